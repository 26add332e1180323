"""Metrics of single images and the degradations that test them: by hand, at the limits, and in the right order."""

import math

import numpy as np
import pytest
import torch

from softvq_lib.data.digits import DigitsSource
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.draws import Seeds
from softvq_lib.evaluation.degradations import STRENGTHS, UNITS, degrade
from softvq_lib.evaluation.reconstruction import SIGMA, WINDOW, compare, eight_bit, ssim
from softvq_lib.losses.perceptual import build_perceptual


def blobs(count=4, size=32, seed=0):
    """Smooth coloured images with edges in them, 8-bit, (b, 3, size, size) in [-1, 1]."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=draws)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    images[:, :, size // 4 : size // 2, size // 4 :] *= -1
    return eight_bit(images.clamp(-1, 1))


def digits(count=16):
    source = DigitsSource("validation", count)
    return to_tensor(torch.from_numpy(np.stack([fit(source[i][0], 32) for i in range(count)])))


@pytest.fixture(scope="module")
def perceptual():
    return build_perceptual("efflite1", 32)


def test_identical_images_are_at_the_limit(perceptual):
    found = compare(digits(3), digits(3), perceptual)
    assert set(found) == {"psnr", "ssim", "perceptual-EffLite1"}
    assert found["psnr"].tolist() == [math.inf] * 3
    assert found["ssim"].tolist() == [1] * 3
    assert found["perceptual-EffLite1"].tolist() == [0] * 3
    assert all(values.dtype == torch.float64 for values in found.values())


def test_psnr_and_ssim_by_hand():
    black, white = -torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    found = compare(black, white)
    assert found["psnr"].item() == pytest.approx(0)
    # Without variance only the luminance counts: (2 mx my + c1) / (mx^2 + my^2 + c1), c1 = (0.01 * 2)^2.
    assert found["ssim"].item() == pytest.approx((-2 + 4e-4) / (2 + 4e-4))
    grey = torch.full_like(black, 0.5)
    assert ssim(grey, 0 * grey).item() == pytest.approx(4e-4 / (0.25 + 4e-4))
    assert compare(grey, 0 * grey)["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.25))


def test_ssim_is_scipys_moments_under_a_gaussian():
    from scipy.ndimage import gaussian_filter

    images = blobs(3)
    others = degrade(images, "noise", 20, torch.Generator().manual_seed(0))
    margin = WINDOW // 2

    def smooth(maps):
        return gaussian_filter(maps, SIGMA, radius=margin)[margin:-margin, margin:-margin]

    for image, other, value in zip(images.double().numpy(), others.double().numpy(), ssim(images, others), strict=True):
        channels = []
        for x, y in zip(image, other, strict=True):
            mx, my = smooth(x), smooth(y)
            vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
            c1, c2 = 0.02**2, 0.06**2
            channels.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        assert value.item() == pytest.approx(np.mean(channels), abs=1e-9)


def test_each_image_is_measured_by_itself(perceptual):
    images = digits(5)
    others = degrade(images, "blur", 1)
    together, alone = compare(images, others, perceptual), compare(images[3:4], others[3:4], perceptual)
    for name, values in together.items():
        assert values[3].item() == pytest.approx(alone[name].item(), rel=1e-4)


def test_what_is_beyond_the_range_is_clamped(perceptual):
    images = digits(2)
    inside, beyond = compare(images, images.clamp(-0.9, 0.9), perceptual), compare(images, 3 * images, perceptual)
    assert all(values.isfinite().all() for values in inside.values())
    same = compare(images, (3 * images).clamp(-1, 1), perceptual)
    assert all((beyond[name] == same[name]).all() for name in same)


def test_eight_bits_are_kept_and_conventions_differ():
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    assert torch.equal(eight_bit(levels), levels.float())
    between = levels + 0.7 / 127.5
    ours, truncated = eight_bit(between), eight_bit(between, "repa")
    assert ((ours - truncated) * 127.5).round().unique().tolist() == [0, 1]
    assert eight_bit(torch.full((1, 3, 2, 2), 7.0)).unique().tolist() == [1]
    with pytest.raises(ValueError, match="convention='round'"):
        eight_bit(levels, "round")


def test_bad_images_are_refused():
    images = blobs(3)
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of 3 reconstructions hold NaN .* \(numbers 1 of the batch\)"):
        compare(images, broken)
    with pytest.raises(ValueError, match="1 of 3 originals hold NaN"):
        compare(broken, images)
    with pytest.raises(ValueError, match="1 of 3 images hold NaN"):
        eight_bit(broken)
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 32\), reconstructions \(3, 3, 16, 16\): .* same number, crop"):
        compare(images, images[..., :16, :16])
    with pytest.raises(ValueError, match="8 x 8 pixels: SSIM's window needs 11"):
        compare(images[..., :8, :8], images[..., :8, :8])


@pytest.mark.parametrize("kind", STRENGTHS)
def test_every_metric_falls_along_every_degradation(kind, perceptual):
    """On natural colours and on digits, image means; a stronger degradation is never nearer to the original."""
    for images in (blobs(8, 64), digits()):
        series = [degrade(images, kind, s, Seeds(range(len(images)))) for s in STRENGTHS[kind]]
        measured = [{n: v.mean().item() for n, v in compare(images, x, perceptual).items()} for x in series]
        for name, sign in (("psnr", -1), ("ssim", -1), ("perceptual-EffLite1", 1)):
            values = [sign * found[name] for found in measured]
            assert values == sorted(values) and len(set(values)) == 5, (kind, name, values)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_degradation_gives_images_and_the_same_ones_again(kind):
    images = blobs(4)
    strong = STRENGTHS[kind][-1]
    first, again = (degrade(images, kind, strong, Seeds(range(4))) for _ in range(2))
    assert torch.equal(first, again) and first.shape == images.shape
    assert torch.equal(first, eight_bit(first)) and not torch.equal(first, images)
    parts = [degrade(images[i : i + 2], kind, strong, Seeds(range(i, i + 2))) for i in (0, 2)]
    assert torch.allclose(torch.cat(parts), first, atol=1.01 / 127.5)  # rounding may fall to the other side
    assert kind in UNITS


def test_noise_has_the_spread_it_says_and_nothing_changes_nothing():
    grey = torch.zeros(8, 3, 32, 32)
    noisy = degrade(grey, "noise", 20, torch.Generator().manual_seed(1)) * 127.5
    assert noisy.std().item() == pytest.approx(20, rel=0.02)
    images = blobs(2)
    assert torch.equal(degrade(images, "noise", 0), images) and torch.equal(degrade(images, "resize", 1), images)
    assert torch.equal(degrade(grey, "blur", 2.5), eight_bit(grey))


@pytest.mark.parametrize(
    ("kind", "strength", "words"),
    [
        ("noises", 1, "kind='noises'.*did you mean 'noise'"),
        ("noise", -1, "strength=-1.*at least 0"),
        ("blur", 0, "strength=0.*above 0"),
        ("resize", 0.5, "strength=0.5.*at least 1"),
        ("jpeg", 0, "strength=0.*at least 1"),
        ("jpeg", 101, "from 1 to 100"),
    ],
)
def test_a_degradation_refuses(kind, strength, words):
    with pytest.raises(ValueError, match=words):
        degrade(blobs(1), kind, strength)
    with pytest.raises(ValueError, match="NaN"):
        degrade(blobs(1) * math.nan, "noise", 1)
