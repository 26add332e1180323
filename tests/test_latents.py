"""Cached latents: what is stored, statistics, interruptions and damage, refusals, random access, the order of batches."""

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

from softvq_lib.data import DataSplits, Source, UnreadableImage, training_batches, validation_batches
from softvq_lib.data.latents import HEADER, LatentCache, latent_batches, tokenizer_hash
from softvq_lib.evaluation.latent_cost import latent_reading_ratio
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
    for item, (latents, label) in enumerate(cache):
        assert latents.dtype == torch.float32 and torch.equal(latents, z[item]) and label == labels[item]
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
        if made == (call if name == "replace" else 2 * call - 1):  # the folder is flushed after each file
            raise Killed
        return function(*arguments)

    monkeypatch.setattr(os, name, dying)
    with pytest.raises(Killed):
        encode(tokenizer, tmp_path)
    monkeypatch.undo()
    if call < 8:
        with pytest.raises(ValueError, match="unfinished|holds no latents"):
            LatentCache.open(tmp_path)
    for torn in ("shard-00001.safetensors", HEADER):  # what a process that is really killed leaves behind
        (tmp_path / f".{torn}.part").write_bytes(b"torn")
    encode(tokenizer, tmp_path)
    assert {k: v for k, v in files(tmp_path).items() if not k.endswith(".part")} == files(cache.folder)


