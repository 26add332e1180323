"""Quantizers: parity with the reference, limits and identities in float64, where gradients go, wrappers, errors."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from softvq_lib.losses import LossConfig, weighted
from softvq_lib.tokenizers import AE, GMMVQ, KL, VQ, CodebookUsage, NotFiniteError, Product, Residual, SoftVQ
from softvq_lib.tokenizers.quantizer import kl_term

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def double(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- parity with the reference numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "l2"), [("v", True), ("u", False)])
def test_vq_equals_reference(case, l2):
    reference = {k[2:]: v for k, v in load_file(DATA / "quantizers.safetensors").items() if k.startswith(f"{case}.")}
    size, dim = reference["codebook"].shape
    quantizer = VQ(8, dim, size, l2=l2, entropy_temperature=0.01).train()
    quantizer.codebook.data = reference["codebook"][None].clone()
    z_hat = reference["z"].clone().requires_grad_()
    z, losses = quantizer(z_hat)
    torch.testing.assert_close(z, reference["zq"], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses["codebook"], reference["vq_loss"], atol=1e-6, rtol=0)
    torch.testing.assert_close(0.25 * losses["commit"], reference["commit"], atol=1e-6, rtol=0)
    torch.testing.assert_close(0.1 * losses["kl"], reference["entropy"], atol=1e-6, rtol=0)
    ((z * reference["w"]).sum() + losses["codebook"] + 0.25 * losses["commit"] + 0.1 * losses["kl"]).backward()
    torch.testing.assert_close(z_hat.grad, reference["grad_z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.codebook.grad[0], reference["grad_codebook"], atol=1e-5, rtol=1e-5)
    assert torch.equal(quantizer.indices(z_hat).flatten(), reference["indices"])
    z_eval, none = quantizer.eval()(z_hat)
    torch.testing.assert_close(z_eval, reference["zq"], atol=1e-6, rtol=0)
    assert none == {}


def test_gmmvq_equals_the_papers_formula_with_its_omega():
    """Values and gradients in float64, omega given."""
    reference = load_file(DATA / "paper_formula_f64.safetensors")
    size, dim = reference["C"].shape
    quantizer = GMMVQ(8, dim, size).double()
    quantizer.codebook.data = reference["C"][None].clone()
    z_hat, omega = (reference[name].clone().requires_grad_() for name in ("z", "omega"))
    q = quantizer.log_posterior(z_hat, omega).exp()
    z = q @ quantizer.codebook[0]
    torch.testing.assert_close(q, reference["gmm_q"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(z, reference["gmm_zq"], atol=1e-10, rtol=1e-10)
    (z * reference["w"]).sum().backward()
    for ours, name in ((z_hat.grad, "z"), (omega.grad, "omega"), (quantizer.codebook.grad[0], "C")):
        torch.testing.assert_close(ours, reference[f"gmm_grad_{name}"], atol=1e-8, rtol=1e-8)


# -- limits and identities -----------------------------------------------------------------------------------------


def test_gmmvq_starts_as_eq_4_and_computes_what_its_posterior_says():
    quantizer, z_hat = GMMVQ(6, 5, 16, codebooks=2, temperature=0.3).double(), double(0, 2, 6, 5)
    torch.testing.assert_close(quantizer.omega(z_hat), torch.full((2, 6, 1), 1 / 0.3, dtype=torch.float64))
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(2, 16, dtype=torch.float64))
    quantizer.to_omega.weight.data = double(1, 1, 5)
    omega, z = quantizer.omega(z_hat), quantizer(z_hat)[0]
    assert (omega > 0).all() and omega.std() > 0.1
    for i in range(6):
        distance = (z_hat[:, i, None] - quantizer.codebook[i // 3]).norm(dim=-1)  # (b, k)
        q = (-omega[:, i] * distance).softmax(-1)
        torch.testing.assert_close(quantizer.log_posterior(z_hat)[:, i].exp(), q)
        torch.testing.assert_close(z[:, i], q @ quantizer.codebook[i // 3])


def test_a_cold_soft_quantizer_is_vq():
    vq = VQ(6, 5, 16, 2, l2=True).double().eval()
    soft = SoftVQ(6, 5, 16, 2, "released", 1e-6, 0.01).double().eval()
    soft.codebook.data = vq.codebook.data
    z_hat = double(1, 3, 6, 5)
    torch.testing.assert_close(soft(z_hat)[0], vq(z_hat)[0], atol=1e-9, rtol=0)
    assert torch.equal(soft.log_posterior(z_hat).argmax(-1), vq.indices(z_hat))
    raw, gmm = VQ(6, 5, 16, 2, l2=False).double().eval(), GMMVQ(6, 5, 16, 2, temperature=1e-5).double().eval()
    gmm.codebook.data = raw.codebook.data
    torch.testing.assert_close(gmm(z_hat)[0], raw(z_hat)[0], atol=1e-9, rtol=0)


def test_an_em_step_of_a_gaussian_mixture_moves_means_to_the_posteriors_averages():
    """Soft K-means (Sec. 3.2): with equal weights and variance tau, EM follows the gradient of the likelihood."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    tau, points = 0.3, double(2, 1, 40, 3)
    quantizer = SoftVQ(40, 3, 7, 1, "squared", tau, tau).double().eval()
    means = quantizer.codebook.detach()[0].clone().requires_grad_()
    mixture = MixtureSameFamily(
        Categorical(torch.ones(7, dtype=torch.float64)), Independent(Normal(means, math.sqrt(tau)), 1)
    )
    mixture.log_prob(points[0]).sum().backward()
    q = quantizer.log_posterior(points)[0].exp()  # (t, k)
    responsibilities = (
        mixture.component_distribution.log_prob(points[0][:, None]) - math.log(7) - mixture.log_prob(points[0])[:, None]
    ).exp()
    torch.testing.assert_close(q, responsibilities.detach(), atol=1e-12, rtol=0)
    averages = (q.T @ points[0]) / q.sum(0)[:, None]
    em_step = means.detach() + tau * means.grad / responsibilities.detach().sum(0)[:, None]
    torch.testing.assert_close(averages, em_step, atol=1e-12, rtol=0)


