"""Fidelity of images to reference images (Sec. 4.1, Evaluation): FID, KID, IS, precision and recall, with intervals.

The names FID, rFID, gFID, KID and IS are for Inception features alone; in other features they are FD-EffLite0,
KID-EffLite0 and so on. Each number stands beside its floor, what two halves of the reference have among themselves.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import one_of
from softvq_lib.data.source import fixed_order
from softvq_lib.evaluation.frechet import GROUPS, PROJECTIONS, grouped_distance, projection, split_half
from softvq_lib.evaluation.generated import _precision_recall
from softvq_lib.evaluation.kid import LEAST as KID_LEAST
from softvq_lib.evaluation.kid import kernel_distance
from softvq_lib.evaluation.pixels import AS_GIVEN, STORED, Images, Pixels, npz_names, open_pixels
from softvq_lib.evaluation.reference import (
    KEPT,
    Statistics,
    extractor_of,
    image_statistics,
    load_statistics,
    read_moments,
)

if TYPE_CHECKING:
    from softvq_lib.evaluation.extractors import Extractor

INCEPTION = "Inception"  # label of the extractor that FID is defined with
MEASURES = ("frechet", "projected", "kid", "precision", "recall", "score")
FOR_FEW = ("projected", "kid", "precision", "recall")  # that need few images
KINDS = ("", "r", "g")
PROJECTION = "proj64-v1"
ENOUGH = 20  # images a dimension, from which on a Fréchet distance says more than its floor


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: As in tables, such as `FID` or `FD-EffLite0`.
        value: The number. Fréchet distances and KID: lower is better; precision, recall, score: higher.
        low, high: Of its 95 % interval; None where there is none.
        interval: How the interval was made; "" where there is none.
        n: Images that were judged.
        reference_n: Images of the reference; None where its file does not tell.
        floor: The same of two random halves of the reference, n/2 against n/2; of the score, that of the reference.
            None where the reference is mean and covariance alone, or has no score.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    interval: str
    n: int
    reference_n: int | None
    floor: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        floor = "no floor" if self.floor is None else f"floor {self.floor:.4g}"
        against = "a reference of unknown number" if self.reference_n is None else f"{self.reference_n:,}"
        return f"{self.name} {self.value:.4g}{interval}, {floor}, n = {self.n:,} against {against}"


@dataclass(frozen=True)
class Fidelity:
    """What `fidelity` measured.

    Attributes:
        measures: By name, in the order of a table.
        facts: Of the images, flat and JSON-able: `extractor`, `extractor_weights` (sha256), `preparation`,
            `image_size`, `uint8` and `reference_uint8` (convention, or `stored`), `crop`, `reference_crop`,
            `fingerprint` and `reference_fingerprint` (sha256 of the bytes of all images).
        decides: Name of the distance to go by: KID below 20 images a dimension, else the Fréchet distance; None where
            neither was asked for.
        notes: Sentences that belong beside the numbers.
    """

    measures: dict[str, Measure]
    facts: dict[str, object]
    decides: str | None
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Measure:
        one_of("measure", name, self.measures)
        return self.measures[name]

    def entries(self) -> list[dict[str, object]]:
        """Return the entries of results rows that a measure fills: metric, value, low, high, interval, n and terms."""
        rows = []
        for each in self.measures.values():
            row = {field.name: getattr(each, field.name) for field in fields(each)}
            terms = {name: row.pop(name) for name in ("floor", "reference_n")}
            rows.append({"metric": row.pop("name"), **row, "terms": terms})
        return rows

    def __str__(self) -> str:
        uint8 = f"uint8 {self.facts['uint8']} against {self.facts['reference_uint8']}"
        crop = f"crop {self.facts['crop']} against {self.facts['reference_crop']}"
        lines = [*map(str, self.measures.values()), f"{self.facts['extractor']}; {uint8}; {crop}", *self.notes]
        return "\n".join(lines)


def fidelity(
    generated: Images | Pixels | Statistics,
    reference: Images | Pixels | Statistics,
    extractor: "str | Extractor" = "efflite0",
    *,
    measures: tuple[str, ...] | None = None,
    kind: str = "",
    image_size: int | None = None,
    convention: str | None = None,
    match_labels: bool = True,
    kept: int = KEPT,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Fidelity:
    """Compare images with a reference.

    Names, for EffLite0 and for Inception: `FD-EffLite0` or `FID`; `FD-EffLite0-inf` or `FID-inf`, extrapolated to an
    infinite number of images; `FD-EffLite0-proj64-v1` or `FID-proj64-v1`, on a fixed projection to 64 dimensions;
    `KID-EffLite0` or `KID`; `precision-EffLite0` or `precision`; `recall-EffLite0` or `recall`; `IS-EffLite0` or `IS`.

    Args:
        generated: Generated or reconstructed images: a tensor (n, 3, height, width), uint8 or float in [-1, 1]; an
            iterable of such batches; a `Source`; the path of a folder of images, of an export, or of an .npz of
            `arr_0`; a `Pixels` of `open_pixels`, which takes labels and crop too; or `Statistics`.
        reference: The same; or the path of a file of `save_statistics`, or of an .npz with `mu` and `sigma` of
            Inception (pytorch-fid, ADM).
        extractor: A name of `extractors.EXTRACTORS`, or an `Extractor`. Nothing to `Statistics`, which have theirs.
        measures: Some of `MEASURES`. None: all, but `projected` where there are so many images that it adds nothing,
            and `score` where the extractor has no classes. With few images, see `FOR_FEW`.
        kind: `g` for generated and `r` for reconstructed images puts that letter before FID or FD.
        image_size: See `open_pixels`.
        convention: See `open_pixels`.
        match_labels: Refuse sides whose sets of labels differ, where both have labels.
        kept: Most images, random ones, of which KID, precision and recall are taken. Memory and time grow with its
            square.
        batch_size: Images that the extractor sees at once.
        device: Where it runs.
        progress: Show a progress bar.

    Raises:
        ValueError: for a Fréchet distance of no more images than dimensions; fewer than ten images; sides of
            different size, crop, conversion to bytes, labels or extractor; images that are not finite; folders
            without images; a reference that lacks what a measure needs. The message says what to do.
    """
    one_of("kind", kind, KINDS)
    for name in measures or ():
        one_of("measures", name, MEASURES)
    made = _opened(generated, image_size, convention, "generated images")
    real = _opened(reference, image_size, convention, "reference images")
    if isinstance(made, Statistics) and made.sample is None:
        raise ValueError(f"{made.facts['what']} is mean and covariance alone: give the images to judge.")
    if isinstance(made, Pixels) or isinstance(real, Pixels):
        extractor = extractor_of(extractor)
    identity, width = (
        (made.facts["extractor"], made.width) if isinstance(made, Statistics) else (extractor.identity, extractor.width)
    )
    if isinstance(real, Statistics) and real.facts["extractor"] is None and identity["extractor"] != INCEPTION:
        raise ValueError(
            f"{real.facts['what']} is mean and covariance of Inception's features, but the extractor is "
            f"{identity['extractor']}: take extractor='inception', or give images."
        )
    # What can be refused is refused before features are extracted, and the rest after.
    names = _names(identity["extractor"], kind)
    _check_pair(_facts(made, identity), _facts(real, identity), match_labels)
    _check_numbers(measures, names, width, made.count, real.count)
    options = {"kept": kept, "batch_size": batch_size, "device": device, "progress": progress}
    if isinstance(made, Pixels):
        made = image_statistics(made, extractor, **options)
    if isinstance(real, Pixels):
        real = _all_of_adm(image_statistics(real, extractor, **options), reference)
    _check_pair(made.facts, real.facts, match_labels)
    _check_numbers(measures, names, made.width, made.count, real.count)
    few = min(made.count, real.count or made.count) < ENOUGH * made.width
    measures = _chosen(measures, made, real, few, names)
    found = _measured(made, real, measures, names)
    decides = names["kid"] if "kid" in measures and (few or "frechet" not in measures) else names["frechet"]
    return Fidelity(
        {each.name: each for each in found},
        _stated(made.facts, real.facts, identity),
        decides if {"kid", "frechet"} & set(measures) else None,
        _notes(made, real, measures, names, few),
    )


def _opened(side: object, image_size: int | None, convention: str | None, what: str) -> Pixels | Statistics:
    if isinstance(side, Statistics | Pixels):
        return side
    path = Path(side).expanduser() if isinstance(side, str | Path) else None
    if path is not None and path.suffix == ".safetensors":
        return load_statistics(path)
    if path is not None and path.suffix == ".npz" and "arr_0" not in npz_names(path):
        return read_moments(path)
    return open_pixels(side, image_size=image_size, convention=convention, what=None if path else what)


def _all_of_adm(real: Statistics, path: object) -> Statistics:
    """Take the moments that ADM's reference files hold beside some images: of all images, in Inception's features."""
    inside = npz_names(Path(path).expanduser()) if str(path).endswith(".npz") else ()
    if real.facts["extractor"]["extractor"] != INCEPTION or "mu" not in inside:
        return real
    return Statistics(real.facts | {"count": None}, read_moments(path).groups, real.sample, real.scores)


def _facts(side: Pixels | Statistics, identity: dict[str, str]) -> dict[str, object]:
    """Return what is known of a side before its features are extracted."""
    if isinstance(side, Statistics):
        return side.facts
    known = {"what": side.what, "image_size": list(side.size), "crop": side.crop, "uint8": side.uint8}
    return known | {"classes": None, "extractor": identity}


# What must agree: the value that says nothing, and what to do.
_AGREE = {
    "image_size": (None, "give both in one size; image_size resizes a data set or a folder."),
    "crop": (AS_GIVEN, "crop both in the same way, which moves rFID as much as another tokenizer does."),
    "uint8": (STORED, "convert both to bytes in the same way."),
    "extractor": (None, "take one extractor for both, and reference statistics of its own."),
}


def _check_pair(made: dict[str, object], real: dict[str, object], match_labels: bool) -> None:
    """Raise unless two sets of images may be compared."""
    for name, (unsaid, remedy) in _AGREE.items():
        if made[name] != real[name] and unsaid not in (made[name], real[name]):
            raise ValueError(
                f"{name} of {made['what']} is {made[name]}, but of {real['what']} it is {real[name]}: {remedy}"
            )
    if match_labels and None not in (made["classes"], real["classes"]):
        ours, theirs = set(made["classes"]), set(real["classes"])
        if ours != theirs:
            raise ValueError(
                f"{made['what']} and {real['what']} are of different classes: {_listed(ours - theirs)} in the first "
                f"alone, {_listed(theirs - ours)} in the second alone. Give images of the same classes, or "
                "match_labels=False."
            )


def _listed(labels: set[int]) -> str:
    some = ", ".join(map(str, sorted(labels)[:5]))
    return f"{len(labels)} ({some}{', ...' if len(labels) > 5 else ''})" if labels else "none"


def _names(label: str, kind: str) -> dict[str, str]:
    """Return the names of all measures in tables."""
    suffix = "" if label == INCEPTION else f"-{label}"
    distance = f"{kind}{'FID' if label == INCEPTION else 'FD'}{suffix}"
    names = {"frechet": distance, "extrapolated": f"{distance}-inf", "projected": f"{distance}-{PROJECTION}"}
    others = {"kid": "KID", "precision": "precision", "recall": "recall", "score": "IS"}
    return names | {key: name + suffix for key, name in others.items()}


def _check_numbers(measures: tuple[str, ...] | None, names: dict[str, str], width: int, *counts: int | None) -> None:
    """Raise unless there are enough images, as far as their numbers are known."""
    least = min((count for count in counts if count is not None), default=None)
    if least is None:
        return
    here = " and ".join("unknown" if count is None else f"{count:,}" for count in counts)
    if least < KID_LEAST:
        raise ValueError(f"{here} images are here (judged and reference): give {KID_LEAST} or more of each.")
    dimensions = {"frechet": width, "projected": PROJECTIONS[PROJECTION]}
    for name in dimensions.keys() & set(measures or ["frechet"]):
        if least <= dimensions[name]:
            few = FOR_FEW if least > dimensions["projected"] else FOR_FEW[1:]
            raise ValueError(
                f"{names[name]} is a distance in {dimensions[name]:,} dimensions and needs {dimensions[name] + 1:,} "
                f"images or more of each; {here} are here (judged and reference). Give more, or ask for "
                f"{names['kid']}, which is right for few: measures={few}."
            )


def _chosen(
    measures: tuple[str, ...] | None, made: Statistics, real: Statistics, few: bool, names: dict[str, str]
) -> set[str]:
    """Return the measures to take: as asked for, or all that can be had; and what a Fréchet distance of few needs."""
    sampled = set() if real.sample is None else {"kid", "precision", "recall"}
    scored = set() if made.scores is None else {"score"}
    chosen = {"frechet"} | sampled | scored if measures is None else set(measures)
    if few and "frechet" in chosen:
        chosen |= sampled & {"kid"}
        chosen |= {"projected"} if made.width > PROJECTIONS[PROJECTION] else set()
    for name in sorted(chosen & {"kid", "precision", "recall"} - sampled):
        raise ValueError(
            f"{names[name]} needs images of the reference, but {real.facts['what']} is mean and covariance alone: give "
            "images, or ask for measures=('frechet',)."
        )
    if "score" in chosen - scored:
        raise ValueError(f"{names['score']} needs an extractor that tells classes: take an efflite, or inception.")
    return chosen


def _measured(made: Statistics, real: Statistics, measures: set[str], names: dict[str, str]) -> list[Measure]:
    found, whole = [], (made.count, real.count)
    how = f"jackknife, {GROUPS} groups" + ("" if len(real.groups) > 1 else " of the judged alone")
    if "frechet" in measures:
        distance, floor = grouped_distance(made.groups, real.groups), split_half(real.groups)
        value = (distance.value, distance.low, distance.high)
        found.append(Measure(names["frechet"], *value, how, *whole, floor and floor.value))
        limit = (distance.extrapolated, distance.extrapolated_low, distance.extrapolated_high)
        found.append(Measure(names["extrapolated"], *limit, how, *whole, floor and floor.extrapolated))
    if "projected" in measures:
        matrix = projection(made.width, PROJECTION)
        ours, theirs = ([group.project(matrix) for group in side.groups] for side in (made, real))
        distance, floor = grouped_distance(ours, theirs), split_half(theirs)
        value = (distance.value, distance.low, distance.high)
        found.append(Measure(names["projected"], *value, how, *whole, floor and floor.value))
    if measures & {"kid", "precision", "recall"}:
        found += _of_samples(made.sample, real.sample, measures, names)
    if "score" in measures:
        value, reach = _mean_of_splits(made.scores)
        floor = None if real.scores is None else _mean_of_splits(real.scores)[0]
        parts = f"t over {len(made.scores)} parts"
        found.append(Measure(names["score"], value, value - reach, value + reach, parts, *whole, floor))
    return found


def _of_samples(ours: Tensor, theirs: Tensor, measures: set[str], names: dict[str, str]) -> list[Measure]:
    """Return KID, precision and recall, as far as asked for, of features (n, c) and of the reference's (m, c)."""
    counts, found = (len(ours), len(theirs)), []
    halves = [theirs[rows] for rows in np.array_split(fixed_order(len(theirs)), 2)]
    if "kid" in measures:
        floor = kernel_distance(*halves)[0] if len(halves[1]) >= KID_LEAST else None
        found.append(Measure(names["kid"], *kernel_distance(ours, theirs), "jackknife", *counts, floor))
    if measures & {"precision", "recall"}:
        values = _precision_recall(ours.double(), theirs.double())
        floors = _precision_recall(*(half.double() for half in halves))
        for name, value, floor in zip(("precision", "recall"), values, floors, strict=True):
            if name in measures:
                found.append(Measure(names[name], *value, "Wilson", *counts, floor[0]))
    return found


