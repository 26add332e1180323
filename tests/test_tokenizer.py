"""Tokenizer: sizes and shapes of Sec. 3.1, parity with the reference implementation, errors, round trip."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softvq_lib.tokenizers import PRESETS, QUANTIZERS, Tokenizer, TokenizerConfig
from softvq_lib.tokenizers.published import translate

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("preset", "million", "with_unused_patch_embedding"),
    [("s", 44.54, 44.84), ("b", 172.97, 173.56), ("bl", 390.55, 391.33), ("l", 608.14, 608.92)],
)
def test_parameter_counts(preset, million, with_unused_patch_embedding):
    """The paper's 45/173/391/608 M count a patch embedding that the release's decoder never uses."""
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset(preset, tokens=64)
    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    assert round(count / 1e6, 2) == million
    width = tokenizer.decoder.width
    assert round((count + width * (3 * 16 * 16 + 1)) / 1e6, 2) == with_unused_patch_embedding


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "tiny_softvq.safetensors")


@pytest.fixture
def tiny_reference(monkeypatch, reference):
    """Our tokenizer with the reference's weights."""
    row = {**PRESETS["s"], "overrides": {"embed_dim": 96, "depth": 3, "num_heads": 3}}
    monkeypatch.setitem(PRESETS, "reference", row)
    tokenizer = Tokenizer.from_preset("reference", image_size=64, patch_size=16, tokens=16, dim=8, codebook_size=64)
    weights = load_file(DATA / "tiny_trunk.safetensors")
    weights["quantize.embedding"] = reference["sd.quantize.embedding"]
    tokenizer.load_state_dict(translate(weights))
    return tokenizer


