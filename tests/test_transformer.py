"""The transformer of SiT and DiT: parity with the published code, sizes, costs, and what may not change its output."""

import dataclasses
import math

import pytest
import torch
from references import numbers, transformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from softvq_lib.generators import SIZES, GeneratorConfig, SiT, Transformer
from softvq_lib.generators.linear import Linear
from softvq_lib.generators.transformer import Ahead, grid_positions, patchify, sincos_positions, unpatchify


def small(depth: int = 3, **options) -> Transformer:
    """A transformer whose every weight is random, so that no path through it is closed."""
    settings = {"tokens": 9, "dim": 4, "out_dim": 4, "classes": 5, "width": 32, "heads": 2} | options
    model = Transformer(depth=depth, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def inputs(b: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, 9, 4, generator=generator)
    return x, torch.rand(b, generator=generator), torch.arange(b) % 6


@pytest.mark.parametrize("name", ["sit1d", "sit1d_learn_sigma", "dit1d", "sit2d", "dit2d"])
@pytest.mark.parametrize("grad", [False, True])
def test_output_equals_reference(name, grad):
    """Both ways to compute a linear layer; 2-D latents as patches of 2 x 2."""
    reference, model = numbers("transformer", f"{name}."), transformer(name)
    x = patchify(reference["x"], 2) if name.endswith("2d") else reference["x"]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model.t_embedder(reference["t"]), reference["t_emb"], atol=1e-5, rtol=1e-5)
        assert torch.equal(model.y_embedder(reference["y"]), reference["y_emb"])
        for block in (1, 2):
            out, h = model(x, reference["t"], reference["y"], hidden=block)
            torch.testing.assert_close(h[:, :2], reference[f"block{block - 1}"], atol=2e-5, rtol=1e-5)
    if name.endswith("2d"):
        out, channels = unpatchify(out, 2), reference["out"].shape[1]
        out = out[:, :channels]
    torch.testing.assert_close(out[..., : reference["out"].shape[-1]], reference["out"], atol=2e-5, rtol=1e-5)


def test_positions_equal_reference():
    row, square = numbers("transformer", "sit1d."), numbers("transformer", "sit2d.")
    torch.testing.assert_close(sincos_positions(torch.arange(16), 64)[None], row["pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(grid_positions(4, 64)[None], square["pos_embed"], atol=1e-6, rtol=0)


def test_patches_are_undone():
    latents = torch.randn(2, 3, 8, 8)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 16, 12)
    assert torch.equal(tokens[0, 1], latents[0, :, :2, 2:4].flatten())
    assert torch.equal(unpatchify(tokens, 2), latents)


def parameters(model: nn.Module) -> int:
    """Parameters as the references count them: with the fixed positions."""
    fixed = 0 if isinstance(model.pos_embed, nn.Parameter) else model.pos_embed.numel()
    return sum(p.numel() for p in model.parameters()) + fixed


@pytest.mark.parametrize(
    ("size", "tokens", "dim", "out_dim", "expected"),
    [
        ("s", 64, 32, 64, 32.91e6),
        ("b", 64, 32, 64, 130.40e6),
        ("l", 64, 32, 64, 457.96e6),
        ("xl", 64, 32, 64, 674_963_776),
        ("xl", 64, 32, 32, 674_926_880),
        ("xl", 256, 16, 32, 675_129_632),
    ],
)
def test_parameters_of_the_published_sizes(size, tokens, dim, out_dim, expected):
    with torch.device("meta"):
        model = Transformer(tokens=tokens, dim=dim, out_dim=out_dim, classes=1000, **SIZES["sit"][size])
    assert abs(parameters(model) - expected) <= (5e3 if isinstance(expected, float) else 0)


@pytest.mark.parametrize(
    ("size", "tokens", "out_dim", "expected"),
    [("xl", 64, 32, 29.034), ("b", 64, 64, 5.560)],
)
def test_multiply_accumulates_of_the_published_sizes(size, tokens, out_dim, expected):
    with torch.device("meta"):
        model = Transformer(tokens=tokens, dim=32, out_dim=out_dim, classes=1000, **SIZES["dit"][size])
        x, t, y = torch.empty(1, tokens, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, t, y)
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=6e-4)


def test_a_new_model_predicts_nothing_and_every_parameter_can_learn():
    x, t, y = inputs()
    for positions in ("sincos", "learned", "grid"):
        model = Transformer(tokens=9, dim=4, out_dim=4, classes=5, depth=2, width=32, heads=2, positions=positions)
        assert not model(x, t, y).any()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model(x, t, y).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert isinstance(model.pos_embed, nn.Parameter) == (positions == "learned")


def test_one_time_for_all_equals_a_time_each():
    model, (x, _, y) = small(), inputs()
    torch.testing.assert_close(model(x, torch.tensor([0.3]), y), model(x, torch.full((6,), 0.3), y))


def test_time_scale_multiplies_the_time():
    x, t, y = inputs()
    torch.testing.assert_close(small(time_scale=1000.0)(x, t, y), small()(x, 1000 * t, y), atol=1e-5, rtol=1e-4)


def test_modulations_by_class_equal_those_by_image():
    """What samplers do: each class once, for several times together, one row for each image."""
    model, (x, _, y) = small(), inputs()
    times = [1.0 - i / 40 for i in range(40)]
    with torch.no_grad():
        classes, rows = torch.unique(y, return_inverse=True)
        ahead = Ahead(model, classes, times)
        for t in (*times, 0.123):  # the last is none of those announced
            out = model.run(x, ahead.at(t), rows)
            torch.testing.assert_close(out, model(x, torch.tensor([t]), y), atol=1e-5, rtol=1e-5)


