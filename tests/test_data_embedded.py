"""The embedded data sets: digits split evenly and for ever, shapes drawn from their number with known factors."""

import numpy as np
import pytest

from softvq_lib.data import DataConfig, mixed, open_dataset, photographs
from softvq_lib.data.digits import DigitsSource, load_digits, split_rows
from softvq_lib.data.shapes import CLASSES, PALETTE, TEXTURES, ShapesSource, draw, draw_factors
from softvq_lib.data.source import fixed_order

# Mean colours of the first training pictures at 32 pixels.
SHAPE_MEANS = [[117.6, 86.3, 145.2], [64.3, 142.8, 150.5], [105.6, 93.6, 146.2], [146.5, 107.3, 99.1]]
WINDOWS = [("flower", (154, 158, 304, 308)), ("flower", (387, 244, 565, 422))]


def test_digits_split_is_stratified_and_disjoint():
    _, labels = load_digits()
    rows = split_rows(labels)
    assert len(rows["train"]) == 4000 and len(rows["validation"]) == 1000
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(5000))
    assert np.bincount(labels[rows["validation"]]).tolist() == [100] * 10
    assert np.bincount(labels[rows["train"]]).tolist() == [400] * 10


def test_digits_are_32_pixels_with_a_black_border():
    source = DigitsSource("train")
    image, label = source[0]
    pixels = np.asarray(image)
    assert image.mode == "RGB" and pixels.shape == (32, 32, 3) and 0 <= label <= 9
    inner = pixels[2:-2, 2:-2]
    assert inner.max() > 200 and pixels.sum() == inner.sum()
    assert all(source[i][1] == source.labels[i] for i in range(20))


def test_digits_limit_keeps_the_first_of_the_order():
    few, all_ = DigitsSource("train", limit=50), DigitsSource("train")
    assert len(few) == 50 and np.array_equal(few.labels, all_.labels[:50])
    assert len(set(few.labels.tolist())) == 10


def test_the_fixed_order_is_a_permutation_that_never_changes():
    order = fixed_order(1000, salt=1)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, fixed_order(1000, salt=2))
    assert fixed_order(8, salt=1).tolist() == [5, 6, 3, 1, 4, 0, 2, 7]
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_a_shape_is_a_function_of_its_number():
    first, second = ShapesSource("train", 48), ShapesSource("train", 48)
    second[3]
    for index in (0, 7, 49_999):
        assert np.array_equal(np.asarray(first[index][0]), np.asarray(second[index][0]))
    validation = ShapesSource("validation", 48)
    assert not np.array_equal(np.asarray(first[0][0]), np.asarray(validation[0][0]))
    assert (len(first), len(validation)) == (50_000, 2_000)


def test_shape_factors_match_the_label_and_are_varied():
    source = ShapesSource("train", 16)
    factors = [source.factors(i) for i in range(400)]
    assert all(CLASSES.index(f["shape"]) == source[i][1] for i, f in enumerate(factors))
    assert {f["shape"] for f in factors} == set(CLASSES)
    assert {f["texture"] for f in factors} == {f["background_texture"] for f in factors} == set(TEXTURES)
    assert {f["colour"] for f in factors} == {f["background"] for f in factors} == set(PALETTE)
    for f in factors:
        assert len({f["colour"], f["accent"], f["background"], f["background_accent"]}) == 4
        assert abs(f["x"]) + f["size"] <= 1 and abs(f["y"]) + f["size"] <= 1


@pytest.mark.parametrize("shape", CLASSES)
def test_each_shape_lies_where_its_factors_say(shape):
    factors = draw_factors("train", 0) | {
        "shape": shape, "colour": "red", "accent": "red", "background": "white", "background_accent": "white",
        "texture": "plain", "background_texture": "plain", "x": 0.25, "y": -0.25, "size": 0.5, "shade": 1.0,
    }  # fmt: skip
    red = draw(factors, 64)[..., 1] < 150
    rows, columns = np.nonzero(red)
    assert 200 < red.sum() < 0.9 * 32 * 32
    # The picture spans 2 units: the circle of radius 0.5 about (0.25, -0.25) is columns 24-56 and rows 8-40.
    assert (columns >= 24 - 1).all() and (columns <= 56).all()
    assert (rows >= 8 - 1).all() and (rows <= 40).all()
    others = [draw(factors | {"shape": other}, 64) for other in CLASSES if other != shape]
    assert all((np.abs(draw(factors, 64).astype(int) - other) > 60).any(-1).sum() > 60 for other in others)


