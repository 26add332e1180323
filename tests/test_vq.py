"""VQ's remedies against collapse, by hand: k-means start, moving-average codebook, revival; training of every kind."""

import pytest
import torch
import torch.nn.functional as F
from test_training import interrupt, same_files, small

from softvq_lib.tokenizers import VQ
from softvq_lib.training import reconstruct, train
from softvq_lib.training import tokenizer as trainer


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(**settings) -> VQ:
    """Two codes on a line, at -1 and 1."""
    quantizer = VQ(1, 1, 2, l2=False, entropy_temperature=None, **settings).train()
    quantizer.codebook.data = torch.tensor([[[-1.0], [1.0]]])
    if "total" in dict(quantizer.named_buffers()):
        quantizer.total.copy_(quantizer.codebook)
    return quantizer


def test_moving_average_codebook_by_hand():
    quantizer = flat(ema=0.5)
    z_hat = torch.tensor([0.5, 2.0, 3.5, -2.0]).reshape(4, 1, 1)
    z, losses = quantizer(z_hat)
    assert z.flatten().tolist() == [1, 1, 1, -1] and set(losses) == {"commit"}
    # In units of an even share (2 tokens a code): use 1 -> (1 + 3/2) / 2, total 1 -> (1 + 6/2) / 2; likewise -1.
    assert quantizer.use.tolist() == [[0.75, 1.25]]
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[[-1.0 / 0.75], [2.0 / 1.25]]]))
    assert not quantizer.codebook.requires_grad
    before = quantizer.codebook.clone()
    quantizer.eval()(z_hat)
    assert torch.equal(quantizer.codebook, before)


def test_a_code_without_tokens_stays_where_it_is():
    quantizer = flat(ema=0.1)
    for _ in range(60):
        quantizer(torch.full((2, 1, 1), 3.0))
    assert quantizer.codebook[0, 0].item() == pytest.approx(-1, abs=1e-4)
    assert quantizer.codebook[0, 1].item() == pytest.approx(3, abs=1e-4)


