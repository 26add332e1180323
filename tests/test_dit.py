"""DiT: parity with the published loss, gradients and samples, guidance, evaluations and input checks."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softvq_lib.draws import Rows, Seeds
from softvq_lib.generators.alignment import alignment, projector
from softvq_lib.generators.dit import DiT
from softvq_lib.generators.gaussian import SOLVERS
from softvq_lib.generators.presets import GeneratorConfig
from softvq_lib.generators.transformer import Transformer

DATA = Path(__file__).parent / "data/generators"
TOKENS, DIM, CLASSES = 4, 3, 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(tokens=TOKENS, dim=DIM, classes=CLASSES, depth=2, width=32, heads=2, **options):
    """A DiT of less than the smallest preset, whose every weight is random."""
    model = DiT(GeneratorConfig("dit", tokens=tokens, dim=dim, classes=classes, **options))
    model.backbone = Transformer(
        tokens=tokens, dim=dim, out_dim=2 * dim, classes=classes, depth=depth, width=width, heads=heads
    )
    if options.get("align_block"):
        model.projector = projector(width, options["align_width"])
    rng = generator(7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=rng)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "dit_diffusion.safetensors")


@pytest.fixture
def published(reference):
    """The model of the reference numbers: 16 tokens of 8 channels, 10 classes, 2 blocks 64 wide with 4 heads.

    Its weights are normal numbers of a known seed, so that they need not be stored.
    """
    model = small(tokens=16, dim=8, classes=10, depth=2, width=64, heads=4)
    rng, first = generator(104), []
    for name, parameter in model.backbone.named_parameters():
        scale = parameter.shape[-1] ** -0.5
        if parameter.ndim == 1:
            scale = 0.1
        elif "embedding_table" in name:
            scale = 0.5
        elif "adaLN" in name:
            scale *= 0.7
        elif ".qkv." in name or ".fc1." in name:
            scale *= 2
        parameter.data = scale * torch.randn(parameter.shape, generator=rng)
        first.append(parameter.detach().flatten()[0])
    torch.testing.assert_close(torch.stack(first), reference["weights.first"], msg="torch draws other numbers")
    model.diffusion.pixel_likelihood = True
    return model


def drawing(*tensors):
    """In place of `normal`: the given tensors, one after the other."""
    queue = iter(tensors)
    return lambda *_: next(queue)


def test_loss_and_gradients_equal_reference(published, reference, monkeypatch):
    """Label 10 among the reference's labels is "no class", which here is a dropped label."""
    data = {k[7:]: v for k, v in reference.items() if k.startswith("case1d.")}
    y = reference["y"]
    assert y.tolist()[3] == 10 and (y[:3] < 10).all()
    monkeypatch.setattr(published.diffusion, "times", lambda *_: data["t"])
    monkeypatch.setattr("softvq_lib.generators.dit.normal", drawing(data["noise"]))
    monkeypatch.setattr("softvq_lib.generators.dit.uniform", drawing(torch.tensor([1.0, 1.0, 1.0, 0.0])))
    loss, terms = published.train()(data["x0"], y.clamp(max=9), None)
    torch.testing.assert_close(loss, data["loss"].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms, {k: data[k].mean() for k in ("mse", "vb")}, rtol=1e-5, atol=0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in published.backbone.named_parameters()}
    kept = {k[5:]: v for k, v in reference.items() if k.startswith("grad.")}
    assert len(kept) == 8
    for name, expected in kept.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", "10"), ("ddim", "10"), ("ddim", "ddim10"), ("ddim", "ddim50")])
def test_samples_equal_reference(published, reference, monkeypatch, solver, steps):
    noise = reference["noise"] if solver == "ddpm" else []
    monkeypatch.setattr("softvq_lib.generators.gaussian.normal", drawing(reference["z"], *noise))
    x = published.sample(reference["y_sampling"], draws=None, steps=steps, solver=solver)
    expected = reference[f"sample.{solver}.{steps}"]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_loss_of_a_batch_does_not_depend_on_its_cut(model):
    x = torch.randn(6, TOKENS, DIM, generator=generator())
    labels = torch.arange(6) % CLASSES
    model.train()
    whole, terms = model(x, labels, generator(1))
    parts = [model(x[i : i + 2], labels[i : i + 2], Rows(generator(1), 6, i))[0] for i in (0, 2, 4)]
    model.eval()
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    torch.testing.assert_close(terms["mse"] + terms["vb"], whole.detach())
    assert whole.requires_grad and not terms["mse"].requires_grad


