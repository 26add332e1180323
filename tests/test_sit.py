"""SiT: parity of losses and samplers, the interpolants' algebra, solvers on a known density, and training's draws."""

import math

import pytest
import torch
from references import numbers, transformer
from torch import nn

from softvq_lib.draws import Rows, Seeds
from softvq_lib.generators import DIFFUSIONS, GeneratorConfig, Interpolant, SiT, Transformer
from softvq_lib.generators.alignment import alignment
from softvq_lib.generators.presets import PATHS, PREDICTIONS, TIMES, WEIGHTINGS
from softvq_lib.generators.solvers import adaptive, euler, euler_maruyama, heun, step_times

CASES = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


@pytest.fixture(scope="module")
def reference():
    """The published losses. Their time is 1 - t, so that velocities have the other sign."""
    found = numbers("sit_loss")
    return found | {"level": 1 - found["t"]}


@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_loss_equals_reference(reference, path, prediction):
    close = {"atol": 1e-5, "rtol": 1e-5}
    data, noise, t = reference["x1_data"], reference["x0_noise"], reference["level"]
    noisy, velocity = Interpolant(path, prediction).noisy(data, noise, t)
    torch.testing.assert_close(noisy, reference[f"{path}.xt"], **close)
    torch.testing.assert_close(velocity, -reference[f"{path}.ut"], **close)
    with torch.no_grad():
        output = transformer("sit1d")(noisy, reference["t"], reference["y"])
    torch.testing.assert_close(output, reference[f"{path}.pred"], **close)
    sign = -1 if prediction == "velocity" else 1
    for weighting in WEIGHTINGS:
        expected = reference[f"{path}.{prediction}.{'none' if weighting == 'none' else weighting}.loss"]
        loss = Interpolant(path, prediction, weighting).loss(sign * output, data, noise, t)
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_forward_process_equals_reference(reference, path):
    c = Interpolant(path).coefficients(reference["level"][:, None, None])
    torch.testing.assert_close(c.diffusion, reference[f"{path}.drift_var"], atol=0, rtol=1e-5)
    drift = c.d_alpha / c.alpha * reference[f"{path}.xt"]
    torch.testing.assert_close(drift, reference[f"{path}.drift_mean"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_ranges_of_noise_levels_equal_reference(reference, path, prediction):
    interpolant = Interpolant(path, prediction)
    (low, high), ode, sde = interpolant.training_range(), interpolant.ode_range(), interpolant.sde_start()
    ours = torch.tensor([1 - high, 1 - low, 1 - ode[0], 1 - ode[1], 1 - sde, 1 - 0.04], dtype=torch.float64)
    torch.testing.assert_close(ours, reference[f"{path}.{prediction}.ranges"], atol=1e-9, rtol=0)


def test_gradients_equal_reference(reference):
    model = transformer("sit1d")
    data, noise, t = reference["x1_data"], reference["x0_noise"], reference["level"]
    noisy, _ = Interpolant().noisy(data, noise, t)
    loss = Interpolant().loss(-model(noisy, reference["t"], reference["y"]), data, noise, t).mean()
    torch.testing.assert_close(loss, reference["default.loss"], atol=0, rtol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        norm = reference[f"default.norm.{name}"]
        torch.testing.assert_close(parameter.grad.norm(), norm, atol=0, rtol=1e-5)
        first = parameter.grad.flatten()[:128]
        torch.testing.assert_close(first, reference[f"default.grad.{name}"], atol=1e-5 * float(norm), rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_paths_go_from_data_to_noise(path):
    c = Interpolant(path).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(c.alpha, torch.tensor([1.0, 0.0]).double(), atol=7e-3 if path == "vp" else 1e-12, rtol=0)
    torch.testing.assert_close(c.sigma, torch.tensor([0.0, 1.0]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_belong_together(path):
    """Derivatives by automatic differentiation; sigma^2 + alpha^2 = 1 where the path keeps the variance."""
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64).requires_grad_()
    c = Interpolant(path).coefficients(t)
    for value, slope in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (derivative,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, derivative)
    if path != "linear":
        torch.testing.assert_close(c.alpha.square() + c.sigma.square(), torch.ones_like(t))
    assert (c.wronskian > 0).all() and (c.diffusion > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_velocity_score_and_noise_say_the_same(path):
    data, noise = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    for level in (0.02, 0.5, 0.97):
        t = torch.tensor(level, dtype=torch.float64)
        x, velocity = Interpolant(path).noisy(data, noise, t.expand(5))
        score = -noise / Interpolant(path).coefficients(t).sigma
        for prediction, output in (("velocity", velocity), ("noise", noise), ("score", score)):
            interpolant = Interpolant(path, prediction)
            torch.testing.assert_close(interpolant.velocity(output, x, t), velocity)
            torch.testing.assert_close(interpolant.score(velocity, x, t), score)
            assert interpolant.loss(output, data, noise, t.expand(5)).max() < 1e-20


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_are_normal_in_the_logarithm_of_noise_over_data(path):
    times = Interpolant(path, times="lognormal").draw_times(4000, torch.Generator().manual_seed(0), torch.ones(()))
    c = Interpolant(path).coefficients(times.double())
    ratios = (c.sigma / c.alpha).log()
    assert abs(ratios.mean()) < 0.05 and abs(ratios.std() - 1) < 0.05
    if path == "linear":
        torch.testing.assert_close(times.logit(), ratios.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_times_stay_in_their_range(path, prediction, times):
    interpolant = Interpolant(path, prediction, times=times)
    drawn = interpolant.draw_times(4000, torch.Generator().manual_seed(0), torch.ones(()))
    low, high = interpolant.training_range()
    assert drawn.min() >= low and drawn.max() <= high
    if times == "uniform":
        assert drawn.min() < low + 0.002 and drawn.max() > high - 0.002 and abs(drawn.mean() - 0.5) < 0.02


MEAN, SPREAD = 1.5, 0.4


def known(interpolant: Interpolant):
    """The exact field of data from N(MEAN, SPREAD^2), through whatever the network would have predicted."""

    def field(x, t, level):
        t = torch.tensor(t, dtype=torch.float64)
        c = interpolant.coefficients(t)
        score = -(x - c.alpha * MEAN) / ((c.alpha * SPREAD).square() + c.sigma.square())
        if interpolant.prediction == "velocity":
            noise = -c.sigma * score
            data = MEAN + c.alpha * SPREAD**2 / ((c.alpha * SPREAD) ** 2 + c.sigma**2) * (x - c.alpha * MEAN)
            output = c.d_alpha * data + c.d_sigma * noise
        else:
            output = score if interpolant.prediction == "score" else -c.sigma * score
        return interpolant.velocity(output, x, t)

    return field


def solve(interpolant: Interpolant, solver: str, steps: int, x: torch.Tensor) -> torch.Tensor:
    field, times = known(interpolant), step_times(solver, steps, *interpolant.ode_range())
    if solver == "adaptive":
        return adaptive(field, x, times, rtol=1e-6, atol=1e-8)
    return (euler if solver == "euler" else heun)(field, x, times)


@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_the_flow_of_a_known_density_is_found(path, prediction):
    """It maps z to MEAN + SPREAD z, but for the noise level of 0.001 where some of the samplers end."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    exact = MEAN + SPREAD * z
    interpolant = Interpolant(path, prediction)
    found = solve(interpolant, "adaptive", 1, z)
    torch.testing.assert_close(found, exact, atol=6e-3, rtol=0)
    if path == "linear" and prediction == "velocity":
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(solve(interpolant, "heun", 100, z), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_solvers_have_their_order(path, solver, order):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    errors = [(solve(Interpolant(path), solver, n, z) - MEAN - SPREAD * z).abs().max() for n in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize(("path", "prediction"), [("linear", "velocity"), ("gvp", "score"), ("vp", "noise")])
def test_the_noisy_solver_finds_a_known_density(path, prediction, diffusion):
    """With a last step, which adds no noise, much shorter than the samplers' 0.04, where it makes samples too alike."""
    interpolant = Interpolant(path, prediction)
    z = torch.randn(20000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = [*torch.linspace(interpolant.sde_start(diffusion), 0.002, 400, dtype=torch.float64).tolist(), 0.0]

    def number(t):
        return torch.tensor(t, dtype=torch.float64)

    found = euler_maruyama(
        known(interpolant),
        z,
        times,
        torch.Generator().manual_seed(1),
        lambda v, x, t: interpolant.score(v, x, number(t)),
        lambda t: interpolant.diffusion(diffusion, number(t)),
    )
    assert abs(found.mean() - MEAN) < 0.015
    assert abs(found.std() - SPREAD) < 0.015
    # Noise makes the end forget the beginning, more or less; a deterministic solver would keep the order.
    assert torch.corrcoef(torch.stack([found.flatten(), z.flatten()]))[0, 1] < 0.97


def small(depth=2, width=32, **options) -> SiT:
    """A SiT of less than the smallest preset, whose every weight is random."""
    model = SiT(GeneratorConfig(**{"tokens": 4, "dim": 3, "classes": 5} | options))
    config = model.config
    model.backbone = Transformer(
        tokens=config.tokens, dim=config.dim, out_dim=config.dim, classes=5, depth=depth, width=width, heads=2
    )
    if config.align_block:
        model.projector[0] = nn.Linear(width, 2048)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


LABELS = torch.tensor([3, 0, 3, 1])


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_deterministic_samples_equal_torchdiffeq(solver):
    """The reference's sampler: its time runs the other way, and n + 1 points of time are n steps."""
    from torchdiffeq import odeint

    model = small().double()
    noise = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(7)).double()
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    if solver == "heun":
        times = times[:-1]  # our last step is Euler's

    def drift(t, x):
        return -model.backbone(x, 1 - t.expand(4), LABELS)

    with torch.no_grad():
        expected = odeint(drift, noise, times, method={"euler": "euler", "heun": "heun2"}[solver])[-1]
        if solver == "heun":
            expected = expected + 0.1 * drift(times[-1], expected)
    found = model.sample(LABELS, draws=torch.Generator().manual_seed(7), steps=10, solver=solver)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_noisy_samples_equal_the_published_sampler():
    """Written out: drift v - t score and noise of variance 2 t |dt|, guided after the score, from 1 to 0.04 to 0."""
    model, n, scale = small(), 6, 2.5
    draws = torch.Generator().manual_seed(7)
    x = torch.randn(4, 4, 3, generator=draws).double()
    times = [*torch.linspace(1, 0.04, n, dtype=torch.float64), torch.tensor(0.0).double()]
    for t, s in zip(times[:-1], times[1:], strict=True):
        drifts = []
        for labels in (LABELS, torch.full((4,), 5)):
            with torch.no_grad():
                v = model.backbone(x.float(), t.float().expand(4), labels).double()
            score = -((1 - t) * v + x) / t
            drifts.append(v - t * score)
        drift = drifts[1] + scale * (drifts[0] - drifts[1]) if t <= 0.7 else drifts[0]
        x = x + (s - t) * drift
        if s > 0:
            x = x + (2 * t * (t - s)).sqrt() * torch.randn(4, 4, 3, generator=draws).double()
    found = model.sample(
        LABELS,
        draws=torch.Generator().manual_seed(7),
        steps=n,
        solver="sde",
        guidance_scale=scale,
        guidance_interval=(0.0, 0.7),
    )
    torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "adaptive"])
def test_a_sample_depends_on_its_seed_and_class_alone(solver):
    model = small()
    options = {"steps": 5, "solver": solver, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
    options |= {"rtol": 1e-5, "atol": 1e-6} if solver == "adaptive" else {}
    together = model.sample(LABELS, draws=Seeds([1, 2, 3, 4]), **options)
    assert torch.isfinite(together).all()
    order = [2, 0, 3]
    apart = model.sample(LABELS[order], draws=Seeds([3, 1, 4]), **options)
    torch.testing.assert_close(apart, together[order], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1  # the same class, another seed
    again = model.sample(LABELS, draws=Seeds([1, 2, 3, 4]), **options)
    assert torch.equal(again, together)


def test_progress_goes_round_the_steps():
    seen = []

    def progress(steps):
        for step in steps:
            yield step
            seen.append(step)

    small().sample(LABELS, draws=None, steps=7, solver="sde", progress=progress)
    assert len(seen) == 7


@pytest.mark.parametrize("options", [{}, {"path": "vp", "prediction": "noise", "weighting": "velocity"}])
def test_the_loss_of_a_batch_does_not_depend_on_its_cut(options):
    model = small(**options, times="lognormal", label_dropout=0.5).train()
    x, labels = torch.randn(6, 4, 3), torch.arange(6) % 5

    def losses(sizes):
        first, total = 0, 0.0
        for size in sizes:
            part = slice(first, first + size)
            draws = Rows(torch.Generator().manual_seed(3), 6, first)
            total += size * model(x[part], labels[part], draws)[0].detach() / 6
            first += size
        return total

    torch.testing.assert_close(losses([6]), losses([1, 3, 2]))


def test_labels_are_dropped_in_training_at_the_share_asked_for(monkeypatch):
    model, seen = small(label_dropout=0.25), []
    backbone = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x, t, y, **more: seen.append(y) or backbone(x, t, y, **more))
    x, labels = torch.zeros(2000, 4, 3), torch.arange(2000) % 5
    model.train()(x, labels, torch.Generator().manual_seed(0))
    dropped = seen[0] == 5
    assert abs(dropped.float().mean() - 0.25) < 0.04
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    model.eval()(x, labels, torch.Generator().manual_seed(0))
    assert torch.equal(seen[1], labels)


def test_labels_of_a_small_type_can_be_dropped():
    model = small(label_dropout=1.0).train()
    loss, _ = model(torch.zeros(4, 4, 3), LABELS.to(torch.uint8), torch.Generator().manual_seed(0))
    plain, _ = model(torch.zeros(4, 4, 3), LABELS, torch.Generator().manual_seed(0))
    assert torch.equal(loss, plain)


def test_alignment_pulls_features_towards_the_teacher():
    model, x = small(align_block=1, align_width=6), torch.randn(4, 4, 3)
    teacher = torch.randn(4, 8, 6)
    loss, terms = model(x, LABELS, torch.Generator().manual_seed(0), teacher)
    torch.testing.assert_close(loss.detach(), terms["denoising"] + 0.5 * terms["alignment"])
    h = torch.randn(4, 4, 6)
    cosines = [
        torch.cosine_similarity(h[i, token], teacher[i, 2 * token + which], dim=0)
        for i in range(4)
        for token in range(4)
        for which in range(2)
    ]
    torch.testing.assert_close(alignment(h, teacher), -torch.stack(cosines).mean())
    loss.backward()
    assert model.projector[0].weight.grad.any() and model.backbone.blocks[0].attn.qkv.weight.grad.any()
    # The blocks after the aligned one serve the denoising alone.
    alone = torch.autograd.grad(
        alignment(model.projector(model.backbone(x, torch.rand(4), LABELS, hidden=1)[1]), teacher),
        model.backbone.blocks[1].attn.qkv.weight,
        allow_unused=True,
    )
    assert alone == (None,)


def test_a_teacher_is_given_where_it_is_needed_and_only_there():
    x, teacher = torch.zeros(4, 4, 3), torch.randn(4, 8, 6)
    with pytest.raises(ValueError, match="no teacher's features"):
        small(align_block=1, align_width=6)(x, LABELS, None)
    with pytest.raises(ValueError, match="a teacher's features"):
        small()(x, LABELS, None, teacher)
    with pytest.raises(ValueError, match="teacher"):
        small(align_block=1, align_width=6)(x, LABELS, None, teacher[..., :5])


def test_wrong_training_input_is_refused():
    model = small()
    with pytest.raises(ValueError, match="label 5 is out of range"):
        model(torch.zeros(1, 4, 3), torch.tensor([5]), None)
    with pytest.raises(ValueError, match=r"give \(batch, 4, 3\)"):
        model(torch.zeros(1, 5, 3), torch.tensor([1]), None)
    with pytest.raises(ValueError, match="Allowed: 'sit'"):
        SiT(GeneratorConfig("dit", tokens=4, dim=3, classes=5))


def test_training_learns_the_mean_of_each_class():
    """Two classes at +2 and -2, one token: after a short training samples have the sign of their class."""
    model = small(depth=1, tokens=1, dim=2)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        labels = torch.randint(2, (64,), generator=generator)
        centres = (4.0 * labels - 2)[:, None, None]
        x = centres + 0.3 * torch.randn(64, 1, 2, generator=generator)
        loss, _ = model(x, labels, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    labels = torch.arange(200) % 2
    found = model.eval().sample(labels, draws=generator, steps=20, solver="heun", guidance_scale=1.0)
    means = torch.stack([found[labels == which].mean() for which in (0, 1)])
    torch.testing.assert_close(means, torch.tensor([-2.0, 2.0]), atol=0.4, rtol=0)
    assert (found.mean((1, 2)).sign() == 2.0 * labels - 1).float().mean() > 0.95
