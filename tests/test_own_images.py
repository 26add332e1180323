"""From a folder of one's own images to samples: the example folder, the clock, the rows, and refusals."""

import numpy as np
import pytest
from PIL import Image
from tiny_runs import content

from softvq_lib import own_images, results, train_generator, train_tokenizer
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.own_images import CPU, WALL, Stages, example_images, record, time_table


def test_the_example_folder_holds_the_embedded_images(tmp_path):
    made = example_images(tmp_path / "images", count=12)
    source = open_dataset(DataConfig("digits"), 32).train
    for number, name in enumerate(made.files):
        image, label = source[number]
        assert name == f"{label}/{number:05d}.png"
        assert np.array_equal(np.asarray(Image.open(made.folder / name)), np.asarray(image)), "to the bit"
    before = content(made.folder)
    assert example_images(tmp_path / "images", count=12).made == 0 and content(made.folder) == before
    with pytest.raises(ValueError, match="holds no pictures of this command"):
        example_images(tmp_path)


def test_a_folder_is_opened_and_mistakes_are_told(tmp_path):
    mine = own_images.own_images(out=str(tmp_path))
    assert mine.folder == str(tmp_path / "images") and len(mine.data.train) == 380 and len(mine.data.classes) == 10
    again = own_images.own_images(folder=mine.folder, runs=str(tmp_path / "runs"))
    assert again.data.fingerprint == mine.data.fingerprint and again.out == tmp_path / "runs" / "five_minutes"
    for values, words in (
        ({"fulder": "x"}, "did you mean 'folder'?"),
        ({"tokens": 0}, "tokens=0 is not allowed"),
        ({"folder": str(tmp_path / "nowhere")}, "no such folder"),
    ):
        with pytest.raises(ValueError) as error:
            own_images.own_images(**values)
        assert words in str(error.value)


def test_times_are_recorded_of_fresh_runs_alone(tmp_path):
    folder = str(example_images(tmp_path / "images", count=24).folder)
    common = {"dataset": folder, "steps": 2, "batch_size": 4, "val_images": 8, "workers": 0, "runs": str(tmp_path)}

    def trained():
        stages = Stages()
        tokenizer = train_tokenizer(tokens=4, pca=False, **common)
        stages.done("tokenizer")
        generator = train_generator(tokenizer=tokenizer.run.name, columns=2, sample_steps=2, **common)
        stages.done("generator")
        return stages, tokenizer, generator

    stages, tokenizer, generator = trained()
    rows = record(stages, tokenizer, generator, tmp_path / "results")
    assert results.read(tmp_path / "results" / "five_minutes.jsonl") == rows
    assert [row["metric"] for row in rows] == [WALL, CPU, "psnr"] and {row["n"] for row in rows[:2]} == {24}
    assert rows[0]["terms"] == stages.wall and rows[0]["value"] == sum(stages.wall.values())
    assert 0 < rows[1]["terms"]["tokenizer"] == stages.cpu["tokenizer"]
    (samples,), (decoded,) = rows[0]["pictures"], rows[2]["pictures"]
    classes = len(generator.classes)
    picture = Image.open(results.find_file(rows[0], samples, tmp_path / "results" / "five_minutes"))
    assert picture.size == (classes * 33 + 1, 2 * 33 + 1), "a column a class"
    assert decoded.endswith("-decoded.png")
    table = time_table(results.read(tmp_path / "results" / "five_minutes.jsonl"))
    assert table.index("| tokenizer |") < table.index("| generator |") < table.index("| **all** |")
    assert record(*trained(), tmp_path / "results") == [], "both runs were found finished"
    assert len((tmp_path / "results" / "five_minutes.jsonl").read_text().splitlines()) == 3