def test_labels_are_dropped_in_training_only():
    model = small(label_dropout=0.3)
    seen = []
    model.backbone.y_embedder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, labels = torch.zeros(2000, TOKENS, DIM), torch.full((2000,), 2)
    model.train()(x, labels, generator())
    model.eval()(x, labels, generator())
    assert set(seen[0].tolist()) == {2, CLASSES} and abs(float((seen[0] == CLASSES).float().mean()) - 0.3) < 0.04
    assert (seen[1] == 2).all()


def test_alignment_adds_to_the_loss():
    config = {"align_block": 1, "align_width": 6, "align_weight": 0.25}
    model = small(**config)
    x, labels = torch.randn(2, TOKENS, DIM, generator=generator()), torch.tensor([0, 1])
    teacher = torch.randn(2, 2 * TOKENS, 6, generator=generator(2))
    seen = []
    model.projector.register_forward_hook(lambda _, __, output: seen.append(output))
    loss, terms = model(x, labels, generator(), teacher)
    torch.testing.assert_close(terms["alignment"], alignment(seen[0], teacher).detach())
    torch.testing.assert_close(loss.detach(), terms["mse"] + terms["vb"] + 0.25 * terms["alignment"])
    with pytest.raises(ValueError, match="with alignment got no teacher"):
        model(x, labels, generator())
    with pytest.raises(ValueError, match="without alignment got a teacher"):
        small()(x, labels, generator(), teacher)


def evaluated(model, monkeypatch, labels, **options):
    """Rows of every evaluation of the network in a call of `sample`."""
    rows, run = [], model.backbone.run

    def counted(x, *arguments):
        rows.append(len(x))
        return run(x, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "run", counted)
        model.sample(labels, draws=generator(), **options)
    return rows


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_evaluations_are_as_announced(model, monkeypatch, solver, steps):
    """One batch a step, of twice the rows inside the interval."""
    labels = torch.tensor([0, 1, 4])
    options = {"steps": steps, "solver": solver}
    assert evaluated(model, monkeypatch, labels, **options) == [3] * steps
    assert model.evaluations(**options) == steps
    options |= {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
    rows = evaluated(model, monkeypatch, labels, **options)
    assert len(rows) == steps and rows == sorted(rows)
    assert model.evaluations(**options) == sum(rows) / 3
    assert model.evaluations(steps, solver, guidance_scale=2.0) == 2 * steps


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250])
def test_an_interval_saves_evaluations(model, solver, steps):
    cost = model.evaluations(steps, solver, guidance_scale=1.5, guidance_interval=(0.0, 0.7)) / steps
    assert 1.6 < cost <= 1.7


def test_guidance_moves_eps_on_all_tokens_and_channels_and_leaves_the_variance(model, monkeypatch):
    labels, null = torch.tensor([1, 3]), torch.full((2,), CLASSES)
    captured = {}

    def sample(network, shape, *_, **__):
        x = torch.randn(shape, generator=generator())
        captured.update(x=x, out=network(x, torch.full((2,), 999)))
        return x

    with monkeypatch.context() as patch:
        patch.setattr(model.diffusion, "sample", sample)
        model.sample(labels, draws=None, steps=1, guidance_scale=3.0)
    x, t = captured["x"], torch.full((2,), 999)
    with torch.no_grad():
        with_class, without = model.backbone(x, t, labels), model.backbone(x, t, null)
    eps, v = captured["out"].split(DIM, dim=-1)
    torch.testing.assert_close(v, with_class[..., DIM:])
    difference = with_class[..., :DIM] - without[..., :DIM]
    assert difference.abs().min() > 0
    torch.testing.assert_close(eps, without[..., :DIM] + 3 * difference, rtol=1e-4, atol=1e-5)


