"""Tokenizers from folders and hub names: the authors' and ours, parity with a model written in timm, damaged files."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn

from softvq_lib.tokenizers import PRESETS, Tokenizer
from softvq_lib.tokenizers.published import STATISTICS

KEYS = json.loads((Path(__file__).parent / "data" / "softvq_s_64.keys.json").read_text())
S = "vit_small_patch14_dinov2.lvd142m"
B, L = S.replace("small", "base"), S.replace("small", "large")
# What the authors' code writes, without what their later versions added.
SETTINGS = {
    "image_size": 256,
    "codebook_size": 8192,
    "codebook_embed_dim": 32,
    "codebook_l2_norm": True,
    "codebook_show_usage": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.01,
    "tau": 0.07,
    "num_codebooks": 4,
    "encoder_ch_mult": [1, 1, 2, 2, 4],
    "dropout_p": 0.0,
    "enc_type": "vit",
    "dec_type": "vit",
    "encoder_model": S,
    "decoder_model": S,
    "num_latent_tokens": 64,
    "enc_tuning_method": "full",
    "enc_pretrained": True,
    "dec_pretrained": False,
    "enc_patch_size": 16,
    "dec_patch_size": 16,
    "enc_drop_path_rate": 0.0,
    "repa": True,
    "repa_model": B,
    "repa_layer_indices": 1,
    "vq_mean": 0.0,
    "vq_std": 1.0,
}
SMALL = {"image_size": 64, "codebook_size": 64, "codebook_embed_dim": 8, "num_latent_tokens": 16}
WIDTHS = {"embed_dim": 48, "depth": 2, "num_heads": 3}


class Half(nn.Module):
    """Encoder or decoder, under the authors' names."""

    def __init__(self, settings, decoder, **widths):
        import timm

        super().__init__()
        size, patch, tokens = (settings[k] for k in ("image_size", "enc_patch_size", "num_latent_tokens"))
        self.model = timm.create_model(S, img_size=size, patch_size=patch, num_classes=0, **widths)
        width = self.model.embed_dim
        self.latent_pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        if decoder:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            self.to_pixel = nn.ModuleDict({"model": nn.Linear(width, 3 * patch**2)})
        else:
            self.latent_tokens = nn.Parameter(torch.empty(1, tokens, width))

    def run(self, patches, latents):
        x = torch.cat([self.model.cls_token.expand(len(patches), -1, -1), patches], 1) + self.model.pos_embed
        return self.model.norm(self.model.blocks(torch.cat([x, latents + self.latent_pos_embed], 1)))


class Reference(nn.Module):
    """The authors' tokenizer, written from its description."""

    def __init__(self, settings, **widths):
        super().__init__()
        self.settings, dim = settings, settings["codebook_embed_dim"]
        self.encoder, self.decoder = Half(settings, False, **widths), Half(settings, True, **widths)
        self.quant_conv = nn.Linear(self.encoder.model.embed_dim, dim)
        self.post_quant_conv = nn.Linear(dim, self.decoder.model.embed_dim)
        self.quantize = nn.Module()
        shape = (settings["num_codebooks"], settings["codebook_size"], dim)
        self.quantize.embedding = nn.Parameter(torch.empty(shape))
        self.quantize.register_buffer("codebook_used", torch.zeros(shape[0], 65536))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.05, generator=generator)
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                parameter.data += 0.5

    def encode(self, images):
        latents = self.encoder.latent_tokens.expand(len(images), -1, -1)
        z_hat = self.quant_conv(
            self.encoder.run(self.encoder.model.patch_embed(images), latents)[:, -latents.shape[1] :]
        )
        codebooks = F.normalize(self.quantize.embedding, dim=-1)
        parts = zip(F.normalize(z_hat, dim=-1).chunk(len(codebooks), 1), codebooks, strict=True)
        return z_hat, torch.cat([(h @ c.T / self.settings["tau"]).softmax(-1) @ c for h, c in parts], 1)

    def decode(self, z):
        patch, side = self.settings["enc_patch_size"], self.settings["image_size"] // self.settings["enc_patch_size"]
        masks = self.decoder.mask_token.expand(len(z), side**2, -1)
        x = self.decoder.run(masks, self.post_quant_conv(z))[:, 1 : 1 + side**2]
        x = self.decoder.to_pixel["model"](x).view(len(z), side, side, patch, patch, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(z), 3, side * patch, side * patch)


