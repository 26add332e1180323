"""Linear probing: the head, the choice of its hyper-parameters, the features it is given, the experiment."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from softvq_lib import linear_probing as probing
from softvq_lib import probing_figures, results
from softvq_lib.data import DataConfig, open_dataset, validation_batches
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.evaluation import frozen_features as features_of
from softvq_lib.evaluation.probe_subjects import baseline, find_model
from softvq_lib.evaluation.probing import SETTINGS, _split, probe, train_probes
from softvq_lib.generators import GeneratorConfig
from softvq_lib.generators.build import build_generator
from softvq_lib.generators.loading import load_generator, save_generator
from softvq_lib.tokenizers import Tokenizer

TOKENS, DIM, CLASSES = 4, 4, 10
QUICK = {"epochs": 10, "batch_size": 32}


def toy(n, classes=3, width=6, spread=0.3, seed=0):
    """Gaussian clouds around points of different classes: features and labels."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, width, generator=draws), labels


def test_what_is_separable_is_told_apart():
    found = probe(toy(120, spread=0.1), toy(60, spread=0.1, seed=1), **QUICK)
    assert found.accuracy.value == found.logistic.value == found.macro == 1
    assert found.accuracy.low == pytest.approx(1 / (1 + 1.96**2 / 60), abs=1e-3), "Wilson's, for 60 of 60"
    assert (found.accuracy.n, found.images, found.classes, found.width) == (60, 120, 3, 6)


def test_shuffled_labels_give_chance():
    (x, y), (v, w) = toy(300), toy(300, seed=1)
    draws = torch.Generator().manual_seed(5)
    found = probe((x, y[torch.randperm(300, generator=draws)]), (v, w[torch.randperm(300, generator=draws)]), **QUICK)
    assert found.accuracy.low < 1 / 3 < found.accuracy.high
    assert found.logistic.low < 1 / 3 < found.logistic.high


def test_macro_accuracy_counts_classes_alike():
    """A large class that is told well, and a small one that is mixed into it."""
    draws = torch.Generator().manual_seed(0)
    y = (torch.arange(200) < 20).long()
    found = probe((torch.randn(200, 2, generator=draws), y), (torch.randn(200, 2, generator=draws), y), **QUICK)
    assert found.accuracy.value == pytest.approx(0.9, abs=0.03) and found.macro == pytest.approx(0.5, abs=0.05)


