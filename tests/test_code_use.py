"""Use of codes: information and effective sizes by hand on made-up posteriors, beside the KL term and scikit-learn."""

import numpy as np
import pytest
import torch

from softvq_lib.evaluation.code_use import CodeUse
from softvq_lib.tokenizers.ae import AE
from softvq_lib.tokenizers.gmmvq import GMMVQ
from softvq_lib.tokenizers.product import Product
from softvq_lib.tokenizers.quantizer import CodebookQuantizer, Quantizer
from softvq_lib.tokenizers.softvq import SoftVQ


class Given(Quantizer):
    """Takes the posteriors themselves, (b, l, k), for z_hat."""

    def __init__(self, codes):
        super().__init__(1)
        self.codes = codes

    def log_posterior(self, z_hat):
        return z_hat.log()


class Halves(CodebookQuantizer):
    """The same with two codebooks, one for each half of the tokens."""

    def __init__(self, tokens, codes):
        super().__init__(tokens, 1, codes, codebooks=2)

    def log_posterior(self, z_hat):
        return z_hat.log()


def used(q, quantizer=None, parts=64):
    use = CodeUse(quantizer or Given(q.shape[-1]), q.shape[1])
    for part in q.split(parts):
        use.update(part)
    return use


def numbers(use):
    return {name: value for name, (value, _) in use.measure().items()}


def test_a_uniform_posterior_uses_all_codes_and_says_nothing():
    found = numbers(used(torch.full((40, 3, 8), 1 / 8)))
    assert np.exp(found["code_entropy"]) == pytest.approx(8) and found["posterior_entropy"] == pytest.approx(np.log(8))
    for name in ("mutual_information", "mutual_information_image", "mutual_information_position"):
        assert found[name] == pytest.approx(0, abs=1e-12)


def test_balanced_one_hot_codes_say_log_k():
    """Over images, each position the same: all of it is about the image."""
    q = torch.eye(8)[torch.arange(80) % 8][:, None].expand(-1, 3, -1)
    use = used(q)
    found = numbers(use)
    for name in ("code_entropy", "mutual_information", "mutual_information_image"):
        assert found[name] == pytest.approx(np.log(8))
    assert found["mutual_information_by_position"] == pytest.approx(np.full(3, np.log(8)))
    assert found["mutual_information_position"] == pytest.approx(0, abs=1e-12) and found["posterior_entropy"] == 0
    assert use.usage() == 1 and use.mean_posterior() == pytest.approx(np.full((1, 8), 1 / 8))


def test_codes_of_positions_say_nothing_of_images():
    use = used(torch.eye(8)[:4].expand(40, -1, -1))
    found = numbers(use)
    assert found["mutual_information"] == found["mutual_information_position"] == pytest.approx(np.log(4))
    assert found["mutual_information_image"] == pytest.approx(0, abs=1e-12) and use.usage() == 0.5


def test_codebooks_are_kept_apart():
    """Two codebooks of 4 codes: the first half of the tokens uses one code, the second half all evenly."""
    q = torch.zeros(40, 4, 4)
    q[:, :2, 0], q[:, 2:] = 1, 1 / 4
    use = used(q, Halves(4, 4))
    found = numbers(use)
    assert np.exp(found["codebook_entropy"]) == pytest.approx([1, 4])
    assert np.exp(found["code_entropy"]) == pytest.approx(2 * (1 * 4) ** 0.5)  # 1/2 on one code, 1/8 on four others
    assert found["posterior_entropy_by_position"] == pytest.approx([0, 0, np.log(4), np.log(4)])
    assert use.chosen.tolist() == [[80, 0, 0, 0], [80, 0, 0, 0]]


def random_posteriors(n=50, tokens=3, codes=6, seed=0):
    return torch.randn(n, tokens, codes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_batching_changes_nothing_and_neither_does_leaving_out_a_group_afterwards():
    q = random_posteriors()
    whole, cut = used(q).measure(), used(q, parts=7).measure()
    for name, (value, without) in whole.items():
        assert cut[name][0] == pytest.approx(value, abs=1e-12)
        assert cut[name][1] == pytest.approx(without, abs=1e-12)
    rest = numbers(used(q[torch.arange(50) % 20 != 3]))
    for name, value in rest.items():
        assert whole[name][1][3] == pytest.approx(value, abs=1e-12)


def test_the_kl_term_is_minus_the_information():
    """Eq. 4, where the loss has the temperature of z and averages over each codebook."""
    torch.manual_seed(0)
    quantizer = SoftVQ(4, 3, 16, codebooks=2, posterior="squared", temperature=0.3, entropy_temperature=0.3)
    z_hat = torch.randn(32, 4, 3)
    loss = quantizer(z_hat)[1]["kl"].item()
    assert loss < -0.1
    assert numbers(used(z_hat, quantizer))["mutual_information"] == pytest.approx(-loss, abs=1e-4)


def test_product_quantization_has_a_place_for_each_group():
    torch.manual_seed(0)
    quantizer = Product(6, [GMMVQ(4, 3, 5), GMMVQ(4, 3, 5)]).eval()
    z_hat = torch.randn(30, 4, 6)
    use = used(z_hat, quantizer)
    q = quantizer.log_posterior(z_hat).exp().double()  # (b, l, groups, k)
    entropy = torch.special.entr(q).sum(-1).mean((0, 2))
    given = torch.special.entr(q.mean(0)).sum(-1).mean(1) - entropy
    assert use.measure()["mutual_information_by_position"][0] == pytest.approx(given.detach().numpy(), abs=1e-6)
    assert use.mean_posterior() == pytest.approx(q.mean((0, 1)).detach().numpy(), abs=1e-6)


def test_information_of_classes_is_scikit_learns():
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(0)
    labels, codes = rng.integers(3, size=200), rng.integers(5, size=200)
    codes[::2] = labels[::2]
    use = used(torch.eye(5)[torch.from_numpy(codes)][:, None])
    value, without, chance = use.class_information(labels, 3)
    assert value == pytest.approx(normalized_mutual_info_score(labels, codes), abs=1e-6)
    rest = np.arange(200) % 20 != 4
    assert without[4] == pytest.approx(normalized_mutual_info_score(labels[rest], codes[rest]), abs=1e-6)
    assert 0 < chance < 0.05 < value
    by_class = use.by_class(labels, 4)
    assert by_class[1, 0] == pytest.approx(np.bincount(codes[labels == 1], minlength=5) / (labels == 1).sum(), abs=1e-6)
    assert by_class[3].sum() == 0  # no image is of this class
    one_to_one = used(torch.eye(3)[torch.from_numpy(labels)][:, None])
    assert one_to_one.class_information(labels, 3)[0] == pytest.approx(1, abs=1e-6)


def test_bad_use_of_codes_is_refused():
    use = used(random_posteriors())
    for labels, words in (
        (np.zeros(50, int), "two classes"),
        (np.arange(50), "labels from 0 to 49 do not fit 3 classes"),
        (np.arange(49) % 3, "49 labels for 50 images"),
    ):
        with pytest.raises(ValueError, match=words):
            use.class_information(labels, 3)
    with pytest.raises(ValueError, match="AE has no codebook.*choose vq, softvq or gmmvq"):
        CodeUse(AE(8), 4)
    with pytest.raises(ValueError, match="1 images tell nothing"):
        used(random_posteriors(1)).measure()