def write(folder, settings, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def narrow(monkeypatch):
    """Size S, but narrow."""
    monkeypatch.setitem(PRESETS, "s", {**PRESETS["s"], "overrides": WIDTHS})


@pytest.fixture
def theirs(narrow, tmp_path):
    """A folder as the authors publish it, of a narrow network."""
    settings = SETTINGS | SMALL
    return write(tmp_path / "theirs", settings, Reference(settings, **WIDTHS).state_dict())


@pytest.fixture
def ours(tmp_path):
    """A folder that this library wrote."""
    Tokenizer.from_preset("tiny", tokens=8).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def change(folder, **settings):
    """Change settings in a folder's config.json; None removes one."""
    path = folder / "config.json"
    merged = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


def check_parity(reference, folder, batch):
    tokenizer = Tokenizer.from_pretrained(folder)
    size = tokenizer.config.image_size
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        code, (z_hat, z) = tokenizer.encode(images), reference.eval().encode(images)
        decoded = tokenizer.decode(z), reference.decode(z)
    assert z_hat.std() > 0.1 and decoded[1].std() > 0.1 and z[:, 0].std() > 0.01, "the reference computes nothing"
    torch.testing.assert_close(code.z_hat, z_hat, atol=1e-5, rtol=0)
    torch.testing.assert_close(code.z, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(*decoded, atol=1e-5, rtol=0)
    assert not tokenizer.training
    return tokenizer


def test_narrow_parity(theirs, capsys):
    reference = Reference(SETTINGS | SMALL, **WIDTHS)
    reference.load_state_dict(load_file(theirs / "model.safetensors"))
    tokenizer = check_parity(reference, theirs, batch=3)
    assert (tokenizer.config.codebooks, tokenizer.config.temperature) == (4, 0.07)
    assert tokenizer.config.entropy_temperature == 0.01 and tokenizer.config.posterior == "released"
    assert capsys.readouterr() == ("", "")


def test_full_size_parity_names_and_statistics(tmp_path):
    reference = Reference(SETTINGS)
    state = reference.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == KEYS
    folder = write(tmp_path / "softvq-s-64", SETTINGS, state)
    tokenizer = check_parity(reference, folder, batch=1)
    assert tokenizer.config.preset == "s" and tokenizer.config.dim == 32
    assert (tokenizer.latent_mean, tokenizer.latent_std) == STATISTICS["s-64"]


def test_files_without_the_unused_tensors_load_the_same(theirs):
    before = Tokenizer.from_pretrained(theirs).state_dict()
    tensors = load_file(theirs / "model.safetensors")
    unused = [name for name in tensors if name.startswith(("decoder.model.patch_embed", "quantize.codebook_used"))]
    assert len(unused) == 3
    write(theirs, SETTINGS | SMALL, {name: tensor for name, tensor in tensors.items() if name not in unused})
    after = Tokenizer.from_pretrained(theirs).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_settings_of_theirs_are_ignored_with_one_note(theirs, caplog):
    change(theirs, repa_weight=0.1, aux_loss_mask=True, rope_theta=10.0, wing_span=3, beak=True)
    with caplog.at_level(logging.INFO):
        Tokenizer.from_pretrained(theirs)
    assert [record.getMessage() for record in caplog.records] == [
        "unknown settings of the published tokenizer are ignored: beak, wing_span."
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_l2_norm": False}, ["codebook_l2_norm=False", "codebook_l2_norm=True"]),
        ({"enc_type": "cnn"}, ["enc_type='cnn'", "'vit'"]),
        ({"dec_type": "cnn"}, ["dec_type='cnn'"]),
        ({"to_pixel": "conv"}, ["to_pixel='conv'", "'linear'"]),
        ({"use_ape": False}, ["use_ape=False"]),
        ({"use_rope": True}, ["use_rope=True"]),
        ({"dec_cls_token": False}, ["dec_cls_token=False"]),
        ({"dec_patch_size": 8}, ["dec_patch_size=8", "dec_patch_size=16"]),
        ({"encoder_model": "vit_giant"}, ["'vit_giant'", S, L]),
        ({"encoder_model": L, "decoder_model": B}, [L, B]),
        ({"encoder_model": None}, ["encoder_model missing"]),
        ({"codebook_embed_dim": "32"}, ["dim='32' is of type str", "dim is codebook_embed_dim"]),
        ({"num_codebooks": 3}, ["tokens=16", "codebooks=3"]),
        ({"tau": -1.0}, ["temperature=-1.0", "temperature is tau"]),
        ({"vq_std": 0.0}, ["vq_std=0.0"]),
        ({"vq_mean": "x"}, ["vq_mean='x'"]),
        ({"codebook_size": 32}, ["quantize.embedding (4, 64, 8) where (4, 32, 8) is wanted"]),
        ({"num_latent_tokens": 32}, ["encoder.latent_tokens (1, 16, 48) where (1, 32, 48) is wanted"]),
        ({"image_size": 128}, ["encoder.model.pos_embed (1, 17, 48) where (1, 65, 48) is wanted"]),
    ],
)
def test_unsupported_or_contradicting_settings_of_theirs(theirs, settings, words):
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(change(theirs, **settings))
    for word in ["config.json", *words]:
        assert word in str(error.value)


def test_networks_of_another_size_are_recognised(theirs, monkeypatch):
    monkeypatch.setitem(PRESETS, "b", {**PRESETS["b"], "overrides": {**WIDTHS, "depth": 3}})
    change(theirs, encoder_model=B, decoder_model=B)
    with pytest.raises(ValueError, match=r"preset='s' \(encoder 48 wide with 2 blocks.*preset='b' .*3 blocks.*" + S):
        Tokenizer.from_pretrained(theirs)


@pytest.mark.parametrize("folder", ["theirs", "ours"])
def test_missing_and_unknown_tensors_are_named(folder, request):
    folder = request.getfixturevalue(folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("blocks.1.attn.qkv.weight"))
    tensors["feather.weight"] = tensors.pop(lost)
    write(change(folder, weights_sha256=None), json.loads((folder / "config.json").read_text()), tensors)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(folder)
    assert f"missing: {lost}; unknown: feather.weight" in str(error.value)


def test_half_precision_is_loaded_as_fp32(theirs):
    tensors = load_file(theirs / "model.safetensors")
    write(theirs, SETTINGS | SMALL, {name: tensor.half() for name, tensor in tensors.items()})
    tokenizer = Tokenizer.from_pretrained(theirs)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "statistics"),
    [
        ("softvq-s-64", {}, (None, None)),  # the folder's name says 64 tokens of 256 px, its settings do not
        ("anything", {"vq_mean": 0.5, "vq_std": 2}, (0.5, 2.0)),
        ("anything", {}, (None, None)),
    ],
)
def test_statistics_of_the_latents(theirs, name, settings, statistics):
    change(theirs, **settings).rename(theirs.with_name(name))
    tokenizer = Tokenizer.from_pretrained(theirs.with_name(name))
    assert (tokenizer.latent_mean, tokenizer.latent_std) == statistics