def test_the_kl_term_is_minus_the_mutual_information():
    """L_kl = -I(x; c) in float64, by its definition as a divergence between joint and product of margins."""
    q = double(3, 1, 50, 9).mul(2).softmax(-1)
    joint = q[0] / 50
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint / independent).log()).sum()
    torch.testing.assert_close(kl_term(q.log(), pooled=False, floor=0), -information, atol=1e-12, rtol=0)


def test_kl_by_hand():
    quantizer = KL(2)
    z_hat = torch.tensor([[[1.0, 0.0, 0.0, math.log(4.0)]], [[0.0, 0.0, 0.0, 0.0]]])
    assert quantizer(z_hat)[1]["kl"].item() == pytest.approx((0.5 + 0.5 * (4 - 1 - math.log(4))) / 2)
    z, losses = quantizer.eval()(z_hat)
    assert torch.equal(z, z_hat[..., :2]) and losses == {}
    wild = torch.tensor([[[0.0, 0.0, 1000.0, -1000.0]]])
    assert quantizer.moments(wild)[1].tolist() == [[[20.0, -30.0]]]


def test_kl_samples_have_the_posteriors_moments_and_repeat():
    quantizer = KL(1)
    z_hat = torch.tensor([2.0, math.log(9.0)]).expand(1, 20000, 2)
    draws = [quantizer.sample(z_hat, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0].mean().item() == pytest.approx(2, abs=0.1) and draws[0].std().item() == pytest.approx(3, abs=0.1)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(quantizer.train()(z_hat, torch.Generator().manual_seed(0))[0], draws[0])


def test_ae_is_the_identity():
    z_hat = torch.randn(2, 3, 4)
    z, losses = AE(4)(z_hat)
    assert torch.equal(z, z_hat) and losses == {}


# -- where gradients go --------------------------------------------------------------------------------------------

# (quantizer, term) -> whether its gradient reaches the codewords and z_hat.
REACH = {
    "vq": {"z": (False, True), "codebook": (True, False), "commit": (False, True), "kl": (True, True)},
    "ema": {"z": (False, True), "commit": (False, True), "kl": (False, True)},
    "released": {"z": (True, True), "kl": (False, True)},
    "paper": {"z": (True, True), "kl": (True, True)},
    "gmmvq": {"z": (True, True), "kl": (True, True)},
}
MAKE = {
    "vq": lambda: VQ(4, 3, 6, entropy_temperature=0.3),
    "ema": lambda: VQ(4, 3, 6, entropy_temperature=0.3, ema=0.9),
    "released": lambda: SoftVQ(4, 3, 6, 1, "released", 0.3, 0.3),
    "paper": lambda: SoftVQ(4, 3, 6, 1, "paper", 0.3, 0.3),
    "gmmvq": lambda: GMMVQ(4, 3, 6, temperature=0.3),
}


@pytest.mark.parametrize(("name", "term"), [(name, term) for name, terms in REACH.items() for term in terms])
def test_which_term_moves_codewords_and_encoder(name, term):
    quantizer, z_hat = MAKE[name]().train(), torch.randn(2, 4, 3, requires_grad=True)
    z, losses = quantizer(z_hat)
    assert {"z", *losses} == set(REACH[name])
    value = (z * torch.randn(2, 4, 3)).sum() if term == "z" else losses[term]
    inputs = [z_hat, *([quantizer.codebook] if quantizer.codebook.requires_grad else [])]
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    reached = [g is not None and bool(g.abs().sum() > 0) for g in gradients] + [False]
    assert (reached[1], reached[0]) == REACH[name][term]
    if reached[1]:
        moved = gradients[1][0].abs().sum(-1) > 0
        chosen = torch.zeros(6, dtype=torch.bool)
        chosen[quantizer.indices(z_hat).flatten()] = True
        assert torch.equal(moved, chosen if term == "codebook" else torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["gmmvq", "product", "residual"])
def test_gradients_of_soft_forms_by_finite_differences(kind):
    def make(dim):
        quantizer = GMMVQ(4, dim, 5, 2, temperature=0.4)
        torch.nn.init.normal_(quantizer.to_omega.weight, std=0.3)
        return quantizer

    torch.manual_seed(0)
    quantizer = {
        "gmmvq": lambda: make(4),
        "product": lambda: Product(4, [make(2), make(2)]),
        "residual": lambda: Residual(4, [make(4), make(4)], sphere=False),
    }[kind]().double()
    names = [name for name, _ in quantizer.named_parameters() if name != "log_scale"]

    def value(z_hat, *parameters):
        z, losses = torch.func.functional_call(quantizer, dict(zip(names, parameters, strict=True)), (z_hat,))
        return z, losses["kl"]

    tensors = [double(4, 2, 4, 4), *(quantizer.get_parameter(name).detach().clone() for name in names)]
    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in tensors])


