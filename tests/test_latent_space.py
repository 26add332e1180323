"""The latent space: each number by hand on made-up latents, attention beside a plain computation, rows and figures."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from softvq_lib import Tokenizer, latent_figures, results
from softvq_lib.data import Batch, Source
from softvq_lib.evaluation import latent_space as measures
from softvq_lib.evaluation.latent_space import (
    collect_latents,
    cosine,
    embed,
    jackknife,
    mean_jackknife,
    purity,
    purity_bounds,
    silhouette,
)
from softvq_lib.evaluation.patch_attention import PatchAttention, best_strips
from softvq_lib.latent_space import LatentSpaceConfig, latent_space, table
from softvq_lib.style import SAVE_METADATA

FIGURES = (
    latent_figures.umap_panel,
    latent_figures.attention_maps,
    latent_figures.code_usage,
    latent_figures.by_position,
    latent_figures.component_use,
)


def clusters(n=60, classes=3, width=4, apart=0.0, seed=0):
    """Normal features (n, width) around centres so far apart, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, width)) + apart * np.eye(classes, width)[labels], labels


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_purity_by_hand():
    """On a line: of 0, 1, 2, 10 and 11 the two nearest are those of a glance."""
    x, labels = np.array([[0.0], [1.1], [2.0], [10.0], [11.0]]), np.array([0, 0, 1, 1, 1])
    # 0: 1.1 and 2; 1.1: 2 and 0; 2: 1.1 and 0; 10: 11 and 2; 11: 10 and 2
    assert purity(x, labels, 2)[0] == pytest.approx((1 + 1 + 0 + 2 + 2) / 10)
    assert purity_bounds(labels, 2) == pytest.approx(((2 * 1 + 3 * 2) / 20, (2 * 0.5 + 3 * 1) / 5))


def test_purity_and_silhouette_of_clear_and_of_no_clusters():
    x, labels = clusters(apart=1000)
    assert purity(x, labels)[0] == 1 and jackknife(*purity(x, labels)) == (1, 1, 1)
    assert silhouette(x, labels)[0] > 0.99
    x, labels = clusters(n=600)
    value, low, high = jackknife(*purity(x, labels))
    assert low < purity_bounds(labels)[0] < high and high - low < 0.1
    assert abs(silhouette(x, labels)[0]) < 0.02


@pytest.mark.parametrize("labels", [[0, 1, 2] * 6, [0, 1] * 8 + [2, 3], [0] * 9 + [1] * 7 + [2, 2]])
def test_silhouette_is_scikit_learns_and_without_each_image_too(labels):
    from sklearn.metrics import silhouette_score

    labels = np.array(labels)
    x = clusters(n=18, classes=1)[0] + labels[:, None]
    value, without = silhouette(x, labels)
    assert value == pytest.approx(silhouette_score(x, labels), abs=1e-12)
    expected = [silhouette_score(np.delete(x, j, 0), np.delete(labels, j)) for j in range(len(x))]
    assert without == pytest.approx(expected, abs=1e-12)


def test_purity_without_each_image():
    x, labels = clusters(n=25, apart=1)
    expected = [purity(np.delete(x, j, 0), np.delete(labels, j), 4)[0] for j in range(25)]
    assert purity(x, labels, 4)[1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", [lambda x, y: purity(x, y, 3), silhouette], ids=["purity", "silhouette"])
def test_intervals_cover(measure):
    found = np.array([jackknife(*measure(*clusters(n=40, classes=2, apart=1, seed=seed))) for seed in range(200)])
    value, low, high = found.T
    assert 0.90 <= ((low < value.mean()) & (value.mean() < high)).mean() <= 0.99


def test_the_jackknife_of_a_mean_is_students_interval():
    from scipy.stats import sem, t

    values = np.random.default_rng(0).normal(size=(12, 2))
    mean, low, high = mean_jackknife(values)
    assert mean == pytest.approx(values.mean(0))
    assert high - mean == pytest.approx(t.ppf(0.975, 11) * sem(values)) and mean - low == pytest.approx(high - mean)
    with pytest.raises(ValueError, match="1 images or groups of images are too few"):
        jackknife(0.5, np.array([0.5]))


def test_cosine_by_hand():
    z_hat = np.array([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])
    assert cosine(z_hat, np.array([[[2.0, 2.0], [-3.0, -4.0], [1.0, 0.0]]])) == pytest.approx(
        np.array([[0.5**0.5, -1, 0]])
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: purity(x, y, 0), "neighbours=0"),
        (lambda x, y: purity(x[:11], y[:11], 10), "11 images are too few for 10 neighbours each: give 12"),
        (lambda x, y: purity(x, np.where(y == 1, -1, y), 3), "20 of 60 images have no label"),
        (lambda x, y: purity(x, y[:9], 3), "9 labels for 60 images"),
        (lambda x, y: purity(np.where(x == x[3], np.nan, x), y, 3), "1 of 60 latents are not finite"),
        (lambda x, y: silhouette(x, y * 0), "two classes or more"),
        (lambda x, y: silhouette(x[:3], y[:3]), "two images or more of each"),
        (lambda x, y: embed(x[:15], 0), "15 images are too few for umap_neighbours=15"),
    ],
)
def test_bad_features_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*clusters())


