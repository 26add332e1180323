"""Gaussian diffusion: parity with the published tables, losses and steps, closed forms, and other people's solvers."""

import copy
import math
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from softvq_lib.draws import Rows, Seeds
from softvq_lib.generators.gaussian import SOLVERS, GaussianDiffusion, _ddpm, betas, respace

REFERENCE = load_file(Path(__file__).parent / "data/generators/dit_diffusion.safetensors")
MEAN, STD = 0.7, 0.4  # of the toy data


def case(name):
    return {k.removeprefix(f"{name}."): v for k, v in REFERENCE.items() if k.startswith(f"{name}.")}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(diffusion, schedule, calls=None):
    """The exact network for data from N(MEAN, STD^2): eps and the v of the exact step variance; counts its calls."""

    def model(x, t):
        if calls is not None:
            calls.append(int(t[0]))
        i = schedule.timesteps.index(int(t[0]))
        a, previous, beta = (float(row[i]) for row in (schedule.alpha_bar, schedule.previous, schedule.beta))
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)
        left = STD**2 * (1 - a) / (a * STD**2 + 1 - a)  # variance of x_0 given x_t
        variance = float(schedule.posterior_variance[i]) + previous * (beta / (1 - a)) ** 2 * left
        lower, upper = schedule.log_variance[:, i].tolist()
        v = 2 * (math.log(variance) - lower) / (upper - lower) - 1
        return torch.cat([eps, torch.full_like(x, v)], dim=-1)

    return model


@pytest.mark.parametrize("name", ["full", "250"])
def test_tables_equal_reference(name):
    schedule = GaussianDiffusion().schedule
    if name == "250":
        schedule = schedule.at(respace("250", 1000))
    for ours, key in (
        (schedule.alpha_bar, "alpha_bar"),
        (schedule.beta, "beta"),
        (schedule.log_variance[0], "log_variance"),
    ):
        torch.testing.assert_close(ours, REFERENCE[f"{name}.{key}"], rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.log_variance[1], REFERENCE[f"{name}.beta"].log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", ["250", "100", "50", "ddim25", "ddim50", "ddim100", "ddim250"])
def test_respacing_equals_reference(steps):
    assert respace(steps, 1000) == REFERENCE[f"timesteps.{steps}"].tolist()


def test_respacing_of_all_and_of_one():
    assert respace(1000, 1000) == list(range(1000))
    assert respace(1, 1000) == [999], "generation starts from noise"
    assert respace(250, 1000) == respace("250", 1000)


@pytest.mark.parametrize("steps", [0, -1, 1001, "ddim0", "ddim", "many", "10,20", 2.5, True])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ValueError, match="give 1 to 1000"):
        respace(steps, 1000)


def test_a_stride_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'ddim250' exists"):
        respace("ddim280", 1000)


