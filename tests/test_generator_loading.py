"""Generators from folders and hub names: ours and the authors', with the statistics of their latents; bad files."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from softvq_lib.generators import GeneratorConfig, SampleConfig, Transformer, build_generator, generate
from softvq_lib.generators.loading import load_generator, save_generator
from softvq_lib.tokenizers.published import STATISTICS

TOKENS, DIM, CLASSES = 64, 3, 5
# What the authors' code writes for a network of our size `tiny`.
SIT = {
    "path_type": "edm",
    "input_size": TOKENS,
    "patch_size": 1,
    "in_channels": DIM,
    "hidden_size": 128,
    "decoder_hidden_size": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": CLASSES,
    "use_cfg": True,
    "vae_1d": True,
    "qk_norm": False,
    "fused_attn": True,
    "license": "apache-2.0",
}
DIT = {name: SIT[name] for name in SIT if name not in ("path_type", "decoder_hidden_size", "use_cfg")}
DIT |= {"learn_sigma": True}


def config(generator="sit", **options):
    return GeneratorConfig(generator, "tiny", tokens=4, dim=DIM, classes=CLASSES, **options)


def randomised(module, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.1, generator=rng)
    return module


def reference(settings):
    """A network of these settings, all of whose tensors are random; its names are the published ones."""
    channels = settings["in_channels"]
    shape = {"depth": settings["depth"], "width": settings["hidden_size"], "heads": settings["num_heads"]}
    network = Transformer(
        tokens=settings["input_size"],
        dim=channels,
        out_dim=2 * channels if "learn_sigma" in settings else channels,
        classes=settings["num_classes"],
        **shape,
    )
    return randomised(network).eval()


def write(folder, settings, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def change(folder, **settings):
    """Change settings in a folder's config.json; None removes one."""
    path = folder / "config.json"
    merged = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


@pytest.fixture
def theirs(tmp_path):
    """A folder as the authors publish it, of a small network."""
    return write(tmp_path / "sit-xl_softvq-l-64", SIT, reference(SIT).state_dict())


@pytest.fixture
def ours(tmp_path):
    """A folder that this library wrote."""
    model = randomised(build_generator(config()))
    save_generator(model, tmp_path / "ours", tokenizer="t", tokenizer_hash="0a", mean=0.5, std=2.0)
    return tmp_path / "ours"


@pytest.mark.parametrize("generator", ["sit", "dit", "mar"])
def test_what_is_saved_is_loaded(tmp_path, generator):
    model = randomised(build_generator(config(generator)))
    mean, std = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    save_generator(model, tmp_path / "a/b", tokenizer="t", tokenizer_hash="0a", mean=mean, std=std, normalise="channel")
    state = torch.get_rng_state()
    loaded = load_generator(tmp_path / "a/b")
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert loaded.model.config == model.config and not loaded.model.training
    assert torch.equal(loaded.mean, mean) and torch.equal(loaded.std, std)
    assert (loaded.tokenizer, loaded.tokenizer_hash, loaded.origin) == ("t", "0a", None)
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    settings = SampleConfig(sample_steps=2, head_steps=2 if generator == "mar" else None)
    labels = torch.arange(CLASSES)
    x = generate(model, labels, range(CLASSES), settings)
    assert torch.equal(generate(loaded.model, labels, range(CLASSES), settings), x)
    assert torch.equal(loaded.denormalise(x), x * std + mean)
    torch.testing.assert_close(loaded.normalise(loaded.denormalise(x)), x)


def test_a_folder_may_be_saved_over_while_its_model_lives(ours):
    loaded = load_generator(ours)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    assert (loaded.mean, loaded.std) == (0.5, 2.0)
    same = torch.full((DIM,), 0.25)  # as a cache of latents gives them
    save_generator(loaded.model, ours, tokenizer=None, tokenizer_hash=None, mean=same, std=2 * same)
    again = load_generator(ours)
    assert again.mean.shape == () and (again.mean, again.std, again.tokenizer) == (0.25, 0.5, None)
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": [0.0, 0.0], "std": [1.0, 1.0], "normalise": "channel"}, "mean is 2 numbers.*needs 3 numbers"),
        ({"mean": 0.0, "std": 1.0, "normalise": "channel"}, "mean is one number.*needs 3 numbers"),
        ({"mean": 0.0, "std": [1.0, 2.0, 1.0]}, "std is 3 numbers, but normalise='scalar'.*one number"),
        ({"mean": 0.0, "std": 0.0}, "std=0.0 is not a finite number above 0"),
        ({"mean": float("nan"), "std": 1.0}, "mean=nan"),
        ({"mean": 0.0, "std": 1.0, "normalise": "tokens"}, "normalise='tokens' is not known.*'channel'"),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        save_generator(build_generator(config()), tmp_path / "x", tokenizer=None, tokenizer_hash=None, **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("settings", "kind", "channels"), [(SIT, "sit", DIM), (DIT, "dit", 2 * DIM)])
