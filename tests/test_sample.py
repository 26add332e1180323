"""The sampling experiment: which generator, which classes, the same images always, its export, and what it refuses."""

import shutil

import numpy as np
import pytest
import torch
from tiny_runs import CLASSES, NAMES, generator, write_runs

from softvq_lib import sampling
from softvq_lib.evaluation import export
from softvq_lib.evaluation.export import sample_labels, to_uint8
from softvq_lib.generators import SampleConfig
from softvq_lib.generators.loading import Loaded, save_generator
from softvq_lib.generators.published import SAMPLING
from softvq_lib.sampling import class_names, read_classes, sample_generator, sample_images
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.generator import train_generator


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: a tokenizer, and a generator on its latents of `shapes`, both with random weights."""
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def sample(runs):
    """`sample_generator` of that run, short, with other parameters."""

    def call(**values):
        return sample_generator(
            **{"generator": "gen", "runs": str(runs), "device": "cpu", "columns": 3, "sample_steps": 2} | values
        )

    yield call
    shutil.rmtree(runs / "gen" / "samples", ignore_errors=True)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- the grid --------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_same_twice(sample):
    first, second = sample(), sample()
    assert first.grid.shape == (3 * CLASSES, 3, 16, 16) and first.grid.abs().max() <= 1 and first.grid.std() > 0.1
    assert torch.equal(first.grid, second.grid)
    assert first.labels.tolist() == [label for label in range(CLASSES) for _ in range(3)]
    assert first.classes == NAMES and first.exported is None
    assert not torch.equal(first.grid, sample(sample_seed=1).grid)
    assert "sit tiny, 4 tokens x 3" in str(first) and "steps=2, guidance_scale=1.0" in str(first)


def test_an_image_does_not_depend_on_batch_size_order_or_the_others(sample):
    whole = sample()
    assert len(set(whole.seeds)) == 3 * CLASSES
    one_seed = whole.sample(torch.arange(CLASSES), [7] * CLASSES)
    for images in (whole.grid, one_seed):  # or the rest would say little
        assert torch.pdist(images.flatten(1)).min() > 0.05
    alike = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(sample(batch_size=5).grid, whole.grid, **alike)
    some = whole.grid.unflatten(0, (CLASSES, 3))[[6, 3]].flatten(0, 1)
    torch.testing.assert_close(sample(classes="6, star").grid, some, **alike)
    torch.testing.assert_close(sample(columns=1).grid, whole.grid[::3], **alike)
    order = torch.randperm(3 * CLASSES, generator=torch.Generator().manual_seed(0))
    seeds = [whole.seeds[i] for i in order]
    torch.testing.assert_close(whole.sample(whole.labels[order], seeds), whole.grid[order], **alike)


def test_long_sampling_shows_a_bar(sample, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "_BAR_AFTER", 0.0)
    sample(batch_size=5).grid  # noqa: B018
    assert "samples: 100%" in capsys.readouterr().err
    seen = []
    whole = sample(batch_size=10)
    whole.sample(whole.labels, whole.seeds, progress=lambda starts: seen.extend(starts) or starts)
    assert seen == [0, 10, 20] and not capsys.readouterr().err


def test_images_that_are_not_finite_and_seeds_that_are_missing(sample):
    ready = sample()
    with pytest.raises(ValueError, match="2 seeds for 3 labels"):
        ready.sample(torch.zeros(3, dtype=torch.long), [1, 2])
    broken = Loaded(ready.loaded.model, torch.tensor(torch.nan), ready.loaded.std)
    with pytest.raises(ValueError, match="not finite: use more steps"):
        sample_images(broken, ready.tokenizer, torch.tensor([0]), [0], ready.settings)


# -- the generator ---------------------------------------------------------------------------------------------------


def test_a_generator_is_found_as_run_and_as_folder(sample, runs, tmp_path):
    by_name = sample()
    assert by_name.folder == runs / "gen" / "samples"
    for place in (runs / "gen", runs / "gen" / "generator"):
        assert torch.equal(sample(generator=str(place), columns=1).grid, sample(columns=1).grid)
    copy = shutil.copytree(runs / "gen" / "generator", tmp_path / "mine")
    elsewhere = sample(generator=str(copy), tokenizer=str(runs / "tok" / "tokenizer"))
    assert elsewhere.folder == runs / "samples" / "mine"
    assert elsewhere.classes == [str(i) for i in range(CLASSES)]  # nobody tells what it was trained on


def test_by_default_it_is_the_run_that_train_generator_trains(runs, tmp_path, monkeypatch):
    asked = []

    def train(**values):
        asked.append(values)
        return type("Run", (), {"path": runs / "gen"})

    monkeypatch.setattr(sampling, "train", train)
    assert sample_generator(runs=str(runs), device="cpu").folder == runs / "gen" / "samples"
    assert asked == [{"runs": str(runs), "device": "cpu"}]


def test_a_generator_that_was_just_trained_is_sampled(runs, tmp_path):
    tiny = {"steps": 1, "batch_size": 4, "limit": 8, "val_images": 4, "sample_steps": 1}
    home = {"runs": str(tmp_path), "device": "cpu"}
    tokenizer = str(runs / "tok" / "tokenizer")
    run = train_generator(dataset="shapes", tokenizer=tokenizer, run="new", solver="euler", **tiny, **home)
    made = sample_generator(generator="new", classes="crescent", columns=2, sample_steps=1, **home)
    assert made.classes == NAMES and made.grid.shape == (2, 3, 16, 16) and made.folder == run.path / "samples"


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_published_settings_are_taken_unless_others_are_given(sample, runs, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(
        sampling,
        "load_generator",
        lambda source: Loaded(
            generator(kind, 1000), torch.tensor(0.1), torch.tensor(2.0), "tok", origin=source, sampling=SAMPLING[kind]
        ),
    )
    name = f"SoftVQVAE/{kind}-xl_softvq-l-64"
    theirs = sample(generator=name, sample_steps=None)
    assert theirs.settings == SAMPLING[kind] and theirs.folder == runs / "samples" / name.split("/")[1]
    assert "steps=250, " in str(theirs) and "guidance_scale=1.75" in str(theirs)
    assert theirs.classes[0] == "tench" and len(set(theirs.classes)) == 998  # two pairs have one name
    other = sample(generator=name, guidance_scale=1.0, classes="Golden retriever,volcano", columns=1)
    assert (other.settings.guidance_scale, other.settings.sample_steps) == (1.0, 2)
    assert other.settings.solver == SAMPLING[kind].solver and other.labels.tolist() == [207, 980]
    assert other.grid.isfinite().all()


# -- classes ---------------------------------------------------------------------------------------------------------


def test_classes_by_number_and_name():
    names = ["hot_dog", "tench, Tinca tinca", "0", "crane"]
    assert read_classes(None, names) == [0, 1, 2, 3] and read_classes(None, names * 3) == list(range(10))
    assert read_classes("Hot dog,  3", names) == [0, 3] and read_classes("3,tench,hot_dog", names) == [3, 1, 0]
    assert read_classes("0", names) == [2]  # a name
    assert read_classes(1, names) == [1]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("8", "classes: 8 is out of range: give numbers from 0 to 7, or names"),
        ("-1", "classes: -1 is out of range"),
        ("cirkle", "classes: 'cirkle' is not known, did you mean 'circle'"),
        ("0,,1", "classes: '' is not known. There are: circle, square"),
        ("1.5", "classes: '1.5' is not known"),
        ("3,star", "classes: 'star' stands there twice"),
    ],
)
def test_wrong_classes_are_refused(sample, asked, words):
    with pytest.raises(ValueError, match=words):
        sample(classes=asked)


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="'crane' is the name of 0 and 2: give the number"):
        read_classes("crane", ["crane", "x", "crane"])


def test_class_names_of_another_data_set(tmp_path):
    from PIL import Image

    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "images" / name / f"{i}.png")
    loaded = Loaded(generator(classes=3), torch.tensor(0.0), torch.tensor(1.0))
    assert class_names(loaded, str(tmp_path / "images")) == ["ant", "bee", "2"]
    with pytest.raises(ValueError, match="dataset='shapes' has 8 classes, but the generator 3"):
        class_names(loaded, "shapes")


# -- the export ------------------------------------------------------------------------------------------------------


def test_an_export_starts_with_the_grid_and_goes_on_after_a_kill(sample, runs, tmp_path, monkeypatch):
    asked = {"exported": 3 * CLASSES, "shard_size": 10, "batch_size": 4}
    done = sample(**asked, export=str(tmp_path / "done"), npz=True)
    assert done.exported["count"] == 24 and "exported 24 images, labels balanced, in 3 shards" in str(done)
    with np.load(tmp_path / "done" / "samples.npz") as archive:
        images = archive["arr_0"]
    grid = to_uint8(done.grid).unflatten(0, (CLASSES, 3)).transpose(0, 1).flatten(0, 1).numpy()
    assert np.abs(grid.astype(int) - images).max() <= 1  # another batch size than the grid's

    made, real = [], export.generate

    def killed(*arguments, **options):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(1)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(export, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(**asked)
    folder = runs / "gen" / "samples"
    assert (folder / "samples-00000.npy").exists() and not (folder / "samples-00001.npy").exists()
    sample(**asked, npz=True)
    assert content(folder) == content(tmp_path / "done")
    path = folder / "samples-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])  # truncated: made anew
    sample(**asked, npz=True)
    assert content(folder) == content(tmp_path / "done")


def test_labels_settings_and_bytes_of_an_export_are_those_asked_for(sample, tmp_path):
    values = {"exported": 6, "labels": "random", "sample_seed": 3, "convention": "mar", "guidance_scale": 1.5}
    made = sample(**values, export=str(tmp_path / "x")).exported
    assert (made["labels"], made["seed"], made["uint8"]) == ("random", 3, "mar")
    assert made["settings"]["guidance_scale"] == 1.5 and made["settings"]["sample_steps"] == 2
    drawn = np.load(tmp_path / "x" / "labels.npy").tolist()
    assert drawn == sample_labels(6, CLASSES, "random", 3).tolist() != list(range(6))
    with pytest.raises(ValueError, match="holds other samples .*choose another folder"):
        sample(**values | {"guidance_scale": 2.0}, export=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="count=6 images cannot be balanced over 8 classes"):
        sample(**values | {"labels": "balanced"}, export=str(tmp_path / "y"))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"generators": "gen"}, "unknown parameter 'generators', did you mean 'generator'"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_low": 0.7, "guidance_high": 0.2}, r"guidance_interval=\(0.7, 0.2\)"),
        ({"sample_steps": 0}, "sample_steps=0"),
        ({"solver": "ddim"}, "solver='ddim' is not known"),
        ({"head_steps": 3}, "head_steps=3 is for mar, not for generator='sit'"),
        ({"generator": "mar", "guidance_high": 0.7}, "guidance_high=0.7 bound noise levels"),
        ({"columns": 0}, "columns=0"),
        ({"exported": -1}, "exported=-1"),
        ({"sample_seed": -1}, "sample_seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"labels": "sorted"}, "labels='sorted' is not known.*'balanced', 'random'"),
        ({"convention": "adm"}, "convention='adm' is not known"),
        ({"npz": True}, "npz=True needs an export"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
        ({"generator": "gan"}, "no finished run of .*, did you mean 'gen'.* Finished there: gen, mar"),
        ({"generator": "tok"}, "generator='tok' is no folder with a generator"),
        ({"tokenizer": "tik"}, "tokenizer='tik' is no folder with a tokenizer.*Trained there: tok"),
    ],
)
def test_bad_input_is_refused(sample, bad, words):
    with pytest.raises(ValueError, match=words):
        sample(**bad).grid  # noqa: B018


def test_wrong_sampling_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(sampling, "train", lambda **values: pytest.fail("it is trained"))
    with pytest.raises(ValueError, match="sample_steps=0"):
        sample_generator(sample_steps=0)


def test_another_tokenizer_than_the_generators_is_refused(sample, tmp_path):
    other = Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=16, patch_size=8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on latents of another tokenizer \(tok, sha256 "):
        sample(tokenizer=str(tmp_path / "other"))
    save_generator(generator(), tmp_path / "g", tokenizer=None, tokenizer_hash=None, mean=0.0, std=1.0)
    with pytest.raises(ValueError, match="does not say whose latents it makes: give tokenizer"):
        sample(generator=str(tmp_path / "g"))
    assert isinstance(sample(generator=str(tmp_path / "g"), tokenizer="tok").settings, SampleConfig)
