"""SoftVQ as attention: every path against the formulas written out as matrices, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from softvq_lib.tokenizers import POSTERIORS, SoftVQ, attention
from softvq_lib.tokenizers.plain import plain
from softvq_lib.tokenizers.quantizer import kl_term
from softvq_lib.tokenizers.softvq import temperatures


def brute_force(posterior, z, c, tau, entropy_tau):
    """Eq. 4 by its definition, (n, t, d) and (n, k, d), one difference z - c at a time."""
    keys = c
    if posterior == "released":
        z, c = z / z.norm(dim=-1, keepdim=True), c / c.norm(dim=-1, keepdim=True)
        keys = c.detach()
    square = (z[:, :, None] - keys[:, None]).square().sum(-1)  # (n, t, k)
    scores = -square.sqrt() if posterior == "paper" else -square / 2
    log_q = (scores / entropy_tau).log_softmax(-1)
    return (scores / tau).softmax(-1) @ c, kl_term(log_q, pooled=posterior == "released")


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Chunks of 3 tokens, which divide no number of tokens used here."""
    monkeypatch.setattr(attention, "_ON_CPU", 1)
    monkeypatch.setattr(attention, "_LEAST", 3)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("entropy_tau", [0.2, 0.05])
@pytest.mark.parametrize("codebooks", [1, 4])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_equals_brute_force(few_at_a_time, posterior, codebooks, entropy_tau, training):
    """Values, and gradients to z_hat and to every codeword, with and without the KL term."""
    quantizer = SoftVQ(8, 3, 7, codebooks, posterior, 0.2, entropy_tau).double().train(training)
    z_hat, upstream = drawn(5, 8, 3).requires_grad_(), drawn(5, 8, 4)[..., :3]
    z, losses = quantizer(z_hat)
    tokens = quantizer.segments(z_hat)
    expected, kl = brute_force(posterior, tokens, quantizer.codebook, 0.2, entropy_tau)
    expected = quantizer.unsegment(expected, 5)
    torch.testing.assert_close(z, expected, atol=1e-12, rtol=0)
    value, wanted = (z * upstream).sum(), (expected * upstream).sum()
    assert set(losses) == ({"kl"} if training else set())
    if training:
        torch.testing.assert_close(losses["kl"], kl, atol=1e-12, rtol=0)
        value, wanted = value + 3 * losses["kl"], wanted + 3 * kl
    inputs = (z_hat, quantizer.codebook)
    for ours, theirs in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)
    assert (torch.autograd.grad(quantizer(z_hat)[0].sum(), quantizer.codebook)[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("entropy_tau", [None, 0.3, 0.1])
def test_plain_form_equals_brute_force(posterior, entropy_tau):
    z_hat, codebook = drawn(2, 9, 3), drawn(2, 6, 3)
    z, kl = plain(posterior, z_hat, codebook, 0.3, entropy_tau)
    expected, expected_kl = brute_force(posterior, z_hat, codebook, 0.3, entropy_tau or 1)
    torch.testing.assert_close(z, expected, atol=1e-12, rtol=0)
    assert kl is None if entropy_tau is None else abs(kl - expected_kl) < 1e-12


@pytest.mark.parametrize("term", ["z", "kl"])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_gradients_by_finite_differences(few_at_a_time, posterior, term):
    """`released` keeps the codebook's gradient from the posterior, which finite differences know nothing of."""
    quantizer = SoftVQ(4, 3, 5, 2, posterior, 0.4, 0.3).double()
    codebook = quantizer.codebook.detach().clone().requires_grad_(posterior != "released")

    def value(z_hat, codebook):
        z, losses = torch.func.functional_call(quantizer, {"codebook": codebook}, (z_hat,))
        return z if term == "z" else losses["kl"]

    assert torch.autograd.gradcheck(value, [drawn(2, 4, 3).requires_grad_(), codebook])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_single_precision_is_close_to_double(posterior):
    """At the size of a real codebook; gradients too, relative to their largest."""
    torch.manual_seed(0)
    quantizer = SoftVQ(100, 32, 8192, 1, posterior)
    z_hat = torch.randn(1, 100, 32)

    def run(quantizer, z_hat):
        z_hat = z_hat.clone().requires_grad_()
        z, losses = quantizer(z_hat)
        gradients = torch.autograd.grad(z.square().sum() + losses["kl"], (z_hat, quantizer.codebook))
        return [x.double() for x in (z.detach(), losses["kl"].detach(), *gradients)]

    single = run(quantizer, z_hat)
    for ours, exact in zip(single, run(quantizer.double(), z_hat.double()), strict=True):
        assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_no_tensor_of_tokens_by_codes_is_kept():
    """What backward keeps is about the size of tokens and codebooks, in training and evaluation."""
    for posterior in POSTERIORS:
        for training in (True, False):
            quantizer, kept = SoftVQ(512, 8, 1024, 1, posterior).train(training), []

            def keep(x, kept=kept):
                kept.append(x.numel())
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                quantizer(torch.randn(1, 512, 8, requires_grad=True))
            assert kept and max(kept) <= 16 * 1024, (posterior, training)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_flops_are_counted_without_memory(posterior):
    """On the meta device: two products of 2 t k d, and what the augmentation of the operands adds."""
    with torch.device("meta"):
        quantizer, z_hat = SoftVQ(64, 16, 256, 1, posterior).eval(), torch.empty(2, 64, 16)
        with FlopCounterMode(display=False) as counter:
            z, losses = quantizer(z_hat)
    assert z.shape == z_hat.shape and z.device.type == "meta" and losses == {}
    least = 2 * 2 * (2 * 64) * 256 * 16
    assert least <= counter.get_total_flops() <= 1.6 * least


def test_the_usual_start_of_a_codebook_is_uniform_under_eq_4():
    """U(-1/k, 1/k) and no norm: perplexity k and no gradient, so a dead encoder. The unit sphere has both."""
    torch.manual_seed(0)
    k, z_hat = 8192, torch.randn(1, 8, 32, requires_grad=True)
    quantizer = SoftVQ(8, 32, k, 1, "paper", 0.07)
    upstream = torch.randn(1, 8, 32)

    def measure():
        log_q = quantizer.log_posterior(z_hat).detach().double()
        perplexity = (-(log_q.exp() * log_q).sum(-1)).exp()
        return perplexity, torch.autograd.grad((quantizer(z_hat)[0] * upstream).sum(), z_hat)[0].norm()

    perplexity, gradient = measure()
    assert perplexity.max() < 0.6 * k and gradient > 0.1
    torch.nn.init.uniform_(quantizer.codebook, -1 / k, 1 / k)
    perplexity, gradient = measure()
    assert (perplexity / k - 1).abs().max() < 1e-3 and gradient < 1e-5


@pytest.mark.parametrize("posterior", ["paper", "squared"])
def test_the_kl_term_at_tau_hardens_the_posterior_that_makes_z(posterior):
    """Minimised alone it makes z blind to z_hat at T = tau; at the default T most of the gradient is left."""

    def gradient(entropy_tau):
        torch.manual_seed(0)
        quantizer = SoftVQ(32, 8, 32, 1, posterior, entropy_temperature=entropy_tau)
        z_hat, upstream = torch.randn(1, 32, 8).requires_grad_(), torch.randn(1, 32, 8)
        optimizer = torch.optim.SGD([z_hat], lr=5.0)
        for _ in range(60):
            optimizer.zero_grad()
            quantizer(z_hat)[1]["kl"].backward()
            optimizer.step()
        return torch.autograd.grad((quantizer(z_hat)[0] * upstream).sum(), z_hat)[0].norm()

    tau, default = temperatures(posterior)
    assert gradient(tau) < 0.25 * gradient(default)


def test_kl_term_of_sure_and_even_posteriors():
    """From tokens: each sure of a code of its own gives -log t; all the same gives 0."""
    quantizer = SoftVQ(4, 4, 4, 1, "released", 0.07, 0.01)
    quantizer.codebook.data = torch.eye(4)[None]
    assert quantizer(torch.eye(4)[None])[1]["kl"].item() == pytest.approx(-math.log(4), abs=1e-4)
    assert quantizer(torch.ones(1, 4, 4))[1]["kl"].item() == pytest.approx(0, abs=1e-4)


def test_default_temperatures():
    assert temperatures("released") == (0.07, 0.01)
    assert temperatures("released", 0.2) == (0.2, 0.01)
    assert temperatures("paper") == (0.07, pytest.approx(0.01))
    assert temperatures("squared") == (0.5, pytest.approx(0.5 / 7))
    assert temperatures("squared", 0.7, 0.3) == (0.7, 0.3)
    with pytest.raises(ValueError, match="posterior='cosine'"):
        temperatures("cosine")


def test_token_on_a_codeword_has_finite_gradients():
    """The distance of Eq. 4 has a kink there."""
    quantizer = SoftVQ(3, 4, 8, 1, "paper")
    z_hat = quantizer.codebook.detach()[:, :3].clone().requires_grad_()
    z, losses = quantizer(z_hat)
    (z.sum() + losses["kl"]).backward()
    assert z_hat.grad.isfinite().all() and z_hat.grad.abs().max() < 1e3
    torch.testing.assert_close(F.normalize(z, dim=-1), z_hat.detach(), atol=0.02, rtol=0)
