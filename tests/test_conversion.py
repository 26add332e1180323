"""Conversion of tokenizers to ONNX and to diffusers: equal output, statistics of latents, and what is refused."""

import copy
import json
import re
import sys

import numpy as np
import pytest
import torch
from tiny_runs import generator, randomised
from torch import nn

from softvq_lib.conversion import convert, export, onnx
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.generators.loading import save_generator
from softvq_lib.tokenizers import Tokenizer

TOKENS = 4
# Every quantizer, each form of the posterior, and what wraps them.
CASES = {
    "ae": {"quantizer": "ae"},
    "kl": {"quantizer": "kl"},
    "vq": {"quantizer": "vq"},
    "gmmvq": {"quantizer": "gmmvq"},
    "released": {"quantizer": "softvq", "codebooks": 2},
    "squared": {"quantizer": "softvq", "posterior": "squared"},
    "paper": {"quantizer": "softvq", "posterior": "paper", "codebooks": 2},
    "product": {"quantizer": "softvq", "product": 2},
    "residual": {"quantizer": "vq", "residual": 2},
    "both": {"quantizer": "softvq", "product": 2, "residual": 2, "posterior": "paper"},
}


def tiny(case: str, **more) -> Tokenizer:
    """A tokenizer of random weights; a fresh one's decoder hardly looks at its latents."""
    sizes = {"tokens": TOKENS, "dim": 6, "image_size": 16, "patch_size": 8, "codebook_size": 16}
    return randomised(Tokenizer.from_preset("tiny", **sizes | CASES[case] | more))


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def snippet(folder) -> str:
    """The one piece of Python in a folder's model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code


# -- ONNX ------------------------------------------------------------------------------------------------------------


class Latents(nn.Module):
    """The quantizer alone, which differs from case to case; the transformers around it are the same."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z_hat):
        return self.quantizer(z_hat)[0]