def test_guidance_of_scale_one_or_outside_its_interval_does_nothing(model):
    def generate(**options):
        return model.sample(torch.tensor([0, 2]), draws=generator(), steps=8, **options)

    plain = generate()
    assert torch.equal(generate(guidance_scale=1.0, guidance_interval=(0.2, 0.4)), plain)
    assert torch.equal(generate(guidance_scale=4.0, guidance_interval=(0.001, 0.002)), plain)
    assert not torch.allclose(generate(guidance_scale=4.0), plain)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_depends_on_its_seed_and_class_alone(model, solver):
    def generate(labels, seeds):
        return model.sample(torch.tensor(labels), draws=Seeds(seeds), steps=6, solver=solver, guidance_scale=2.0)

    together = generate([0, 1, 4], [10, 11, 12])
    assert together.shape == (3, TOKENS, DIM) and together.isfinite().all()
    assert torch.equal(generate([0, 1, 4], [10, 11, 12]), together)
    scale = float(together.abs().max())
    torch.testing.assert_close(generate([4], [12]), together[2:], rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(generate([3], [12]), together[2:], rtol=0, atol=1e-2 * scale)


def test_half_precision_weights_sample_in_fp32(model):
    half = small().bfloat16()
    x = half.sample(torch.tensor([1]), draws=generator(), steps=3)
    assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.fixture
def one_thread():
    """Many small operations on a busy machine: threads that wait for each other would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_trained_model_generates_its_classes(one_thread):
    """Two classes at +1 and -1 in every channel, deviation 0.1."""
    torch.manual_seed(0)
    model = small(tokens=2, dim=2, classes=2, depth=1, width=32)
    model.backbone._initialise()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    draws = generator()
    for _ in range(150):
        labels = torch.randint(2, (64,), generator=draws)
        x = (1.0 - 2 * labels)[:, None, None] + 0.1 * torch.randn(64, 2, 2, generator=draws)
        loss, terms = model(x, labels, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["mse"] < 0.1
    labels = torch.arange(2).repeat(50)
    for options in ({"solver": "ddpm", "steps": 50}, {"solver": "ddim", "steps": 25}, {"solver": "dpm++", "steps": 15}):
        x = model.eval().sample(labels, draws=draws, **options)
        middle = torch.stack([x[labels == c].flatten(0, 1).median(0).values for c in (0, 1)])  # (class, d)
        assert (middle - torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).abs().max() < 0.2
        assert ((x.mean((1, 2)) > 0) == (labels == 0)).float().mean() > 0.95


def test_the_schedule_is_the_configured_one():
    a = small(schedule="cosine").diffusion.schedule.alpha_bar
    assert math.isclose(a[499], 0.494, abs_tol=0.002) and small().diffusion.schedule.alpha_bar[499] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 1001}, "steps=1001"),
        ({"solver": "euler"}, "solver='euler'"),
        ({"guidance_scale": -0.5}, "guidance_scale=-0.5"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval"),
        ({"labels": torch.tensor([CLASSES])}, f"label {CLASSES} is out of range"),
        ({"labels": torch.tensor([-1])}, "label -1 is out of range"),
        ({"labels": torch.tensor([0.5])}, "give integers"),
    ],
)
def test_wrong_sampling_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**{"labels": torch.tensor([0]), "draws": generator(), **options})


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((1, TOKENS + 1, DIM), [0], "do not fit this generator"),
        ((1, TOKENS, DIM + 1), [0], "do not fit this generator"),
        ((1, TOKENS, DIM), [CLASSES], "out of range"),
    ],
)
def test_wrong_latents_and_labels_are_refused(model, shape, labels, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape), torch.tensor(labels), generator())


def test_a_configuration_of_another_generator_is_refused():
    with pytest.raises(ValueError, match="generator='sit'"):
        DiT(GeneratorConfig("sit", tokens=4, dim=3, classes=5))