def test_umap_is_the_same_for_a_seed():
    x, labels = clusters(n=30, apart=20)
    first = embed(x, 0, neighbours=5)
    assert first.shape == (30, 2) and np.isfinite(first).all()
    assert np.array_equal(first, embed(x, 0, neighbours=5)) and not np.array_equal(first, embed(x, 1, neighbours=5))
    assert purity(first, labels, 5)[0] == 1


# -- attention and latents --------------------------------------------------------------------------------------------


def tokenizer(quantizer="softvq", tokens=4, **overrides):
    torch.manual_seed(0)
    codes = {} if quantizer in ("ae", "kl") else {"codebook_size": 16}
    return Tokenizer.from_preset("tiny", quantizer=quantizer, tokens=tokens, dim=8, **codes, **overrides).eval()


def plain_attention(model, images):
    """Attention of latent tokens to patches (b, blocks, l, n) from each block's own queries and keys."""
    vit, found, seen = model.encoder.vit, [], []
    hooks = [block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for block in vit.blocks]
    model.encode(images)
    for hook in hooks:
        hook.remove()
    for block, x in zip(vit.blocks, seen, strict=True):
        h = block.attn.num_heads
        q, k, _ = block.attn.qkv(x).chunk(3, -1)
        q, k = (y.unflatten(-1, (h, -1)).transpose(1, 2) for y in (q, k))  # (b, h, t, c / h)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
        weights = (weights / weights.sum(-1, keepdim=True)).mean(1)  # (b, t, t)
        tokens = model.config.tokens
        found.append(weights[:, -tokens:, vit.num_prefix_tokens : -tokens])
    return torch.stack(found, 1)


@torch.no_grad()
def test_attention_is_that_of_queries_and_keys():
    model, images = tokenizer(), torch.rand(5, 3, 32, 32) * 2 - 1
    attention = PatchAttention(model)
    fused = [layer.fused_attn for layer in attention.layers]
    latents = torch.cat([attention.encode(part).z for part in images.split(2)])
    assert [layer.fused_attn for layer in attention.layers] == fused
    assert torch.allclose(latents, model.encode(images).z, atol=1e-5)
    expected = plain_attention(model, images)
    shares = expected.sum(-1)
    maps = (expected / shares[..., None]).mean(0)
    assert attention.images == 5 and attention.maps().shape == (2, 4, 16)
    assert np.allclose(attention.maps(), maps, atol=1e-6) and np.allclose(attention.shares(), shares.mean(0), atol=1e-6)
    assert np.allclose(attention.maps().sum(-1), 1)
    own = torch.stack([maps[:, token, 4 * token : 4 * token + 4].sum(-1) for token in range(4)]).mean(0)
    assert np.allclose(torch.cat(attention.own).mean(0), own, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["eva02_tiny_patch14_224", "vit_wee_patch16_reg1_gap_256"])
def test_attention_of_other_encoders(encoder):
    """With rotary positions and a class token, or with a register and normalised queries."""
    model, images = tokenizer(tokens=3, encoder=encoder), torch.rand(2, 3, 32, 32)
    attention = PatchAttention(model)
    code = attention.encode(images)
    assert torch.allclose(code.z_hat, model.encode(images).z_hat, atol=1e-4)
    assert attention.maps().shape[1:] == (3, 16) and np.allclose(attention.maps().sum(-1), 1)
    assert (attention.shares() < 1).all() and not attention.own  # 3 tokens do not divide 16 patches


