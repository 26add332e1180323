"""Export of generated images: bytes, labels and seeds, going on after a kill, other folders, merging."""

import json

import numpy as np
import pytest
import torch

from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.draws import Seeds
from softvq_lib.evaluation import export
from softvq_lib.evaluation.export import export_samples, merge_npz, sample_labels, sample_seeds, to_uint8
from softvq_lib.generators import GeneratorConfig, SampleConfig, build_generator
from softvq_lib.generators.loading import Loaded
from softvq_lib.tokenizers import Tokenizer

CLASSES, SIZE = 5, 16
SHORT = SampleConfig(sample_steps=2)


def randomised(module):
    rng = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3, generator=rng)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    # Random throughout: at its start a tokenizer's decoder hardly looks at the latents.
    return randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=SIZE, patch_size=8)).eval()


@pytest.fixture(scope="module")
def bundle(tokenizer):
    model = randomised(build_generator(GeneratorConfig("sit", "tiny", tokens=4, dim=3, classes=CLASSES))).eval()
    return Loaded(model, torch.tensor(0.1), torch.tensor(2.0), "t", tokenizer_hash(tokenizer), sampling=SHORT)


def run(bundle, tokenizer, folder, **options):
    options = {"count": 23, "batch_size": 4, "shard_size": 10, "progress": False} | options
    return export_samples(bundle, tokenizer, folder, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def done(bundle, tokenizer, tmp_path_factory):
    """A finished export of 23 images in shards of 10."""
    folder = tmp_path_factory.mktemp("export") / "samples"
    run(bundle, tokenizer, folder)
    return folder


def pixels(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("samples-*.npy"))])


def test_conventions_of_bytes():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.003, 0.0, 0.003, 0.5, 0.9999, 1.0, 1.5]).expand(1, 3, 1, 10)
    wanted = {
        "dit": [0, 0, 64, 127, 128, 128, 191, 255, 255, 255],
        "repa": [0, 0, 63, 127, 127, 127, 191, 254, 255, 255],
        "mar": [0, 0, 64, 127, 128, 128, 191, 255, 255, 255],
    }
    for name, values in wanted.items():
        made = to_uint8(x, name)
        assert made.shape == (1, 1, 10, 3) and made.dtype == torch.uint8 and made[0, 0, :, 1].tolist() == values
    with pytest.raises(ValueError, match="convention='adm' is not known.*'dit', 'repa', 'mar'"):
        to_uint8(x, "adm")


def test_labels_are_balanced_or_random():
    labels = sample_labels(23, CLASSES, "balanced", 0)
    assert labels.bincount().tolist() == [5, 5, 5, 4, 4]
    assert all(sample_labels(23, CLASSES, "balanced", 0)[i : i + 5].unique().numel() == 5 for i in range(18))
    drawn = sample_labels(5000, CLASSES, "random", 0)
    assert drawn.dtype == torch.int64 and (drawn.bincount() - 1000).abs().max() < 150
    assert len(set(drawn.bincount().tolist())) > 1 and not torch.equal(drawn, sample_labels(5000, CLASSES, "random", 1))
    with pytest.raises(ValueError, match=r"count=4 images cannot be balanced over 5 classes.*labels='random'"):
        sample_labels(4, CLASSES, "balanced", 0)
    with pytest.raises(ValueError, match="labels='sorted' is not known"):
        sample_labels(4, CLASSES, "sorted", 0)


def test_every_image_has_a_seed_of_its_own():
    seeds = sample_seeds(0, 50_000)
    assert len(set(seeds)) == 50_000 and seeds[:100] == sample_seeds(0, 100)
    assert not set(seeds) & set(sample_seeds(1, 50_000))
    first = torch.stack([g.get_state() for g in Seeds(seeds[:2000]).generators])
    assert first.unique(dim=0).shape[0] == 2000


def test_what_is_written(done, bundle, tokenizer):
    header = json.loads((done / "samples.json").read_text())
    assert sorted(content(done)) == ["labels.npy", "samples-00000.npy", "samples-00001.npy", "samples-00002.npy"] + [
        "samples.json"
    ]
    assert [shard["count"] for shard in header["shards"]] == [10, 10, 3]
    assert (header["uint8"], header["labels"], header["count"], header["seed"]) == ("dit", "balanced", 23, 0)
    assert header["settings"]["sample_steps"] == 2 and header["tokenizer"] == bundle.tokenizer_hash
    images = pixels(done)
    assert images.shape == (23, SIZE, SIZE, 3) and images.dtype == np.uint8 and images.std() > 1
    assert np.load(done / "labels.npy").tolist() == [i % CLASSES for i in range(23)]
    # Image 13 alone, from its label and seed.
    draws = Seeds([sample_seeds(0, 23)[13]])
    x = bundle.model.sample(torch.tensor([13 % CLASSES]), draws=draws, steps=2)
    with torch.no_grad():
        alone = to_uint8(tokenizer.decode(2 * x + 0.1))[0].numpy()
    assert np.abs(alone.astype(int) - images[13]).max() <= 1


