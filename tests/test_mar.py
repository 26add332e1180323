"""MAR and its head: parity with the published code, what is drawn and what is computed, failures.

Weights and inputs of the reference numbers are normal numbers of known seeds, so that only results are stored.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq_lib.draws import Rows, Seeds
from softvq_lib.generators import gaussian, mar
from softvq_lib.generators.gaussian import GaussianDiffusion
from softvq_lib.generators.mar import MAR, mask_ratio, set_sizes
from softvq_lib.generators.presets import SIZES, GeneratorConfig

REFERENCE = load_file(Path(__file__).parent / "data" / "generators" / "mar.safetensors")
LABELS = REFERENCE["labels"]
SMALL = {"generator": "mar", "size": "tiny", "tokens": 16, "dim": 8, "classes": 10, "buffer": 4}
SMALL |= {"head_depth": 2, "head_width": 48, "head_repeat": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


X = numbers((4, 16, 8), 61)


def fill(model: MAR) -> None:
    """Give every parameter the random numbers of the reference."""
    generator = seeded(160)
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[-1]
        if parameter.ndim == 1:
            scale = 0.1
        elif name.endswith(("fake_latent", "_learned", "mask_token", "class_emb.weight")):
            scale = 0.5
        elif "adaLN" in name:
            scale = 0.7 * fan_in**-0.5
        else:
            scale = (2 if ".qkv." in name or ".fc1." in name else 1) * fan_in**-0.5
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) + norm


def small(**settings) -> MAR:
    """A model with weights at which everything has an effect."""
    model = MAR(GeneratorConfig(**SMALL | settings))
    fill(model)
    return model.eval()


@pytest.fixture(autouse=True)
def size_of_the_reference(monkeypatch):
    monkeypatch.setitem(SIZES["mar"], "tiny", SIZES["mar"]["tiny"] | {"depth": 2, "width": 64})


@pytest.fixture
def reference() -> MAR:
    model = small()
    model.diffloss.diffusion = GaussianDiffusion("cosine", pixel_likelihood=True, full_range=True)
    first = torch.stack([parameter.detach().flatten()[0] for parameter in model.parameters()])
    assert torch.allclose(first, REFERENCE["weights.first"], atol=1e-6), "torch draws other numbers than it did"
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> bool:
    """Whether no element differs by more than a part of the largest."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() <= rtol * expected.abs().max()).item()


class Spy:
    """Sees every output of a module."""

    def __init__(self, module: torch.nn.Module):
        self.outputs = []
        module.register_forward_hook(lambda module, inputs, output: self.outputs.append(output))

    @property
    def rows(self) -> list[int]:
        return [math.prod(output.shape[:-1]) for output in self.outputs]


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [16, 12, 11])
def test_training_equals_reference(reference, monkeypatch, masked):
    """Encoder, decoder, loss and gradients for given orders, times and noise."""

    def stack(rows):  # the reference lays out draws, then samples, then tokens
        return rows.unflatten(0, (2, 4, 16)).transpose(0, 1)

    draws = {(4, 16): REFERENCE["orders"].argsort(1) / 16, (4, 2, 16): stack(REFERENCE["t"] + 0.5) / 1000}
    for module in (mar, gaussian):
        monkeypatch.setattr(module, "uniform", lambda shape, draws_, like: draws.get(shape, torch.zeros(shape)))
    monkeypatch.setattr(mar, "normal", lambda shape, draws_, like: stack(numbers((128, 8), 63)))
    monkeypatch.setattr(mar, "mask_ratio", lambda u: masked / 16)
    encoder, terms = Spy(reference.encoder_norm), []
    conditions, head = reference._conditions, reference.diffloss.terms
    monkeypatch.setattr(reference, "_conditions", lambda *inputs: terms.append(conditions(*inputs)) or terms[0])
    monkeypatch.setattr(reference.diffloss, "terms", lambda *inputs: terms.append(head(*inputs)) or terms[1])
    loss, parts = reference(X, LABELS, None)
    loss.backward()

    assert close(encoder.outputs[0], REFERENCE[f"{masked}.encoder_out"])
    assert close(terms[0], REFERENCE[f"{masked}.decoder_out"])
    mask = REFERENCE["orders"].argsort(1) < masked
    for name in ("mse", "vb"):
        expected = REFERENCE[f"{masked}.{name}"].view(2, 4, 16)[:, mask]
        # The distribution function at t = 0 is a difference of nearly equal numbers.
        first = REFERENCE["t"].view(2, 4, 16)[:, mask] == 0
        assert close(terms[1][name][~first], expected[~first])
        assert torch.allclose(terms[1][name][first], expected[first], rtol=1e-5, atol=2e-3)
        assert parts[name].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(REFERENCE[f"{masked}.loss"].item(), rel=1e-5)

    stored = {k.split(".grad.")[1]: v for k, v in REFERENCE.items() if k.startswith(f"{masked}.grad.")}
    assert len(stored) == (len(list(reference.parameters())) - 1 if masked == 12 else 0)
    for name, expected in stored.items():
        gradient = reference.get_parameter(name).grad
        if gradient.ndim > 1:
            gradient = gradient @ numbers((gradient.shape[-1],), 0)
        assert close(gradient, expected, 2e-5), name


