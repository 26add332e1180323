"""Judge generated digits: is each of its class, are all kinds of digits there, and are they new.

A small classifier trained on real digits says of which class an image is, and its features are the space of precision
and recall (Kynkäänniemi et al. 2019). Distances between images are root mean squares over pixels in [-1, 1].
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.config import at_least, fingerprint
from softvq_lib.data.digits import CLASSES, SIDE, DigitsSource, digits_identity
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.draws import uniform
from softvq_lib.evaluation.statistics import share_interval
from softvq_lib.training.files import write_whole

Share = tuple[float, float, float]  # a share of n cases, with the low and high of its 95 % Wilson interval

_NEIGHBOUR = 3  # of precision and recall
_COPY = 0.01  # share of held-out images that lie as near to the training images as what is called a copy
_BATCH = 64
_SHIFT = 2  # pixels that training moves a digit by at most


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers on grey 32 x 32 pictures.

    Attributes:
        held_out: Share of the held-out real digits that it knows.
    """

    held_out: Share

    def __init__(self):
        super().__init__()

        def convolution(channels: int, out: int, size: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
            return [layer, nn.BatchNorm2d(out), nn.ReLU()]

        self.trunk = nn.Sequential(
            *convolution(1, 16, 5, 2),
            *convolution(16, 32, 3, 1),
            nn.MaxPool2d(2),
            *convolution(32, 64, 3, 1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 8) ** 2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Map images (b, 3, height, width) in [-1, 1] of any size to features (b, 64)."""
        grey = images.mean(1, keepdim=True)
        if grey.shape[-2:] != (SIDE, SIDE):
            grey = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.trunk(grey)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, height, width) in [-1, 1] to scores of the classes, (b, 10)."""
        return self.head(self.features(images))


def real_digits(split: str, image_size: int = SIDE) -> tuple[Tensor, Tensor]:
    """Return the digits of a split, `train` or `validation`: images (n, 3, height, width) in [-1, 1], labels (n,)."""
    source = DigitsSource(split)
    pixels = np.stack([fit(source[index][0], image_size) for index in range(len(source))])
    return to_tensor(torch.from_numpy(pixels)), torch.from_numpy(source.labels)


@cache
def digit_classifier(seed: int = 0, *, folder: str | Path | None = None, epochs: int = 12) -> DigitClassifier:
    """Train the classifier on the 4,000 training digits, about 12 seconds on one core.

    It knows more than 98 % of the held-out digits; `held_out` says how many, with an interval.

    Args:
        seed: Of its first weights, of the order of the digits and their shifts. The same gives the same classifier on
            the same machine.
        folder: Where it is kept, and found again by the next process. None: in memory alone.
        epochs: Passes over the training digits.

    Returns:
        A classifier in evaluation mode whose parameters need no gradient.
    """
    at_least("epochs", epochs, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    name = fingerprint({"data": digits_identity(), "seed": seed, "epochs": epochs, "network": str(model), "rule": 1})
    path = None if folder is None else Path(folder).expanduser() / f"digit-classifier-{name[:12]}.safetensors"
    if path is not None and path.exists():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    else:
        _train(model, seed, epochs)
        if path is not None:
            from safetensors.torch import save_file

            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda part: save_file(model.state_dict(), part))
    model.eval().requires_grad_(False)
    images, labels = real_digits("validation")
    model.held_out = _share(model(images).argmax(1) == labels)
    return model


def _train(model: DigitClassifier, seed: int, epochs: int) -> None:
    images, labels = real_digits("train")
    draws = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=draws)
            for rows in order[: len(images) // _BATCH * _BATCH].split(_BATCH):
                scores = model(_shifted(images[rows], draws))
                loss = F.cross_entropy(scores, labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def _shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """Move each image by up to two pixels either way, black coming in."""
    b, side = len(images), 2 * _SHIFT + 1
    padded = F.pad(images, (_SHIFT,) * 4, value=-1.0)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # (b, 3, side, side, h, w)
    down, right = (uniform((2, b), draws, images) * side).long()
    return windows[torch.arange(b), :, down, right]  # (b, 3, h, w)


@torch.no_grad()
def judge(
    images: Tensor,
    labels: Tensor,
    classifier: DigitClassifier,
    train_images: Tensor,
    held_out: tuple[Tensor, Tensor],
) -> dict[str, float | Share | list[float]]:
    """Compare generated digits with real ones.

    Recall grows with the number of images, so take as many as are held out (1,000). A decoder smooths its images, which
    brings them nearer to all others and away from the originals in the features: to judge a generator apart from its
    tokenizer, give training and held-out images that were encoded and decoded.

    Args:
        images: Generated, (b, 3, height, width) in [-1, 1].
        labels: The classes that they were asked for, (b,); at least two of each.
        classifier: From `digit_classifier`.
        train_images: What the generator was trained on, (n, 3, height, width).
        held_out: Real images (m, 3, height, width) that it has not seen, and their labels (m,).

    Returns:
        class_agreement: Share of images that the classifier finds to be of their class.
        class_agreement_per_class: The same for each class.
        precision: Share of images that lie among held-out ones (within the distance of one to its third neighbour).
        recall: Share of held-out images that lie among generated ones.
        real_precision, real_recall: The same for as many training images, what a perfect generator would have.
        nearer_than_held_out: How probably an image is nearer to its nearest training image than a held-out image to
            its own; 0.5 where nothing is copied.
        copied: Share of images nearer to a training image than 99 % of the held-out images are; 0.01 where nothing is
            copied.
        diversity: Mean distance between images of one class, over that between held-out ones; 1 where they vary as
            much, 0 where all are equal.
        diversity_per_class: The same for each class.

        Shares are (value, low, high) with a 95 % Wilson interval.

    Raises:
        ValueError: for images of different sizes or not finite, labels that do not fit, or fewer than two images of a
            class.
    """
    real, real_labels = held_out
    _check(images, labels, train_images, real, real_labels)
    agree = _in_parts(classifier, images).argmax(1) == labels
    groups = range(len(CLASSES))
    features, train_features, real_features = (
        _in_parts(classifier.features, x).double() for x in (images, train_images, real)
    )
    precision, recall = _precision_recall(features, real_features)
    as_many = train_features[:: max(1, len(train_features) // len(images))][: len(images)]
    real_precision, real_recall = _precision_recall(as_many, real_features)
    near, real_near = (nearest(x, train_images)[0] for x in (images, real))
    spread = [_spread(images[labels == c]) / _spread(real[real_labels == c]) for c in groups]
    return {
        "class_agreement": _share(agree),
        "class_agreement_per_class": [float(agree[labels == c].float().mean()) for c in groups],
        "precision": precision,
        "recall": recall,
        "real_precision": real_precision,
        "real_recall": real_recall,
        "nearer_than_held_out": _probability_below(near, real_near),
        "copied": _share(near < real_near.quantile(_COPY)),
        "diversity": float(np.mean(spread)),
        "diversity_per_class": spread,
    }


@torch.no_grad()
def nearest(images: Tensor, train_images: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image the distance to the nearest training image and its number, (b,) both.

    Images are (b, 3, height, width) in [-1, 1], training images (n, 3, height, width); the distance is the root mean
    square over the pixels, in their unit.
    """
    flat, train = images.flatten(1), train_images.flatten(1)
    number = torch.cat([torch.cdist(part, train).argmin(1) for part in flat.split(1024)])
    # Again and exactly: cdist's matrix product would leave copies at a distance above 0.
    return (flat - train[number]).square().mean(1).sqrt(), number


def _check(images: Tensor, labels: Tensor, train_images: Tensor, real: Tensor, real_labels: Tensor) -> None:
    for name, x, y in (("generated", images, labels), ("held-out", real, real_labels)):
        if len(x) != len(y):
            raise ValueError(f"{len(y)} labels for {len(x)} {name} images: give one an image.")
        counts = torch.bincount(y[(y >= 0) & (y < len(CLASSES))], minlength=len(CLASSES))
        if counts.sum() < len(y) or counts.min() < 2:
            raise ValueError(
                f"{name} images of each class: {counts.tolist()}, {len(y) - int(counts.sum())} of no class: give two "
                f"or more of each, with labels 0 to {len(CLASSES) - 1}."
            )
    for name, x in (("training", train_images), ("held-out", real)):
        if x.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{name} images of shape {tuple(x.shape[1:])} beside generated ones of {tuple(images.shape[1:])}: give "
                "all in one size."
            )
    broken = int((~images.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(images)} generated images are not finite: sample them anew.")


def _share(cases: Tensor) -> Share:
    return share_interval(int(cases.sum()), len(cases)).triple


def _in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(500)])


# torch-fidelity's are of files of images and its own extractors; these are of any features, with intervals.
def _precision_recall(features: Tensor, real: Tensor) -> tuple[Share, Share]:
    """Return the shares of `features` (b, c) among `real` (m, c), and of `real` among `features`."""
    between = torch.cdist(features, real)  # (b, m)

    def radius(x: Tensor) -> Tensor:  # to the third neighbour, the point itself left out
        return torch.cdist(x, x).kthvalue(_NEIGHBOUR + 1).values

    return _share((between <= radius(real)).any(1)), _share((between <= radius(features)[:, None]).any(0))


def _spread(images: Tensor) -> float:
    """Return the mean distance between two of the images (b, 3, height, width)."""
    return float(torch.pdist(images.flatten(1).double()).mean() / images[0].numel() ** 0.5)


def _probability_below(a: Tensor, b: Tensor) -> float:
    """Return the probability that one of a (n,) is below one of b (m,), equal ones counting half."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(b.numpy(), a.numpy()).statistic / (len(a) * len(b)))