def test_an_encoder_that_cannot_be_watched_is_refused():
    model = tokenizer()
    model.encoder.vit.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="block 2 of the encoder, a Block, has 0 attention layers"):
        PatchAttention(model)


def test_strips_dealt_out_as_suits_best():
    maps = np.zeros((2, 2, 4))
    maps[:, 0, 2:], maps[:, 1] = 0.5, [0.4, 0.4, 0.1, 0.1]  # each on the other's strip of two patches
    assert best_strips(maps) == pytest.approx((1 + 0.8) / 2)


class Pictures(Source):
    """Random pictures of three classes, brighter from class to class."""

    embedded = True

    def __len__(self):
        return 30

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(60 * (1 + index % 3), size=(32, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


def test_latents_do_not_depend_on_the_batches():
    model = tokenizer("kl").train()
    latents = collect_latents(model, Pictures(), batch_size=64)
    again = collect_latents(model, Pictures(), batch_size=7)
    assert model.training and latents.z.shape == latents.z_hat.shape == (30, 4, 8)  # KL's variances are left out
    assert latents.labels.tolist() == list(range(3)) * 10
    for name in ("z", "z_hat", "mean_image"):
        assert np.allclose(getattr(latents, name), getattr(again, name), atol=1e-5)
    pictures = np.stack([np.asarray(Pictures()[i][0], float) for i in range(30)])
    assert np.allclose(latents.mean_image.transpose(1, 2, 0), pictures.mean(0) / 127.5 - 1, atol=1e-6)
    assert latents.features("z", "mean") == pytest.approx(latents.z.mean(1))
    assert latents.features("z_hat", "flat")[2] == pytest.approx(latents.z_hat[2].ravel())
    assert len(collect_latents(model, Pictures(), limit=5).z) == 5


def test_images_that_are_not_finite_are_named(monkeypatch):
    images = torch.zeros(4, 3, 32, 32)
    images[2] = torch.nan
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(10, 14), [])
    monkeypatch.setattr(measures, "validation_batches", lambda *args, **kwargs: [batch])
    with pytest.raises(ValueError, match="NaN or infinity in batch rows 2.*the images 12 of the split"):
        collect_latents(tokenizer(), Pictures())


# -- the experiment ---------------------------------------------------------------------------------------------------

QUICK = {"limit": 60, "neighbours": 3, "umap_points": 30, "umap_neighbours": 5, "umap_seeds": "0, 1"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent_space")
    tokenizer().save_pretrained(folder / "runs" / "toy" / "tokenizer")
    settings = {"tokenizer": "toy", "runs": str(folder / "runs"), "results": str(folder / "results")}
    return latent_space(**QUICK, **settings), folder / "results"


def test_it_measures_and_records(recorded):
    experiment, folder = recorded
    rows = results.read(folder / "latent_space.jsonl")
    assert rows == experiment.rows and {row["run"] for row in rows} == {"toy"} and rows[0]["n"] == 60
    assert "umap-learn" in rows[0]["packages"] and str(folder.parent) not in json.dumps(rows)
    found = experiment.numbers
    assert all(low <= value <= high for value, low, high in found.values() if low is not None)
    parts = found["mutual_information_image"][0] + found["mutual_information_position"][0]
    assert parts == pytest.approx(found["mutual_information"][0])
    for what in ("purity", "silhouette"):
        change = found[f"{what}_z_flat"][0] - found[f"{what}_z_hat_flat"][0]
        assert found[f"{what}_change_flat"][0] == pytest.approx(change)
    assert found["purity_chance"][0] == pytest.approx(0.1, abs=0.05) and found["strip_attention_even"][0] == 0.25
    assert "toy on 60 held-out images of digits" in str(experiment) and not experiment.missing
    assert "| toy (softvq) | digits | 4 × 8 | 1 × 16 |" in table(rows) and "No rows" in table([])


def test_recorded_arrays_are_those_of_the_row(recorded):
    experiment, folder = recorded
    rows = results.read(folder / "latent_space.jsonl")
    (path,) = (folder / "latent_space").iterdir()
    assert rows[0]["arrays"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} and len(path.name) < 20
    its, arrays = latent_figures.recorded(rows, folder / "latent_space")["toy"]
    assert its == rows and set(arrays) == set(experiment.arrays)
    assert all(np.array_equal(arrays[name], value) for name, value in experiment.arrays.items())
    assert arrays["umap_z"].dtype == np.float16 and arrays["umap_z"].shape == (2, 30, 2)
    with pytest.raises(ValueError, match="no row of 'toy' names its arrays"):
        latent_figures.recorded(rows[1:], folder / "latent_space")


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: draw.__name__)
def test_figures_of_recorded_rows_are_the_same_twice(recorded, draw):
    rows = results.read(recorded[1] / "latent_space.jsonl")
    arguments = latent_figures.recorded(rows, recorded[1] / "latent_space")["toy"]
    first, second = io.BytesIO(), io.BytesIO()
    for file in (first, second):
        draw(*arguments).savefig(file, format="svg", metadata=SAVE_METADATA)
    assert first.getvalue() == second.getvalue()


def test_figures_show_the_arrays(recorded):
    rows, arrays = recorded[0].rows, recorded[0].arrays
    panel = latent_figures.umap_panel(rows, arrays)
    shown = sum(len(points.get_offsets()) for points in panel.axes[0].collections)
    assert shown == 30 and [axis.get_xlabel() for axis in panel.axes[:2]] == ["seed 0", "seed 1"]
    value, low, high = recorded[0].numbers["purity_z_flat"]
    assert panel.axes[2].get_title() == f"purity\n{value:.3f} [{low:.3f}, {high:.3f}]"
    bars = latent_figures.by_position(rows, arrays).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(arrays["mutual_information"][0].tolist())
    second = latent_figures.attention_maps(rows, arrays, block=2).axes[1].images[-1].get_array()
    assert np.allclose(second.ravel(), 16 * arrays["attention"][1, 1].astype(float), atol=1e-5)
    usage = latent_figures.code_usage(rows, arrays).axes[0].lines[0].get_ydata()
    assert usage.mean() == pytest.approx(1, abs=1e-5) and (np.diff(usage) <= 0).all()


def test_what_a_tokenizer_or_its_data_lack_is_said(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(400):
        Image.fromarray(np.full((32, 32, 3), i % 256, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    tokenizer("ae").save_pretrained(tmp_path / "toy")
    experiment = latent_space(tokenizer=str(tmp_path / "toy"), dataset=str(tmp_path / "images"), umap=False, workers=0)
    codes, labels = experiment.missing
    assert "AE has no codebook" in codes and "no labels of two classes" in labels and labels in str(experiment)
    assert set(experiment.numbers) == {
        "cosine",
        "patch_attention",
        "strip_attention",
        "strip_attention_best",
        "strip_attention_even",
    }
    assert experiment.numbers["cosine"][0] == pytest.approx(1)
    assert "mean_image" not in experiment.arrays  # of 20 images it might still show them
    said = [draw(experiment.rows, experiment.arrays).axes[0].get_title() for draw in FIGURES]
    assert said[0] == "no UMAP was made" and said[2] == "AE has no codebook" and "by class" in said[4]
    assert "| toy (ae) | images | 4 × 8 | – |" in table(experiment.rows)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"tokeniser": "x"}, "did you mean 'tokenizer'"),
        ({"tokenizer": ""}, "names nothing"),
        ({"umap_seeds": "0;1"}, "umap_seeds='0;1' are no seeds"),
        ({"umap_neighbours": 1}, "umap_neighbours=1"),
        ({"umap_min_dist": 2.0}, "umap_min_dist=2.0"),
        ({"umap_points": 15}, "15 points are too few for umap_neighbours=15"),
        ({"limit": 9}, "9 points are too few"),
        ({"block": 0}, "block=0"),
    ],
)
def test_bad_parameters_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        latent_space(**bad)


@pytest.mark.parametrize(
    ("bad", "words"), [({"block": 3}, "block=3, but the encoder has 2"), ({"limit": 4}, "4 images are too few for 10")]
)
def test_parameters_that_do_not_fit_the_tokenizer_are_refused(recorded, bad, words):
    runs = str(recorded[1].parent / "runs")
    with pytest.raises(ValueError, match=words):
        latent_space(tokenizer="toy", runs=runs, umap=False, **bad)


def test_seeds_are_numbers():
    assert LatentSpaceConfig(umap_seeds="3, 1").seeds == [3, 1]
