"""The judge of classes: it learns classes that features tell apart, says what it cannot know, and is kept."""

from dataclasses import replace

import pytest
import torch

from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.evaluate import EvaluateConfig
from softvq_lib.evaluation.class_judge import class_judge


class Colour:
    """Stands for an extractor: mean of each channel, so that classes of colour are told apart and others are not."""

    label, identity = "Colour", {"extractor": "Colour", "weights": "none", "preparation": "none"}

    def __init__(self):
        self.calls = 0

    def to(self, device):
        return self

    def __call__(self, images):
        self.calls += 1
        return images.float().mean((2, 3)), None


@pytest.fixture
def coloured(tmp_path):
    """A data set of red and blue pictures, with some noise."""
    from PIL import Image

    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(40):
            shade = tuple(min(255, value + number % 20) for value in colour)
            Image.new("RGB", (8, 8), shade).save(folder / f"{number}.png")
    return open_dataset(DataConfig(dataset=str(tmp_path / "pictures")), 8)


def test_it_learns_what_features_tell_apart_and_counts_by_hand(coloured, tmp_path):
    judge = class_judge(coloured, Colour(), 60, 8, tmp_path / "judges")
    blue, red = (coloured.classes.index(name) for name in ("blue", "red"))
    features = torch.tensor([[210.0, 25, 25], [205, 30, 30], [25, 25, 210], [30, 30, 205]])
    judge.see(features[:2], torch.tensor([red, red]))
    judge.see(features[2:], torch.tensor([blue, red]))  # the last is meant to be red, and is not
    found = judge.agreement()
    assert (found.value, found.n) == (0.75, 4) and found.low < 0.75 < found.high
    judge.see(features[:1], torch.tensor([red]))
    assert judge.agreement().n == 1  # counted anew


def test_it_is_trained_once_for_images_and_extractor(coloured, tmp_path):
    first, second = Colour(), Colour()
    a = class_judge(coloured, first, 60, 8, tmp_path / "judges")
    b = class_judge(coloured, second, 60, 8, tmp_path / "judges")
    assert first.calls > 0 and second.calls == 0
    x = torch.rand(50, 3) * 255
    for judge in (a, b):
        judge.see(x, torch.zeros(50, dtype=torch.long))
    assert a.agreement() == b.agreement()
    class_judge(coloured, second, 50, 8, tmp_path / "judges")
    assert second.calls > 0  # fewer images are another judge


def test_data_without_labels_and_too_few_images_are_refused(coloured, tmp_path):
    with pytest.raises(ValueError, match="judge=9 is not allowed"):
        class_judge(coloured, Colour(), 9, 8, tmp_path)
    with pytest.raises(ValueError, match="judge=60 needs labels"):
        class_judge(replace(coloured, classes=None), Colour(), 60, 8, tmp_path)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="judge=-1"):
        EvaluateConfig(judge=-1)
    with pytest.raises(ValueError, match="guided=-1"):
        EvaluateConfig(guided=-1.0)
