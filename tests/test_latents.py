"""Caches of latents: what is stored, exact statistics, interruptions, damage, refusals, unreadable images."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from softvq_lib.data import DataSplits, Source, UnreadableImage, validation_batches
from softvq_lib.data.latents import HEADER, LatentCache, latent_batches, tokenizer_hash
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import latents
from softvq_lib.training.latents import ROWS, column_sums, encode_dataset, exact_statistics

COUNT = 22


class Stripes(Source):
    """Pictures that differ from each other and from their mirror images; `broken` ones cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = self._check(index)
        if index in self.broken:
            raise UnreadableImage(index, self.name(index), "torn")
        pixels = np.random.default_rng(index).integers(256, size=(20, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


def stripes(count=COUNT, broken=()):
    return DataSplits(Stripes(count, broken), Stripes(9), "stripes", "f" * 64, ["a", "b", "c"])


def tiny(quantizer="ae", seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tokenizer.from_preset("tiny", quantizer=quantizer, tokens=4, dim=6, image_size=16, **options).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny()


def encode(tokenizer, folder, data=None, **options):
    options = {"batch_size": 4, "shard_size": 8, "progress": False, "workers": 0} | options
    return encode_dataset(tokenizer, data or stripes(), folder, **options)


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    """22 items in three shards."""
    return encode(tokenizer, tmp_path_factory.mktemp("latents") / "cache")


def files(folder):
    """All that a cache consists of, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def direct(tokenizer, source, batch_size=4):
    """Latents (n, 2, l, d), labels and numbers of all images, without a cache."""
    batches = list(validation_batches(source, image_size=16, batch_size=batch_size))
    with torch.no_grad():
        z = [[tokenizer.encode(view).z for view in (b.images, b.images.flip(-1))] for b in batches]
    stacked = torch.cat([torch.stack(pair, 1) for pair in z])
    return stacked, torch.cat([b.labels for b in batches]), torch.cat([b.indices for b in batches])


# -- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", ["ae", "kl", "softvq"])
def test_the_cache_holds_what_the_tokenizer_gives(quantizer, tmp_path):
    tokenizer = tiny(quantizer)
    cache = encode(tokenizer.train(), tmp_path / "cache")
    assert tokenizer.training  # as it was
    z, labels, _ = direct(tokenizer.eval(), stripes().train)
    assert len(cache) == COUNT and (cache.tokens, cache.dim) == (4, 6)
    for item, (stored, label) in enumerate(cache):
        assert stored.dtype == torch.float32 and torch.equal(stored, z[item]) and label == labels[item]
    assert not torch.equal(z[:, 0], z[:, 1])
    assert cache.labels([5, 0, 21]).tolist() == [2, 0, 0] and cache.classes == ["a", "b", "c"]


def test_the_size_of_batches_changes_rounding_alone(tokenizer, cache, tmp_path):
    other = encode(tokenizer, tmp_path, batch_size=5, shard_size=100)
    for item in range(COUNT):
        torch.testing.assert_close(other[item][0], cache[item][0], rtol=1e-4, atol=1e-5)


def test_loader_processes_change_nothing(tokenizer, cache, tmp_path):
    encode(tokenizer, tmp_path, workers=1)
    assert files(tmp_path) == files(cache.folder)


def test_half_precision_rounds_to_eleven_bits(tokenizer, cache, tmp_path):
    half = encode(tokenizer, tmp_path, dtype="float16")
    ours, exact = (torch.stack([c[item][0] for item in range(COUNT)]) for c in (half, cache))
    assert torch.equal(ours, exact.half().float()) and not torch.equal(ours, exact)
    shard, whole = (c.header["shards"][0]["bytes"] for c in (half, cache))
    assert shard < 0.6 * whole


def test_without_mirror_images(tokenizer, cache, tmp_path):
    single = encode(tokenizer, tmp_path, flips=False)
    assert torch.equal(single[3][0], cache[3][0][:1])
    with pytest.raises(ValueError, match="no mirror images"):
        single.batch([1, 2], [False, True])
    with pytest.raises(ValueError, match="flip=True.*no mirror images"):
        latent_batches(single, batch_size=4, seed=0, steps=1, flip=True)


def test_the_validation_split(tokenizer, cache, tmp_path):
    held_out = encode(tokenizer, tmp_path, split="validation")
    assert len(held_out) == 9 and held_out.header["split"] == "validation"


def test_the_header_says_what_was_encoded(tokenizer, cache):
    header = json.loads((cache.folder / HEADER).read_text())
    assert header["tokenizer"] == tokenizer_hash(tokenizer) and header["data"] == "f" * 64
    assert (header["crop"], header["image_size"], header["dtype"]) == ("centre", 16, "float32")
    assert [entry["count"] for entry in header["shards"]] == [8, 8, 6] and header["count"] == COUNT
    assert header["left_out"] == [] and header["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_hash_is_of_weights_and_configuration(tokenizer, tmp_path):
    ours = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(Tokenizer.from_pretrained(tmp_path)) == ours
    assert tokenizer_hash(tiny(seed=1)) != ours
    nudged = tiny()
    with torch.no_grad():
        nudged.to_latent.bias[0] += 1e-6
    assert tokenizer_hash(nudged) != ours
    a, b = tiny("softvq"), tiny("softvq", temperature=0.5)
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert tokenizer_hash(a) != tokenizer_hash(b)


# -- statistics --------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_latents(tokenizer, cache):
    z = direct(tokenizer, stripes().train)[0].double().numpy()  # (n, 2, l, d)
    for how, axes in (("channel", (0, 1, 2)), ("scalar", None)):
        np.testing.assert_allclose(cache.header["mean"][how], z.mean(axes), rtol=1e-12)
        np.testing.assert_allclose(cache.header["std"][how], z.std(axes), rtol=1e-12)
        mean, std = cache.statistics(how)
        assert mean.shape == std.shape == (6,) and mean.dtype == torch.float32
    exact = [float(sum(map(Fraction, column)) / len(column)) for column in z.reshape(-1, 6).T.tolist()]
    assert cache.header["mean"]["channel"] == exact


@pytest.mark.parametrize("shard_size", [4, 12, 100])
def test_statistics_do_not_depend_on_shards(shard_size, tokenizer, cache, tmp_path):
    other = encode(tokenizer, tmp_path, shard_size=shard_size)
    assert other.header["mean"] == cache.header["mean"] and other.header["std"] == cache.header["std"]


def test_sums_have_no_rounding_at_any_scale():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((ROWS, 3)) * 10.0 ** rng.integers(-30, 30, (ROWS, 3))).astype(np.float32).astype(float)
    x[:4, 0] = 3e38, -3e38, 1e-45, 0
    squares = x[:500] ** 2
    for numbers in (x, squares, np.full((ROWS, 1), 1 - 2.0**-53), np.zeros((4, 2)), np.empty((0, 2))):
        assert column_sums(numbers).tolist() == [sum(map(Fraction, column), Fraction(0)) for column in numbers.T]


def test_statistics_do_not_depend_on_the_order_of_numbers():
    """Sums in float64 would: each number is added to a larger one."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal((3 * ROWS + 5, 2))).astype(np.float32)
    whole, backwards = exact_statistics([x]), exact_statistics([x[ROWS:][::-1], x[:ROWS]])
    assert whole == backwards
    assert whole[0]["channel"] == [math.fsum(column) / len(x) for column in x.T.tolist()]
    np.testing.assert_allclose(whole[1]["channel"], (x.astype(float) - x.astype(float).mean(0)).std(0), rtol=1e-12)


def test_a_constant_channel_stays_finite(cache):
    header = cache.header | {"std": {"channel": [0.0] + [2.0] * 5, "scalar": 1.0}}
    assert LatentCache(cache.folder, header).statistics()[1].tolist() == [1.0] + [2.0] * 5


# -- interruptions and damage ------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_anywhere_and_started_again_gives_the_same_bytes(name, call, tokenizer, cache, tmp_path, monkeypatch):
    """The first header, three shards, each followed by the header, and the last header: 8 files are written."""
    function, made = getattr(os, name), 0

    def dying(*arguments):
        nonlocal made
        made += 1
        if made == (call if name == "replace" else 2 * call - 1):  # after each file its folder is flushed
            raise Killed
        return function(*arguments)

    monkeypatch.setattr(os, name, dying)
    with pytest.raises(Killed):
        encode(tokenizer, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no latents" if call == 1 else "unfinished"):
        LatentCache.open(tmp_path)
    # What a process that is really killed leaves behind.
    (tmp_path / f".{HEADER}.part").write_bytes(b"torn")
    for shard in range(call // 2, 3) if call > 1 else ():
        (tmp_path / f".shard-{shard:05d}.safetensors.part").write_bytes(b"torn")
    encode(tokenizer, tmp_path)
    assert files(tmp_path) == files(cache.folder)


def encode_until(shard, *given, **options):
    """Encode, and die before a shard is written."""
    write = latents._write

    def dying(path, *rest):
        if f"{shard:05d}" in path.name:
            raise Killed
        return write(path, *rest)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(latents, "_write", dying)
        encode(*given, **options)


def test_finished_shards_are_not_encoded_again(tokenizer, tmp_path, monkeypatch):
    encode_until(2, tokenizer, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard*")}
    seen, views = [], latents._views
    monkeypatch.setattr(latents, "_views", lambda *given: seen.extend(given[2].tolist()) or views(*given))
    encode(tokenizer, tmp_path)
    assert seen == list(range(16, COUNT)) and len(before) == 2
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    encode(tokenizer, tmp_path)
    assert seen == list(range(16, COUNT))  # finished: only checked


def damaged(cache, folder, shard, change):
    """Copy a cache into a folder, and change one shard there, or delete it."""
    folder.mkdir(exist_ok=True)
    for name, content in files(cache.folder).items():
        (folder / name).write_bytes(content)
    path = folder / f"shard-{shard:05d}.safetensors"
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_a_truncated_shard_is_named_with_its_sizes(cache, tmp_path):
    whole = cache.header["shards"][1]["bytes"]
    damaged(cache, tmp_path, 1, lambda content: content[:-100])
    with pytest.raises(ValueError, match=rf"shard-00001.*truncated.*{whole} bytes expected, {whole - 100} found.*agai"):
        LatentCache.open(tmp_path)
    damaged(cache, tmp_path, 2, lambda content: None)
    with pytest.raises(ValueError, match="lacks the shard shard-00002"):
        LatentCache.open(tmp_path)


def test_a_changed_byte_is_found_by_its_checksum(cache, tmp_path):
    damaged(cache, tmp_path, 2, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    opened = LatentCache.open(tmp_path)
    checksum = cache.header["shards"][2]["sha256"]
    with pytest.raises(ValueError, match=f"shard-00002.*damaged: sha256 {checksum} expected"):
        opened.verify()
    cache.verify()


@pytest.mark.parametrize(
    "change", [lambda c: c[:50], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: None], ids=["torn", "bit", "gone"]
)
def test_encoding_again_mends_what_is_damaged(change, tokenizer, cache, tmp_path, caplog):
    damaged(cache, tmp_path, 1, change)
    encode(tokenizer, tmp_path)
    assert "shard-00001" in caplog.text and "shard-00000" not in caplog.text
    assert files(tmp_path) == files(cache.folder)


def test_a_full_disk_is_noticed_before_anything_is_encoded(tokenizer, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="free space, but 22 more latents need.*float16"):
        encode(tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.*safetensors"))


# -- refusals ----------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_by_name_of_both(tokenizer, cache):
    other = tiny(seed=1)
    assert len(LatentCache.open(cache.folder, tokenizer)) == COUNT
    with pytest.raises(ValueError) as opened:
        LatentCache.open(cache.folder, other)
    with pytest.raises(ValueError) as encoded:
        encode(other, cache.folder)
    for caught in (opened, encoded):
        assert tokenizer_hash(tokenizer) in str(caught.value) and tokenizer_hash(other) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": DataSplits(Stripes(COUNT), Stripes(1), "other", "e" * 64, None)}, "data: 'ffff.*' there, 'eeee"),
        ({"split": "validation"}, "split: 'train' there, 'validation' asked for"),
        ({"flips": False}, "flips: True there, False"),
        ({"dtype": "float16"}, "dtype: 'float32' there"),
        ({"precision": "bf16"}, "precision: 'float32' there, 'bfloat16'"),
        ({"shard_size": 4}, "shard_size: 8 there, 4"),
    ],
)
def test_other_latents_are_refused(options, named, tokenizer, cache):
    before = files(cache.folder)
    with pytest.raises(ValueError, match=f"holds other latents.*{named}.*another folder"):
        encode(tokenizer, cache.folder, **options)
    assert files(cache.folder) == before


def test_another_crop_is_refused(cache, tmp_path):
    larger = Tokenizer.from_preset("tiny", quantizer="ae", tokens=4, dim=6, image_size=32)
    with pytest.raises(ValueError, match="image_size: 16 there, 32 asked for"):
        encode(larger, cache.folder)


def test_folders_that_are_no_cache(tokenizer, cache, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no latents"):
        encode(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="holds no latents"):
        LatentCache.open(tmp_path)
    for text in ("{torn", "[]", '{"format": 1}'):
        (tmp_path / HEADER).write_text(text)
        with pytest.raises(ValueError, match=f"{HEADER} cannot be read.*delete"):
            LatentCache.open(tmp_path)


def test_one_process_at_a_time(tokenizer, tmp_path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="being filled by another process"):
            encode(tokenizer, tmp_path)
        other.communicate(b"\n")
    assert len(encode(tokenizer, tmp_path)) == COUNT


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"shard_size": 0}, {"dtype": "bf16"}, {"split": "test"}, {"precision": "half"}]
)
def test_bad_arguments_are_named(options, tokenizer, tmp_path):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        encode(tokenizer, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_latents_that_cannot_be_stored(tmp_path):
    large = tiny()
    with torch.no_grad():
        large.to_latent.weight *= 1e6
    with pytest.raises(ValueError, match="latents of image 0 cannot be stored as float16"):
        encode(large, tmp_path, dtype="float16")
    with torch.no_grad():
        large.to_latent.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"\(images 0, 1, 2, 3\)"):
        encode(large, tmp_path / "b")


# -- images that cannot be read ----------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_listed(tokenizer, tmp_path, caplog):
    """Image 208 is alone in the last shard, which so is empty."""
    data, broken = stripes(209, [3, 208]), [3, 208]
    cache = encode(tokenizer, tmp_path / "a", data, batch_size=16, shard_size=16)
    assert len(cache) == 207 and cache.header["left_out"] == broken
    z, labels, numbers = direct(tokenizer, data.train, batch_size=16)
    assert cache.labels(range(207)).tolist() == labels.tolist()
    torch.testing.assert_close(cache[100][0], z[100], rtol=1e-4, atol=1e-5)
    assert [i for shard in cache._shards for i in shard["indices"].tolist()] == numbers.tolist()
    assert [message for message in caplog.messages if "left out" in message] == [
        f"unreadable image left out: image {index}: torn" for index in broken
    ]
    encode_until(13, tokenizer, tmp_path / "b", data, batch_size=16, shard_size=16)
    encode(tokenizer, tmp_path / "b", data, batch_size=16, shard_size=16)
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_too_many_unreadable_images_stop(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 22 images found unreadable.*image 9 \(torn\)"):
        encode(tokenizer, tmp_path, stripes(broken=[9]))
