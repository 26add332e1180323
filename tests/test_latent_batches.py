"""Reading cached latents: random access, normalisation, memory, the order of batches, the benchmark."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_latents import COUNT, encode, stripes, tiny

from softvq_lib.data import training_batches
from softvq_lib.data.latents import latent_batches
from softvq_lib.evaluation.latent_cost import latent_reading_ratio


@pytest.fixture(scope="module")
def tokenizer():
    return tiny()


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    """22 items in three shards."""
    return encode(tokenizer, tmp_path_factory.mktemp("latents") / "cache")


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
assert len(cache.header["shards"]) == 250
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