def test_a_hub_name_asks_for_two_files_and_gives_the_statistics(narrow, tmp_path, monkeypatch, caplog):
    settings = SETTINGS | {"codebook_size": 64}
    cache = tmp_path / "models--SoftVQVAE--softvq-l-64" / "snapshots" / "0123"
    write(cache, settings, Reference(settings, **WIDTHS).state_dict())
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options["revision"]))
        return str(cache / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = Tokenizer.from_pretrained("SoftVQVAE/softvq-l-64", revision="main")
    assert asked == [("SoftVQVAE/softvq-l-64", name, "main") for name in ("config.json", "model.safetensors")]
    assert (tokenizer.latent_mean, tokenizer.latent_std) == STATISTICS["l-64"]
    assert tokenizer.origin == "SoftVQVAE/softvq-l-64"
    assert "named after size l, but its settings are those of size s" in caplog.text
    assert Tokenizer.from_pretrained(cache).latent_std == tokenizer.latent_std


def test_statistics_and_origin_survive_saving(theirs, tmp_path):
    tokenizer = Tokenizer.from_pretrained(change(theirs, vq_mean=0.5, vq_std=2.0))
    tokenizer.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert (again.latent_mean, again.latent_std, again.origin) == (0.5, 2.0, "theirs")
    assert again.config == tokenizer.config
    card = (tmp_path / "again" / "README.md").read_text()
    assert "license:" not in card and "`theirs`" in card and "0.5 and std 2.0" in card


def test_our_settings_are_written_in_full_and_read_strictly(ours):
    settings = json.loads((ours / "config.json").read_text())
    assert None not in settings.values() and settings["dim"] == 16 and settings["pretrained"] is False
    with pytest.raises(ValueError, match=r"config.json: unknown parameter 'tokenz', did you mean 'tokens'\?"):
        Tokenizer.from_pretrained(change(ours, tokenz=3))
    with pytest.raises(ValueError, match="neither a preset nor"):
        Tokenizer.from_pretrained(change(ours, tokenz=None, preset=None))


def test_our_settings_that_contradict_the_tensors(ours):
    with pytest.raises(ValueError, match=r"preset='tiny' \(.*describes preset='mini' \(encoder 160 wide"):
        Tokenizer.from_pretrained(change(ours, preset="mini"))


def test_the_card_says_what_it_is(ours):
    text = (ours / "README.md").read_text()
    for words in ("license: apache-2.0", "8 latent tokens of 16 channels", "| temperature | 0.07 |", "from_pretrained"):
        assert words in text
    assert "2412.10958" in text and "http" not in text


def test_pushing_sends_weights_settings_and_card(monkeypatch):
    sent = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, folder_path, **_: sent.extend(p.name for p in Path(folder_path).iterdir())
    )
    Tokenizer.from_preset("tiny", tokens=8).push_to_hub("someone/tokenizer")
    assert sorted(sent) == ["README.md", "config.json", "model.safetensors"]