def _mean_of_splits(scores: Tensor) -> tuple[float, float]:
    """Return the mean of the scores of parts, and how far its 95 % interval reaches to either side."""
    from scipy.stats import t

    reach = t.ppf(0.975, len(scores) - 1) * scores.std() / len(scores) ** 0.5
    return float(scores.mean()), float(reach)


def _stated(made: dict[str, object], real: dict[str, object], identity: dict[str, str]) -> dict[str, object]:
    stated = {"extractor": identity["extractor"], "extractor_weights": identity["weights"]}
    stated |= {"preparation": identity["preparation"], "image_size": made["image_size"]}
    for name in ("uint8", "crop", "fingerprint"):
        stated |= {name: made[name], f"reference_{name}": real[name]}
    return stated


def _notes(made: Statistics, real: Statistics, measures: set[str], names: dict[str, str], few: bool) -> tuple[str, ...]:
    notes = []
    least = min(made.count, real.count or made.count)
    if few and "frechet" in measures:
        judge = f"{names['kid']} decides" if "kid" in measures else f"{names['extrapolated']} corrects that"
        notes.append(
            f"{least:,} images are fewer than {ENOUGH} for each of {made.width:,} dimensions, so {names['frechet']} "
            f"depends on their number: {judge}."
        )
    if len(real.groups) == 1:
        notes.append("The reference is mean and covariance alone: its own sampling is in no interval.")
    for side in (made, real):
        if side.sample is not None and side.count is not None and len(side.sample) < side.count:
            taken = f"{len(side.sample):,} random ones of the {side.count:,} {side.facts['what']}"
            notes.append(f"KID, precision and recall are of {taken}.")
    return tuple(notes)