def test_modulations_are_computed_a_few_times_together(monkeypatch):
    """Four classes at 40 times, 64 rows at most: three products instead of 40, each time asked for twice."""
    model, calls = small(), []
    plain = model.modulations
    monkeypatch.setattr(model, "modulations", lambda t, y: calls.append(len(t)) or plain(t, y))
    times = [1.0 - i / 40 for i in range(40)]
    ahead = Ahead(model, torch.arange(4), times)
    for t in times:
        assert ahead.at(t)[0].shape == (4, 6 * 32)
        ahead.at(t)
    assert calls == [64, 64, 32]


def test_checkpointing_changes_no_gradient():
    x, t, y = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = small()
        model.checkpointing = checkpointing
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_checkpointing_keeps_less_for_the_backward_pass():
    x, t, y = inputs()
    kept = []
    for checkpointing in (False, True):
        model, sizes = small(depth=6), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda s: sizes.append(s.numel()) or s, lambda s: s):  # noqa: B023
            model(x, t, y)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_hidden_is_the_output_of_a_block():
    model, (x, t, y) = small(), inputs()
    out, h = model(x, t, y, hidden=3)
    torch.testing.assert_close(model.final_layer(h, model.modulations(t, y)[-1][:, None]), out)
    assert torch.equal(out, model(x, t, y))
    for block in (0, 4):
        with pytest.raises(ValueError, match=f"hidden={block}.*1 to 3"):
            model(x, t, y, hidden=block)


def test_latents_of_another_shape_are_refused():
    model, (x, t, y) = small(), inputs()
    for wrong in (x[:, :8], x[..., :3], x[0]):
        with pytest.raises(ValueError, match=r"give \(batch, 9, 4\)"):
            model(wrong, t, y)


def test_linear_is_the_same_with_and_without_gradients():
    layer, x = Linear(37, 11), torch.randn(2, 5, 37)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x).double(), exact, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert Linear(37, 11)(x).dtype == torch.bfloat16


def test_bfloat16_stays_near_float32():
    model, (x, t, y) = small(), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    plain = model(x, t, y)
    assert (out - plain).norm() < 0.03 * plain.norm()


CONFIG = {"tokens": 16, "dim": 8, "classes": 10}


def test_configurations_are_filled_in():
    config = GeneratorConfig(**CONFIG, size="mini").resolved()
    assert (config.path, config.prediction, config.weighting, config.times) == ("linear", "velocity", "none", "uniform")
    assert (config.positions, config.time_scale, config.label_dropout) == ("sincos", 1.0, 0.1)
    assert config.schedule is None and config.buffer is None and config.align_weight is None
    assert config.resolved() == config
    dit = GeneratorConfig("dit", **CONFIG).resolved()
    assert (dit.schedule, dit.path) == ("linear", None)
    mar = GeneratorConfig("mar", "h", **CONFIG).resolved()
    assert (mar.buffer, mar.head_depth, mar.head_width, mar.dropout) == (64, 12, 1536, 0.1)
    assert mar.mask_per_sample is False and mar.positions is None
    assert GeneratorConfig(**CONFIG, align_block=2, align_width=7).resolved().align_weight == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generator": "siet"}, "did you mean 'sit'"),
        ({"size": "h"}, "'xl'"),
        ({"generator": "mar", "size": "xl"}, "'h'"),
        ({"path": "cosine"}, "'gvp'"),
        ({"prediction": "v"}, "'velocity'"),
        ({"times": "normal"}, "'lognormal'"),
        ({"positions": "sin"}, "'sincos'"),
        ({"generator": "dit", "schedule": "cos"}, "'cosine'"),
        ({"tokens": 0}, "tokens=0"),
        ({"label_dropout": 1.5}, "from 0 to 1"),
        ({"label_dropout": -0.1}, "label_dropout=-0.1"),
        ({"generator": "mar", "dropout": 1.0}, "below 1"),
        ({"time_scale": 0.0}, "above 0"),
        ({"time_scale": math.inf}, "time_scale=inf"),
        ({"schedule": "linear"}, "generator='dit'"),
        ({"generator": "dit", "path": "vp"}, "generator='sit'"),
        ({"generator": "mar", "positions": "sincos"}, "leave it out"),
        ({"weighting": "likelihood"}, "prediction='velocity'"),
        ({"align_block": 2}, "belong together"),
        ({"align_width": 384}, "belong together"),
        ({"align_weight": 1.0}, "align_block"),
        ({"align_block": 7, "align_width": 384}, "1 to 6"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**CONFIG | wrong)


@pytest.mark.parametrize("missing", ["tokens", "dim", "classes"])
def test_settings_of_the_latents_must_be_known_in_the_end(missing):
    config = GeneratorConfig(**{name: value for name, value in CONFIG.items() if name != missing})
    with pytest.raises(ValueError, match=f"{missing} is not given"):
        config.resolved()
    assert dataclasses.replace(config, **{missing: 16}).resolved()


def test_a_grid_needs_a_square():
    with pytest.raises(ValueError, match="square"):
        GeneratorConfig(tokens=32, dim=8, classes=10, positions="grid").resolved()


def test_alignment_counts_as_in_the_reference():
    """REPA's SiT-XL on 64 tokens with a projector to nothing, as the paper's table counts it."""
    config = GeneratorConfig("sit", "xl", tokens=64, dim=32, classes=1000, align_block=8, align_width=768)
    with torch.device("meta"):
        model = SiT(config)
    last = sum(p.numel() for p in model.projector[-1].parameters())
    projector = sum(p.numel() for p in model.projector.parameters()) - last
    assert parameters(model.backbone) + projector == 681_484_576