@pytest.mark.parametrize("case", CASES)
def test_each_quantizer_is_the_same_in_onnx_for_any_batch(case, tmp_path):
    import onnxruntime

    quantizer = tiny(case).quantizer
    example = torch.randn(2, TOKENS, quantizer.hat_dim)
    onnx.to_file(Latents(quantizer).eval(), example, ["z_hat"], ["z"], tmp_path / "q.onnx", 18, {})
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        z_hat = torch.randn(batch, TOKENS, quantizer.hat_dim)
        (z,) = session.run(["z"], {"z_hat": z_hat.numpy()})
        torch.testing.assert_close(torch.from_numpy(z), quantizer(z_hat)[0].detach(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tokenizer, and the folder that it was exported to."""
    tokenizer = tiny("paper")
    tokenizer.latent_mean, tokenizer.latent_std = 0.25, 2.0
    folder = tmp_path_factory.mktemp("exports") / "new" / "paper"
    return tokenizer, folder, export(tokenizer, folder)


def test_the_files_say_what_they_are(exported):
    import onnxruntime

    tokenizer, folder, made = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "decoder.onnx",
        "encoder.onnx",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["paper"], "something is left beside it"
    assert set(made.differences) == {"z", "z_hat", "images"} and max(made.differences.values()) < made.tolerance
    assert "differs by at most" in str(made) and made.bytes == sum(path.stat().st_size for path in folder.iterdir())
    for name in ("encoder.onnx", "decoder.onnx"):
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        known = session.get_modelmeta().custom_metadata_map
        assert known["tokenizer_hash"] == tokenizer_hash(tokenizer)
        assert [json.loads(known[k]) for k in ("latent_mean", "latent_std", "latent_statistics_known")] == [
            0.25,
            2,
            True,
        ]
        assert json.loads(known["config"])["posterior"] == "paper"
        for axes in (*session.get_inputs(), *session.get_outputs()):
            assert isinstance(axes.shape[0], str) and all(isinstance(size, int) for size in axes.shape[1:])
        # The exporter notes where in the source each operator came from.
        assert b".py" not in (folder / name).read_bytes()
    assert "library_name: onnx" in (folder / "README.md").read_text()


def test_the_cards_code_runs_without_this_library(exported, monkeypatch):
    _, folder, _ = exported
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "softvq_lib", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    exec(snippet(folder), known := {})
    assert known["restored"].shape == (2, 3, 16, 16)
    np.testing.assert_allclose(known["normalised"] * 2 + 0.25, known["z"], rtol=1e-5, atol=1e-6)


def test_kls_moments_are_an_output(tmp_path):
    import onnxruntime

    tokenizer = tiny("kl")
    onnx.to_file(onnx._Encoder(tokenizer).eval(), images(2), ["images"], ["z", "z_hat"], tmp_path / "e.onnx", 18, {})
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    z, z_hat = session.run(["z", "z_hat"], {"images": images(3).numpy()})
    assert z.shape == (3, TOKENS, 6) and z_hat.shape == (3, TOKENS, 12)
    np.testing.assert_array_equal(z, z_hat[..., :6])
    np.testing.assert_allclose(z_hat, tokenizer.encode(images(3)).z_hat.detach(), atol=1e-4)


def test_weights_beyond_the_formats_limit_lie_beside_the_file(monkeypatch, tmp_path):
    import onnxruntime

    monkeypatch.setattr(onnx, "_MOST", 0)
    quantizer = tiny("released", codebook_size=2048).quantizer
    (part := tmp_path / "part").mkdir()
    onnx.to_file(Latents(quantizer).eval(), torch.randn(2, TOKENS, 6), ["z_hat"], ["z"], part / "q.onnx", 18, {})
    assert sorted(path.name for path in part.iterdir()) == ["q.onnx", "q.onnx.data"]
    folder = part.rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(folder / "q.onnx", providers=["CPUExecutionProvider"])
    z_hat = torch.randn(3, TOKENS, 6)
    (z,) = session.run(["z"], {"z_hat": z_hat.numpy()})
    torch.testing.assert_close(torch.from_numpy(z), quantizer(z_hat)[0].detach(), rtol=0, atol=1e-5)


def test_unequal_output_is_refused_and_nothing_kept(monkeypatch, tmp_path):
    write = onnx.to_file

    def other(module, *arguments):
        module = copy.deepcopy(module)
        module.tokenizer.to_latent.bias.data += 0.01
        write(module, *arguments)

    monkeypatch.setattr(onnx, "to_file", other)
    with pytest.raises(ValueError, match=r"differs in z_hat by 0\.00\d+, where tolerance=0\.0001"):
        export(tiny("ae"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="z by nan"):
        convert.refuse_unequal({"z": float("nan")}, 1e-4, "onnx")
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the tokenizer's \(3, 2\)"):
        convert.relative(np.zeros((2, 3)), np.zeros((3, 2)))
    assert convert.relative(np.array([10.0, 0]), np.array([8.0, 0])) == 0.25
    assert convert.relative(np.array([0.5]), np.array([0.25])) == 0.25


# -- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_diffusers_gives_the_same(case, tmp_path):
    from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

    tokenizer = tiny(case)
    made = export(tokenizer, tmp_path / "out", to="diffusers")
    assert max(made.differences.values()) == 0.0
    vae = AutoencoderSoftVQ.from_pretrained(tmp_path / "out")
    assert not vae.training and vae.config.scaling_factor == 1.0 and vae.config.grid == [2, 2]
    assert vae.config.tokenizer_hash == tokenizer_hash(tokenizer) == tokenizer_hash(vae.tokenizer)
    with torch.no_grad():
        restored, code = tokenizer(images(3))
        assert torch.equal(vae(images(3)).sample, restored)
        found = vae.encode(images(3)).latent_dist
        assert found.mode().shape == (3, 6, 2, 2) and torch.equal(found.mode()[:, :, 1, 0], code.z[:, 2])
        drawn = [found.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2]) == (case != "kl")


@pytest.mark.parametrize(
    ("mean", "std"), [(0.5, 2.0), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]
)
def test_latents_are_normalised_inside(mean, std):
    from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

    tokenizer, known = tiny("kl"), convert.Statistics(mean, std, True)
    plain = AutoencoderSoftVQ.from_tokenizer(tokenizer)
    vae = AutoencoderSoftVQ.from_tokenizer(tokenizer, known, grid=(1, TOKENS))
    shift, scale = (torch.tensor(x).reshape(1, -1, 1, 1) for x in (mean, std))  # (1, 1 or d, 1, 1)
    with torch.no_grad():
        ours, theirs = (model.encode(images(2)).latent_dist for model in (vae, plain))
        assert ours.mode().shape == (2, 6, 1, TOKENS)
        # Drawn with the same noise, in units of the data's deviation.
        wanted = (theirs.sample(torch.Generator().manual_seed(0)).reshape(2, 6, 1, TOKENS) - shift) / scale
        noise = torch.Generator().manual_seed(0)
        torch.testing.assert_close(ours.sample(noise), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(ours.mode()).sample, plain.decode(theirs.mode()).sample)
        assert torch.equal(vae.to_tokens(vae.to_grid(x := torch.randn(2, TOKENS, 6))), x)


def test_automodel_and_a_pipeline_take_it(monkeypatch, tmp_path):
    from diffusers import AutoModel, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tokenizer = tiny("released")
    tokenizer.latent_mean, tokenizer.latent_std = 0.5, 2.0
    export(tokenizer, tmp_path / "vae", to="diffusers")
    vae = AutoModel.from_pretrained(str(tmp_path / "vae"), trust_remote_code=True)
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 1000}
    shape = {"in_channels": 6, "out_channels": 6, "sample_size": 2, "patch_size": 1}
    pipeline = DiTPipeline(DiTTransformer2DModel(**sizes, **shape), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: seen.append(z) or decode(z))
    call = {"class_labels": [1, 2], "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    made = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    with torch.no_grad():
        wanted = tokenizer.decode(seen[0].flatten(2).mT * 2.0 + 0.5)
    torch.testing.assert_close(made, (wanted / 2 + 0.5).clamp(0, 1))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**call, generator=torch.Generator().manual_seed(0)).images, made)


def test_half_precision_and_encoders_whose_positions_are_in_no_file(tmp_path):
    from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

    for number, name in enumerate(["test_vit.r160_in1k", "vit_small_patch16_rope_224"]):
        tokenizer = Tokenizer.from_preset("tiny", tokens=TOKENS, encoder=name, patch_size=16).eval()
        export(tokenizer, tmp_path / str(number), to="diffusers")
    vae = AutoencoderSoftVQ.from_pretrained(tmp_path / "0", torch_dtype=torch.bfloat16)
    x = torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)
    assert vae.encode(x).latent_dist.sample().dtype == vae(x).sample.dtype == torch.bfloat16


def test_the_cards_code_runs_for_diffusers(monkeypatch, tmp_path):
    export(tiny("released"), tmp_path / "out", to="diffusers")
    monkeypatch.chdir(tmp_path / "out")
    exec(snippet(tmp_path / "out"), known := {})
    assert known["restored"].shape == (1, 3, 16, 16)
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


# -- where statistics come from --------------------------------------------------------------------------------------


def test_statistics_come_from_a_generator_of_this_tokenizer(tmp_path):
    tokenizer = randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=16, patch_size=8))
    tokenizer.save_pretrained(tmp_path / "runs" / "tok" / "tokenizer")
    known = {
        "tokenizer": "tok",
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2, 3],
    }
    save_generator(generator(), tmp_path / "runs" / "gen" / "generator", **known, normalise="channel")
    options = {"to": "diffusers", "runs": str(tmp_path / "runs")}
    export("tok", tmp_path / "out", statistics="gen", **options)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["latent_mean"] == pytest.approx([0.1, 0.2, 0.3]) and settings["latent_std"] == [1, 2, 3]
    with pytest.raises(ValueError, match="tokenizer"):
        export(tiny("released", dim=3), tmp_path / "other", statistics="gen", **options)
    with pytest.raises(ValueError, match="no finished run .*did you mean 'gen'"):
        export("tok", tmp_path / "other", statistics="gem", **options)
    with pytest.raises(ValueError, match="no run of .*Trained there: tok"):
        export("tokk", tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


def test_statistics_come_from_a_cache_of_latents(tmp_path):
    from softvq_lib.data import DataConfig, open_dataset
    from softvq_lib.training.latents import encode_dataset

    tokenizer = randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, quantizer="ae"))
    data = open_dataset(DataConfig(dataset="digits", limit=8), 32)
    cache = encode_dataset(tokenizer, data, tmp_path / "latents", flips=False, workers=0, progress=False)
    found = convert.find_statistics(tmp_path / "latents", tokenizer, "channel", None)
    mean, std = (x.tolist() for x in cache.statistics("channel"))
    assert (found.mean, found.std) == (pytest.approx(mean), pytest.approx(std)) and found.known
    other = randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, quantizer="ae"), std=0.2)
    with pytest.raises(ValueError, match="latents of another tokenizer"):
        convert.find_statistics(tmp_path / "latents", other, "scalar", None)
    header = json.loads((tmp_path / "latents" / convert.HEADER).read_text())
    del header["mean"]
    (tmp_path / "latents" / convert.HEADER).write_text(json.dumps(header))
    with pytest.raises(ValueError, match="is not finished"):
        convert.find_statistics(tmp_path / "latents", tokenizer, "scalar", None)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("diffusers", "diffusers")]
)
def test_a_missing_extra_is_named(to, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package} cannot be imported .*pip install 'softvq-book\[export\]'"):
        export(tiny("ae"), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    tokenizer = tiny("ae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name} exists, and nothing is written over unasked"):
            export(tokenizer, tmp_path / name, to="diffusers")
        with pytest.raises(ValueError, match=f"{name} holds more than an earlier export"):
            export(tokenizer, tmp_path / name, to="diffusers", overwrite=True)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(tokenizer, tmp_path / "empty", to="diffusers")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(ValueError, match="empty exists"):
        export(tokenizer, tmp_path / "empty", to="diffusers")
    export(tiny("kl"), tmp_path / "empty", to="diffusers", overwrite=True)
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["tokenizer_config"]["quantizer"] == "kl"
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty holds more than an earlier export"):
        export(tokenizer, tmp_path / "empty", to="diffusers", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_the_tokenizer_that_is_given_stays_as_it_is(tmp_path):
    tokenizer = tiny("ae").train()
    export(tokenizer, tmp_path / "out", to="diffusers")
    assert tokenizer.training


def test_the_command_writes_and_refuses(monkeypatch, tmp_path, capsys):
    from softvq_lib.cli import main

    tiny("ae").save_pretrained(tmp_path / "runs" / "mine" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    command = ["export", "mine", "-o", "out", "--to", "diffusers", "--grid", "1", "4", "--runs", "runs"]
    assert main(command) == 0
    assert "out: diffusers" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["grid"] == [1, 4]
    assert main(command) == 2
    assert "error: out exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "onx"}, "to='onx' is not known, did you mean 'onnx'"),
        ({"grid": (2, 2)}, "grid=.* is for to='diffusers' alone"),
        ({"to": "diffusers", "grid": (3, 2)}, r"grid=\(3, 2\) does not hold 4 tokens: choose among \(1, 4\), \(2, 2\)"),
        ({"opset": 17}, "opset=17 is not allowed"),
        ({"tolerance": 0}, "tolerance=0 is not allowed"),
        ({"normalise": "token"}, "normalise='token' is not known"),
    ],
)
def test_bad_options_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(tiny("ae"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_bad_settings_of_a_model_are_refused():
    from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

    settings = {"tokens": 4, "dim": 3}
    with pytest.raises(ValueError, match="latent_std=0.0 is neither a finite number above 0 nor 3 of them"):
        AutoencoderSoftVQ(settings, latent_std=0.0)
    with pytest.raises(ValueError, match=r"latent_mean=\[0.0, 1.0\] is neither"):
        AutoencoderSoftVQ(settings, latent_mean=[0.0, 1.0])
    with pytest.raises(ValueError, match="unknown parameter 'tokenz', did you mean 'tokens'"):
        AutoencoderSoftVQ({"tokenz": 4})
    vae = AutoencoderSoftVQ(settings)
    with pytest.raises(ValueError, match=r"latents of shape \(1, 3, 4\) do not fit: give \(batch, 3, 2, 2\)"):
        vae.decode(torch.zeros(1, 3, 4))
