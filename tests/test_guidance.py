"""Guidance: its formula, where it is computed, what it costs, and the solvers' announced evaluations."""

import math
from itertools import pairwise

import pytest
import torch
from references import numbers, transformer
from torch import nn

from softvq_lib.draws import Seeds
from softvq_lib.generators import SOLVERS, GeneratorConfig, Guidance, SiT
from softvq_lib.generators.guidance import check_labels, guided
from softvq_lib.generators.solvers import stages, step_times
from softvq_lib.generators.transformer import patchify, unpatchify


@pytest.mark.parametrize("name", ["sit2d", "dit2d"])
def test_guided_output_equals_reference_on_all_channels(name):
    """Scale 4, four times at once; the reference guides every channel, and of DiT's we compare the predicted noise."""
    reference, net = numbers("transformer", f"{name}.cfg."), transformer(name)

    def model(x, t, labels):
        return unpatchify(net(patchify(x, 2), t.repeat(len(x) // 4), labels), 2)[:, :4]

    field = guided(model, reference["y"], torch.full((4,), 10), Guidance(4.0))
    out = field(reference["x"], reference["t"], 0.5)
    torch.testing.assert_close(out, reference["out"], atol=1e-4, rtol=1e-5)


def label_model(calls):
    """A model whose prediction is the label, on every token and channel."""

    def model(x, t, labels):
        calls.append(len(x))
        return labels[:, None, None].expand(-1, *x.shape[1:]).double()

    return model


def test_guidance_by_hand():
    calls, x = [], torch.zeros(2, 3, 4)
    labels, null = torch.tensor([1, 2]), torch.tensor([5, 5])
    field = guided(label_model(calls), labels, null, Guidance(3.0, (0.2, 0.7)))
    expected = 5 + 3 * (labels - 5).double()
    assert torch.equal(field(x, 0.5, 0.5), expected[:, None, None].expand(2, 3, 4))
    assert calls == [4]
    for level in (0.1, 0.71):
        assert torch.equal(field(x, 0.5, level)[:, 0, 0], labels.double())
    assert calls == [4, 2, 2]
    for level in (0.2, 0.7):  # the ends belong to the interval
        assert torch.equal(field(x, 0.5, level)[:, 0, 0], expected)


def test_guidance_of_some_channels_leaves_the_others_with_the_class():
    labels, null = torch.tensor([1, 2]), torch.tensor([5, 5])
    out = guided(label_model([]), labels, null, Guidance(3.0), channels=3)(torch.zeros(2, 3, 4), 0.5, 0.5)
    assert torch.equal(out[:, 0], torch.tensor([[-7.0, -7, -7, 1], [-4, -4, -4, 2]]).double())


def test_scale_one_costs_nothing_and_scale_zero_forgets_the_class():
    labels, null, x = torch.tensor([1, 2]), torch.tensor([5, 5]), torch.zeros(2, 3, 4)
    calls = []
    assert torch.equal(guided(label_model(calls), labels, null, Guidance())(x, 0.5, 0.5)[:, 0, 0], labels.double())
    assert calls == [2]
    assert (guided(label_model(calls), labels, null, Guidance(0.0))(x, 0.5, 0.5) == 5).all()


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_wrong_scales_are_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale=.*at least 0"):
        Guidance(scale)


@pytest.mark.parametrize("interval", [(0.7, 0.0), (-0.1, 0.5), (0.0, 1.1), (0.0, math.nan), (0.5,)])
def test_wrong_intervals_are_refused(interval):
    with pytest.raises(ValueError, match=r"guidance_interval=.*for example \(0.0, 0.7\)"):
        Guidance(2.0, interval)


@pytest.mark.parametrize("labels", [[0, 10], [-1, 3]])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match="out of range: give labels from 0 to 9"):
        check_labels(torch.tensor(labels), 10)


@pytest.mark.parametrize(
    "labels", [torch.zeros(2), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, dtype=torch.bool)]
)
def test_labels_that_are_no_list_of_integers_are_refused(labels):
    with pytest.raises(ValueError, match="give integers"):
        check_labels(labels, 10)


def counted(**options) -> tuple[SiT, list[int]]:
    """A small SiT with random weights, and the number of images in each call of its network."""
    model = SiT(GeneratorConfig(tokens=4, dim=2, classes=3, **options)).eval()
    model.backbone.blocks = model.backbone.blocks[:1]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    calls, run = [], model.backbone.run
    model.backbone.run = lambda x, *rest, **named: calls.append(len(x)) or run(x, *rest, **named)
    return model, calls


LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7), (0.9, 0.95)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_evaluations_are_those_announced(solver, scale, interval, steps):
    model, calls = counted()
    options = {"guidance_scale": scale, "guidance_interval": interval}
    model.sample(LABELS, draws=Seeds([1, 2]), steps=steps, solver=solver, **options)
    assert sum(calls) == 2 * model.evaluations(steps, solver, **options)
    assert len(calls) == (2 * steps - 1 if solver == "heun" else steps)
    if scale == 1:
        assert set(calls) == {2}


@pytest.mark.parametrize("steps", [1, 3, 10, 50, 250])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_guidance_up_to_level_0_7_costs_at_most_1_7_evaluations_a_step(solver, steps):
    model, _ = counted()
    plain = model.evaluations(steps, solver)
    cost = model.evaluations(steps, solver, guidance_scale=1.75, guidance_interval=(0.0, 0.7))
    assert cost <= 1.7 * plain
    assert plain < cost or steps == 1


def test_both_slopes_of_a_heun_step_are_guided_or_none():
    model, calls = counted()
    model.sample(LABELS, draws=Seeds([1, 2]), steps=4, solver="heun", guidance_scale=2, guidance_interval=(0.0, 0.5))
    assert calls == [2, 2, 2, 2, 4, 4, 4]


def test_the_adaptive_solver_is_guided_inside_the_interval_only():
    model, calls = counted()
    model.sample(LABELS, draws=Seeds([1, 2]), solver="adaptive", guidance_scale=2, guidance_interval=(0.2, 0.7))
    changes = [a for a, b in pairwise(calls) if a != b]
    assert changes == [2, 4] and calls[0] == calls[-1] == 2
    with pytest.raises(ValueError, match="adaptive.*'euler'"):
        model.evaluations(10, "adaptive")


def test_times_go_from_noise_to_data():
    assert step_times("euler", 4, 1.0, 0.0) == step_times("heun", 4, 1.0, 0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert step_times("adaptive", 4, 1.0, 0.0) == [1.0, 0.0]
    assert step_times("sde", 1, 1.0, 0.0) == [1.0, 0.0]
    sde = torch.tensor(step_times("sde", 250, 1.0, 0.0), dtype=torch.float64)
    expected = torch.cat([torch.linspace(1, 0.04, 250, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(sde, expected)
    assert stages("heun", [1.0, 0.5, 0.0]) == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [0, -3])
def test_wrong_steps_are_refused(solver, steps):
    model, _ = counted()
    with pytest.raises(ValueError, match=f"steps={steps}.*at least 1"):
        model.sample(LABELS, draws=None, steps=steps, solver=solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "eular"}, "did you mean 'euler'"),
        ({"solver": "sde", "diffusion": "sigmo"}, "did you mean 'sigma'"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"labels": torch.tensor([3])}, "label 3 is out of range"),
    ],
)
def test_wrong_sampling_is_refused(options, message):
    model, calls = counted()
    with pytest.raises(ValueError, match=message):
        model.sample(**{"labels": LABELS, "draws": None} | options)
    assert not calls
