"""Linear probing (Fig. 3, Tab. 4, Sec. 4.4): how well one linear layer tells classes from frozen features.

The head is that of MAE and REPA, batch normalisation without parameters and a linear layer, trained by SGD on features
that are computed once. A logistic regression of scikit-learn on the same features is the check. Hyper-parameters are
chosen on a part of the training images; the head is then trained again on all of them, and only that one sees the
validation images.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.config import at_least
from softvq_lib.evaluation.statistics import Estimate, share_interval

# What is chosen from; of equally good ones the first.
SETTINGS = tuple(itertools.product((0.003, 0.03, 0.3), (0.1, 0.01, 0.0)))  # (lr, weight decay)
CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of scikit-learn's penalty
HELD_OUT = 0.2  # share of the training images of each class that the choice is made on
_MOMENTUM = 0.9
_EPSILON = 1e-6  # MAE's


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        accuracy: Share of the validation images whose class the head names, with Wilson's interval.
        logistic: The same of the logistic regression.
        macro: Mean of the classes' accuracies under the head.
        images: Training images.
        classes: Number of classes.
        width: Features f of an image.
        lr: Chosen for the head.
        weight_decay: Chosen for the head.
        c: Chosen for the logistic regression.
    """

    accuracy: Estimate
    logistic: Estimate
    macro: float
    images: int
    classes: int
    width: int
    lr: float
    weight_decay: float
    c: float


class LinearProbe(nn.Module):
    """Batch normalisation without parameters, then a linear layer: features (b, f) to scores (b, classes).

    The problem is convex, so the weights start at 0.
    """

    def __init__(self, norm: nn.BatchNorm1d, classes: int):
        super().__init__()
        self.norm = norm
        self.head = nn.utils.skip_init(nn.Linear, norm.num_features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, f) to scores (b, classes), before the softmax."""
        return self.head(self.norm(x))


def train_probes(
    features: Tensor,
    labels: Tensor,
    classes: int,
    settings: Sequence[tuple[float, float]],
    *,
    epochs: int = 30,
    batch_size: int = 128,
    seed: int = 0,
) -> list[LinearProbe]:
    """Train one probe for each setting, all on the same batches, by SGD with momentum under a cosine schedule.

    Args:
        features: (n, f), on the device to train on.
        labels: (n,), from 0 to classes - 1.
        classes: Number of classes.
        settings: (lr, weight decay) pairs; the bias is not decayed.
        epochs: Passes over the features.
        batch_size: Images in a step; what is left over at the end of a pass rests.
        seed: Of the order.

    Returns:
        Probes in evaluation mode.

    Raises:
        ValueError: for epochs below 1, or fewer than two images in a batch.
    """
    at_least("epochs", epochs, 1)
    at_least("batch_size", min(batch_size, len(features)), 2)
    # The features stand still, so the plain average over all batches is their best estimate, not a moving one.
    norm = nn.BatchNorm1d(features.shape[1], eps=_EPSILON, momentum=None, affine=False)
    probes = nn.ModuleList(LinearProbe(norm, classes) for _ in settings).to(features.device)
    groups = []
    for probe, (lr, decay) in zip(probes, settings, strict=True):
        groups.append({"params": [probe.head.weight], "lr": lr, "weight_decay": decay})
        groups.append({"params": [probe.head.bias], "lr": lr, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM)
    batch_size = min(batch_size, len(features))
    steps = len(features) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    draws = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(features), generator=draws)[: steps * batch_size]
            for rows in order.to(features.device).split(batch_size):
                x, y = norm(features[rows]), labels[rows]
                # One sum for all: no head has a part in another's gradient, even where its rate is too high.
                loss = sum(F.cross_entropy(probe.head(x), y) for probe in probes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return list(probes.eval().requires_grad_(False))


def probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    name: str = "features",
    epochs: int = 30,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probed:
    """Choose hyper-parameters on a part of the training images, train on all of them, measure on the validation images.

    Args:
        train: Features (n, f) and labels (n,), any integers from 0.
        validation: Features (m, f) and labels (m,) of other images.
        name: Of the features, for messages.
        epochs: As in `train_probes`.
        batch_size: As in `train_probes`.
        seed: Of the part that the choice is made on, and of the order of training.
        device: Where the head is trained; the logistic regression runs on the processor.

    Raises:
        ValueError: for images without labels, a single class, classes that only one of both has, too few images to
            choose on, or features that are not finite or of another shape.
    """
    _check(train, validation, name)
    known, labels = train[1].unique(return_inverse=True)
    answers = torch.searchsorted(known, validation[1])
    part = _split(labels.numpy(), seed)
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    mean, scale = centring(train[0])
    x, y = ((train[0] - mean) / scale).to(device), labels.to(device)
    final, chosen = choose_probe(x, y, len(known), **options)
    right = _right(final, ((validation[0] - mean) / scale).to(device), answers.to(device)).cpu()
    c, check = _logistic((train[0].numpy(), labels.numpy()), (validation[0].numpy(), answers.numpy()), part)
    by_class = [right[answers == label].float().mean().item() for label in range(len(known))]
    return Probed(
        accuracy=share_interval(int(right.sum()), len(right)),
        logistic=share_interval(int(check.sum()), len(check)),
        macro=float(np.mean(by_class)),
        images=len(labels),
        classes=len(known),
        width=x.shape[1],
        lr=chosen[0],
        weight_decay=chosen[1],
        c=c,
    )


def choose_probe(
    x: Tensor, y: Tensor, classes: int, *, epochs: int = 30, batch_size: int = 128, seed: int = 0
) -> tuple[LinearProbe, tuple[float, float]]:
    """Choose from `SETTINGS` on a fifth of the images (n, f), with labels (n,) from 0, and train on all of them.

    Returns:
        The probe and its (lr, weight decay).

    Raises:
        ValueError: for too few images to choose on.
    """
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    fitted, held_out = (torch.from_numpy(rows).to(x.device) for rows in _split(y.cpu().numpy(), seed))
    trials = train_probes(x[fitted], y[fitted], classes, SETTINGS, **options)
    scores = [_right(trial, x[held_out], y[held_out]).float().mean().item() for trial in trials]
    chosen = SETTINGS[int(np.argmax(scores))]
    (final,) = train_probes(x, y, classes, [chosen], **options)
    return final, chosen


def centring(train: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mean (f,) and one scale () that bring features (n, f) to size one.

    So the epsilon of the normalisation is small beside them: an untrained tokenizer's hardly differ between images, but
    a linear layer reads them all the same.
    """
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    return mean, scale if scale else torch.ones_like(scale)