@pytest.mark.parametrize(("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_equal_diffusers(schedule, theirs):
    expected = diffusers.DDPMScheduler(beta_schedule=theirs).betas.double()
    torch.testing.assert_close(betas(schedule, 1000), expected, rtol=1e-5, atol=1e-9)


def test_linear_betas_keep_their_sum_at_other_step_counts():
    torch.testing.assert_close(betas("linear", 500).sum(), betas("linear", 1000).sum())


@pytest.mark.parametrize("name", ["case1d", "case2d"])
def test_noise_and_losses_equal_reference(name):
    """Channels last, tokens (b, l, c) and images (b, h, w, c), at t = 0, 1, 500 and 999."""
    data = case(name)
    diffusion = GaussianDiffusion(pixel_likelihood=True)
    given = (data["prediction"], data["x0"], data["noise"], data["t"])
    torch.testing.assert_close(diffusion.add_noise(*given[1:]), data["x_t"], rtol=1e-6, atol=1e-6)
    terms = diffusion.terms(*given)
    for term in ("mse", "vb"):
        torch.testing.assert_close(terms[term], data[term], rtol=1e-5, atol=0)
    torch.testing.assert_close(diffusion.loss(*given), data["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["case1d", "case2d"])
def test_steps_equal_reference(name):
    data = case(name)
    schedule = GaussianDiffusion().schedule
    eps, v = data["prediction"].chunk(2, dim=-1)
    for row, t in enumerate(data["t"].tolist()):
        mean, std = _ddpm(schedule, t, data["x_t"][row], eps[row], v[row])
        torch.testing.assert_close(mean, data["mean"][row], rtol=1e-5, atol=1e-6)
        if t:
            torch.testing.assert_close(2 * std.log(), data["log_variance"][row], rtol=1e-5, atol=0)
        else:
            assert std is None


def test_the_pixel_term_is_left_out_by_default():
    data = case("case1d")
    given = (data["prediction"], data["x0"], data["noise"], data["t"])
    terms = GaussianDiffusion().terms(*given)
    assert terms["vb"][0] == 0
    torch.testing.assert_close(terms["vb"][1:], data["vb"][1:], rtol=1e-5, atol=0)
    prediction = data["prediction"].clone().requires_grad_()
    GaussianDiffusion().terms(prediction, *given[1:])["vb"].sum().backward()
    assert not prediction.grad[0].any() and prediction.grad[1:, :, 8:].all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bound_is_the_divergence_of_two_gaussians(schedule):
    """Against torch's KL of the posterior and the step, written out with x_0 and x_t, at every t in float64."""
    diffusion = GaussianDiffusion(schedule)
    s, t = diffusion.schedule, torch.arange(1, 1000)
    x0, noise, eps, v = torch.randn(4, 999, 3, generator=generator(), dtype=torch.float64)
    x = diffusion.add_noise(x0, noise, t)
    a, previous, beta = (row[1:, None] for row in (s.alpha_bar, s.previous, s.beta))
    predicted = (x - (1 - a).sqrt() * eps) / a.sqrt()

    def mean(data):
        return (beta * previous.sqrt() * data + (1 - previous) * (1 - beta).sqrt() * x) / (1 - a)

    lower, upper = s.log_variance[:, 1:, None]
    step = torch.distributions.Normal(mean(predicted), torch.exp((lower + (v + 1) / 2 * (upper - lower)) / 2))
    posterior = torch.distributions.Normal(mean(x0), torch.exp(lower / 2))
    expected = torch.distributions.kl_divergence(posterior, step).mean(1) / math.log(2)
    vb = diffusion.terms(torch.cat([eps, v], dim=-1), x0, noise, t)["vb"]
    torch.testing.assert_close(vb, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pixel_likelihood", [False, True])
def test_gradients_equal_finite_differences(pixel_likelihood):
    """The bound's gradient goes to v alone, that of the squared error to eps alone."""
    diffusion = GaussianDiffusion(pixel_likelihood=pixel_likelihood)
    t = torch.tensor([0, 1, 2, 40, 500, 999])
    kind = {"generator": generator(1), "dtype": torch.float64}
    x0 = torch.rand(6, 2, 3, **kind) - 0.5
    noise = torch.randn(6, 2, 3, **kind)
    eps, v = (torch.randn(6, 2, 3, **kind).mul(0.3).requires_grad_() for _ in range(2))

    def terms(eps, v):
        return diffusion.terms(torch.cat([noise + eps, v], dim=-1), x0, noise, t)

    assert torch.autograd.gradcheck(lambda v: terms(eps.detach(), v)["vb"], v)
    assert torch.autograd.gradcheck(lambda eps: terms(eps, v.detach())["mse"], eps)
    assert torch.autograd.grad(terms(eps, v)["vb"].sum(), eps)[0].abs().max() == 0
    assert torch.autograd.grad(terms(eps, v)["mse"].sum(), v)[0].abs().max() == 0


def test_rows_and_times_of_single_tokens():
    """A head that denoises tokens one by one passes rows (r, c), or a time for each token."""
    data = case("case1d")
    diffusion = GaussianDiffusion("cosine")
    parts = (data["prediction"], data["x0"], data["noise"])
    t = torch.randint(1000, (4, 16), generator=generator())
    together = diffusion.loss(*parts, t)  # (b, l)
    assert together.shape == (4, 16)
    torch.testing.assert_close(diffusion.loss(*(part.flatten(0, 1) for part in parts), t.flatten()), together.flatten())
    same = diffusion.loss(*parts, t[:, :1].expand(-1, 16)).mean(1)
    torch.testing.assert_close(diffusion.loss(*parts, t[:, 0]), same)


def test_half_precision_predictions_are_judged_in_fp32():
    data = case("case1d")
    diffusion = GaussianDiffusion()
    prediction = data["prediction"].bfloat16()
    rest = (data["x0"], data["noise"], data["t"])
    loss = diffusion.loss(prediction, *rest)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, diffusion.loss(prediction.float(), *rest))
    x = diffusion.sample(
        lambda x, t: torch.cat([x, x], -1).bfloat16(), (2, 3), generator(), torch.zeros(1).half(), steps=3
    )
    assert x.dtype == torch.float32


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 250])
def test_ancestral_sampling_recovers_a_gaussian(schedule, steps):
    """With the exact step variance the chain is exact at any number of steps."""
    diffusion = GaussianDiffusion(schedule)
    model = toy(diffusion, diffusion.sampling(steps, "ddpm"))
    x = diffusion.sample(model, (20000, 1), generator(), torch.zeros(1, dtype=torch.float64), steps=steps)
    assert abs(float(x.mean()) - MEAN) < 4 * STD / math.sqrt(20000)
    assert abs(float(x.std()) / STD - 1) < 4 / math.sqrt(40000)


@pytest.mark.parametrize(
    ("solver", "schedule", "steps", "tolerance"),
    [
        ("ddim", "linear", 1000, 0.01),
        ("ddim", "linear", "ddim250", 0.02),
        ("ddim", "cosine", 1000, 0.01),
        ("dpm++", "linear", 50, 0.01),
        ("dpm++", "linear", 100, 0.01),
        ("dpm++", "cosine", 100, 0.01),
    ],
)
def test_deterministic_solvers_recover_a_gaussian(solver, schedule, steps, tolerance):
    """The flow is x -> MEAN + STD x: noises 0 and 1 tell both."""
    diffusion = GaussianDiffusion(schedule)
    model = toy(diffusion, diffusion.sampling(steps, solver))

    def generate(noise):
        return flow(diffusion, model, noise, steps, solver)

    zero, one = generate(torch.tensor([[0.0], [1.0]], dtype=torch.float64)).flatten().tolist()
    assert abs(zero - MEAN) < tolerance and abs(one - zero - STD) < tolerance


def flow(diffusion, model, noise, steps, solver, **options):
    """Generate from a given first noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softvq_lib.generators.gaussian.normal", lambda *_: noise)
        return diffusion.sample(model, tuple(noise.shape), None, noise, steps=steps, solver=solver, **options)


def test_dpm_solver_needs_fewer_steps_than_ddim():
    diffusion = GaussianDiffusion()
    noise = torch.ones(1, 1, dtype=torch.float64)

    def error(solver, steps):
        model = toy(diffusion, diffusion.sampling(steps, solver))
        return abs(float(flow(diffusion, model, noise, steps, solver)) - MEAN - STD)

    assert error("dpm++", 50) < error("ddim", 50) / 4


def test_samplers_begin_where_there_is_signal():
    cosine = GaussianDiffusion("cosine")
    for solver in SOLVERS:
        assert cosine.sampling(25, solver).timesteps[-1] == 995
        assert GaussianDiffusion("cosine", full_range=True).sampling(25, solver).timesteps[-1] == 999
        assert GaussianDiffusion().sampling(25, solver).timesteps[-1] == 999
    assert cosine.sampling("ddim25", "ddim").timesteps == respace("ddim25", 1000)
    assert cosine.sampling(1000, "ddpm").timesteps == list(range(1000)), "as many as there are, when asked for"
    assert cosine.sampling(999, "dpm++").timesteps == list(range(1, 1000))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_error_at_the_highest_noise_does_little_harm(solver):
    """In the published range of timesteps it does ten times as much."""
    harm = {}
    for full in (False, True):
        diffusion = GaussianDiffusion("cosine", full_range=full)
        exact = toy(diffusion, diffusion.sampling(100, solver))
        wrong = [lambda x, t, e=e, exact=exact: exact(x, t) + e * (t[0] > 990) for e in (0.0, 0.05)]
        like = torch.zeros(1, dtype=torch.float64)
        right, off = (
            diffusion.sample(model, (50, 1), generator(), like, steps=100, solver=solver).mean() for model in wrong
        )
        harm[full] = float((off - right).abs())
    assert harm[False] < 0.3 and harm[True] > 10 * harm[False], harm


def test_noisy_ddim_recovers_a_gaussian():
    diffusion = GaussianDiffusion()
    model = toy(diffusion, diffusion.sampling(500, "ddim"))
    like = torch.zeros(1, dtype=torch.float64)
    x = diffusion.sample(model, (20000, 1), generator(), like, steps=500, solver="ddim", eta=1.0)
    assert abs(float(x.mean()) - MEAN) < 0.02 and abs(float(x.std()) - STD) < 0.02


def network(x, t):
    """Some smooth function of x and t in place of a trained network."""
    eps = 0.9 * x + 0.3 * torch.sin(3 * x + t[0] / 200)
    return torch.cat([eps, torch.cos(x)], dim=-1)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_equals_diffusers(eta):
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    theirs.set_timesteps(20)
    noise = torch.randn(21, 3, 4, 5, generator=generator())
    x = noise[0]
    for i, t in enumerate(theirs.timesteps):
        eps = network(x, t[None]).chunk(2, -1)[0]
        x = theirs.step(eps, int(t), x, eta=eta, variance_noise=noise[i + 1] if eta else None).prev_sample
    drawn = iter(noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softvq_lib.generators.gaussian.normal", lambda *_: next(drawn))
        ours = GaussianDiffusion().sample(network, (3, 4, 5), None, noise, steps="ddim20", solver="ddim", eta=eta)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("schedule", "beta_schedule"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50])
def test_dpm_solver_equals_diffusers(schedule, beta_schedule, steps):
    theirs = diffusers.DPMSolverMultistepScheduler(beta_schedule=beta_schedule, lambda_min_clipped=-5.1)
    theirs.set_timesteps(steps)
    assert GaussianDiffusion(schedule).sampling(steps, "dpm++").timesteps[::-1] == theirs.timesteps.tolist()
    noise = torch.randn(3, 4, 5, generator=generator())
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(network(x, t[None]).chunk(2, -1)[0], t, x).prev_sample
    ours = flow(GaussianDiffusion(schedule), network, noise, steps, "dpm++")
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 250])
def test_steps_are_evaluations_from_noise_to_data(solver, steps):
    diffusion, calls = GaussianDiffusion(), []

    def model(x, t):
        calls.append(t)
        return torch.zeros(2, 6)

    diffusion.sample(model, (2, 3), generator(), torch.zeros(1), steps=steps, solver=solver)
    assert len(calls) == steps
    assert all(t.shape == (2,) and t.dtype == torch.int64 and t[0] == t[1] for t in calls)
    times = [int(t[0]) for t in calls]
    assert times[0] == 999 and times == sorted(set(times), reverse=True)


def test_temperature_scales_the_noise_of_steps_only():
    """With a constant network the sample is affine in the temperature; the first noise is out of its reach."""
    diffusion = GaussianDiffusion()

    def generate(temperature, steps=5):
        return diffusion.sample(
            lambda x, t: torch.zeros(2, 6, dtype=x.dtype),
            (2, 3),
            generator(),
            torch.zeros(1, dtype=torch.float64),
            steps=steps,
            temperature=temperature,
        )

    none, half, full = (generate(temperature) for temperature in (0.0, 0.5, 1.0))
    assert (full - none).abs().min() > 0
    torch.testing.assert_close(half - none, (full - none) / 2)
    assert torch.equal(generate(0.0, steps=1), generate(1.0, steps=1)) and generate(0.0).abs().min() > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_depends_on_its_seed_alone(solver):
    diffusion = GaussianDiffusion()

    def generate(seeds):
        options = {"steps": 4, "solver": solver, "eta": 0.5}
        return diffusion.sample(network, (len(seeds), 2, 3), Seeds(seeds), torch.zeros(1), **options)

    together = generate([5, 6, 7])
    torch.testing.assert_close(generate([7, 5]), together[[2, 0]], rtol=0, atol=1e-6)
    assert torch.equal(generate([5, 6, 7]), together)
    assert not torch.allclose(together[0], together[1])


def test_drawn_times_cover_all_and_do_not_depend_on_the_cut():
    diffusion = GaussianDiffusion(steps=30)
    whole = diffusion.times((3000,), generator(), torch.zeros(1, dtype=torch.bfloat16))
    counts = whole.bincount()
    assert len(counts) == 30 and counts.min() > 60 and counts.max() < 140
    part = diffusion.times((10,), Rows(generator(), 3000, 20), torch.zeros(1))
    assert torch.equal(part, whole[20:30])


def test_noise_levels():
    torch.testing.assert_close(
        GaussianDiffusion().noise_level(torch.tensor([0, 333, 999])), torch.tensor([0, 1 / 3, 1])
    )


def test_progress_wraps_the_steps():
    seen = []

    def progress(steps):
        seen.append(len(steps))
        return steps

    GaussianDiffusion().sample(network, (1, 2), generator(), torch.zeros(1), steps=4, progress=progress)
    assert seen == [4]


def test_a_copy_goes_its_own_way():
    data = case("case1d")
    diffusion = GaussianDiffusion(pixel_likelihood=True)
    given = (data["prediction"], data["x0"], data["noise"], data["t"])
    expected = diffusion.loss(*given)
    twin = copy.deepcopy(diffusion)
    twin.pixel_likelihood = False
    assert torch.equal(diffusion.loss(*given), expected)
    assert not torch.equal(twin.loss(*given), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"steps": 1}, "steps=1"),
        ({"steps": 10}, "at least 21"),
    ],
)
def test_a_wrong_process_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dpm+"}, "did you mean 'dpm\\+\\+'"),
        ({"steps": 0}, "give 1 to 1000"),
        ({"steps": "ddim50", "solver": "dpm++"}, "from 1 to 999"),
        ({"steps": 1000, "solver": "dpm++"}, "from 1 to 999"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"eta": math.nan}, "eta=nan"),
    ],
)
def test_wrong_sampling_is_refused_before_any_evaluation(options, message):
    def model(x, t):
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=message):
        GaussianDiffusion().sample(model, (1, 2), None, torch.zeros(1), **options)


def test_a_network_without_variance_is_refused():
    with pytest.raises(ValueError, match="twice the channels"):
        GaussianDiffusion().sample(lambda x, t: x, (1, 2), None, torch.zeros(1), steps=2)
    with pytest.raises(ValueError, match="twice the channels"):
        GaussianDiffusion().loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1).long())
