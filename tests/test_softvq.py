"""SoftVQ (Eq. 4): parity, limits, gradients, the KL term and codebook usage."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from softvq_lib.tokenizers import POSTERIORS, CodebookUsage, SoftVQ
from softvq_lib.tokenizers.attention import assign
from softvq_lib.tokenizers.quantizer import kl_term

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("case", ["a", "b", "d"])
def test_released_form_equals_reference(case):
    """Values and gradients, for 1, 4 and 2 codebooks."""
    reference = {k[2:]: v for k, v in load_file(DATA / "quantizers.safetensors").items() if k.startswith(f"{case}.")}
    codebooks, size, dim = reference["codebook"].shape
    quantizer = SoftVQ(8, dim, size, codebooks, "released", float(reference["tau"]), 0.01).train()
    quantizer.codebook.data = reference["codebook"].clone()
    z_hat = reference["z"].clone().requires_grad_()
    z, losses = quantizer(z_hat)
    torch.testing.assert_close(z, reference["zq"], atol=1e-6, rtol=0)
    torch.testing.assert_close(0.01 * losses["kl"], reference["entropy"], atol=1e-6, rtol=0)
    ((z * reference["w"]).sum() + 0.01 * losses["kl"]).backward()
    torch.testing.assert_close(z_hat.grad, reference["grad_z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.codebook.grad, reference["grad_codebook"], atol=1e-5, rtol=1e-5)
    best = quantizer.log_posterior(z_hat).argmax(-1)  # (b, l)
    expected = reference["indices"]
    if codebooks == 1:
        assert torch.equal(best, expected.reshape(best.shape))


def test_raw_dot_product_of_the_release_equals_reference():
    """Off the sphere the release's scores are plain dot products: no form of ours, but the same computation."""
    reference = {k[2:]: v for k, v in load_file(DATA / "quantizers.safetensors").items() if k.startswith("c.")}
    z_hat, codes = (reference[name].clone().requires_grad_() for name in ("z", "codebook"))
    tokens = z_hat.flatten(0, 1)[None]  # (1, b l, d)
    tau = float(reference["tau"])
    z, kl = assign(tokens, codes.detach(), codes, tau, 0.01, root=False, pooled=True)
    z = z.view_as(z_hat)  # (b, l, d)
    torch.testing.assert_close(z, reference["zq"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(0.01 * kl, reference["entropy"], atol=1e-6, rtol=0)
    ((z * reference["w"]).sum() + 0.01 * kl).backward()
    torch.testing.assert_close(z_hat.grad, reference["grad_z"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codes.grad, reference["grad_codebook"], atol=1e-5, rtol=1e-5)


def test_paper_form_equals_eq_4_in_float64():
    reference = load_file(DATA / "paper_formula_f64.safetensors")
    size, dim = reference["C"].shape
    quantizer = SoftVQ(8, dim, size, 1, "paper", 0.07, 0.07).eval()
    quantizer.codebook.data = reference["C"][None].float()
    z_hat = reference["z"].float()
    torch.testing.assert_close(
        quantizer.log_posterior(z_hat).exp().double(), reference["softvq_paper_tau007_q"], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(quantizer(z_hat)[0].double(), reference["softvq_paper_tau007_z"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_cold_is_vq_and_hot_is_the_mean(posterior):
    """tau -> 0 picks the nearest codeword; tau -> infinity gives the codebook's mean."""
    torch.manual_seed(0)
    z_hat = torch.randn(3, 4, 5)
    cold = SoftVQ(4, 5, 16, 1, posterior, temperature=1e-4).eval()
    codes = F.normalize(cold.codebook[0], dim=-1)
    points = F.normalize(z_hat, dim=-1) if posterior == "released" else z_hat
    nearest = codes[torch.cdist(points, codes[None].expand(3, -1, -1)).argmin(-1)]
    torch.testing.assert_close(cold(z_hat)[0], nearest, atol=1e-4, rtol=0)
    hot = SoftVQ(4, 5, 16, 1, posterior, temperature=1e6).eval()
    mean = F.normalize(hot.codebook[0], dim=-1).mean(0)
    torch.testing.assert_close(hot(z_hat)[0], mean.expand(3, 4, 5), atol=1e-5, rtol=0)


def test_released_is_a_squared_distance_at_twice_the_temperature():
    torch.manual_seed(0)
    quantizer = SoftVQ(4, 5, 16, temperature=0.1).eval()
    z_hat = torch.randn(3, 4, 5)
    squared = torch.cdist(F.normalize(z_hat, dim=-1), quantizer.codebook.expand(3, -1, -1)).square()
    torch.testing.assert_close(quantizer.log_posterior(z_hat).exp(), F.softmax(-squared / 0.2, -1), atol=1e-5, rtol=0)


def test_segments_use_their_own_codebook():
    quantizer = SoftVQ(6, 3, 8, codebooks=3).eval()
    z_hat = torch.randn(2, 6, 3)
    z = quantizer(z_hat)[0]
    for segment in range(3):
        alone = SoftVQ(2, 3, 8).eval()
        alone.codebook.data = quantizer.codebook.data[segment : segment + 1]
        torch.testing.assert_close(
            z[:, 2 * segment : 2 * segment + 2], alone(z_hat[:, 2 * segment : 2 * segment + 2])[0]
        )
    assert torch.equal(quantizer.unsegment(quantizer.segments(z_hat), 2), z_hat)


def test_kl_term_is_minus_the_mutual_information():
    """By hand: two tokens, each sure of its own code, share log 2 nats with it; equal posteriors share none."""
    sure = torch.tensor([[[1.0, 1e-12], [1e-12, 1.0]]]).log()
    torch.testing.assert_close(kl_term(sure, pooled=False), torch.tensor(-math.log(2)), atol=1e-5, rtol=0)
    even = torch.full((1, 2, 2), 0.5).log()
    torch.testing.assert_close(kl_term(even, pooled=False), torch.tensor(0.0), atol=1e-5, rtol=0)
    # Two codebooks, each using another code: pooled they look like two codes in use.
    apart = torch.tensor([[[1.0, 1e-12]], [[1e-12, 1.0]]]).log()
    torch.testing.assert_close(kl_term(apart, pooled=True), torch.tensor(-math.log(2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(kl_term(apart, pooled=False), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_computed_in_fp32_under_autocast():
    quantizer = SoftVQ(4, 8, 32)
    z_hat = torch.randn(2, 4, 8)
    plain, plain_losses = quantizer(z_hat)
    with torch.autocast("cpu", torch.bfloat16):
        z, losses = quantizer(z_hat)
        (z.sum() + losses["kl"]).backward()  # autocast holds in the backward pass too
    gradient, quantizer.codebook.grad = quantizer.codebook.grad, None
    (plain.sum() + plain_losses["kl"]).backward()
    assert torch.equal(gradient, quantizer.codebook.grad)
    assert z.dtype == torch.float32
    assert torch.equal(z, plain) and torch.equal(losses["kl"], plain_losses["kl"])


@pytest.mark.parametrize(
    "bad", [{"codebook_size": 0}, {"temperature": 0.0}, {"temperature": math.nan}, {"codebooks": 3}, {"dim": -1}]
)
def test_bad_arguments(bad):
    (name, value) = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SoftVQ(**{"tokens": 4, "dim": 8, "codebook_size": 32, **bad})


def test_usage_over_a_pass_not_a_batch():
    """Two batches that use one code each: together half of four codes, perplexity 2; alone it would be 1."""
    usage = CodebookUsage()
    for code in (0, 3):
        usage.update(F.one_hot(torch.full((1, 5), code), 4).float())
    summary = usage.summary()
    assert summary["usage"] == 0.5
    assert summary["perplexity"] == pytest.approx(2.0)


def test_usage_averages_codebooks():
    usage = CodebookUsage()
    usage.update(torch.stack([F.one_hot(torch.arange(4), 4), F.one_hot(torch.zeros(4, dtype=torch.long), 4)]).float())
    summary = usage.summary()
    assert summary["usage"] == pytest.approx((1 + 0.25) / 2)
    assert summary["perplexity"] == pytest.approx((4 + 1) / 2)


def test_usage_of_nothing():
    with pytest.raises(ValueError, match="at least one batch"):
        CodebookUsage().summary()