def test_head_equals_reference(reference):
    net, x, t = reference.diffloss.net, numbers((6, 8), 65), REFERENCE["mlp.t"]
    z, null = numbers((6, 64), 64), numbers((6, 64), 66)
    assert close(net(x, t, net.cond_embed(z)), REFERENCE["mlp.out"])
    # Its guided output repeats the noise for both halves; the variance of the first is the one that counts.
    seen = {}

    class Process:
        def sample(self, model, shape, *args, **kwargs):
            for i, time in enumerate(t):
                seen[i] = model(x[None, i : i + 1].expand(shape), time[None])
            return x

    reference.diffloss.diffusion = Process()
    for i in range(6):
        both = torch.stack([z[i], null[i]])[:, None, None]  # (2, 1, 1, c)
        reference.diffloss.sample(both, None, 3.0)
        assert close(seen[i][0, 0], REFERENCE["mlp.cfg"][i])


@pytest.mark.parametrize(
    ("scale", "schedule", "temperature", "steps"),
    [(1.0, "linear", 1.0, 6), (3.0, "linear", 1.0, 6), (3.0, "constant", 0.95, 6), (1.0, "linear", 0.9, 16)],
)
def test_sampling_equals_reference(reference, monkeypatch, scale, schedule, temperature, steps):
    """In float64: these weights take rounding errors of single precision to a few parts in ten thousand."""
    reference.double()
    generator, orders = seeded(81), REFERENCE["sample.orders"]
    expected, masked, scales = (
        REFERENCE[f"sample.{scale}.{schedule}.{temperature}.{steps}.{name}"] for name in ("out", "masked", "scale")
    )
    drawn = []

    def normal(shape, draws, like):
        drawn.append(shape)
        # The reference draws for the unconditional half too, and at the last of ten steps, where it adds none.
        rows, noise = shape[0] * shape[1], []
        for _ in range(2 if len(drawn) % 10 == 0 else 1):
            doubled = scale != 1 and len(drawn) % 10 != 1
            noise.append(torch.randn(((2 if doubled else 1) * rows, 8), generator=generator)[:rows].view(shape))
        return noise[0].to(like.dtype)

    used = []
    sample = reference.diffloss.sample
    monkeypatch.setattr(gaussian, "normal", normal)
    monkeypatch.setattr(mar, "uniform", lambda shape, draws, like: orders.argsort(1) / 16)
    monkeypatch.setattr(reference.diffloss, "sample", lambda *a, **k: used.append(a[2]) or sample(*a, **k))
    settings = {"guidance_scale": scale, "guidance_schedule": schedule, "temperature": temperature}
    x = reference.sample(LABELS, draws=None, steps=steps, head_steps=10, **settings)
    assert close(x, expected, 2e-4)
    assert used == pytest.approx(scales.tolist())
    left = 16 - torch.tensor(set_sizes(16, steps)).cumsum(0)
    assert torch.equal(left[:-1], masked[:-1]), "the last is all that is left; the reference says 1 there"