def test_the_head_is_logistic_regression_in_the_limit():
    """Long full-batch training ends where scipy finds the minimum of the same penalised loss."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    x, y = toy(150, spread=1.0)
    decay = 0.05
    (trained,) = train_probes(x, y, 3, [(0.3, decay)], epochs=1500, batch_size=150)
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double().numpy()

    def loss(flat):
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        scores = log_softmax(z @ weight.T + bias, axis=1)
        return -scores[np.arange(150), y.numpy()].mean() + decay / 2 * (weight**2).sum()

    best = minimize(loss, np.zeros(21), options={"gtol": 1e-8}).x
    assert trained.head.weight.numpy() == pytest.approx(best[:18].reshape(3, 6), abs=1e-4)
    assert trained.head.bias.numpy() == pytest.approx(best[18:], abs=1e-4)
    assert trained.norm.running_mean.numpy() == pytest.approx(x.mean(0).numpy(), abs=1e-5)
    assert trained.norm.running_var.numpy() == pytest.approx(x.var(0).numpy(), rel=1e-4)


def test_heads_that_are_trained_together_do_not_touch_each_other():
    x, y = toy(64, spread=1.0)
    alone = [train_probes(x, y, 3, [setting], **QUICK)[0].head.weight for setting in SETTINGS]
    together = train_probes(x, y, 3, [*SETTINGS, (1e6, 0.0)], **QUICK)
    assert all(torch.equal(one, other.head.weight) for one, other in zip(alone, together, strict=False))


def test_the_choice_never_sees_validation():
    train, (v, w) = toy(150, spread=2.0), toy(90, spread=2.0, seed=1)
    honest, poisoned = probe(train, (v, w), **QUICK), probe(train, (100 * v.flip(0), (w + 1) % 3), **QUICK)
    chosen = [(found.lr, found.weight_decay, found.c) for found in (honest, poisoned)]
    assert chosen[0] == chosen[1] and honest.accuracy.value > 0.5 > poisoned.accuracy.value


def test_the_choice_is_the_best_on_the_held_out_part_of_train():
    x, y = toy(150, spread=2.0)
    x = (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()
    fitted, held_out = _split(y.numpy(), seed=0)
    assert sorted([*fitted, *held_out]) == list(range(150)) and np.bincount(y[held_out]).tolist() == [10] * 3
    trials = train_probes(x[fitted], y[fitted], 3, SETTINGS, seed=0, **QUICK)
    scores = [(trial(x[held_out]).argmax(1) == y[held_out]).float().mean().item() for trial in trials]
    found = probe((x, y), toy(60, seed=1), **QUICK)
    assert (found.lr, found.weight_decay) == SETTINGS[int(np.argmax(scores))] and len(set(scores)) > 1


def test_the_same_seed_gives_the_same_and_draws_nothing_globally():
    train, validation = toy(100, spread=2.0), toy(50, spread=2.0, seed=1)
    state = torch.get_rng_state()
    first, second = probe(train, validation, seed=3, **QUICK), probe(train, validation, seed=3, **QUICK)
    assert first == second and torch.equal(state, torch.get_rng_state())
    weights = [train_probes(*train, 3, SETTINGS[:1], seed=seed, **QUICK)[0].head.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_scale_of_features_does_not_matter():
    """An untrained tokenizer's vary by less than the epsilon of the normalisation."""
    (x, y), (v, w) = toy(120), toy(60, seed=1)
    assert probe((3 + 1e-5 * x, y), (3 + 1e-5 * v, w), **QUICK).accuracy.value > 0.95


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y, v, w: ((x, y - 1), (v, w)), "12 of 36 training images have no label"),
        (lambda x, y, v, w: ((x, 0 * y), (v, 0 * w)), "all training images are of class 0: .* two classes"),
        (lambda x, y, v, w: ((x, y), (v[w < 2], w[w < 2])), r"1 classes of the training images \(2\) have no valid"),
        (lambda x, y, v, w: ((x[y < 2], y[y < 2]), (v, w)), r"1 classes of the validation images \(2\) have no train"),
        (lambda x, y, v, w: ((x.clone().index_fill_(0, torch.tensor([7]), torch.nan), y), (v, w)), "first at row 7"),
        (lambda x, y, v, w: ((x, y), (v / 0, w)), "30 of 30 validation images are NaN or infinite"),
        (lambda x, y, v, w: ((x, y), (v[:, :5], w)), "6 features of training images, 5 of validation"),
        (lambda x, y, v, w: ((x, y[1:]), (v, w)), r"\(36, 6\) with labels \(35,\)"),
        (lambda x, y, v, w: ((x[:3], y[:3]), (v, w)), "3 training images of 3 classes are too few"),
        (lambda x, y, v, w: ((x[:0], y[:0]), (v, w)), "no training images"),
    ],
)
def test_bad_features_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words) as error:
        probe(*change(*toy(36), *toy(30, seed=1)), name="block 3, noise 0.5")
    assert "too few" in words or str(error.value).startswith("block 3, noise 0.5: ")