def test_published_names_and_settings(tmp_path, settings, kind, channels):
    network = reference(settings)
    projectors = {"projectors.0.0.weight": torch.zeros(8, 128), "projectors.0.4.bias": torch.zeros(0)}
    folder = write(tmp_path / f"{kind}-xl_softvq-l-64", settings, network.state_dict() | projectors)
    loaded = load_generator(folder)
    c = loaded.model.config
    assert (c.generator, c.size, c.tokens, c.dim, c.classes, c.label_dropout) == (kind, "tiny", TOKENS, DIM, 5, 0.1)
    assert (c.path, c.prediction, c.times) == (("gvp", "velocity", "lognormal") if kind == "sit" else (None,) * 3)
    assert c.schedule == (None if kind == "sit" else "cosine")
    x, t, y = torch.randn(2, TOKENS, DIM), torch.tensor([0.3, 0.9]), torch.tensor([1, CLASSES])
    output = loaded.model.backbone(x, t, y)
    assert output.shape == (2, TOKENS, channels) and output.std() > 0.01
    torch.testing.assert_close(output, network(x, t, y))
    assert loaded.sampling.guidance_scale == 1.75 and loaded.sampling.arguments(kind)["steps"] == 250
    assert loaded.origin == f"{kind}-xl_softvq-l-64" and loaded.tokenizer == "SoftVQVAE/softvq-l-64"
    torch.testing.assert_close((loaded.mean, loaded.std), tuple(map(torch.tensor, STATISTICS["l-64"])))


def test_published_weights_keep_their_positions_and_origin_when_saved_again(theirs, tmp_path):
    loaded = load_generator(theirs)
    save_generator(
        loaded.model,
        tmp_path / "again",
        tokenizer=loaded.tokenizer,
        tokenizer_hash=None,
        mean=loaded.mean,
        std=loaded.std,
        origin=loaded.origin,
    )
    again = load_generator(tmp_path / "again")
    positions = load_file(theirs / "model.safetensors")["pos_embed"]
    assert torch.equal(again.model.backbone.pos_embed, positions)
    assert again.origin == "sit-xl_softvq-l-64" and again.model.config == loaded.model.config


def test_settings_left_out_are_those_of_their_code(theirs):
    network = reference(SIT | {"num_classes": 1000})
    write(theirs, {name: SIT[name] for name in SIT if name != "num_classes"}, network.state_dict())
    assert load_generator(theirs).model.config.classes == 1000
    with pytest.raises(ValueError, match=r"depth=28, hidden_size=128, num_heads=4.*only depth 6, width 128.*depth 28"):
        load_generator(change(theirs, depth=None))


def test_unknown_settings_of_theirs_are_ignored_with_one_note(theirs, caplog):
    change(theirs, z_dims=[0], flash_attn=True, wing_span=3, beak=True)
    with caplog.at_level(logging.INFO):
        load_generator(theirs)
    assert [record.getMessage() for record in caplog.records] == [
        "unknown settings of the published generator are ignored: beak, wing_span."
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vae_1d": False}, ["vae_1d=False", "only vae_1d=True"]),
        ({"qk_norm": True}, ["qk_norm=True"]),
        ({"mlp_ratio": 2.0}, ["mlp_ratio=2.0"]),
        ({"learn_sigma": False}, ["learn_sigma=False"]),
        ({"in_channels": None}, ["in_channels missing"]),
        ({"in_channels": "3"}, ["dim='3' is of type str", "dim is in_channels"]),
        ({"num_classes": 7}, ["its tensors have classes=5, but config.json classes=7"]),
        ({"in_channels": 4}, ["its tensors have dim=3, but config.json dim=4", "x_embedder.weight (128, 3)"]),
        ({"hidden_size": 256, "depth": 8}, ["its tensors have width=128, but config.json width=256"]),
        ({"input_size": 32}, ["input_size=32", "softvq-l-64", "has 64 tokens"]),
        ({"learn_sigma": True}, ["final_layer.linear.weight (3, 128) where (6, 128) is wanted"]),
    ],
)
def test_unsupported_or_contradicting_settings_of_theirs(theirs, settings, words):
    with pytest.raises(ValueError) as error:
        load_generator(change(theirs, **settings))
    for word in ["config.json", *words]:
        assert word in str(error.value)


