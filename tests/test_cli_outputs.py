"""Outputs of the command `softvq`: those that exist, those that were interrupted, and full disks."""

import errno
import json
import os

import pytest
from PIL import Image
from tiny_runs import content

from softvq_lib import pictures
from softvq_lib.training import latents

IMAGES = 10

# -- outputs that exist ----------------------------------------------------------------------------------------------


def test_what_is_done_is_found_and_what_is_another_is_refused(softvq, refused, photos, tmp_path):
    z, back = tmp_path / "z", tmp_path / "back"
    softvq("encode", "tok", photos, "-o", z)
    softvq("decode", "tok", z, "-o", back)
    before = content(z), content(back)
    assert softvq("encode", "tok", photos, "-o", z)[0] == 0
    assert softvq("decode", "tok", z, "-o", back)[1].endswith("of which 10 were there already\n")
    assert "dtype: 'float32' there, 'float16' asked for" in refused(
        "encode", "tok", photos, "-o", z, "--dtype", "float16"
    )
    assert "convention: dit there, mar asked for" in refused("decode", "tok", z, "-o", back, "--convention", "mar")
    # Folders and files of somebody else, with and without --overwrite.
    mine = content(photos)
    for more in ((), ("--overwrite",)):
        assert "is not empty and holds no latents" in refused("encode", "tok", photos, "-o", photos, *more)
        assert "holds no pictures of this command" in refused("decode", "tok", z, "-o", photos, *more)
        assert "holds no pictures of this command" in refused("sample", "gen", "-o", z, "-p", "sample_steps", 1, *more)
        file = photos / "cat" / "0.png"
        assert "is a file" in refused("encode", "tok", photos, "-o", file, *more)
        assert "holds no pictures" in refused("decode", "tok", z, "-o", file, *more)
    assert content(photos) == mine and (content(z), content(back)) == before


def test_overwriting_removes_what_the_command_wrote(softvq, photos, tmp_path):
    z, back = tmp_path / "z", tmp_path / "back"
    softvq("encode", "tok", photos, "-o", z, "--shard-size", 4)
    softvq("decode", "tok", z, "-o", back)
    for torn in (z / ".shard-00001.safetensors.part", back / "dog" / ".3.png.part"):
        torn.write_bytes(b"of a process that was killed")
    (photos / "dog" / "1.png").unlink()
    assert softvq("encode", "tok", photos, "-o", z, "--dtype", "float16", "--overwrite")[0] == 0
    assert set(content(z)) == {"latents.json", "names.json", "shard-00000.safetensors"}
    assert softvq("decode", "tok", z, "-o", back, "--overwrite")[0] == 0
    assert set(content(back)) == {
        "pictures.json",
        *(f"{('cat', 'dog')[n % 2]}/{n}.png" for n in range(IMAGES) if n != 1),
    }


def test_a_folder_with_other_files_is_not_overwritten(softvq, refused, photos, tmp_path):
    z, back = tmp_path / "z", tmp_path / "back"
    softvq("encode", "tok", photos, "-o", z)
    softvq("decode", "tok", z, "-o", back)
    (z / "notes.txt").write_text("mine")
    (back / "dog" / "mine.png").write_text("mine")
    before = content(z), content(back)
    said = refused("encode", "tok", photos, "-o", z, "--dtype", "float16", "--overwrite")
    assert "did not write (notes.txt), so it is not overwritten" in said
    assert "(dog/mine.png)" in refused("decode", "tok", z, "-o", back, "--convention", "mar", "--overwrite")
    assert (content(z), content(back)) == before


def test_a_header_cannot_make_it_remove_files_elsewhere(softvq, refused, photos, tmp_path):
    softvq("encode", "tok", photos, "-o", tmp_path / "z")
    (tmp_path / "back").mkdir()
    (tmp_path / "precious.png").write_bytes(b"mine")
    (tmp_path / "back" / "pictures.json").write_text(json.dumps({"status": "partial", "files": ["../precious.png"]}))
    assert "no name of a picture" in refused("decode", "tok", tmp_path / "z", "-o", tmp_path / "back", "--overwrite")
    assert (tmp_path / "precious.png").exists()
    (tmp_path / "back" / "pictures.json").write_text("{")
    assert "cannot be read" in refused("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")