def test_saving_over_the_folder_it_was_loaded_from(ours):
    tokenizer = Tokenizer.from_pretrained(ours)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer.save_pretrained(ours)
    after = Tokenizer.from_pretrained(ours).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "last.ckpt", "pytorch_model.bin"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name}.*can run any code.*safetensors.torch.save_file"):
            Tokenizer.from_pretrained(source)


def test_a_truncated_file_is_refused(theirs, ours):
    for folder in (theirs, ours):
        path = folder / "model.safetensors"
        for size in (path.stat().st_size - 1, 100, 0):
            path.write_bytes(path.read_bytes()[:size])
            with pytest.raises(ValueError, match=r"model\.safetensors.* damaged"):
                Tokenizer.from_pretrained(folder)


def test_a_pointer_of_git_lfs_is_recognised(theirs):
    (theirs / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match="Git LFS's pointer"):
        Tokenizer.from_pretrained(theirs)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_flipped_bits_are_noticed_by_the_checksum(ours):
    flip(ours / "model.safetensors", -10)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*sha256 is .* but config\.json records"):
        Tokenizer.from_pretrained(ours)


def test_flipped_bits_are_noticed_by_a_checksum_beside_the_file(theirs):
    path = theirs / "model.safetensors"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    (theirs / "model.safetensors.sha256").write_text(f"{checksum}  model.safetensors\n")
    Tokenizer.from_pretrained(theirs)
    flip(path, -10)
    with pytest.raises(ValueError, match=r"but model\.safetensors\.sha256 records"):
        Tokenizer.from_pretrained(theirs)


@pytest.mark.parametrize("position", [0, 9, 40])
def test_flipped_bits_in_the_header_are_noticed_without_a_checksum(theirs, position):
    flip(theirs / "model.safetensors", position)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Tokenizer.from_pretrained(theirs)


def test_numbers_that_are_not_finite_are_refused(theirs):
    tensors = load_file(theirs / "model.safetensors")
    tensors["quant_conv.bias"][0] = torch.nan
    write(theirs, SETTINGS | SMALL, tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: not finite: quant_conv\.bias"):
        Tokenizer.from_pretrained(theirs)


def test_what_is_not_there_is_named(tmp_path, ours):
    with pytest.raises(ValueError, match=r"no folder .*/nowhere/at/all.*hub name such as"):
        Tokenizer.from_pretrained(tmp_path / "nowhere/at/all")
    with pytest.raises(OSError, match=r"nobody/nothing cannot be had.*no folder of that name.*config\.json failed"):
        Tokenizer.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"is a file: give the folder"):
        Tokenizer.from_pretrained(ours / "model.safetensors")
    shutil.copytree(ours, tmp_path / "part")
    (tmp_path / "part" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path / "part")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "part" / name).unlink()
        with pytest.raises(ValueError, match=rf"holds no {name.replace('.', '[.]')}"):
            Tokenizer.from_pretrained(tmp_path / "part")
