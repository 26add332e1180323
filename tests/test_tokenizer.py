"""Tokenizer: sizes and shapes of Sec. 3.1, parity with the reference implementation, errors, round trip."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq_lib.tokenizers import PRESETS, QUANTIZERS, Tokenizer, TokenizerConfig
from softvq_lib.tokenizers.presets import ENCODERS
from softvq_lib.tokenizers.published import translate
from softvq_lib.tokenizers.vit import _run

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("preset", "million", "with_unused_patch_embedding"),
    [("s", 44.54, 44.84), ("b", 172.97, 173.56), ("bl", 390.55, 391.33), ("l", 608.14, 608.92)],
)
def test_parameter_counts(preset, million, with_unused_patch_embedding):
    """The paper's 45/173/391/608 M, rounded; the release's decoder carries a patch embedding too that it never uses."""
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


@pytest.mark.parametrize("preset", PRESETS)
def test_512_pixels_build_and_run_on_meta(preset):
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset(preset, image_size=512, tokens=32)
        images, code = tokenizer(torch.empty(1, 3, 512, 512))
    assert images.shape == (1, 3, 512, 512) and code.z.shape == (1, 32, 64)
    assert all(tensor.is_meta for tensor in tokenizer.state_dict().values())


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


# One network of each kind that an encoder may be: class token; registers; a norm before the blocks; rotary positions
# (of all heads, of each head); pooling for a classifier instead of a class token.
NETWORKS = [
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_clip_224.openai",
    "eva02_base_patch16_clip_224.merged2b",
    "vit_small_patch16_rope_mixed_224.naver_in1k",
    "vit_base_patch16_siglip_224.webli",
]
ROTARY = NETWORKS[3:5]


@pytest.fixture
def small(monkeypatch):
    """Tokenizers whose encoder is a network of a given name in a small size, with random weights of some spread."""

    def build(network, **settings):
        monkeypatch.setitem(PRESETS, "small", {**PRESETS["tiny"], "encoder": network})
        torch.manual_seed(0)
        tokenizer = Tokenizer.from_preset("small", **{"tokens": 3, "codebook_size": 16, **settings})
        for parameter in tokenizer.encoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return tokenizer

    return build


@pytest.mark.parametrize("network", NETWORKS)
def test_without_latents_the_encoder_is_timms_own_network(small, network):
    vit, images = small(network).encoder.vit, torch.randn(2, 3, 32, 32)
    patches = vit.patch_embed(images)
    assert torch.equal(_run(vit, patches, patches[:, :0]), vit.forward_features(images))


@pytest.mark.parametrize("network", ROTARY)
def test_latents_are_not_rotated(small, network):
    """timm leaves prefix tokens alone, so latents among the prefix tokens must give what they give at the end."""
    encoder, images = small(network).encoder, torch.randn(2, 3, 32, 32)
    vit, latents = encoder.vit, encoder.latent_tokens + encoder.latent_pos_embed
    x, rope = vit._pos_embed(vit.patch_embed(images))
    x = torch.cat([x[:, :1], latents.expand(2, -1, -1), x[:, 1:]], dim=1)
    for i, block in enumerate(vit.blocks):
        block.attn.num_prefix_tokens = 1 + 3
        x = block(x, rope=rope[i] if vit.rope_mixed else rope)
        block.attn.num_prefix_tokens = 1
    torch.testing.assert_close(encoder(images), vit.norm(x)[:, 1:4])


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_of_every_network_gets_a_gradient(small, network):
    tokenizer = small(network, quantizer="ae")
    tokenizer(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
    # A common shift of all keys changes no attention: that bias has a gradient of 0, which rounding hides.
    assert [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("network", NETWORKS[:4])
def test_gradient_checkpointing_changes_nothing(small, network):
    tokenizer, images = small(network), torch.randn(2, 3, 32, 32)
    calls = []
    for half in (tokenizer.encoder, tokenizer.decoder):
        half.vit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        tokenizer.zero_grad()
        output, code = tokenizer(images)
        (output.square().mean() + code.losses["kl"]).backward()
        return output, [parameter.grad for parameter in tokenizer.parameters()], len(calls)

    output, gradients, once = step()
    tokenizer.set_gradient_checkpointing()
    again, same, twice = step()
    assert (once, twice) == (2, 4)
    assert torch.equal(output, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    tokenizer.set_gradient_checkpointing(False)
    assert step()[2] == 2


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize(("alias", "width"), [(None, 768), *zip(ENCODERS, (384, 768, 1024, 768, 768), strict=True)])
def test_every_encoder_builds_and_runs_on_meta_beside_the_presets_decoder(alias, width, size):
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset("b", tokens=64, encoder=alias, image_size=size)
        images, code = tokenizer(torch.empty(1, 3, size, size))
    assert (tokenizer.encoder.width, tokenizer.decoder.width) == (width, 768)
    assert images.shape == (1, 3, size, size) and code.z.shape == (1, 64, 32)


def test_a_named_encoder_keeps_its_size_and_two_spellings_are_one_configuration():
    config = TokenizerConfig(preset="tiny", encoder="dinov2-s", pretrained=True).resolved()
    assert config.encoder == ENCODERS["dinov2-s"] == TokenizerConfig(encoder=config.encoder).resolved().encoder
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset("tiny", encoder="dinov2-s")
    assert (tokenizer.encoder.width, len(tokenizer.encoder.vit.blocks)) == (384, 12)
    assert (tokenizer.decoder.width, len(tokenizer.decoder.vit.blocks)) == (64, 2)
    for name in ("dinov2-b", ENCODERS["dinov2-b"], None):
        assert TokenizerConfig(preset="b", encoder=name).resolved().encoder is None


def test_a_named_encoder_is_saved_and_loaded(small, tmp_path):
    tokenizer = Tokenizer.from_preset("tiny", tokens=3, encoder="test_vit.r160_in1k").eval()
    tokenizer.save_pretrained(tmp_path / "named")
    rotary = small(ROTARY[0]).eval()  # its rotary positions are in no file
    rotary.save_pretrained(tmp_path / "rotary")
    state, images = torch.get_rng_state(), torch.rand(2, 3, 32, 32)
    for name, original in (("named", tokenizer), ("rotary", rotary)):
        torch.set_rng_state(state)
        again = Tokenizer.from_pretrained(tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
        assert again.config == original.config
        with torch.no_grad():
            assert torch.equal(again(images)[0], original(images)[0])


def test_pretrained_weights_start_the_encoder_alone(monkeypatch, tmp_path):
    """A file in place of the hub: kernel and position table are resampled from 160 pixels to 32."""
    import timm

    torch.manual_seed(0)
    published = timm.create_model("test_vit").state_dict()
    save_file(published, tmp_path / "model.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors")}}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **overlay))
    tokenizer = Tokenizer.from_preset("tiny", tokens=3, encoder="test_vit.r160_in1k", pretrained=True)
    vit = tokenizer.encoder.vit
    assert (vit.pos_embed.shape[1], published["pos_embed"].shape[1]) == (1 + 16, 1 + 100)
    assert torch.equal(vit.pos_embed[:, :1], published["pos_embed"][:, :1])
    assert vit.patch_embed.proj.weight.shape[-1] == 8
    assert all(torch.equal(tensor, published[f"blocks.{name}"]) for name, tensor in vit.blocks.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder": "dinov2-x"}, ["encoder='dinov2-x'", "did you mean 'dinov2-", "eva02-b"]),
        ({"encoder": "vit_base_patch14_dinov3"}, ["did you mean 'vit_base_patch1"]),
        ({"encoder": "resnet18"}, ["encoder='resnet18'", "no plain vision transformer", "clip-b"]),
        ({"encoder": "samvit_base_patch16.sa1b"}, ["no plain vision transformer"]),
        ({"encoder": "vit_base_patch14_dinov2.lvd"}, ["tag", "vit_base_patch14_dinov2.lvd142m"]),
        ({"encoder": "test_vit4", "pretrained": True}, ["no published weights"]),
        ({"encoder": 3}, ["encoder=3", "str"]),
    ],
)
def test_a_bad_encoder_is_named_with_the_remedy(settings, words):
    with pytest.raises(ValueError) as error:
        Tokenizer.from_preset("tiny", **settings)
    for word in words:
        assert word in str(error.value)


def test_weights_that_cannot_be_had_are_named():
    with pytest.raises(OSError, match=r"test_vit\.r160_in1k.*pretrained=False"):
        Tokenizer.from_preset("tiny", encoder="test_vit.r160_in1k", pretrained=True)