# -- interruptions ---------------------------------------------------------------------------------------------------


def after(calls: int, function, error: BaseException):
    """The function, which fails instead of being called once more than so many times."""
    left = [calls]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return function(*arguments, **options)

    return call


STOPS = [
    (KeyboardInterrupt(), 130, "interrupted: the same command goes on"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "No space left on device while writing to "),
]


@pytest.mark.parametrize(("error", "code", "words"), STOPS, ids=["ctrl-c", "full disk"])
def test_an_interrupted_encoding_goes_on_and_ends_with_the_same_bytes(
    error, code, words, softvq, photos, tmp_path, monkeypatch
):
    command = ("encode", "tok", photos, "--shard-size", 3, "--batch-size", 2, "-o")
    softvq(*command, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(latents, "_write", after(2, latents._write, error))
        found, out, err = softvq(*command, tmp_path / "z")
    assert (found, out) == (code, "") and words in err and err.strip().count("\n") == 0
    held = json.loads((tmp_path / "z" / "latents.json").read_text())
    assert held["status"] == "partial" and len(held["shards"]) == 2
    kept = content(tmp_path / "z")["shard-00001.safetensors"]
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(latents, "_stored", lambda z, *rest, of=latents._stored: encoded.append(len(z)) or of(z, *rest))
        assert softvq(*command, tmp_path / "z")[0] == 0
    assert sum(encoded) == 4, "two shards of three were there"
    assert content(tmp_path / "z") == content(tmp_path / "whole")
    assert content(tmp_path / "z")["shard-00001.safetensors"] == kept


@pytest.mark.parametrize(("error", "code", "words"), STOPS, ids=["ctrl-c", "full disk"])
@pytest.mark.parametrize("command", ["decode", "sample"])
def test_interrupted_pictures_go_on_and_end_with_the_same_bytes(
    command, error, code, words, softvq, photos, tmp_path, monkeypatch
):
    softvq("encode", "tok", photos, "-o", tmp_path / "z")
    arguments = ("tok", tmp_path / "z") if command == "decode" else ("gen", "--each", 2, "-p", "sample_steps", 2)
    arguments = (command, *arguments, "--batch-size", 4, "-o")
    softvq(*arguments, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_save", after(5, pictures._save, error))
        found, printed, err = softvq(*arguments, out)
    assert (found, printed) == (code, "") and words in err and err.strip().count("\n") == 0
    assert json.loads((out / "pictures.json").read_text())["status"] == "partial"
    assert len(content(out)) == 5 + 1
    torn = next(out.rglob("*.png"))
    torn.write_bytes(torn.read_bytes()[:-5])
    with monkeypatch.context() as patch:
        saved = []
        patch.setattr(pictures, "_save", lambda *a, of=pictures._save: saved.append(a[0]) or of(*a))
        assert softvq(*arguments, out)[0] == 0
    assert torn in saved and len(saved) == len(content(out)) - 1 - 4, "four whole ones were there"
    assert content(out) == content(tmp_path / "whole")


def test_a_picture_that_cannot_be_written_leaves_no_half_of_it(softvq, photos, tmp_path, monkeypatch):
    softvq("encode", "tok", photos, "-o", tmp_path / "z")

    def torn(image, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", torn)
        assert softvq("decode", "tok", tmp_path / "z", "-o", tmp_path / "out")[0] == 1
    assert set(content(tmp_path / "out")) == {"pictures.json"}


def test_no_room_is_told_before_anything_is_encoded(refused, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: type("usage", (), {"free": 100})())
    assert "0.0 MB of free space, but 10 more latents need" in refused("encode", "tok", photos, "-o", tmp_path / "z")
