"""Small parquet and tar shards of grey pictures that tell their numbers, and the batches made of them."""

import io
import tarfile

import datasets
import torch
from PIL import Image

from softvq_lib.data import DataConfig, open_dataset, training_batches

TRAIN, VALIDATION = (37, 5, 41, 20), 12  # images in each shard; the numbers of the images run through all of them


def encoded(number):
    """A picture that tells its number: number // 16 in red and number % 16 in green, twelvefold."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number // 16 * 12, number % 16 * 12, 7)).save(file, "png")
    return file.getvalue()


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(numbers, broken=()):
    for number in numbers:
        yield f"{number:04d}.png", b"junk" if number in broken else encoded(number)
        yield f"{number:04d}.cls", str(number % 3).encode()


def write_parquet(path, numbers, broken=(), rows=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": b"junk" if n in broken else encoded(n), "path": None} for n in numbers]
    table = datasets.Dataset.from_dict({"image": images, "label": [n % 3 for n in numbers]})
    table.to_parquet(str(path), batch_size=rows)  # rows of a row group
    return path


def write(folder, kind, broken=()):
    """Shards of `TRAIN` and `VALIDATION` images; their numbers follow the names of the shards."""
    first = 0
    for shard, count in enumerate((*TRAIN, VALIDATION)):
        name = f"train-{shard}" if shard < len(TRAIN) else "val-0"
        numbers = range(first, first + count)
        if kind == "tar":
            write_tar(folder / f"{name}.tar", samples(numbers, broken))
        else:
            write_parquet(folder / f"{name}.parquet", numbers, broken)
        first += count
    return folder


def streamed(dataset, **options):
    return open_dataset(DataConfig(str(dataset), streaming=True, **options), 8)


def train(source, steps, **options):
    defaults = {"image_size": 8, "batch_size": 8, "seed": 0, "workers": 0}
    return list(training_batches(source, steps=steps, **(defaults | options)))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and a.unreadable == b.unreadable
        for a, b in zip(first, second, strict=True)
    )


def numbers_of(images):
    """The numbers that `encoded` pictures tell."""
    red, green, _ = ((images[:, :, 0, 0] + 1) * 127.5).round().long().unbind(1)
    return (red // 12 * 16 + green // 12).tolist()