def tokenizer(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tokenizer.from_preset("tiny", tokens=TOKENS, dim=DIM, codebook_size=8, image_size=16).eval()


def saved(folder, generator="sit"):
    """A run of a tokenizer and one of a generator on it, with random weights."""
    net = tokenizer()
    net.save_pretrained(folder / "tok" / "tokenizer")
    identity = {"alignment": "efflite2", "perceptual": "none"}
    (folder / "tok" / "config.json").write_text(json.dumps({"identity": identity}))
    model = build_generator(GeneratorConfig(generator, "tiny", tokens=TOKENS, dim=DIM, classes=CLASSES))
    draws = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # the blocks of a new one do nothing
        torch.nn.init.normal_(weight.data, std=0.05, generator=draws)
    save_generator(
        model,
        folder / generator / "generator",
        tokenizer="tok",
        tokenizer_hash=tokenizer_hash(net),
        mean=0.1,
        std=0.5,
    )
    (folder / generator / "config.json").write_text(json.dumps({"identity": {"generator": generator}}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return saved(saved(tmp_path_factory.mktemp("runs"), "dit"), "sit")


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(limit=40), 16)


def test_a_tokenizers_features_are_its_latents(digits):
    net = tokenizer()
    read = features_of.of_tokenizer(net, "tok")
    found, labels = features_of.read_features(digits.train, [read, features_of.of_pixels], image_size=16, limit=10)
    batch = next(validation_batches(digits.train, image_size=16, batch_size=10))
    with torch.no_grad():
        code = net.encode(batch.images)
    expected = {"z, mean": code.z.mean(1), "z, flatten": code.z.flatten(1)}
    expected |= {"ẑ, mean": code.z_hat.mean(1), "ẑ, flatten": code.z_hat.flatten(1)}
    expected = {f"tok, {name}": value for name, value in expected.items()} | {"pixels": batch.images.flatten(1)}
    assert {str(name): x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    assert all(torch.allclose(x, expected[str(name)], atol=1e-6) for name, x in found.items())
    assert torch.equal(labels, batch.labels) and not torch.equal(code.z, code.z_hat)


@pytest.mark.parametrize("generator", ["sit", "dit"])
def test_a_generators_features_are_hidden_states_without_a_label(runs, digits, generator):
    loaded, net = load_generator(runs / generator / "generator"), tokenizer()
    level, model = 0.3, loaded.model
    read = features_of.of_generator(loaded, net, "g", [2, 6], [level])
    found, _ = features_of.read_features(digits.train, [read], image_size=16, limit=8, seed=5)
    images = next(validation_batches(digits.train, image_size=16, batch_size=8)).images
    seeds = [int(np.random.SeedSequence((5, 0, i)).generate_state(1)[0]) for i in range(8)]
    shape = (TOKENS, DIM)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def by_hand(block, label):
        x = (net.encode(images).z - 0.1) / 0.5
        if generator == "sit":
            t, noisy = torch.full((8,), level), (1 - level) * x + level * noise
        else:
            t = torch.full((8,), 300)  # the nearest to 0.3 of timesteps 0 to 999
            alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[300].float()
            noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        return model.backbone(noisy, t, torch.full((8,), label), hidden=block)[1].mean(1)

    with torch.no_grad():
        for name, x in found.items():
            assert torch.allclose(x, by_hand(name.block, CLASSES), atol=1e-4)
            assert not torch.allclose(x, by_hand(name.block, 3), atol=1e-2), "a label would show"
    assert [name.block for name in found] == [2, 6] and all(name.noise_level == level for name in found)


def test_noise_belongs_to_the_image(runs, digits):
    read = features_of.of_generator(load_generator(runs / "sit" / "generator"), tokenizer(), "g", [3], [0.5])

    def features(split="train", seed=0, **options):
        (found,), _ = (
            features_of.read_features(
                digits.train,
                [lambda *batch: {"": next(iter(read(*batch).values()))}],
                image_size=16,
                split=split,
                seed=seed,
                **options,
            )[0].values(),
            None,
        )
        return found

    whole = features(limit=12)
    assert torch.allclose(whole, features(limit=12, batch_size=5), atol=1e-5)
    assert not torch.allclose(whole, features(limit=12, seed=1), atol=1e-3)
    assert not torch.allclose(whole, features(limit=12, split="validation"), atol=1e-3)


@pytest.mark.parametrize(
    ("blocks", "levels", "words"),
    [([0], [0.5], "block 0 is none of g, which has 6: choose 1 to 6"), ([7], [0.5], "block 7.*1 to 6")]
    + [([1], [1.5], "noise_levels: 1.5"), ([1], [-0.1], "noise_levels: -0.1")],
)
def test_blocks_and_levels_that_are_not_there_are_refused(runs, blocks, levels, words):
    with pytest.raises(ValueError, match=words):
        features_of.of_generator(load_generator(runs / "sit" / "generator"), tokenizer(), "g", blocks, levels)


def test_mar_has_no_noise_level(runs):
    saved(runs, "mar")
    with pytest.raises(ValueError, match="MAR: only SiT and DiT"):
        features_of.of_generator(load_generator(runs / "mar" / "generator"), tokenizer(), "g", None, [0.5])


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    settings = {"model": "tok,sit", "blocks": "2,5", "noise_levels": "0.2,0.6", "pooling": "mean"}
    settings |= {"baselines": "pixels,random", "limit": 120, "val_images": 100, "device": "cpu", "runs": str(runs)}
    settings |= {"epochs": 5, "batch_size": 32}
    state = torch.get_rng_state()
    experiment = probing.linear_probing(**settings, results=str(folder))
    assert torch.equal(state, torch.get_rng_state())
    return experiment, settings, folder


def test_the_experiment_measures_and_records(measured):
    experiment, _, folder = measured
    rows = results.read(folder / "linear_probing.jsonl")
    assert rows == experiment.rows and len(rows) == 3 * (2 + 4 + 1 + 2)
    row = next(row for row in rows if row["run"] == "digits-sit-hidden-mean-block5-noise0.6")
    config = row["config"]
    assert (config["kind"], config["block"], config["noise_level"], config["width"]) == ("generator", 5, 0.6, 128)
    assert row["n"] == 100 and config["images"] == 120 and row["interval"] == "95 % Wilson over images"
    assert (config["lr"], config["weight_decay"]) in SETTINGS and config["tokenizer"] == "tok"
    pixels = {row["metric"]: row for row in rows if row["run"] == "digits-pixels-pixels-flatten"}
    assert set(pixels) == {"accuracy", "macro_accuracy", "logistic_accuracy"}
    assert pixels["accuracy"]["low"] > 0.5, "pixels of digits are easy"
    text = str(experiment)
    assert "sit, block 5, noise 0.6" in text and "class labels in training" in text
    assert "ImageNet-1k, through efflite2" in text and len(text.splitlines()) == 10
    assert probing.markdown(rows).count("\n") == 10
    assert probing.markdown([]) == "*No rows have been recorded.*"


def test_the_experiment_is_deterministic(measured):
    experiment, settings, _ = measured
    fewer = {"model": "sit", "blocks": "5", "features": "z", "baselines": "random"}
    again = probing.linear_probing(**settings | fewer)
    values = {(row["run"], row["metric"]): row["value"] for row in experiment.rows}
    assert all(row["value"] == values[row["run"], row["metric"]] for row in again.rows) and again.rows


def test_figures_are_drawn_from_rows(measured):
    rows = measured[0].rows
    bars = probing_figures.sources(rows)
    names = [label.get_text() for label in bars.axes[0].get_yticklabels()]
    assert len(names) == 6 and sum(name.startswith("sit, block") for name in names) == 1, "a generator's best alone"
    curves = probing_figures.by_block(rows).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in curves.get_lines()}
    assert [len(lines[f"noise {level}"]) for level in (0.2, 0.6)] == [2, 2] and lines["chance"][0] == 10
    (z,) = [row["value"] for row in rows if row["run"] == "digits-tok-z-mean" and row["metric"] == "accuracy"]
    assert lines["z, mean"][0] == pytest.approx(100 * z)
    for draw in (probing_figures.sources, probing_figures.by_block):
        assert "probed" in draw([]).axes[0].get_title()


def test_a_packaged_network_is_a_baseline(digits):
    pretrained, random = (baseline(name, tokenizer().config) for name in ("efflite0", "efflite0-random"))
    assert (pretrained.source, pretrained.kind, pretrained.labels) == ("EffLite0", "network", "ImageNet-1k")
    assert (random.source, random.kind, random.labels) == ("EffLite0-random", "random", "")
    found, _ = features_of.read_features(digits.train, [pretrained.reader], image_size=16, limit=2)
    assert {str(name): tuple(x.shape) for name, x in found.items()} == {"EffLite0": (2, 1280)}


def test_it_says_whose_labels_taught_a_model(runs, tmp_path):
    assert find_model("tok", str(runs)).labels == "ImageNet-1k, through efflite2"
    assert find_model("sit", str(runs)).labels == "class labels in training; ImageNet-1k, through efflite2"
    assert find_model(str(runs / "tok" / "tokenizer")).name == "tok"
    assert find_model(str(runs / "sit"), str(runs)).generator is not None
    for identity, words in (
        ({"alignment": "efflite2", "alignment_random": True}, ""),
        ({"alignment": "dinov2-b", "perceptual": "lpips"}, "ImageNet-1k, through lpips"),
        ({"alignment": "resnet18.a1_in1k"}, "unknown"),
        ({}, "unknown"),
    ):
        tokenizer().save_pretrained(tmp_path / "run" / "tokenizer")
        (tmp_path / "run" / "config.json").write_text(json.dumps({"identity": identity}))
        assert find_model("run", str(tmp_path)).labels == words


def test_a_generator_on_another_tokenizer_is_refused(tmp_path):
    folder = saved(tmp_path)
    tokenizer(seed=1).save_pretrained(folder / "tok" / "tokenizer")
    with pytest.raises(ValueError, match="'tok' is not the one whose latents 'sit' was trained on"):
        find_model("sit", str(folder))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"modle": "a"}, "unknown parameter 'modle', did you mean 'model'"),
        ({"features": "z,zhat"}, "features='zhat'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"pooling": ""}, "pooling='' names nothing"),
        ({"blocks": "2;4"}, "blocks='2;4': give numbers with commas"),
        ({"noise_levels": "half"}, "noise_levels='half'"),
        ({"noise_levels": "0.5,0.5"}, "names 0.5 twice"),
        ({"epochs": 0}, "epochs=0"),
        ({"val_images": 0}, "val_images=0"),
        ({"limit": 0}, "limit=0"),
        ({"model": "tok,elsewhere"}, "model='elsewhere' is no generator, and .*Trained there: .*tok"),
        ({"model": "sit", "blocks": "9"}, "block 9 is none of sit, which has 6"),
        ({"model": "tok", "baselines": "efflight0"}, "baselines='efflight0' is not pixels.*did you mean 'efflite0'"),
        ({"model": "tok", "val_images": 3, "baselines": ""}, "classes of the training images .* no validation images"),
    ],
)
def test_bad_parameters_are_refused(runs, bad, words):
    with pytest.raises(ValueError, match=words):
        probing.linear_probing(**{"runs": str(runs), "device": "cpu", "limit": 60, **bad})


def test_images_without_labels_are_refused(runs, tmp_path):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="no labels, without which there is no probing"):
        probing.linear_probing(model="tok", dataset=str(tmp_path), runs=str(runs), device="cpu", baselines="")


def test_every_parameter_is_explained():
    text = probing.ProbeConfig.__doc__
    assert all(f"\n        {field.name}: " in text for field in fields(probing.ProbeConfig))