def test_schedules_equal_reference():
    """Tokens of each step, ratios of masking, and the diffusion's tables and timesteps."""
    tables = [key for key in REFERENCE if key.startswith("sizes.")]
    assert len(tables) == 7
    for key in tables:
        _, tokens, steps = key.split(".")
        assert set_sizes(int(tokens), int(steps)) == REFERENCE[key].tolist()
    for q, ratio in zip(REFERENCE["ratio.q"].tolist(), REFERENCE["ratio.value"].tolist(), strict=True):
        assert mask_ratio(q) == pytest.approx(ratio, abs=1e-6)
    ratios = torch.tensor([mask_ratio((i + 0.5) / 2000) for i in range(2000)], dtype=torch.float64)
    assert torch.allclose(torch.stack([ratios.mean(), ratios.std()]), REFERENCE["ratio.moments"], atol=1e-4)
    schedule = GaussianDiffusion("cosine").schedule
    for name, table in (("betas", schedule.beta), ("alphas_cumprod", schedule.alpha_bar)):
        assert torch.allclose(table[::37], REFERENCE[f"cosine.{name}"], rtol=1e-8)
    assert torch.allclose(schedule.posterior_variance[::37], REFERENCE["cosine.posterior_variance"], rtol=1e-8)
    for steps in (10, 100):
        assert (
            GaussianDiffusion("cosine", full_range=True).sampling(steps, "ddpm").timesteps
            == REFERENCE[f"cosine.steps{steps}"].tolist()
        )


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("b", (207_470_144, 207_543_872, 207_924_768)),
        ("l", (477_716_032, 477_814_336, 478_326_304)),
        ("h", (941_637_184, 941_760_064, 942_403_104)),
    ],
)
def test_presets_have_the_published_number_of_parameters(size, counts):
    for (tokens, dim), count in zip(((32, 32), (64, 32), (256, 16)), counts, strict=True):
        with torch.device("meta"):
            model = MAR(GeneratorConfig(generator="mar", size=size, tokens=tokens, dim=dim, classes=1000))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_head_sees_masked_tokens_alone(per_sample):
    """One ratio for the batch or one for each sample; the encoder sees the other tokens."""
    model = small(mask_per_sample=per_sample)
    head, encoder, condition = (
        Spy(module) for module in (model.diffloss.net.input_proj, model.z_proj, model.diffloss.net.cond_embed)
    )
    for seed in range(12):
        model(X, LABELS, seeded(seed))
    masked = condition.rows
    assert head.rows == [2 * rows for rows in masked], "head_repeat is 2"
    assert all(math.ceil(0.7 * 16) * 4 <= rows <= 16 * 4 for rows in masked)
    assert any(rows % 4 for rows in masked) == per_sample
    if not per_sample:
        assert [rows + seen for rows, seen in zip(masked, encoder.rows, strict=True)] == [4 * 16] * 12


def test_padding_changes_nothing(monkeypatch):
    """The gradient of a batch of samples with masks of their own is the mean of those of the samples alone."""
    model = small(mask_per_sample=True)
    conditions, valid = model._conditions, []
    monkeypatch.setattr(model, "_conditions", lambda *inputs: valid.append(inputs[3]) or conditions(*inputs))
    model(X, LABELS, seeded(3))[0].backward()
    assert len(set(valid[0].sum(1).tolist())) > 2, "these samples keep different numbers of tokens"
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i in range(4):
        (model(X[i : i + 1], LABELS[i : i + 1], Rows(seeded(3), 4, i))[0] / 4).backward()
        assert valid[-1] is None, "one sample needs no padding"
    for name, gradient in whole.items():
        assert close(model.get_parameter(name).grad, gradient, 1e-4), name


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_loss_does_not_depend_on_the_cut_into_parts(per_sample):
    model = small(mask_per_sample=per_sample, dropout=0.0, label_dropout=0.5).train()
    whole = model(X, LABELS, seeded())[0]
    parts = [model(X[i : i + n], LABELS[i : i + n], Rows(seeded(), 4, i))[0] * n for i, n in ((0, 1), (1, 3))]
    assert (sum(parts) / 4).item() == pytest.approx(whole.item(), rel=1e-5)