# -- product and residual ------------------------------------------------------------------------------------------


def test_product_splits_and_merges_channels():
    parts = [GMMVQ(4, 3, 8, 2) for _ in range(2)]
    quantizer, z_hat = Product(6, parts), torch.randn(3, 4, 6)
    assert torch.equal(torch.cat(quantizer.split(z_hat), -1), z_hat)
    z, losses = quantizer(z_hat)
    alone = [part(z_hat[..., 3 * i : 3 * i + 3]) for i, part in enumerate(parts)]
    assert torch.equal(z, torch.cat([each[0] for each in alone], -1))
    torch.testing.assert_close(losses["kl"], (alone[0][1]["kl"] + alone[1][1]["kl"]) / 2)
    posterior = quantizer.log_posterior(z_hat).exp()
    assert posterior.shape == (3, 4, 2, 8) and quantizer.indices(z_hat).shape == (3, 4, 2)
    torch.testing.assert_close(posterior[:, :, 1], parts[1].log_posterior(z_hat[..., 3:]).exp())
    sorted_by = quantizer.by_codebook(posterior)  # group 0: segments 0 and 1, then group 1
    assert sorted_by.shape == (4, 6, 8)
    torch.testing.assert_close(sorted_by[3], posterior[:, 2:, 1].flatten(0, 1))