def test_evaluation_equals_reference(tiny_reference, reference):
    tokenizer = tiny_reference.eval()
    with torch.no_grad():
        code = tokenizer.encode(reference["in.x"])
        images = tokenizer.decode(code.z)
    assert code.losses == {}
    torch.testing.assert_close(code.z_hat, reference["eval.z_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(code.z, reference["eval.z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images, reference["eval.rec"], atol=1e-5, rtol=0)


def test_training_equals_reference(tiny_reference, reference):
    tokenizer = tiny_reference.train()
    images, code = tokenizer(reference["in.x"])
    torch.testing.assert_close(images, reference["train.rec"], atol=1e-5, rtol=0)
    torch.testing.assert_close(0.01 * code.losses["kl"], reference["train.entropy_loss"], atol=1e-6, rtol=0)
    (images.square().mean() + 0.01 * code.losses["kl"]).backward()
    gradients = translate({name[5:]: value for name, value in reference.items() if name.startswith("grad.")})
    assert len(gradients) == 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(tokenizer.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


def reference_of(monkeypatch, quantizer, **settings):
    """Our tokenizer with a quantizer's reference weights on the shared trunk, and the reference numbers."""
    row = {**PRESETS["s"], "overrides": {"embed_dim": 96, "depth": 3, "num_heads": 3}}
    monkeypatch.setitem(PRESETS, "reference", row)
    numbers = load_file(DATA / f"tiny_{quantizer}.safetensors")
    tokenizer = Tokenizer.from_preset(
        "reference", quantizer=quantizer, image_size=64, patch_size=16, tokens=16, dim=8, codebook_size=64, **settings
    )
    weights = load_file(DATA / "tiny_trunk.safetensors")
    weights |= {name[3:]: value for name, value in numbers.items() if name.startswith("sd.quant_conv")}
    state = translate(weights)
    if quantizer == "vq":
        state["quantizer.codebook"] = numbers["sd.quantize.embedding.weight"][None]
    tokenizer.load_state_dict(state)
    return tokenizer, numbers


def check_gradients(tokenizer, numbers):
    gradients = {k[5:]: v for k, v in numbers.items() if k.startswith("grad.") and "quantize." not in k}
    assert len(gradients) == 4
    for name, gradient in translate(gradients).items():
        torch.testing.assert_close(tokenizer.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_ae_equals_reference(monkeypatch):
    tokenizer, numbers = reference_of(monkeypatch, "ae")
    images, code = tokenizer.train()(numbers["in.x"])
    torch.testing.assert_close(code.z_hat, numbers["eval.z_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(code.z, numbers["eval.z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images, numbers["train.rec"], atol=1e-5, rtol=0)
    images.square().mean().backward()
    check_gradients(tokenizer, numbers)


def test_kl_equals_reference(monkeypatch):
    """Mean and its reconstruction, samples of torch's seeds 123 and 7, the summed KL term, gradients."""
    tokenizer, numbers = reference_of(monkeypatch, "kl")
    with torch.no_grad():
        code = tokenizer.eval().encode(numbers["in.x"])
        images = tokenizer.decode(code.z)
    torch.testing.assert_close(code.z_hat, numbers["eval.z_hat"], atol=1e-5, rtol=0)
    torch.testing.assert_close(code.z, numbers["eval.mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.quantizer.moments(code.z_hat)[1], numbers["eval.logvar"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images, numbers["eval.rec_mode"], atol=1e-5, rtol=0)
    sample = code.sample(torch.Generator().manual_seed(123))
    torch.testing.assert_close(sample, numbers["eval.sample_seed123"], atol=1e-5, rtol=0)
    images, code = tokenizer.train()(numbers["in.x"], torch.Generator().manual_seed(7))
    torch.testing.assert_close(images, numbers["train.rec_seed7"], atol=1e-5, rtol=0)
    torch.testing.assert_close(code.losses["kl"], numbers["eval.kl_per_sample"].mean(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(1e-6 * code.losses["kl"], numbers["train.kl_loss_weighted"], atol=1e-9, rtol=0)
    (images.square().mean() + 1e-6 * code.losses["kl"]).backward()
    check_gradients(tokenizer, numbers)


def test_vq_equals_reference(monkeypatch):
    tokenizer, numbers = reference_of(monkeypatch, "vq", codebooks=1)
    with torch.no_grad():
        code = tokenizer.eval().encode(numbers["in.x"])
        images = tokenizer.decode(code.z)
    torch.testing.assert_close(code.z, numbers["eval.z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images, numbers["eval.rec"], atol=1e-5, rtol=0)
    assert torch.equal(code.indices().flatten(), numbers["eval.indices"])
    images, code = tokenizer.train()(numbers["in.x"])
    torch.testing.assert_close(images, numbers["train.rec"], atol=1e-5, rtol=0)
    weighted = {"codebook": 1.0, "commit": 0.25, "kl": 0.01}
    for name, key in (("codebook", "vq_loss"), ("commit", "commit_loss"), ("kl", "entropy_loss")):
        torch.testing.assert_close(weighted[name] * code.losses[name], numbers[f"train.{key}"], atol=1e-6, rtol=0)
    (images.square().mean() + sum(weighted[name] * code.losses[name] for name in weighted)).backward()
    check_gradients(tokenizer, numbers)
    gradient = numbers["grad.quantize.embedding.weight"]
    torch.testing.assert_close(tokenizer.quantizer.codebook.grad[0], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "softvq"])
def test_one_seed_gives_all_quantizers_one_trunk(quantizer):
    def trunk(**settings):
        torch.manual_seed(0)
        state = Tokenizer.from_preset("tiny", tokens=4, dim=6, **settings).state_dict()
        return {name: value for name, value in state.items() if not name.startswith("quantizer.")}

    theirs, ours = trunk(), trunk(quantizer=quantizer)
    assert theirs.keys() == ours.keys()
    different = {name for name in ours if not torch.equal(theirs[name], ours[name])}
    assert different == ({"to_latent.weight", "to_latent.bias"} if quantizer == "kl" else set())


@pytest.mark.parametrize(
    ("settings", "indices"),
    [
        ({"quantizer": "vq"}, (2, 4)),
        ({"quantizer": "gmmvq", "product": 2}, (2, 4, 2)),
        ({"quantizer": "softvq", "residual": 3}, (2, 4, 3)),
        ({"quantizer": "vq", "product": 2, "residual": 3, "codebooks": 2, "vq_ema": 0.9, "vq_kmeans": 1}, (2, 4, 6)),
        ({"quantizer": "kl"}, None),
        ({"quantizer": "ae", "codebooks": None}, None),
    ],
)
def test_every_quantizer_is_saved_and_loaded(settings, indices, tmp_path):
    tokenizer = Tokenizer.from_preset("tiny", tokens=4, codebook_size=16, **settings).eval()
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path).eval()
    assert again.config == tokenizer.config
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        code, theirs = tokenizer.encode(images), again.encode(images)
        assert torch.equal(code.z, theirs.z) and code.z.shape == (2, 4, 16)
        assert tokenizer.decode(code.z).shape == images.shape
    if indices:
        assert code.indices().shape == indices and code.indices().max() < 16
        assert torch.equal(code.indices(), code.posterior().argmax(-1))
    else:
        with pytest.raises(ValueError, match="has no codebook"):
            code.indices()


@pytest.mark.parametrize("tokens", [1, 7, 32, 1024])
def test_any_token_count(tokens):
    tokenizer = Tokenizer.from_preset("tiny", tokens=tokens).eval()
    with torch.no_grad():
        images, code = tokenizer(torch.zeros(2, 3, 32, 32))
    assert code.z.shape == code.z_hat.shape == (2, tokens, 16)
    assert images.shape == (2, 3, 32, 32)
    posterior = code.posterior()
    assert posterior.shape == (2, tokens, 256)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(2, tokens))


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (28, 7), (64, 8), (256, 8), (100, 5)])
def test_small_presets_choose_a_patch_that_divides(size, patch):
    config = TokenizerConfig(preset="tiny", image_size=size, tokens=64).resolved()
    assert config.patch_size == patch and size % patch == 0


@pytest.mark.parametrize(("size", "patches"), [(256, 256), (512, 1024)])
def test_full_size_uses_patch_16_and_the_papers_dim(size, patches):
    for tokens, dim in ((256, 8), (128, 16), (64, 32), (32, 64)):
        config = TokenizerConfig(preset="s", image_size=size, tokens=tokens).resolved()
        assert (config.patch_size, config.patches, config.dim, config.codebooks) == (16, patches, dim, 4)
        assert config.codebook_size == 8192 and config.entropy_temperature == 0.01


def test_512_pixels_build_and_run_on_meta():
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset("b", image_size=512, tokens=32)
        images, code = tokenizer(torch.empty(1, 3, 512, 512))
    assert images.shape == (1, 3, 512, 512) and code.z.shape == (1, 32, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "tinny"}, ["'tinny'", "did you mean 'tiny'"]),
        ({"tokkens": 64}, ["'tokkens'", "did you mean 'tokens'"]),
        ({"quantizer": "soft"}, ["quantizer='soft'", "'softvq'"]),
        ({"posterior": "release"}, ["did you mean 'released'"]),
        ({"tokens": 30, "codebooks": 4}, ["tokens=30", "codebooks=4", "1, 2, 3, 5"]),
        ({"preset": "s", "tokens": 1}, ["tokens=1", "codebooks=4"]),
        ({"image_size": 30, "patch_size": 4}, ["image_size=30", "patch_size=4", "1, 2, 3, 5"]),
        ({"tokens": 0}, ["tokens=0", "at least 1"]),
        ({"tokens": 2000}, ["tokens=2000", "1024"]),
        ({"image_size": -32}, ["image_size=-32"]),
        ({"patch_size": 0}, ["patch_size=0"]),
        ({"dim": 0}, ["dim=0"]),
        ({"codebook_size": 0}, ["codebook_size=0"]),
        ({"temperature": 0.0}, ["temperature=0.0", "above 0"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"tokens": "64"}, ["tokens='64'", "int is wanted"]),
        ({"temperature": "1e-4"}, ["1.0e-4"]),
        ({"preset": "s", "tokens": 48}, ["dim", "tokens=48", "2048"]),
        ({"preset": "s", "image_size": 64}, ["dim", "image_size=64"]),
        ({"pretrained": True}, ["preset='tiny'", "s, b, bl, l"]),
        ({"quantizer": "gmm"}, ["quantizer='gmm'", "did you mean 'gmmvq'"]),
        ({"product": 3}, ["dim=16", "product=3", "1, 2, 4, 8, 16"]),
        ({"product": 0}, ["product=0", "at least 1"]),
        ({"residual": 0}, ["residual=0", "at least 1"]),
        ({"quantizer": "ae", "product": 2}, ["product=2", "'ae'", "vq, softvq, gmmvq"]),
        ({"quantizer": "kl", "residual": 2}, ["residual=2", "'kl'"]),
        ({"quantizer": "gmmvq", "temperature": float("nan")}, ["temperature=nan"]),
        ({"quantizer": "vq", "vq_ema": 1.0}, ["vq_ema=1.0", "0.99"]),
        ({"quantizer": "vq", "vq_kmeans": -1}, ["vq_kmeans=-1"]),
        ({"vq_revive": 0.1}, ["vq_revive=0.1", "quantizer='vq'", "'softvq'"]),
    ],
)
def test_bad_settings_name_the_value_and_the_remedy(settings, words):
    with pytest.raises(ValueError) as error:
        Tokenizer.from_preset(**{"preset": "tiny", **settings})
    for word in words:
        assert word in str(error.value)


def test_wrong_shapes_are_named():
    tokenizer = Tokenizer.from_preset("tiny", tokens=4)
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*\(batch, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(1, 5, 16\).*\(batch, 4, 16\)"):
        tokenizer.decode(torch.zeros(1, 5, 16))


def test_every_parameter_gets_a_gradient():
    tokenizer = Tokenizer.from_preset("tiny", tokens=8, codebooks=2)
    images, code = tokenizer(torch.rand(2, 3, 32, 32) * 2 - 1)
    (images.square().mean() + code.losses["kl"]).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = Tokenizer.from_preset("tiny", tokens=8).eval()
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path).eval()
    assert again.config == tokenizer.config
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images)[0], tokenizer(images)[0])