def test_dropout_follows_draws_alone():
    model = small(dropout=0.5).train()

    def loss(seed: int, disturbance: int = 0) -> float:
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        value = model(X, LABELS, seeded(seed))[0].item()
        assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
        return value

    assert loss(0) == loss(0, disturbance=1) != loss(1)
    encoder = Spy(model.encoder_norm)
    for start in (0, 2):  # two parts of a batch, alike but for their masks
        with mar._dropout_from(Rows(seeded(), 4, start), X, True):
            model._conditions(X, model._classes(LABELS), torch.zeros(4, 1, dtype=torch.long))
    assert not torch.equal(*encoder.outputs)


def test_labels_are_dropped_in_training_alone():
    for training, share, expected in ((True, 1.0, True), (True, 0.0, False), (False, 1.0, False)):
        model = small(label_dropout=share).train(training)
        model(X, LABELS, seeded())[0].backward()
        reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in (model.fake_latent, model.class_emb.weight)]
        assert reached == [expected, not expected]


def test_masked_tokens_are_not_looked_at(monkeypatch):
    """No mask leaks: changing a masked token changes no condition."""
    model, outputs = small(), []
    conditions = model._conditions
    monkeypatch.setattr(
        model, "_conditions", lambda *inputs: outputs.append((inputs[2], conditions(*inputs))) or outputs[-1][1]
    )
    model(X, LABELS, seeded())
    kept, z = outputs[0]
    other = torch.zeros_like(X).scatter(
        1, kept[..., None].expand(-1, -1, 8), X.gather(1, kept[..., None].expand(-1, -1, 8))
    )
    assert not torch.equal(other, X)
    model(other, LABELS, seeded())
    assert torch.equal(outputs[1][1], z)


def test_weight_decay_spares_vectors_and_the_head():
    model = small()
    spared = model.no_weight_decay()
    assert {"diffloss.net.cond_embed.weight", "z_proj.bias", "encoder_norm.weight"} <= spared
    decayed = {name for name, _ in model.named_parameters()} - spared
    assert {"z_proj.weight", "mask_token", "class_emb.weight", "encoder_blocks.0.attn.qkv.weight"} <= decayed
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)


def test_half_precision():
    """By autocast in training, and of the weights in sampling."""
    model = small().train()
    whole = model(X, LABELS, seeded())[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X, LABELS, seeded())[0]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.05)
    x = model.eval().bfloat16().sample(LABELS, draws=seeded(), steps=2, guidance_scale=2.0, head_steps=2)
    assert x.dtype == torch.float32 and x.isfinite().all()


# -- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_computes_what_it_must():
    """One pass for each step, guidance as one batch where the scale is not 1, the head for the set alone."""
    for scale, copies in ((1.0, 1), (2.0, 2)):
        model = small()
        encoder, head, condition = (
            Spy(module) for module in (model.encoder_norm, model.diffloss.net.input_proj, model.diffloss.net.cond_embed)
        )
        model.sample(LABELS, draws=seeded(), steps=4, guidance_scale=scale, head_steps=3)
        assert model.evaluations(4, guidance_scale=scale) == copies * 4 == copies * len(encoder.outputs)
        sizes = set_sizes(16, 4)
        known = [sum(sizes[:i]) for i in range(4)]
        assert [output.shape[:2] for output in encoder.outputs] == [(copies * 4, 4 + k) for k in known]
        assert condition.rows == [copies * 4 * size for size in sizes]
        assert head.rows == [4 * size for size in sizes for _ in range(3)]