@pytest.mark.parametrize("kind", ["vq", "gmmvq", "softvq"])
def test_residual_levels_add_up(kind):
    sphere = kind != "gmmvq"
    make = {"vq": lambda: VQ(4, 6, 64), "gmmvq": lambda: GMMVQ(4, 6, 64), "softvq": lambda: SoftVQ(4, 6, 64)}[kind]
    torch.manual_seed(0)
    quantizer = Residual(6, [make() for _ in range(3)], sphere=sphere).eval()
    torch.testing.assert_close(quantizer.scales(), torch.tensor([1, 0.5, 0.25]))
    z_hat = F.normalize(torch.randn(3, 4, 6), dim=-1)
    z, losses = quantizer(z_hat)
    rest, total = z_hat, 0
    left = []
    for part, scale in zip(quantizer.parts, (1, 0.5, 0.25), strict=True):
        share = scale * part(rest / scale)[0]
        total, rest = total + share, rest - share
        left.append(rest.square().mean().item())
    torch.testing.assert_close(z, total, atol=1e-6, rtol=0)
    torch.testing.assert_close(z + rest, z_hat, atol=1e-6, rtol=0)
    assert losses == {} and left[2] < left[0]
    assert quantizer.log_posterior(z_hat).shape == (3, 4, 3, 64) and quantizer.indices(z_hat).shape == (3, 4, 3)


def test_a_hard_residual_passes_the_gradient_once_and_learns_its_scales():
    quantizer = Residual(3, [VQ(4, 3, 8, l2=False) for _ in range(3)], sphere=False).train()
    z_hat, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    z, losses = quantizer(z_hat)
    gradient, scale = torch.autograd.grad((z * weight).sum(), [z_hat, quantizer.log_scale], retain_graph=True)
    torch.testing.assert_close(gradient, weight)
    assert (scale != 0).all()
    (commit,) = torch.autograd.grad(losses["commit"], z_hat)
    assert (commit != 0).any()
    torch.testing.assert_close(z, quantizer.eval()(z_hat)[0])


def test_levels_inside_groups():
    def group():
        return Residual(3, [VQ(4, 3, 8, 2, ema=0.9) for _ in range(2)], sphere=True)

    quantizer, z_hat = Product(6, [group(), group()]), torch.randn(3, 4, 6)
    before = [part.use.clone() for outer in quantizer.parts for part in outer.parts]
    posterior = quantizer.log_posterior(z_hat).exp()
    assert posterior.shape == (3, 4, 4, 8) and quantizer.indices(z_hat).shape == (3, 4, 4)
    assert quantizer.by_codebook(posterior).shape == (8, 6, 8)
    after = [part.use for outer in quantizer.parts for part in outer.parts]
    assert all(map(torch.equal, before, after)) and quantizer.parts[0].training, "a look is no training step"
    usage = CodebookUsage()
    usage.update(quantizer.by_codebook(posterior))
    assert 0 < usage.summary()["usage"] <= 1


def test_the_kl_weight_depends_on_the_quantizer_unless_given():
    assert LossConfig().resolved("kl").kl_weight == 1e-6
    assert {LossConfig().resolved(name).kl_weight for name in ("vq", "softvq", "gmmvq", "ae")} == {0.01}
    assert LossConfig(kl_weight=-0.5).resolved("kl").kl_weight == -0.5
    losses = {"kl": torch.tensor(2.0), "codebook": torch.tensor(3.0)}
    with pytest.raises(ValueError, match=r"kl_weight=None.*resolved\(quantizer\)"):
        weighted(LossConfig(), losses)
    config = LossConfig(kl_weight=0.5, codebook_weight=0.1, commit_weight=2.0)
    total = weighted(config, {**losses, "commit": torch.tensor(5.0)})
    assert total.item() == pytest.approx(0.5 * 2 + 0.1 * 3 + 2 * 5) and weighted(config, {}) == 0
    for bad in ({"kl_weight": math.nan}, {"codebook_weight": -1.0}, {"commit_weight": -1.0}):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(bad.items())))):
            LossConfig(**bad)