def test_finished_shards_are_not_encoded_again(tokenizer, tmp_path, monkeypatch):
    write = latents._write

    def dying(path, *rest):
        if "00002" in path.name:
            raise Killed
        return write(path, *rest)

    monkeypatch.setattr(latents, "_write", dying)
    with pytest.raises(Killed):
        encode(tokenizer, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard*")}
    seen, views = [], latents._views
    monkeypatch.setattr(latents, "_write", write)
    monkeypatch.setattr(latents, "_views", lambda *given: seen.extend(given[2].tolist()) or views(*given))
    encode(tokenizer, tmp_path)
    assert seen == list(range(16, COUNT)) and len(before) == 2
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    encode(tokenizer, tmp_path)
    assert seen == list(range(16, COUNT))  # finished: only checked


def damaged(cache, folder, shard, change):
    """A copy of a cache with one shard changed."""
    folder.mkdir(exist_ok=True)
    for name, content in files(cache.folder).items():
        (folder / name).write_bytes(content)
    path = folder / f"shard-{shard:05d}.safetensors"
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return LatentCache, folder


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


def test_unreadable_images_are_left_out_and_listed(tokenizer, tmp_path, caplog, monkeypatch):
    """Image 208 is alone in the last shard, which so is empty."""
    data, broken = stripes(209, [3, 208]), [3, 208]
    cache = encode(tokenizer, tmp_path / "a", data, batch_size=16, shard_size=16)
    assert len(cache) == 207 and cache.header["left_out"] == broken
    z, labels, numbers = direct(tokenizer, data.train, batch_size=16)
    assert cache.labels(range(207)).tolist() == labels.tolist()
    torch.testing.assert_close(cache[100][0], z[100], rtol=1e-4, atol=1e-5)
    assert cache._read(range(207), None)[2].tolist() == numbers.tolist()
    assert [message for message in caplog.messages if "left out" in message] == [
        f"unreadable image left out: image {index}: torn" for index in broken
    ]
    write = latents._write
    monkeypatch.setattr(latents, "_write", lambda path, *rest: 1 / ("00013" not in path.name) and write(path, *rest))
    with pytest.raises(ZeroDivisionError):
        encode(tokenizer, tmp_path / "b", data, batch_size=16, shard_size=16)
    monkeypatch.undo()
    encode(tokenizer, tmp_path / "b", data, batch_size=16, shard_size=16)
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_too_many_unreadable_images_stop(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 22 images found unreadable.*image 9 \(torn\)"):
        encode(tokenizer, tmp_path, stripes(broken=[9]))


# -- random access -----------------------------------------------------------------------------------------------


def test_random_access(cache):
    items, flips = [21, 0, 8, 7, 0, 0], [True, False, True, False, True, False]
    stored = torch.stack([cache[i][0][int(f)] for i, f in zip(items, flips, strict=True)])
    for how in ("channel", "scalar"):
        mean, std = cache.statistics(how)
        x = cache.batch(items, flips, normalise=how)
        assert x.shape == (6, 4, 6) and torch.equal(x, (stored - mean) / std)
        torch.testing.assert_close(cache.denormalise(x, how), stored, rtol=1e-5, atol=1e-6)
        assert torch.equal(cache.normalise(stored, how), x)
    assert torch.equal(cache.batch(torch.tensor(items)), cache.batch(items, [False] * 6))
    everything = torch.cat([cache.batch(range(COUNT), [flip] * COUNT) for flip in (False, True)]).flatten(0, 1)
    torch.testing.assert_close(everything.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(everything.std(0, correction=0), torch.ones(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("item", [-1, COUNT])
def test_items_that_are_not_there(item, cache):
    for read in (cache.__getitem__, lambda i: cache.batch([0, i]), lambda i: cache.labels([i])):
        with pytest.raises(IndexError, match=f"item {item} of a cache that holds {COUNT}"):
            read(item)
    with pytest.raises(ValueError, match="normalise='none'.*'channel', 'scalar'"):
        cache.batch([0], normalise="none")


MILLION = """
import json, sys
from pathlib import Path
import numpy as np, torch
from softvq_lib.data.latents import HEADER, LatentCache, latent_batches

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

source, folder = LatentCache.open(sys.argv[1]), Path(sys.argv[2])
list(latent_batches(source, batch_size=64, seed=0, steps=2, flip=True)), source[0]
count, size = 4000, {"latents": 2 * 64 * 32 * 4, "labels": 8, "indices": 8}
table, end = {}, 0
for name, each in size.items():
    shape = [count, 2, 64, 32] if name == "latents" else [count]
    dtype = "F32" if name == "latents" else "I64"
    table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + count * each]}
text = json.dumps(table).encode()
text += b" " * (-len(text) % 8)
shards = []
for number in range(250):
    path = folder / f"shard-{number:05d}.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    shards.append({"name": path.name, "count": count, "bytes": path.stat().st_size, "sha256": ""})
header = source.header | {"shards": shards, "tokens": 64, "dim": 32}
for name, value in (("mean", 0.5), ("std", 2.0)):
    header[name] = {"channel": [value] * 32, "scalar": value}
(folder / HEADER).write_text(json.dumps(header))
before, most = anonymous(), 0.0
cache = LatentCache.open(folder)
assert len(cache) == 1_000_000
for step, batch in enumerate(latent_batches(cache, batch_size=64, seed=0, steps=15_725, start_step=15_525, flip=True)):
    assert len(batch) == 64 and (batch.latents == -0.25).all()
    most = max(most, anonymous() - before)
assert len(cache._mapped) == 250
print(most)
"""


def test_a_million_items_take_less_than_16_mb(cache, tmp_path):
    """Sparse files, 16 GB in name; batches before and after the end of an epoch, from all shards."""
    command = [sys.executable, "-c", MILLION, str(cache.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) < 16


# -- order -------------------------------------------------------------------------------------------------------


def batches(cache, steps=13, **options):
    return list(latent_batches(cache, **({"batch_size": 4, "seed": 0, "steps": steps, "flip": True} | options)))


def same(first, second):
    names = ("latents", "labels", "indices", "flips")
    pairs = zip(first, second, strict=True)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names)


@pytest.mark.parametrize(("batch_size", "seed"), [(4, 0), (5, 3), (50, 0)])
def test_the_order_is_that_of_images(batch_size, seed, cache):
    options = {"batch_size": batch_size, "seed": seed, "steps": 13}
    for start, part in ((0, (0, 1)), (5, (0, 1)), (3, (0, 2)), (3, (1, 2))):
        images = training_batches(stripes().train, image_size=16, start_step=start, part=part, **options)
        ours = batches(cache, start_step=start, part=part, **options)
        for a, b in zip(images, ours, strict=True):
            assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels) and b.unreadable == []


@pytest.mark.parametrize("batch_size", [4, 30])
def test_any_start_and_part_gives_the_same(batch_size, cache):
    whole = batches(cache, batch_size=batch_size)
    for start in (1, 5, 12, 13):
        assert same(whole[start:], batches(cache, start_step=start, batch_size=batch_size))
    halves = [batches(cache, batch_size=batch_size, part=(i, 2)) for i in range(2)]
    half = batch_size // 2
    assert same([b[:half] for b in whole], halves[0]) and same([b[half:] for b in whole], halves[1])


def test_flips_are_even_and_change_with_epoch_and_seed(cache):
    flips = torch.cat([batch.flips for batch in batches(cache, 100)])
    assert flips.dtype == torch.bool and 150 < flips.sum() < 250
    epochs = {tuple(flips[first : first + 20].tolist()) for first in range(0, 400, 20)}
    assert len(epochs) == 20
    assert not torch.equal(flips, torch.cat([batch.flips for batch in batches(cache, 100, seed=1)]))
    plain = batches(cache, 100, flip=False)
    assert not any(batch.flips.any() for batch in plain)
    assert torch.equal(torch.cat([b.indices for b in plain]), torch.cat([b.indices for b in batches(cache, 100)]))


def test_batches_are_what_random_access_gives(cache):
    for how in ("channel", "scalar"):
        for batch in batches(cache, normalise=how):
            assert torch.equal(batch.latents, cache.batch(batch.indices, batch.flips, normalise=how))
            assert torch.equal(batch.labels, cache.labels(batch.indices))


def test_a_batch_serves_the_training_loop(tokenizer, cache):
    (batch,) = batches(cache, 1, batch_size=8, seed=3)
    part = batch[2:5].to(torch.device("cpu"))
    assert len(part) == 3 and torch.equal(part.latents, batch.latents[2:5])
    assert torch.equal(part.indices, batch.indices[2:5])
    assert batch.flips.any() and not batch.flips.all()
    with torch.no_grad():
        z = tokenizer.encode(batch.images(stripes().train, 16)).z
    torch.testing.assert_close(cache.normalise(z), batch.latents, rtol=1e-3, atol=1e-4)


def test_the_global_generators_are_left_alone(tokenizer, cache, tmp_path):
    torch.manual_seed(5), np.random.seed(5)
    batches(cache), encode(tokenizer, tmp_path)
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()
    torch.manual_seed(5), np.random.seed(5)
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seed": -1}, {"start_step": -1}, {"normalise": "none"}])
def test_bad_arguments_of_batches_are_named_before_any_work(options, cache):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        latent_batches(cache, **({"batch_size": 4, "seed": 0, "steps": 3} | options))


# -- benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_the_same_latents():
    row = latent_reading_ratio(24, tokens=4, dim=4, batch_size=4, batches=1, rounds=3, shard_size=8)
    assert row["shards"] == 3 and 0 < row["low"] <= row["ratio"] <= row["high"]
    assert row["seconds"] > 0 and row["against_seconds"] > 0
    with pytest.raises(ValueError, match="rounds=2"):
        latent_reading_ratio(24, rounds=2)