def test_a_sample_does_not_depend_on_its_batch():
    model = small()
    settings = {"steps": 5, "guidance_scale": 2.0, "head_steps": 4}
    together = model.sample(LABELS, draws=Seeds([7, 8, 9, 10]), **settings)
    assert torch.equal(together, model.sample(LABELS, draws=Seeds([7, 8, 9, 10]), **settings))
    for i in (0, 2):
        alone = model.sample(LABELS[i : i + 1], draws=Seeds([7 + i]), **settings)
        assert close(alone[0], together[i], 1e-3)
    other = model.sample(LABELS, draws=Seeds([1, 2, 3, 4]), **settings)
    assert not close(other, together, 0.1)


def test_temperature_zero_leaves_the_first_noise():
    model = small()
    drawn = [model.sample(LABELS, draws=seeded(), steps=2, head_steps=5, temperature=t) for t in (0.0, 0.0, 1.0)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_progress_wraps_the_steps():
    seen = []
    model = small()
    model.sample(LABELS, draws=seeded(), head_steps=1, progress=lambda steps: seen.extend(steps) or steps)
    assert len(seen) == 16, "as many steps as tokens, where these are fewer than 64"


def test_it_learns_to_draw_the_class_asked_for(monkeypatch):
    monkeypatch.setitem(SIZES["mar"]["tiny"], "depth", 1)
    torch.manual_seed(0)
    settings = {"tokens": 4, "dim": 2, "classes": 2, "buffer": 1, "head_depth": 1, "head_width": 64, "head_repeat": 16}
    model = MAR(GeneratorConfig(**SMALL | settings | {"dropout": 0.0}))
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.arange(16) % 2
    centres = torch.tensor([-1.0, 1.0])[labels][:, None, None]  # (b, 1, 1)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 80)
        loss, _ = model(centres + 0.1 * numbers((16, 4, 2), step), labels, seeded(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = model.eval().sample(labels, draws=seeded(), steps=2, head_steps=20, head_solver="ddim")
    assert (x - centres).abs().median() < 0.5
    assert (x.sign() == centres).float().mean() > 0.8


# -- files and failures ----------------------------------------------------------------------------------------------


def test_saved_and_loaded_weights_draw_the_same(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "mar.safetensors")
    other = MAR(model.config).eval()
    other.load_state_dict(load_file(tmp_path / "mar.safetensors"))
    settings = {"steps": 2, "head_steps": 2}
    assert torch.equal(*(each.sample(LABELS, draws=seeded(), **settings) for each in (model, other)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "1 to 16"),
        ({"steps": 17}, "1 to 16"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_schedule": "lineer"}, "did you mean 'linear'"),
        ({"temperature": -0.1}, "temperature"),
        ({"head_steps": 0}, "1 to 1000"),
        ({"head_steps": 1001}, "1 to 1000"),
        ({"head_solver": "ddpn"}, "did you mean 'ddpm'"),
        ({"labels": torch.tensor([0, 10])}, "0 to 9"),
        ({"labels": torch.tensor([-1])}, "0 to 9"),
        ({"labels": torch.tensor([0.5])}, "integers"),
    ],
)
def test_bad_sampling_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small().sample(**{"labels": LABELS, "draws": seeded()} | settings)


def test_bad_inputs_are_named():
    model = small()
    for x in (X[:, :12], X[..., :4], X[0]):
        with pytest.raises(ValueError, match=r"give \(batch, 16, 8\)"):
            model(x, LABELS, None)
    with pytest.raises(ValueError, match="0 to 9"):
        model(X, LABELS + 1, None)
    with pytest.raises(ValueError, match="alignment"):
        model(X, LABELS, None, teacher=X)
    with pytest.raises(ValueError, match="training mode"):
        model.train().sample(LABELS, draws=None)
    with pytest.raises(ValueError, match="generator='sit'"):
        MAR(GeneratorConfig(generator="sit", tokens=16, dim=8, classes=10))
