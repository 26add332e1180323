"""Perceptual distance: its equation by hand, its gradient, its order of distortions, and LPIPS itself."""

import io
import math

import numpy as np
import pytest
import torch
from lpips import LPIPS
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from softvq_lib.losses.perceptual import PERCEPTUAL, Perceptual, build_perceptual


class Stages(nn.Module):
    """Stand-in for a net: the image itself, and its mean."""

    def maps(self, images: Tensor) -> list[Tensor]:
        return [images, images.mean((2, 3), keepdim=True)]


def pair() -> tuple[Tensor, Tensor]:
    """Two images of two channels and two places."""
    first = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2)  # places (3, 4) and (0, 2)
    second = torch.tensor([[6.0, 5.0], [8.0, 0.0]]).view(1, 2, 1, 2)  # places (6, 8) and (5, 0)
    return first, second


def mean_stage() -> float:
    """Squared distance of the unit vectors along the means (1.5, 3) and (5.5, 4)."""
    return 2 - 2 * (1.5 * 5.5 + 3 * 4) / math.hypot(1.5, 3) / math.hypot(5.5, 4)


def test_the_distance_by_hand():
    first, second = pair()
    places = (0 + 2) / 2  # (3, 4) and (6, 8) point the same way, (0, 2) and (5, 0) at right angles
    assert Perceptual(Stages(), "x")(first, second).tolist() == pytest.approx([(places + mean_stage()) / 2])


def test_the_weighted_distance_by_hand():
    first, second = pair()
    weights = [torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([2.0, 2.0]).view(1, 2, 1, 1)]
    places = (0 + 1 * 1 + 3 * 1) / 2
    result = Perceptual(Stages(), "x", weights)(first, second)
    assert result.tolist() == pytest.approx([places + 2 * mean_stage()])


def test_features_that_are_zero_have_a_finite_gradient():
    dark = torch.zeros(1, 2, 1, 2, requires_grad=True)
    Perceptual(Stages(), "x")(pair()[0], dark).sum().backward()
    assert torch.isfinite(dark.grad).all()


def photographs(size: int = 64) -> Tensor:
    """Crops of the photographs that scikit-learn ships, shrunk to half, in [-1, 1]."""
    crops = []
    for image in load_sample_images().images:
        pixels = np.asarray(Image.fromarray(image).reduce(2))
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1
        crops += [pixels[:, y : y + size, x : x + size] for y in (20, 120) for x in (20, 120, 220)]
    return torch.stack(crops)


@pytest.fixture(scope="module")
def distance() -> Perceptual:
    return build_perceptual("efflite1", 64)


def test_identical_images_are_at_distance_zero_and_each_pair_counts_alone(distance):
    images = photographs()[:4]
    others = torch.cat([images[:2], -images[2:]])
    apart = distance(images, others)
    assert apart.shape == (4,) and not apart[:2].any() and (apart[2:] > 0.1).all()
    assert torch.allclose(distance(images[3:], others[3:]), apart[3:], rtol=1e-4)
    assert distance.label == "perceptual-EffLite1"


def test_the_gradient_reaches_the_reconstructions_alone(distance):
    images, reconstructions = photographs()[:2].requires_grad_(), photographs()[2:4].requires_grad_()
    distance(images, reconstructions).sum().backward()
    assert images.grad is None and (reconstructions.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert not distance(images.detach(), reconstructions.detach()).requires_grad


def test_following_the_gradient_brings_images_nearer(distance):
    images = photographs()[:2]
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy.requires_grad_()
    before = distance(images, noisy)
    before.sum().backward()
    after = distance(images, noisy.detach() - 0.02 * noisy.grad.sign())
    assert (after < before).all()


def jpeg(images: Tensor, quality: int = 20) -> Tensor:
    decoded = []
    for image in images:
        file = io.BytesIO()
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(decoded)


def relative_to_noise(distance: Perceptual) -> dict[str, float]:
    """Mean distance of four distortions, each scaled to the PSNR of blur, over that of white noise."""
    images = photographs()
    blur = gaussian_blur(images, 7, 1.0) - images
    error = blur.square().mean((1, 2, 3), keepdim=True)
    distortions = {
        "noise": torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
        "brightness": torch.ones_like(images),
        "tint": torch.tensor([1.0, 0, -1]).view(1, 3, 1, 1).expand_as(images),
        "jpeg": jpeg(images) - images,
        "blur": blur,
    }
    found = {}
    for name, change in distortions.items():
        change = change * (error / change.square().mean((1, 2, 3), keepdim=True)).sqrt()
        found[name] = distance(images, images + change).mean().item()
    return {name: value / found["noise"] for name, value in found.items()}


def test_distortions_of_equal_psnr_are_told_apart(distance):
    trained = relative_to_noise(distance)
    assert trained["brightness"] < trained["tint"] < 0.5 < 0.8 < min(trained["blur"], trained["jpeg"])


def test_a_random_net_cannot_tell_them_apart():
    random = build_perceptual("efflite1", 64, pretrained=False)
    assert random.label == "perceptual-EffLite1-random"
    found = relative_to_noise(random)
    assert found["brightness"] + found["tint"] > 0.6, "a trained one: below .2; eight random ones: .8 to 1.7"


def test_small_images_are_enlarged(distance):
    tiny = photographs(16)
    assert torch.isfinite(distance(tiny, -tiny)).all()
    assert [features.shape[-1] for features in distance.net.maps(tiny)] == [16, 8, 4, 2, 1]
    assert distance.net.maps(photographs(48))[0].shape[-1] == 24, "larger ones are not"


@pytest.fixture(scope="module")
def vgg_and_package() -> tuple[Perceptual, LPIPS]:
    """Our LPIPS on a random net, and the package's model that it was made of."""
    made = []

    def recorded(**settings) -> LPIPS:
        made.append(LPIPS(**settings))
        return made[0]

    before = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpips.LPIPS", recorded)
        ours = build_perceptual("lpips", 32, pretrained=False)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state stays as it was"
    return ours, made[0]


@pytest.fixture
def vgg(vgg_and_package) -> Perceptual:
    return vgg_and_package[0]


def test_lpips_is_that_of_its_package(vgg_and_package):
    vgg, package = vgg_and_package
    images, others = photographs(32)[:3], photographs(32)[3:6]
    with torch.no_grad():
        expected = package.eval()(images, others)
    assert expected.min() > 0
    assert torch.allclose(vgg(images, others), expected.flatten(), rtol=1e-4)
    assert vgg.label == "LPIPS-VGG-random"


def test_lpips_has_no_dropout_in_training_mode(vgg, distance):
    images, others = photographs(32)[:2], photographs(32)[2:4]
    for net in (vgg, distance):
        quiet = net.eval()(images, others)
        assert torch.equal(net.train()(images, others), quiet) and torch.equal(net(images, others), quiet)
    assert not any(isinstance(module, nn.Dropout) for module in vgg.modules())


def test_lpips_without_a_network_says_what_is_missing(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ValueError, match="vgg16.*cannot be had: no network.*efflite0, efflite1, efflite2"):
        build_perceptual("lpips", 64)


def test_wrong_settings_are_refused():
    assert PERCEPTUAL == ("lpips", "efflite0", "efflite1", "efflite2")
    with pytest.raises(ValueError, match="perceptual='lpip' is not known, did you mean 'lpips'"):
        build_perceptual("lpip", 64)
    with pytest.raises(ValueError, match="image_size=8"):
        build_perceptual("lpips", 8)