def test_a_number_of_tokens_that_the_tensors_do_not_have(theirs):
    folder = change(theirs, input_size=32).rename(theirs.with_name("sit-xl_softvq-b-32"))
    with pytest.raises(ValueError, match="its tensors have tokens=64, but config.json tokens=32"):
        load_generator(folder)


@pytest.mark.parametrize("setting", ["tokens", "dim", "classes"])
@pytest.mark.parametrize("generator", ["sit", "mar"])
def test_our_settings_that_contradict_the_tensors(tmp_path, generator, setting):
    save_generator(build_generator(config(generator)), tmp_path, tokenizer="", tokenizer_hash="", mean=0.0, std=1.0)
    told = json.loads((tmp_path / "config.json").read_text())[setting]
    with pytest.raises(ValueError, match=f"its tensors have {setting}={told}, but config.json {setting}={told + 1}"):
        load_generator(change(tmp_path, **{setting: told + 1}))


def test_our_settings_are_read_strictly(ours):
    with pytest.raises(ValueError, match=r"config.json: unknown parameter 'tokenz', did you mean 'tokens'\?"):
        load_generator(change(ours, tokenz=3))
    with pytest.raises(ValueError, match="neither a generator nor the authors' settings"):
        load_generator(change(ours, tokenz=None, generator=None))
    with pytest.raises(ValueError, match=r"config.json: mean and standard deviation .* not known"):
        load_generator(change(ours, generator="sit", mean=None))


def test_a_name_that_does_not_tell_the_tokenizer_needs_statistics(theirs):
    folder = theirs.rename(theirs.with_name("mine"))
    with pytest.raises(ValueError, match="not known: give mean and std, or the folder the name"):
        load_generator(folder)
    loaded = load_generator(folder, mean=0.25, std=0.5)
    assert (loaded.mean, loaded.std, loaded.tokenizer) == (0.25, 0.5, None)


def test_a_hub_name_asks_for_two_files_and_gives_tokenizer_and_statistics(theirs, tmp_path, monkeypatch):
    cache = tmp_path / "models--SoftVQVAE--sit-xl_softvq-bl-64-512" / "snapshots" / "0123"
    write(cache, SIT, load_file(theirs / "model.safetensors"))
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options["revision"]))
        return str(cache / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = "SoftVQVAE/sit-xl_softvq-bl-64-512"
    loaded = load_generator(name, revision="main")
    assert asked == [(name, file, "main") for file in ("config.json", "model.safetensors")]
    assert loaded.tokenizer == "SoftVQVAE/softvq-bl-64-512" and loaded.origin == name
    assert loaded.std == torch.tensor(STATISTICS["bl-64-512"][1])
    assert load_generator(cache).tokenizer == loaded.tokenizer


@pytest.mark.parametrize("folder", ["theirs", "ours"])
def test_missing_and_unknown_tensors_are_named(folder, request):
    folder = request.getfixturevalue(folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("blocks.1.attn.qkv.weight"))
    tensors["feather.weight"] = tensors.pop(lost)
    write(change(folder, weights_sha256=None), json.loads((folder / "config.json").read_text()), tensors)
    with pytest.raises(ValueError) as error:
        load_generator(folder)
    assert f"missing: {lost}; unknown: feather.weight" in str(error.value)


def test_half_precision_is_loaded_as_fp32_and_numbers_must_be_finite(theirs):
    tensors = {name: tensor.half() for name, tensor in load_file(theirs / "model.safetensors").items()}
    write(theirs, SIT, tensors)
    assert {parameter.dtype for parameter in load_generator(theirs).model.parameters()} == {torch.float32}
    tensors["x_embedder.bias"][0] = torch.inf
    write(theirs, SIT, tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: not finite: x_embedder\.bias"):
        load_generator(theirs)


def test_damaged_files_are_refused(theirs, ours):
    data = bytearray((ours / "model.safetensors").read_bytes())
    data[-10] ^= 1
    (ours / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*config\.json records"):
        load_generator(ours)
    path = theirs / "model.safetensors"
    for size in (path.stat().st_size - 1, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors.* damaged"):
            load_generator(theirs)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name}.*can run any code"):
            load_generator(source)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*/nowhere/at/all"):
        load_generator(tmp_path / "nowhere/at/all")
    with pytest.raises(OSError, match=r"nobody/nothing cannot be had"):
        load_generator("nobody/nothing")