def _right(trained: LinearProbe, x: Tensor, y: Tensor) -> Tensor:
    return trained(x).argmax(1) == y


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which training images the trials are fitted on, and on which the choice is made: a fifth of each class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    members = [order[labels[order] == label] for label in range(labels.max() + 1)]
    counts = [round(HELD_OUT * len(rows)) for rows in members]
    if not any(counts):
        raise ValueError(
            f"{len(labels)} training images of {len(members)} classes are too few to choose hyper-parameters on: give "
            "three or more of a class."
        )
    cut = list(zip(members, counts, strict=True))
    return np.concatenate([rows[count:] for rows, count in cut]), np.concatenate([rows[:count] for rows, count in cut])


def _logistic(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    part: tuple[np.ndarray, np.ndarray],
) -> tuple[float, np.ndarray]:
    """Return the chosen C, and which validation images the regression fitted to all training images gets right."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=200))
    search = GridSearchCV(pipeline, {"logisticregression__C": CS}, cv=[part], n_jobs=1)
    with warnings.catch_warnings():
        # A weak penalty on many features is far from its minimum then, which is a regularisation of its own.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(*train)
    return search.best_params_["logisticregression__C"], search.predict(validation[0]) == validation[1]


def _check(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], name: str) -> None:
    for problem in _problems(train, validation):
        raise ValueError(f"{name}: {problem}")


def _problems(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> Iterator[str]:
    for split, (x, y) in (("training", train), ("validation", validation)):
        if x.ndim != 2 or y.shape != x.shape[:1]:
            yield f"{split} features {tuple(x.shape)} with labels {tuple(y.shape)}: give (n, f) and (n,)."
        if not len(x):
            yield f"there are no {split} images."
        if (y < 0).any():
            yield f"{int((y < 0).sum())} of {len(y)} {split} images have no label, without which there is no probing."
        if broken := (~x.isfinite().all(1)).nonzero().flatten().tolist():
            yield (
                f"the features of {len(broken)} of {len(x)} {split} images are NaN or infinite, the first at row "
                f"{broken[0]}: look at this image and at the model's weights."
            )
    if train[0].shape[1] != validation[0].shape[1]:
        yield f"{train[0].shape[1]} features of training images, {validation[0].shape[1]} of validation images."
    here, there = (set(y.unique().tolist()) for _, y in (train, validation))
    if len(here) < 2:
        yield f"all training images are of class {here.pop()}: a probe needs two classes or more."
    for more, less, a, b in ((here, there, "training", "validation"), (there, here, "validation", "training")):
        if missing := sorted(more - less):
            named = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            yield (
                f"{len(missing)} classes of the {a} images ({named}) have no {b} images: give splits with the same "
                "classes, or more images of them."
            )