# -- precision and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vq", "released", "gmmvq", "kl", "ae"])
def test_computed_in_fp32_under_autocast(name):
    quantizer = MAKE.get(name, {"kl": lambda: KL(3), "ae": lambda: AE(3)}.get(name))().eval()
    z_hat = torch.randn(2, 4, quantizer.hat_dim)
    with torch.autocast("cpu", torch.bfloat16):
        z, half = quantizer(z_hat)[0], quantizer(z_hat.bfloat16())[0]
    assert z.dtype == half.dtype == torch.float32 and torch.equal(z, quantizer(z_hat)[0])


@pytest.mark.parametrize("name", ["vq", "gmmvq", "kl", "ae"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named_by_batch_row(name, bad):
    quantizer = MAKE.get(name, {"kl": lambda: KL(3), "ae": lambda: AE(3)}.get(name))()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    z_hat = torch.randn(5, 4, quantizer.hat_dim)
    z_hat[1, 2, 0] = z_hat[4, 0, 1] = bad
    with pytest.raises(NotFiniteError, match=r"batch rows 1, 4 \(2 of 5\)"):
        quantizer(z_hat)
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_large_values_whose_sum_overflows_are_let_through():
    z_hat = torch.full((1, 2, 3), 3e38)
    assert torch.equal(AE(3)(z_hat)[0], z_hat)


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3), (2, 4, 3, 1)])
def test_channels_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))}\).*\(batch, tokens, 3\)"):
        VQ(4, 3, 8)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VQ(4, 3, 0), "codebook_size=0"),
        (lambda: VQ(4, 3, 8, 3), "tokens=4 is not divisible by codebooks=3"),
        (lambda: VQ(4, 3, 8, entropy_temperature=0.0), "entropy_temperature=0.0"),
        (lambda: VQ(4, 3, 8, ema=1.0), "ema=1.0.*0.99"),
        (lambda: VQ(4, 3, 8, revive=-1.0), "revive=-1.0"),
        (lambda: VQ(4, 3, 8, kmeans=-1), "kmeans=-1"),
        (lambda: GMMVQ(4, 3, 8, temperature=0.0), "temperature=0.0"),
        (lambda: GMMVQ(4, 3, 8, temperature=math.nan), "temperature=nan"),
        (lambda: KL(0), "dim=0"),
        (lambda: Product(7, [VQ(4, 3, 8), VQ(4, 3, 8)]), "2 product groups do not divide dim=7.*1, 7"),
        (lambda: Product(8, [VQ(4, 4, 8), VQ(4, 3, 8)]), "part 1 of Product quantizes 3 channels, but 4.*dim=4"),
        (lambda: Product(8, [VQ(4, 4, 8), VQ(4, 4, 9)]), "part 1 of Product has 9 codes, part 0 8"),
        (lambda: Residual(8, [VQ(4, 4, 8)], sphere=True), "part 0 of Residual quantizes 4 channels, but 8"),
        (lambda: Residual(8, [], sphere=True), "at least one level"),
        (lambda: Product(4, [AE(2), AE(2)]), "part 0 of Product is a AE, which has no codebook"),
        (lambda: VQ(4, 3, 8, 2)(torch.zeros(1, 3, 3)), "3 tokens are not divisible by codebooks=2"),
        (lambda: AE(3).indices(torch.zeros(1, 3, 3)), "AE has no codebook"),
        (lambda: VQ(4, 3, 8).sample(torch.zeros(1, 4, 3)), "VQ draws nothing at random"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