def test_images_do_not_depend_on_batches_or_shards(done, bundle, tokenizer, tmp_path):
    run(bundle, tokenizer, tmp_path / "other", batch_size=7, shard_size=23)
    difference = pixels(tmp_path / "other").astype(int) - pixels(done)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    run(bundle, tokenizer, tmp_path / "seed", seed=1)
    assert (pixels(tmp_path / "seed") != pixels(done)).mean() > 0.1


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_a_killed_export_goes_on_to_the_same_bytes(done, bundle, tokenizer, tmp_path, monkeypatch, calls):
    made, real, most = [], export.generate, [calls]

    def counted(model, labels, *arguments, **options):
        if len(made) == most[0]:
            raise KeyboardInterrupt
        made.append(len(labels))
        return real(model, labels, *arguments, **options)

    monkeypatch.setattr(export, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, tokenizer, tmp_path / "x")
    (tmp_path / "x" / ".samples-00001.npy.part").write_bytes(b"torn")
    whole = sum(made) // 10 * 10
    made.clear()
    most[0] = 100
    run(bundle, tokenizer, tmp_path / "x")
    assert content(tmp_path / "x") == content(done)
    assert sum(made) == 23 - whole  # shards that were whole are not made again
    most[0] = len(made)
    run(bundle, tokenizer, tmp_path / "x")  # it is finished: nothing is generated


@pytest.mark.parametrize("damage", [bytes.swapcase, lambda data: data[:-1], None])
def test_a_damaged_shard_is_made_anew(done, bundle, tokenizer, tmp_path, damage, caplog):
    run(bundle, tokenizer, tmp_path / "x")
    path = tmp_path / "x" / "samples-00001.npy"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(ValueError, match=r"samples-00001.npy is missing or damaged"):
        merge_npz(tmp_path / "x")
    run(bundle, tokenizer, tmp_path / "x")
    assert "samples-00001.npy is missing or damaged" in caplog.text and content(tmp_path / "x") == content(done)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"labels": "random"}, "labels: 'balanced' there, 'random' asked for"),
        ({"convention": "mar"}, "uint8: 'dit' there, 'mar' asked for"),
        ({"settings": SampleConfig(sample_steps=3)}, "settings: .*'sample_steps': 3.* asked for"),
    ],
)
def test_a_folder_with_other_samples_is_refused(done, bundle, tokenizer, options, words):
    before = content(done)
    with pytest.raises(ValueError, match=f"holds other samples \\({words}"):
        run(bundle, tokenizer, done, **options)
    assert content(done) == before


def test_a_folder_with_other_files_is_refused(bundle, tokenizer, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no samples"):
        run(bundle, tokenizer, tmp_path)


def test_a_tokenizer_that_is_not_the_generators(bundle, tokenizer, tmp_path):
    other = Tokenizer.from_preset("tiny", tokens=8, dim=3, image_size=SIZE, patch_size=8)
    with pytest.raises(ValueError, match=r"tokens=4, but the tokenizer decodes tokens=8: .*trained on, t\."):
        run(bundle, other, tmp_path / "x")
    other = Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=SIZE, patch_size=8)
    with pytest.raises(ValueError, match=r"trained on latents of another tokenizer \(t, sha256 "):
        run(bundle, other, tmp_path / "x")
    published = Loaded(bundle.model, bundle.mean, bundle.std, "SoftVQVAE/softvq-l-64", origin="sit-xl_softvq-l-64")
    other.origin = "SoftVQVAE/softvq-b-64"
    with pytest.raises(ValueError, match="latents of softvq-l-64, but the tokenizer is softvq-b-64"):
        run(published, other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["count", "batch_size", "shard_size"])
def test_numbers_out_of_range(bundle, tokenizer, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        run(bundle, tokenizer, tmp_path / "x", **{name: 0})


def test_images_that_are_not_finite_are_named(bundle, tokenizer, tmp_path):
    broken = Loaded(bundle.model, torch.tensor(torch.nan), bundle.std)
    with pytest.raises(ValueError, match=r"image 0 \(class 0, seed \d+\) is not finite"):
        run(broken, tokenizer, tmp_path / "x")


def test_merging(done, tmp_path):
    first, second = merge_npz(done, tmp_path / "a.npz"), merge_npz(done, tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()
    with np.load(first) as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels(done))


def test_an_unfinished_export_is_not_merged(tmp_path, done):
    with pytest.raises(ValueError, match="holds no finished export"):
        merge_npz(tmp_path)
    header = json.loads((done / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps(header | {"shards": header["shards"][:2]}))
    with pytest.raises(ValueError, match=r"no finished export \(20 images are there\)"):
        merge_npz(tmp_path)
    assert not (tmp_path / "samples.npz").exists()