@pytest.mark.parametrize("size", [1, 7, 32, 200])
def test_shapes_have_any_size(size):
    image, _ = ShapesSource("train", size)[5]
    assert image.size == (size, size) and image.mode == "RGB"


def test_a_shape_looks_the_same_at_every_size():
    for index in range(6):
        small, _ = ShapesSource("train", 64)[index]
        large, _ = ShapesSource("train", 256)[index]
        difference = np.asarray(small).astype(float) - np.asarray(large.reduce(4))
        assert np.abs(difference).mean() < 4


def test_embedded_data_sets_open_by_name():
    digits, shapes = (open_dataset(DataConfig(name), 32) for name in ("digits", "shapes"))
    assert digits.describe().startswith("digits: 4,000 training and 1,000 validation images, 10 classes (0, 1,")
    assert shapes.classes == CLASSES and digits.fingerprint != shapes.fingerprint
    assert open_dataset(DataConfig(), 64).fingerprint == digits.fingerprint
    assert open_dataset(DataConfig(limit=10), 32).fingerprint != digits.fingerprint


def test_embedded_data_sets_never_change():
    """Where this fails on purpose, the split rule or the version of the shapes must be raised with it."""
    assert open_dataset(DataConfig("digits"), 32).fingerprint[:16] == "c89d6c58a09c8a79"
    assert open_dataset(DataConfig("shapes"), 32).fingerprint[:16] == "fac84d39dfdc5954"
    source = ShapesSource("train", 32)
    means = [np.asarray(source[i][0]).mean((0, 1)).tolist() for i in range(4)]
    assert means == [pytest.approx(mean, abs=0.5) for mean in SHAPE_MEANS]
    windows = [photographs.window(split, 0) for split in ("train", "validation")]
    assert windows == WINDOWS


@pytest.mark.parametrize("index", [-1, 10])
def test_there_is_nothing_outside_the_range(index):
    for source in (DigitsSource("train", limit=10), ShapesSource("train", 8, limit=10)):
        with pytest.raises(IndexError):
            source[index]


def test_any_prefix_of_the_held_out_digits_is_mixed():
    labels = DigitsSource("validation").labels
    counts = np.bincount(labels[:200], minlength=10)
    assert counts.min() >= 8 and counts.max() <= 35


def test_windows_of_photographs_are_held_out_by_place():
    for split in ("train", "validation"):
        for index in range(200):
            name, (left, top, right, bottom) = photographs.window(split, index)
            width, height = photographs.load_photograph(name).size
            edge = round(photographs.TRAINED_SHARE[name] * width)
            assert 0 <= top < bottom <= height and right - left == bottom - top >= photographs.SMALLEST
            assert (left >= 0 and right <= edge) if split == "train" else (edge <= left and right <= width)


def test_photographs_are_windows_of_every_size():
    data = open_dataset(DataConfig("photographs"), 24)
    assert (len(data.train), len(data.validation)) == (12_000, 1_000) and data.classes == ["china", "flower", "hopper"]
    image, label = data.validation[3]
    name, box = photographs.window("validation", 3)
    assert image.size == (24, 24) and image.mode == "RGB" and data.classes[label] == name
    whole = np.asarray(photographs.load_photograph(name).crop(box)).mean((0, 1))
    assert np.asarray(image).mean((0, 1)) == pytest.approx(whole, abs=4)
    sides = [photographs.window("train", i)[1] for i in range(300)]
    assert max(right - left for left, _, right, _ in sides) > 3 * min(right - left for left, _, right, _ in sides)


def test_mixed_takes_the_three_in_turns():
    data = open_dataset(DataConfig("mixed"), 32)
    assert data.describe().startswith("mixed: 12,000 training and 3,000 validation images, 3 classes (digit, shape, ph")
    parts = [open_dataset(DataConfig(name), 32).validation for name in ("digits", "shapes", "photographs")]
    for index in (0, 1, 2, 3, 2_999):
        image, label = data.validation[index]
        assert label == index % 3
        assert np.array_equal(np.asarray(image), np.asarray(parts[label][index // 3][0]))
    assert len(open_dataset(DataConfig("mixed", limit=10), 32).train) == 10
    assert data.validation.name(4) == "shape 1" and data.classes == mixed.CLASSES
