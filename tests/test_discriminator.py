"""Discriminators: sizes of the release's, frozen body, spectral and batch norms, groups, checkpoints, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from softvq_lib.losses.discriminator import BatchNorm, Discriminator, Head, PatchDiscriminator, build_discriminator

TINY = "test_vit"  # 160 pixels, 100 patches, 64 wide, 6 blocks


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator(seed)) * 2 - 1


def tiny(seed: int = 0) -> Discriminator:
    return build_discriminator(TINY, 32, pretrained=False, seed=seed)


@pytest.fixture(scope="module")
def frozen() -> Discriminator:
    """A tiny discriminator that no test changes."""
    return tiny()


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_dino_has_the_size_of_the_release():
    discriminator = build_discriminator("dino", 256, pretrained=False)
    assert sum(p.numel() for p in discriminator.parameters() if p.requires_grad) == 7_386_245  # the release: 7.386 M
    assert sum(p.numel() for p in discriminator.body.parameters()) == pytest.approx(21.67e6, rel=1e-3)
    assert discriminator.tapped == [2, 5, 8, 11]
    assert discriminator.side == 224
    assert discriminator.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # of ImageNet
    assert discriminator.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    with torch.no_grad():
        assert discriminator(images(1, 64)).shape == (1, 5 * 196)


def test_any_vision_transformer_can_be_the_body(frozen):
    assert frozen.tapped == [1, 2, 4, 5]
    assert frozen(images()).shape == (2, 5 * 100)
    assert frozen(images().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("side", "positions", "receptive"), [(28, 12**2, 16), (32, 14**2, 16), (64, 14**2, 34), (128, 14**2, 70)]
)
def test_patch_follows_the_image_size(side, positions, receptive):
    discriminator = build_discriminator("patch", side, pretrained=False)
    x = images(1, side).requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (1, positions)
    row = round(positions**0.5)
    logits[0, (row // 2) * row + row // 2].backward()  # of a position in the middle
    seen = x.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [receptive, receptive]


def test_patch_has_no_more_than_three_halvings():
    discriminator = build_discriminator("patch", 256).to("meta")
    assert discriminator(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, 30**2)


# -- the frozen body -----------------------------------------------------------------------------------------------


def test_features_are_patch_plus_class_tokens_before_and_after_blocks(frozen):
    x = images(2, 160)
    body = frozen.body
    _, after = body.forward_intermediates(
        x, indices=[1, 2, 4, 5], output_fmt="NLC", return_prefix_tokens=True
    )  # test_vit takes [-1, 1] itself
    patches = body.patch_embed(x).flatten(1, 2) + body.pos_embed[:, 1:]
    expected = [patches + body.cls_token + body.pos_embed[:, :1], *(patch + cls for patch, cls in after)]
    features = frozen.features(x)
    assert len(features) == 5
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs.mT, atol=1e-5, rtol=1e-5)


def test_the_body_is_not_saved_not_trained_and_stays_in_evaluation_mode(frozen):
    discriminator = tiny().train()
    assert all(name.startswith("trained.") for name in discriminator.state_dict())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert not any(m is discriminator.body for m in discriminator.modules())
    assert not any(m.training for m in discriminator.body.modules())
    discriminator(images()).sum().backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    assert all(p.grad is None and not p.requires_grad for p in discriminator.body.parameters())


def test_the_body_follows_the_module():
    moved = tiny().to("meta")
    assert {p.device.type for p in [*moved.body.parameters(), *moved.parameters(), moved.mean]} == {"meta"}


def test_small_images_are_enlarged_by_bicubic_interpolation(frozen):
    x = images()
    assert torch.equal(frozen.fit(x, None), F.interpolate(x, (160, 160), mode="bicubic"))
    assert torch.equal(frozen.fit(images(1, 160), None), images(1, 160))


def test_large_images_are_cropped_half_of_the_time_and_shrunk_otherwise(frozen):
    places = torch.arange(200.0)
    x = torch.stack([places[:, None].expand(200, 200), places.expand(200, 200), torch.zeros(200, 200)])[None]
    shrunk, corners = F.interpolate(x, (160, 160), mode="area"), []
    for seed in range(60):
        fitted = frozen.fit(x, generator(seed))
        assert torch.equal(fitted, frozen.fit(x, generator(seed)))
        if not torch.equal(fitted, shrunk):
            top, left = int(fitted[0, 0, 0, 0]), int(fitted[0, 1, 0, 0])
            assert torch.equal(fitted, x[:, :, top : top + 160, left : left + 160])
            corners.append((top, left))
    assert 18 < len(corners) < 42
    assert len(set(corners)) > 10
    assert min(min(corner) for corner in corners) >= 0 and max(max(corner) for corner in corners) <= 40


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TINY, "patch"])
def test_gradients_reach_images_and_no_frozen_parameter(name):
    discriminator = build_discriminator(name, 32, pretrained=False).requires_grad_(False)
    x = images().requires_grad_()
    discriminator(x).mean().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())


def test_features_of_plain_images_keep_no_graph(frozen):
    assert not any(x.requires_grad for x in frozen.features(images()))


# -- heads ---------------------------------------------------------------------------------------------------------


def test_a_head_by_its_formula():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(6)
    x = torch.randn(3, 6, 20, generator=generator(0))

    def block(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        wrapped = torch.cat([x[..., x.shape[-1] - conv.padding[0] :], x, x[..., : conv.padding[0]]], dim=-1)
        y = F.conv1d(wrapped, conv.weight, conv.bias)
        return F.leaky_relu(F.batch_norm(y, None, None, training=True, eps=1e-6), 0.2)

    first = block(x, head.mix)
    second = (first + block(first, head.spread)) / 2**0.5
    assert (head.mix.kernel_size, head.spread.kernel_size) == ((1,), (9,))
    torch.testing.assert_close(head(x), F.conv1d(second, head.out.weight, head.out.bias)[:, 0])


# -- groups and batch norm -----------------------------------------------------------------------------------------


def test_groups_are_normalised_as_if_passed_alone(frozen):
    real, fake = images(3), images(3, seed=1) * 0.3
    together = frozen(torch.cat([real, fake]), groups=2)
    torch.testing.assert_close(together, torch.cat([frozen(real), frozen(fake)]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, frozen(torch.cat([real, fake])), atol=1e-2)


def test_logits_of_patch_depend_on_their_image_alone():
    discriminator, x = build_discriminator("patch", 32), images(3)
    torch.testing.assert_close(discriminator(x)[1:2], discriminator(x[1:2]))


def test_batch_norm_equals_torchs():
    ours, theirs = BatchNorm(5, eps=1e-6), nn.BatchNorm1d(5, eps=1e-6)
    weight, bias = torch.rand(5, generator=generator(0)) + 0.5, torch.randn(5, generator=generator(1))
    x = torch.randn(6, 5, 7, generator=generator(2)) * 3 + 10
    upstream = torch.randn(6, 5, 7, generator=generator(3))
    results = []
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = weight.clone(), bias.clone()
        given = x.clone().requires_grad_()
        y = norm(given)
        (y * upstream).sum().backward()
        results.append((y, given.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# -- spectral norm and state ---------------------------------------------------------------------------------------


def spectral(discriminator: Discriminator) -> list[nn.Module]:
    return [m for m in discriminator.modules() if parametrize.is_parametrized(m, "weight")]


@pytest.mark.parametrize(("name", "layers"), [(TINY, 15), ("patch", 3)])
def test_every_layer_has_a_spectral_norm_of_1_which_advancing_finds_again(name, layers):
    discriminator = build_discriminator(name, 32, pretrained=False)
    assert len(spectral(discriminator)) == layers
    changes = generator(0)
    for layer in spectral(discriminator):
        weight = layer.parametrizations.weight.original.data
        weight += 0.1 * torch.randn(weight.shape, generator=changes)
    for _ in range(50):
        discriminator.advance()
    for layer in spectral(discriminator):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", [TINY, "patch"])
def test_passes_change_no_state_and_advancing_does(name):
    discriminator = build_discriminator(name, 32, pretrained=False)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    vectors = [key for key in before if key.endswith(("_u", "_v"))]
    assert len(vectors) == 2 * len(spectral(discriminator))
    for mode in (True, False):
        discriminator.train(mode)(images())
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    discriminator.advance()
    changed = {key for key, value in discriminator.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and changed <= set(vectors)


@pytest.mark.parametrize("name", [TINY, "patch"])
def test_a_restored_discriminator_goes_on_equally(name):
    def steps(discriminator: Discriminator, seeds: range) -> list[torch.Tensor]:
        losses = []
        for seed in seeds:
            loss = discriminator(images(seed=seed)).square().mean()
            loss.backward()
            with torch.no_grad():
                for p in discriminator.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
            discriminator.advance()
            losses.append(loss.detach())
        return losses

    unbroken = build_discriminator(name, 32, pretrained=False)
    steps(unbroken, range(2))
    saved = {key: value.clone() for key, value in unbroken.state_dict().items()}
    expected = steps(unbroken, range(2, 5))
    restored = build_discriminator(name, 32, pretrained=False)
    restored.load_state_dict(saved)
    assert torch.equal(torch.stack(steps(restored, range(2, 5))), torch.stack(expected))
    for key, value in restored.state_dict().items():
        assert torch.equal(value, unbroken.state_dict()[key]), key


def test_the_seed_alone_decides_and_the_global_generator_is_not_touched(frozen):
    state = torch.get_rng_state()
    same, other = tiny(0), tiny(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same(images()), frozen(images()))
    assert not torch.equal(other.body.pos_embed, frozen.body.pos_embed)
    assert not torch.allclose(other(images()), frozen(images()))


@pytest.mark.parametrize("name", [TINY, "patch"])
def test_spectral_norms_are_computed_outside_autocast(name):
    discriminator, seen = build_discriminator(name, 32, pretrained=False), []
    for layer in spectral(discriminator):
        layer.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(images())
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert len(seen) == len(spectral(discriminator)) and not any(seen)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinno", "discriminator='dinno' is not known, did you mean 'dino'"),
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("test_resnet", "no vision transformer"),
    ],
)
def test_a_name_that_is_no_vision_transformer_is_refused(name, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_discriminator(name, 32, pretrained=False)


def test_missing_weights_are_named_and_a_way_out_is_shown():
    with pytest.raises(ValueError, match="vit_small_patch16_224.dino.*'patch'.*pretrained=False"):
        build_discriminator("dino", 256)


def test_an_image_too_small_is_refused():
    with pytest.raises(ValueError, match="image_size=4 is not allowed"):
        build_discriminator("patch", 4)


def test_patch_needs_no_weights():
    assert isinstance(build_discriminator("patch", 32, pretrained=True), PatchDiscriminator)
