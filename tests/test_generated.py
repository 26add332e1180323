"""Judging generated digits: the classifier, and what each measure says of real, copied, averaged and wrong images."""

import numpy as np
import pytest
import torch

from softvq_lib.evaluation.generated import DigitClassifier, digit_classifier, judge, nearest, real_digits


@pytest.fixture(scope="module")
def classifier():
    """Trained for a sixth of the time."""
    return digit_classifier(epochs=2)


@pytest.fixture(scope="module")
def digits():
    """400 fresh digits with their labels, 1,600 to train on, 400 held out."""
    (images, labels), (real, real_labels) = real_digits("train"), real_digits("validation")
    assert images.shape == (4000, 3, 32, 32) and real.shape == (1000, 3, 32, 32)
    assert images.min() == -1 and images.max() == 1
    return images[:400], labels[:400], images[400:2000], (real[:400], real_labels[:400])


def test_the_classifier_knows_digits_it_has_not_seen(classifier):
    images, labels = real_digits("validation")
    right = (classifier(images).argmax(1) == labels).float().mean().item()
    value, low, high = classifier.held_out
    assert value == pytest.approx(right) and value > 0.95 and low < value < high < low + 0.04
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())
    larger = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic")
    assert (classifier(larger).argmax(1) == labels).float().mean() > value - 0.02


def test_the_classifier_is_trained_once_and_the_same_each_time(tmp_path):
    state = torch.get_rng_state()
    first = digit_classifier(1, folder=tmp_path / "a", epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    (path,) = (tmp_path / "a").iterdir()
    written = path.stat().st_mtime_ns
    digit_classifier.cache_clear()  # as in another process
    again = digit_classifier(1, folder=tmp_path / "a", epochs=1)
    assert again is not first and path.stat().st_mtime_ns == written and again.held_out == first.held_out
    anew = digit_classifier(1, folder=tmp_path / "b", epochs=1)
    for model in (again, anew):
        assert all(torch.equal(x, first.state_dict()[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="epochs=0"):
        digit_classifier(epochs=0)


def test_real_digits_in_another_size():
    images, labels = real_digits("validation", 16)
    assert images.shape == (1000, 3, 16, 16) and labels.bincount().tolist() == [100] * 10


def test_fresh_real_digits_are_as_good_as_real(classifier, digits):
    found = judge(*digits[:2], classifier, *digits[2:])
    agreement, low, high = found["class_agreement"]
    assert agreement > 0.95 and low < agreement < high <= 1 and len(found["class_agreement_per_class"]) == 10
    for name in ("precision", "recall"):
        value, low, high = found[name]
        assert value > 0.7 and low <= found[f"real_{name}"][2] and found[f"real_{name}"][1] <= high
    assert abs(found["nearer_than_held_out"] - 0.5) < 0.06 and found["copied"][1] < 0.01
    assert abs(found["diversity"] - 1) < 0.05 and np.mean(found["diversity_per_class"]) == found["diversity"]


def test_copies_are_seen(classifier, digits):
    _, _, train, held_out = digits
    _, labels = real_digits("train")
    found = judge(train[:400] + 0.01, labels[400:800], classifier, train, held_out)
    assert found["nearer_than_held_out"] == 1 and found["copied"][0] == 1 and found["recall"][0] > 0.7


def test_a_collapse_is_seen(classifier, digits):
    images, labels, train, held_out = digits
    one = torch.stack([images[labels == digit][0] for digit in range(10)])
    found = judge(one.repeat(40, 1, 1, 1), torch.arange(10).repeat(40), classifier, train, held_out)
    assert found["class_agreement"][0] > 0.8 and found["precision"][0] > 0.5
    assert found["recall"][0] < 0.05 and found["diversity"] == 0 == max(found["diversity_per_class"])


def test_wrong_classes_and_images_that_are_no_digits_are_seen(classifier, digits):
    images, labels, train, held_out = digits
    wrong = torch.where(labels == 3, 4, torch.where(labels == 4, 3, labels))
    found = judge(images, wrong, classifier, train, held_out)["class_agreement_per_class"]
    assert max(found[3:5]) < 0.1 and min(found[:3] + found[5:]) > 0.8
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for other in (noise, images.rot90(1, (2, 3))):
        found = judge(other, labels, classifier, train, held_out)
        assert found["class_agreement"][0] < 0.4 and found["recall"][0] < 0.3


def test_precision_and_recall_are_those_of_their_definition(digits):
    images, labels, train, (real, real_labels) = (digits[0][:60], digits[1][:60], *digits[2:])
    torch.manual_seed(0)
    model = DigitClassifier().eval()
    with torch.no_grad():
        a, b = model.features(images).double().numpy(), model.features(real).double().numpy()

    def inside(points, reference):
        count = 0
        for x in points:
            for i, y in enumerate(reference):
                radius = sorted(np.linalg.norm(reference - y, axis=1))[3]  # the first is the point itself
                assert np.linalg.norm(reference[i] - y) == 0
                if np.linalg.norm(x - y) <= radius:
                    count += 1
                    break
        return count / len(points)

    keep = torch.arange(len(real_labels)) < 80
    labels, real_labels = torch.arange(60) % 10, torch.arange(80) % 10
    found = judge(images, labels, model, train, (real[keep], real_labels))
    assert found["precision"][0] == inside(a, b[:80]) and found["recall"][0] == inside(b[:80], a)


def test_nearest_training_images(digits):
    images, _, train, _ = digits
    distance, number = nearest(images[:5], train)
    all_of_them = (images[:5, None] - train).square().mean((2, 3, 4)).sqrt()
    assert torch.equal(number, all_of_them.argmin(1))
    torch.testing.assert_close(distance, all_of_them.min(1).values)
    assert nearest(train[:5], train)[0].max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, t, h: (x[:50], y, t, h), "400 labels for 50 generated images"),
        (
            lambda x, y, t, h: (x, torch.where(y == 3, 4, y), t, h),
            r"generated images of each class: \[\d+, \d+, \d+, 0",
        ),
        (lambda x, y, t, h: (x, y + 1, t, h), r"of no class: give two or more of each"),
        (lambda x, y, t, h: (x, y, t, (h[0], h[1] * 0)), r"held-out images of each class: \[400, 0"),
        (lambda x, y, t, h: (x, y, t[..., :16, :16], h), r"training images of shape \(3, 16, 16\)"),
        (lambda x, y, t, h: (x.clone().fill_(torch.nan), y, t, h), "400 of 400 generated images are not finite"),
    ],
)
def test_images_and_labels_that_do_not_fit(digits, change, words):
    images, labels, train, held_out = change(*digits)
    with pytest.raises(ValueError, match=words):
        judge(images, labels, DigitClassifier().eval(), train, held_out)
