"""Class agreement of samples: a linear head on an extractor's features, trained on real images, names their classes.

The same head judges held-out real images, whose agreement is what perfect samples would have. It is trained once for a
set of images and an extractor, and kept.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from softvq_lib.config import at_least, fingerprint
from softvq_lib.data import DataSplits
from softvq_lib.evaluation.extractors import Extractor
from softvq_lib.evaluation.pixels import open_pixels
from softvq_lib.evaluation.probing import LinearProbe, centring, choose_probe
from softvq_lib.evaluation.statistics import Estimate, share_interval
from softvq_lib.training.files import write_whole

log = logging.getLogger(__name__)

EPOCHS = 20


class ClassJudge:
    """Counts whose class is named right, in batches.

    Args:
        probe: The trained head.
        centre: Mean (c,) and scale of the training images' features, see `centring`.
        known: Labels (classes,) that the head's outputs stand for.

    Attributes:
        right: Images whose class was named right since the last `agreement`.
        seen: Images since then.
    """

    def __init__(self, probe: LinearProbe, centre: tuple[Tensor, Tensor], known: Tensor):
        self.probe, self.centre, self.known = probe, centre, known
        self.right = self.seen = 0

    @torch.no_grad()
    def see(self, features: Tensor, labels: Tensor) -> None:
        """Take in features (b, c) of images that are meant to be of the classes `labels` (b,)."""
        mean, scale = self.centre
        named = self.known[self.probe((features - mean) / scale).argmax(1)]
        self.right += int((named == labels).sum())
        self.seen += len(labels)

    def agreement(self) -> Estimate:
        """The share named right since the last call, with Wilson's interval."""
        found = share_interval(self.right, self.seen)
        self.right = self.seen = 0
        return found


def class_judge(
    data: DataSplits, extractor: Extractor, count: int, image_size: int, folder: Path, **options
) -> ClassJudge:
    """Train a judge on the first `count` training images of a data set, or load the one that lies in `folder`.

    Args:
        data: With labels.
        extractor: Whose features the judge is linear in.
        count: Training images, at least 3 of a class.
        image_size: Side of the images in pixels.
        folder: Where judges are kept, one file each.
        options: `batch_size`, `device` and `progress`, as in `image_statistics`.

    Raises:
        ValueError: for data without labels, or too few images.
    """
    from safetensors.torch import load_file, save_file

    at_least("judge", count, 10)
    if data.classes is None:
        raise ValueError(f"judge={count} needs labels, which {data.name} has not: leave judge out.")
    made_of = [data.fingerprint, extractor.identity, count, image_size, EPOCHS]
    path = Path(folder) / f"{extractor.label}-{fingerprint(made_of)[:12]}.safetensors"
    if path.exists():
        state = load_file(path)
        probe = _empty(*reversed(state["probe.head.weight"].shape))
        probe.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("probe.")})
        return ClassJudge(probe.eval(), (state["mean"], state["scale"]), state["known"])
    features, labels = _features(data, extractor, count, image_size, **options)
    known, answers = labels.unique(return_inverse=True)
    mean, scale = centring(features)
    probe, setting = choose_probe((features - mean) / scale, answers, len(known), epochs=EPOCHS)
    log.info("class judge: %d images of %d classes, lr %g, weight decay %g", len(labels), len(known), *setting)
    state = {f"probe.{name}": value for name, value in probe.state_dict().items()}
    state |= {"mean": mean, "scale": scale, "known": known}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: save_file(state, part))
    return ClassJudge(probe, (mean, scale), known)


def _empty(width: int, classes: int) -> LinearProbe:
    return LinearProbe(nn.BatchNorm1d(width, affine=False), classes)


def _features(
    data: DataSplits,
    extractor: Extractor,
    count: int,
    image_size: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    from tqdm import tqdm

    workers = 0 if torch.device(device).type == "cpu" else None
    pixels = open_pixels(data.train, image_size=image_size, what=f"{data.name}, train", workers=workers)
    extractor.to(device)
    features, labels = [], []
    with tqdm(total=min(count, pixels.count), unit="image", desc="class judge", disable=not progress) as bar:
        for images, their in pixels.batches(batch_size):
            features.append(extractor(images)[0])
            labels.append(their)
            bar.update(len(images))
            if sum(map(len, labels)) >= count:
                break
    return torch.cat(features)[:count], torch.cat(labels)[:count]