def test_the_backward_pass_uses_the_codewords_of_the_forward_pass():
    quantizer = VQ(2, 3, 4, l2=False, ema=0.5).train()
    z_hat = torch.randn(3, 2, 3, requires_grad=True)
    still = VQ(2, 3, 4, l2=False).train()
    still.codebook.data = quantizer.codebook.detach().clone()
    losses, expected = quantizer(z_hat)[1], still(z_hat)[1]
    gradients = [torch.autograd.grad(each["kl"] + each["commit"], z_hat)[0] for each in (losses, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_dead_code_starts_again_at_a_token(ema):
    quantizer = flat(ema=ema, revive=0.5)
    quantizer.use.copy_(torch.tensor([[0.4, 1.0]]))
    z_hat = torch.tensor([2.0, 3.0]).reshape(2, 1, 1)
    z, _ = quantizer(z_hat, seeded())
    # The code at -1 now is at 2 or at 3, where it wins both tokens, twice an even share; the other wins none.
    assert z.flatten().tolist() in ([2, 2], [3, 3])
    decay = ema or 0.99
    assert quantizer.use[0].tolist() == pytest.approx([decay * 1 + (1 - decay) * 2, decay * 1])
    quantizer.eval()
    quantizer.use.zero_()
    before = quantizer.codebook.clone()
    quantizer(z_hat)
    assert torch.equal(quantizer.codebook, before), "nothing is restarted in evaluation"


def test_kmeans_finds_clusters_and_runs_once():
    centres = F.normalize(torch.randn(3, 8, generator=seeded()), dim=-1)
    z_hat = (centres[torch.arange(60) % 3] + 0.01 * torch.randn(60, 8, generator=seeded(1))).reshape(60, 1, 8)
    found = []
    for seed in range(8):  # random starts: some may put two centres into one cluster
        quantizer = VQ(1, 8, 3, kmeans=10).train()
        quantizer(z_hat, seeded(seed))
        assert quantizer.started
        found.append((torch.cdist(centres, quantizer.codebook[0]).min(-1).values < 0.05).all().item())
    assert any(found)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(60, 1, 8), seeded())
    assert torch.equal(quantizer.codebook, before)


def test_kmeans_with_fewer_tokens_than_codes_starts_as_many():
    quantizer = VQ(2, 3, 8, 2, kmeans=2, ema=0.9).train()
    before = quantizer.codebook.clone()
    z_hat = torch.randn(4, 2, 3)
    z, _ = quantizer(z_hat, seeded())
    torch.testing.assert_close(z, F.normalize(z_hat, dim=-1), atol=1e-5, rtol=0)  # each token is its own centre
    torch.testing.assert_close(quantizer.codebook[:, 4:], before[:, 4:])


def test_a_generator_decides_all_draws_and_state_goes_on_exactly():
    batches = [torch.randn(16, 2, 3, generator=seeded(i)) for i in range(6)]

    def run(quantizer, first, last):
        for i in range(first, last):
            quantizer(batches[i], seeded(i))
        return quantizer

    def new():
        torch.manual_seed(0)
        return VQ(2, 3, 24, 2, ema=0.8, revive=0.5, kmeans=3).train()

    whole, half = run(new(), 0, 6), run(new(), 0, 3)
    torch.manual_seed(1)
    resumed = VQ(2, 3, 24, 2, ema=0.8, revive=0.5, kmeans=3).train()
    resumed.load_state_dict(half.state_dict())
    run(resumed, 3, 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_remedies_keep_more_codes_in_use():
    """Tokens far from where codewords start: plain VQ uses few codes, with revival nearly all."""
    z_hat = F.normalize(torch.tensor([3.0, 0, 0, 0]) + 0.3 * torch.randn(256, 1, 4, generator=seeded()), dim=-1)
    used = {}
    for name, settings in {"plain": {}, "remedies": {"ema": 0.8, "revive": 0.3}}.items():
        torch.manual_seed(0)
        quantizer = VQ(1, 4, 32, **settings).train()
        for step in range(40):
            quantizer(z_hat, seeded(step))
        used[name] = len(quantizer.indices(z_hat).unique())
    assert used["plain"] <= 8 and used["remedies"] >= 24


KINDS = {
    "ae": {"quantizer": "ae"},
    "kl": {"quantizer": "kl"},
    "vq": {"quantizer": "vq"},
    "vq-remedies": {"quantizer": "vq", "vq_ema": 0.9, "vq_revive": 0.1, "vq_kmeans": 2},
    "gmmvq": {"quantizer": "gmmvq"},
    "vq-residual": {"quantizer": "vq", "residual": 2},
    "gmmvq-product-residual": {"quantizer": "gmmvq", "product": 2, "residual": 2, "codebooks": 2},
    "softvq-product": {"quantizer": "softvq", "product": 2},
    "softvq-residual": {"quantizer": "softvq", "residual": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantizer_trains(kind, tmp_path):
    run = train(**small(tmp_path, steps=6, log_every=1, codebook_size=32, **KINDS[kind]))
    rows = [row for row in run.metrics if "loss" in row]
    # The learning rate rises from zero: the last steps see more than the first.
    assert rows[-1]["reconstruction"] < rows[0]["reconstruction"]
    weight = {"ae": None, "kl": 1e-6}.get(kind, 0.01)
    assert ("kl" in rows[0]) == (weight is not None) and run.identity["kl_weight"] == (weight or 0.01)
    measured = [row for row in run.metrics if "val_psnr" in row][-1]
    assert ("val_usage" in measured) == (kind not in ("ae", "kl"))
    assert run.tokenizer.config.quantizer == KINDS[kind]["quantizer"]


@pytest.mark.parametrize("kind", ["kl", "vq-remedies"])
def test_what_draws_at_random_goes_on_exactly(kind, tmp_path, monkeypatch):
    settings = {"steps": 6, "checkpoint_every": 2, "codebook_size": 32, "log_every": 1, **KINDS[kind]}
    whole = train(**small(tmp_path / "a", **settings))
    interrupt(monkeypatch, 3, **small(tmp_path / "b", **settings))
    torch.manual_seed(123)  # nothing may depend on torch's own generator
    resumed = train(**small(tmp_path / "b", **settings))
    assert resumed.manifest["resumed_at"] == [2]
    same_files(whole, resumed, "checkpoints/step-00000006.safetensors")


def test_an_encoder_that_breaks_is_named_with_its_step(tmp_path, monkeypatch):
    build = trainer._build

    def broken(*arguments):
        model, config = build(*arguments)
        model.to_latent.bias.data.fill_(float("nan"))
        return model, config

    monkeypatch.setattr(trainer, "_build", broken)
    monkeypatch.setattr(trainer.TokenizerTrainer, "_measure", lambda self: None)
    with pytest.raises(FloatingPointError, match="step 0: z_hat holds NaN.*batch rows 0, 1.*images"):
        train(**small(tmp_path, steps=2, quantizer="ae"))


def test_a_quantizer_without_codebook_has_figures_and_table_rows(tmp_path):
    from softvq_lib import figures, results, tables, train_tokenizer

    settings = small(tmp_path, steps=2, quantizer="ae")
    experiment = train_tokenizer(**settings, results=str(tmp_path / "results"))
    assert experiment.measured.usage == {} and experiment.measured.code_probability is None
    assert "codebook" not in str(experiment)
    assert figures.code_usage(experiment.measured).axes[0].get_title() == "no codebook"
    figures.curves(experiment.run.metrics, "ae")
    assert "| – | – |" in tables.reconstruction(results.read(tmp_path / "results" / "train_tokenizer.jsonl"))
    with pytest.raises(ValueError, match="AE has no codebook"):
        experiment.run.tokenizer.encode(torch.zeros(1, 3, 32, 32)).posterior()
    assert reconstruct(experiment.run.tokenizer, experiment.data.validation, limit=4).usage == {}
