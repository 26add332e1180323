"""Model cards: every number from the run, code that runs, the same bytes each time, and somebody's own card kept."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from softvq_lib import cards, experiments, train_generator, train_tokenizer
from softvq_lib.generators.loading import describe_generator, load_generator
from softvq_lib.tokenizers import Tokenizer

SMALL = {"dataset": "digits", "limit": 64, "batch_size": 4, "val_images": 8, "steps": 2, "workers": 0}
TOKENIZER = SMALL | {"tokens": 4, "image_size": 16, "patch_size": 8, "run": "tok"}


def text_of(folder) -> str:
    return (folder / "README.md").read_text()


def snippet(folder) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text_of(folder), re.S)
    return code


def files(folder) -> dict:
    """What lies in a folder, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tokenizer's experiment and a generator's on it."""
    runs = str(tmp_path_factory.mktemp("runs"))
    tokenizer = train_tokenizer(**TOKENIZER, runs=runs)
    generator = train_generator(**SMALL, tokenizer="tok", run="gen", sample_steps=2, runs=runs)
    return tokenizer, generator


@pytest.fixture
def tokenizer(trained, tmp_path):
    """A copy of the finished tokenizer's folder."""
    return shutil.copytree(trained[0].run.path / "tokenizer", tmp_path / "tokenizer")


def test_a_tokenizers_card_tells_data_settings_and_numbers_of_its_run(trained):
    experiment, _ = trained
    folder, run = experiment.run.path / "tokenizer", experiment.run
    text, head = text_of(folder), ModelCard.load(folder / "README.md").data
    for words in (
        "64 training and 1,000 held-out images, 10 classes",
        experiment.data.fingerprint,
        run.config_hash,
        "| steps | 2 |",
        "| lr | 0.005 |",
        "# Image tokenizer with 4 latent tokens of 16 channels",
        "2 blocks, width 64, 2 heads",
        "a soft average of 256 codewords (SoftVQ, posterior `released`)",
        "It has seen the 64 training images of digits and no others.",
        "Apache-2.0",
        "arXiv:2412.10958",
    ):
        assert words in text
    line = experiment.table()[0]
    shown = f"| PSNR, dB | {line['psnr']:.4g} | [{line['low']:.4g}, {line['high']:.4g}] | 95 % percentile bootstrap"
    assert shown in text and f"| {line['n']} |" in text
    assert "| for comparison: PSNR of PCA with" in text
    assert head.license == "apache-2.0" and "arxiv:2412.10958" in head.tags and head.library_name == "softvq_lib"
    results = {result.metric_type: result.metric_value for result in head.eval_results}
    assert results == {"psnr": line["psnr"], **experiment.measured.usage}, "the model's own numbers, and PCA's not"
    assert str(run.path) not in text and not re.search(r"20\d\d-\d\d-\d\d", text), "neither places nor times"


def test_a_generators_card_tells_its_tokenizer_and_its_run(trained):
    experiment, generator = trained
    folder = generator.run.path / "generator"
    text, loaded = text_of(folder), load_generator(folder)
    for words in (
        "# SiT on 4 latent tokens of 16 channels",
        f"`tok` (sha256 `{loaded.tokenizer_hash}`)",
        f"{generator.run.manifest['parameters'] / 1e6:.2f} million parameters",
        f"with mean {loaded.mean.item():.6f}"[:-1],
        experiment.data.fingerprint,
        generator.run.config_hash,
    ):
        assert words in text
    loss = [row["val_loss"] for row in generator.run.metrics if "val_loss" in row][-1]
    assert f"| loss of held-out latents | {loss:.4g} |  |  | 8 |" in text
    assert loaded.trained["measured"] == [{"metric": "val_loss", "value": loss, "n": 8}]


def test_the_code_of_both_cards_runs(trained, monkeypatch):
    for experiment, part in zip(trained, ("tokenizer", "generator"), strict=True):
        monkeypatch.setenv("SOFTVQ_RUNS", str(experiment.run.path.parent))
        monkeypatch.chdir(experiment.run.path / part)
        exec(snippet(experiment.run.path / part), known := {})
        assert known["images"].shape[1:] == (3, 16, 16)
    assert known["samples"].tokenizer.config.tokens == 4


def test_asking_again_writes_nothing_and_another_place_gives_the_same_bytes(trained, tmp_path):
    first, _ = trained
    folder = first.run.path / "tokenizer"
    before = files(folder)
    assert train_tokenizer(**TOKENIZER, runs=str(first.run.path.parent)).run.trained == 0
    assert files(folder) == before
    again = train_tokenizer(**TOKENIZER, runs=str(tmp_path / "elsewhere"))
    there = {name: content for name, (content, _) in files(again.run.path / "tokenizer").items()}
    assert there == {name: content for name, (content, _) in before.items()}


