"""Data of the explorable pictures: packing, pictures, counts; the committed files are what the library makes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from explore_files import FOLDER, KINDS, pixels_of, read_data

from softvq_lib import explorable_figures, explorables, results
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.evaluation.cost import decoding_macs
from softvq_lib.evaluation.generator_cost import forward_macs, generator_config, sampling_macs
from softvq_lib.losses import psnr
from softvq_lib.style import OKABE_ITO, QUANTIZER_COLOURS, QUANTIZER_NAMES
from softvq_lib.sweeps import read_plan
from softvq_lib.tokenizers import Tokenizer

from repository import ROOT


@pytest.fixture(scope="module")
def experiments():
    """Two untrained tokenizers, as if they had been trained."""
    data = open_dataset(DataConfig("shapes"), 16)
    found = {}
    for preset, quantizer, tokens in (("nano", "softvq", 4), ("tiny", "ae", 2)):
        settings = {"quantizer": quantizer, "tokens": tokens, "dim": 8, "codebook_size": 16, "image_size": 16}
        tokenizer = Tokenizer.from_preset(preset, **settings)
        identity = {"preset": "tiny", "steps": 7, "batch_size": 3, "seed": 1}
        manifest = {"data": {"name": "shapes"}, "device_name": "a machine", "precision": "float32", "dirty": True}
        manifest |= {"packages": {"torch": "2.9"}, "commit": "abcdef0123456789", "ended": "2026-01-02T03:04:05+00:00"}
        run = SimpleNamespace(tokenizer=tokenizer, identity=identity, manifest=manifest)
        measured = SimpleNamespace(psnr=np.linspace(10, 20, 50))
        found[quantizer, tokens] = SimpleNamespace(run=run, data=data, measured=measured)
    return found


@pytest.fixture(scope="module")
def images(experiments):
    return explorables.pictures_of(experiments["ae", 2].data.validation, [3, 5, 8], 16)


def test_a_row_of_pictures_comes_back_pixel_by_pixel(images):
    pixels = pixels_of(explorables.png_row(images), 16)
    assert len(pixels) == 3
    for image, found in zip(images, pixels, strict=True):
        assert np.array_equal(found, ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_packed_tensors_come_back_rounded_to_half_precision():
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1e-7, 0.0, -3.0, 65504.0])}
    found = explorables.unpack(json.loads(json.dumps(explorables.pack(tensors))))
    assert list(found) == ["a", "b"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.half().float())


def test_reconstructions_are_the_tokenizers(experiments, images):
    data = explorables.reconstruction_data(experiments, images, ["x", "y", "z"])
    assert [(arm["quantizer"], arm["tokens"], arm["dim"]) for arm in data["arms"]] == [("softvq", 4, 8), ("ae", 2, 8)]
    for arm in data["arms"]:
        tokenizer = experiments[arm["quantizer"], arm["tokens"]].run.tokenizer
        with torch.no_grad():
            exact = psnr(images, tokenizer(images)[0])
        for original, shown, value in zip(
            pixels_of(data["originals"], 16), pixels_of(arm["png"], 16), exact, strict=True
        ):
            error = np.mean((original.astype(float) - shown) ** 2)
            assert 10 * np.log10(255**2 / error) == pytest.approx(value.item(), abs=0.05)
        assert arm["psnr"]["mean"] == pytest.approx(15) and arm["psnr"]["low"] < 15 < arm["psnr"]["high"]
    json.dumps(data, allow_nan=False)


def test_the_decoder_travels_without_the_rest(experiments, images):
    experiment = experiments["softvq", 4]
    data = json.loads(json.dumps(explorables.token_data(experiment, images, ["x", "y", "z"], (0, 2), averaged=20)))
    weights, latents = explorables.unpack(data["weights"]), explorables.unpack(data["latents"])
    assert all(name.startswith(("decoder.", "from_latent.")) for name in weights)
    assert latents["z"].shape == (3, 4, 8) and latents["mean"].shape == (4, 8)
    tokenizer = experiment.run.tokenizer
    with torch.no_grad():
        assert latents["z"].numpy() == pytest.approx(tokenizer.encode(images).z.numpy(), abs=2e-3)
        seen = explorables.pictures_of(experiment.data.validation, range(20), 16)
        assert latents["mean"].numpy() == pytest.approx(tokenizer.encode(seen).z.mean(0).numpy(), abs=2e-3)
    figure = explorable_figures.draw_tokens(experiment, data)
    assert [axes.get_ylabel() for axes in figure.axes] == ["A and B", "taken away", "from B", "kept, rest from B"]


def test_a_still_shows_the_originals_and_what_was_asked_for(experiments, images):
    figure = explorable_figures.draw_reconstructions(experiments, images, shown=(2, 4))
    assert [axes.get_ylabel() for axes in figure.axes] == ["original", "AE, 2", "SoftVQ, 4"]


def test_provenance_names_data_steps_machine_and_commit(experiments):
    said = explorables.provenance(experiments.values())
    for part in (
        "2 tokenizers of size tiny",
        "shapes for 7 steps of 3",
        "seed 1",
        "a machine",
        "abcdef012+",
        "2026-01",
    ):
        assert part in said


# -- the committed files ---------------------------------------------------------------------------------------------


def test_committed_data_are_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 2e6
    for kind in KINDS:
        assert {f"data_{kind}.js", f"still_{kind}.png", f"provenance_{kind}.txt"} <= set(sizes)


def test_colours_are_those_of_the_figures():
    for kind in KINDS:
        assert read_data(kind)["colours"] == QUANTIZER_COLOURS
    assert read_data("reconstruction")["names"] == QUANTIZER_NAMES
    assert set(read_data("posterior")["code_colours"]) <= set(OKABE_ITO.values())
    # Nothing is typed again in scripts; the style sheet has the theme's colours.
    for path in FOLDER.glob("*.js"):
        if not path.name.startswith("data_"):
            assert not [hex_ for hex_ in QUANTIZER_COLOURS.values() if hex_.lower() in path.read_text().lower()]


def test_committed_reconstructions_are_of_every_arm_of_the_sweep():
    plan = read_plan([ROOT / "sweeps/explore/tokenizers.yaml"], ROOT)
    data = read_data("reconstruction")
    arms = {(arm["quantizer"], arm["tokens"]): arm for arm in data["arms"]}
    assert set(arms) == {(arm.factors["quantizer"], int(arm.factors["tokens"])) for arm in plan}
    assert {arm["tokens"] * arm["dim"] for arm in data["arms"]} == {256}
    assert all(len(pixels_of(arm["png"], data["size"])) == len(data["pictures"]) for arm in data["arms"])
    assert f"{len(plan)} tokenizers" in (FOLDER / "provenance_reconstruction.txt").read_text()


def test_committed_pictures_are_the_held_out_ones():
    import sys

    sys.path.insert(0, str(ROOT / "book"))
    from make_explorables import pictures

    images, names = pictures()
    for kind in ("reconstruction", "tokens"):
        data = read_data(kind)
        assert data["pictures"] == names and data["originals"] == explorables.png_row(images)


def test_committed_posterior_is_the_librarys():
    assert read_data("posterior") == json.loads(json.dumps(explorables.posterior_data()))


def test_committed_counts_are_the_librarys():
    data = read_data("cost")
    for generator, size, tokens, dim in (("sit", "xl", 64, 32), ("dit", "b", 32, 64), ("mar", "h", 64, 32)):
        config = generator_config(generator, size, tokens, dim)
        assert data["forward"][generator][size][str(tokens)] == forward_macs(config)
        found = data["sampling"][generator][size][str(tokens)]
        for steps in (8, 50):
            assert found["none"][str(steps)] == sampling_macs(config, steps)
            assert found["all"][str(steps)] == sampling_macs(config, steps, guidance_scale=4.0)
    assert data["decoding"]["512"]["s"]["64"] == decoding_macs("s", 64, 32, 512)
    assert (
        "65" not in data["sampling"]["mar"]["h"]["64"]["none"]
        and "128" not in data["sampling"]["mar"]["h"]["64"]["none"]
    )


def test_committed_numbers_of_the_paper_and_of_time_are_the_recorded_ones():
    data = read_data("cost")
    paper = results.read_paper(ROOT / "book/results/paper.json")
    assert data["paper"] == json.loads(json.dumps(explorables._printed(paper)))
    rows = results.read(ROOT / "book/results/efficiency.jsonl")
    assert data["measured"] == json.loads(json.dumps(explorables._ratios(rows)))
    assert {"step-32", "step-64", "guided"} <= {row["name"] for row in data["measured"]}