def test_new_numbers_replace_old_ones_and_others_stay(trained, tmp_path):
    first, _ = trained
    shutil.copytree(first.run.path, tmp_path / "tok")
    changed = {"val_images": 6, "pca": False}
    again = train_tokenizer(**TOKENIZER | changed, runs=str(tmp_path))
    known = {row["metric"]: row for row in again.run.tokenizer.trained["measured"]}
    assert known["psnr"]["n"] == 6 and known["psnr"]["value"] == again.table()[0]["psnr"]
    assert known["psnr_pca_64"]["n"] == 8, "it was not measured this time"
    assert f"| PSNR, dB | {known['psnr']['value']:.4g} |" in text_of(tmp_path / "tok" / "tokenizer")
    with_other_run = cards.joined([], {"config_hash": "another", "measured": [known["psnr"]]}, "this")
    assert with_other_run == []


def test_somebodys_own_card_is_kept(trained, tmp_path):
    first, _ = trained
    shutil.copytree(first.run.path, tmp_path / "tok")
    card = tmp_path / "tok" / "tokenizer" / "README.md"
    card.write_text(card.read_text().replace(cards.OURS, "") + "My own words.\n")
    own = card.read_text()
    train_tokenizer(**TOKENIZER | {"val_images": 5}, runs=str(tmp_path))
    Tokenizer.from_pretrained(card.parent).save_pretrained(card.parent)
    assert card.read_text() == own


def test_what_is_known_survives_loading_and_saving(tokenizer, tmp_path):
    loaded = Tokenizer.from_pretrained(tokenizer)
    loaded.save_pretrained(tmp_path / "again")
    assert text_of(tmp_path / "again") == text_of(tokenizer)
    loaded.trained = None
    loaded.save_pretrained(tmp_path / "again")  # our own card is written anew
    text = text_of(tmp_path / "again")
    assert "is not recorded in its config.json" in text and "No measured numbers are recorded" in text
    assert "model-index" not in text


def test_networks_that_it_learnt_from_are_named():
    settings = {"perceptual": "efflite0", "alignment": "none", "pretrained": True}
    told = cards.Trained("d", "f", 3, 2, 0, settings, "c")
    limits = cards._limits(told)
    assert "perceptual='efflite0', the published weights that its encoder started from" in limits
    assert "alignment" not in limits and "no labels" in cards._training(told)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datum": 1}, "trained: unknown parameter 'datum', did you mean 'data'"),
        ({"images": "many"}, "trained: images='many' is of type str"),
        ({"measured": [{"metric": "psnr"}]}, "trained: .*missing"),
    ],
)
def test_a_training_that_is_none_is_refused(tokenizer, change, words):
    settings = json.loads((tokenizer / "config.json").read_text())
    settings["trained"] |= change
    (tokenizer / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json: {words}"):
        Tokenizer.from_pretrained(tokenizer)


def test_a_generators_numbers_are_changed_without_its_weights(trained, tmp_path):
    _, generator = trained
    folder = shutil.copytree(generator.run.path / "generator", tmp_path / "generator")
    weights = files(folder)["model.safetensors"]
    told = load_generator(folder).trained | {"measured": [{"metric": "precision", "value": 0.5, "n": 4}]}
    describe_generator(folder, told)
    assert files(folder)["model.safetensors"] == weights and load_generator(folder).trained == told
    assert "| precision | 0.5 |" in text_of(folder)
    with pytest.raises(ValueError, match="trained: unknown parameter 'x'"):
        describe_generator(folder, told | {"x": 1})


def test_a_folder_that_cannot_be_written_is_left_with_a_warning(trained, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiments, "describe", full)
    experiments._describe(trained[0])
    assert "is left as it is (No space left on device)" in caplog.text


def test_the_card_names_each_quantizer():
    for quantizer, words in {
        "ae": "none at all",
        "kl": "Gaussian",
        "vq": "the nearest of 256",
        "gmmvq": "is learnt",
    }.items():
        assert words in str(Tokenizer.from_preset("tiny", quantizer=quantizer, tokens=4).generate_model_card())
    several = Tokenizer.from_preset("tiny", tokens=4, codebooks=2, product=2, residual=3)
    text = str(several.generate_model_card())
    assert "each of 2 segments" in text and "each of 2 groups" in text and "in 3 levels" in text
