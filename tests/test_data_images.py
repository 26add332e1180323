"""Pictures: every colour mode to RGB by the numbers, orientation, resize and crop, and the range of tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from softvq_lib.data.images import decode, fit, to_rgb, to_tensor


def colour(image):
    """The RGB value of the top left pixel after conversion."""
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return converted.getpixel((0, 0))


def deep(values, dtype):
    return Image.fromarray(np.array(values, dtype=dtype))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_each_mode_becomes_rgb(mode, value, expected):
    assert colour(Image.new(mode, (3, 2), value)) == expected


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert colour(image) == (200, 100, 50)
    image.info["transparency"] = 1
    assert colour(image) == (255, 255, 255)
    image.info["transparency"] = bytes([255, 0])
    assert colour(image) == (255, 255, 255)


def test_a_transparent_colour_key_becomes_white():
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (8, 8, 8))
    image.info["transparency"] = (9, 9, 9)
    assert colour(image) == (255, 255, 255)
    assert to_rgb(image).getpixel((1, 0)) == (8, 8, 8)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian", "int32"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    values = [[0, 257, 32896, 65535]]
    if kind == "int32":
        image = deep(values, np.int32)
        assert image.mode == "I"
    elif kind == "big-endian":
        image = Image.frombytes("I;16B", (4, 1), np.array(values, ">u2").tobytes())
    else:
        file = io.BytesIO()
        deep(values, np.uint16).save(file, kind)
        image = Image.open(file)
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_deeper_integers_use_their_full_range():
    image = to_rgb(deep([[0, 2**30, 2**31 - 1, -5]], np.int32))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 0]


@pytest.mark.parametrize("top", [1, 255, 65535, 1e6])
def test_floats_are_scaled_by_their_range(top):
    image = to_rgb(deep([[0, top / 5, top, -top, float("nan")]], np.float32))
    assert [image.getpixel((x, 0))[0] for x in range(5)] == [0, 51, 255, 0, 0]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    upright = decode(file.getvalue())
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_description_does_not_lose_the_picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 2), (10, 20, 30)).save(file, "png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode(file.getvalue()).size == (4, 2)


@pytest.mark.parametrize("form", ["png", "gif", "webp", "bmp"])
def test_decode_reads_bytes_and_paths(tmp_path, form):
    path = tmp_path / f"a.{form}"
    Image.new("L", (5, 4), 40).save(path)
    assert decode(path).size == decode(path.read_bytes()).size == (5, 4)
    assert decode(str(path)).mode == "RGB"


def test_decode_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        decode(b"")
    with pytest.raises(ValueError, match="not a picture"):
        decode(b"hello")
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "jpeg")
    with pytest.raises(OSError, match="truncated"):
        decode(file.getvalue()[:1000])
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "absent.png")


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_a_fitting_picture_keeps_its_pixels():
    image = noise(32, 32)
    assert np.array_equal(fit(image, 32), np.asarray(image))
    assert np.array_equal(fit(image, 32, np.random.default_rng(0)), np.asarray(image))


@pytest.mark.parametrize("size", [(96, 48), (48, 100), (33, 200), (16, 24)])
def test_validation_resizes_the_shorter_side_and_crops_the_centre(size):
    image = noise(*size)
    scale = 32 / min(size)
    whole = image.resize([max(32, round(side * scale)) for side in size], Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(fit(image, 32).astype(int) - expected).max() <= 2


def test_training_crop_stays_inside_and_covers_every_place():
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    image = Image.fromarray(ramp).convert("RGB")
    generator = np.random.default_rng(0)
    made = np.stack([fit(image, 32, generator, crop=1.5) for _ in range(200)]).astype(int)
    assert made[:, :, 0].min() < 5 and made[:, :, -1].max() > 250
    shares = (made[:, 0, -1, 0] - made[:, 0, 0, 0]) / 255
    assert shares.min() == pytest.approx(1 / 1.5, abs=0.05) and shares.max() == pytest.approx(1, abs=0.05)


def test_flip_mirrors_half_of_the_pictures():
    image = noise(16, 16)
    made = [fit(image, 16, np.random.default_rng(seed), flip=True) for seed in range(200)]
    straight = sum(np.array_equal(pixels, np.asarray(image)) for pixels in made)
    mirrored = sum(np.array_equal(pixels[:, ::-1], np.asarray(image)) for pixels in made)
    assert straight + mirrored == 200
    assert 70 < mirrored < 130


def test_flip_leaves_the_crop_as_it_was():
    image = noise(40, 40)
    for seed in range(8):
        plain = fit(image, 16, np.random.default_rng(seed), crop=1.25)
        flipped = fit(image, 16, np.random.default_rng(seed), crop=1.25, flip=True)
        assert np.array_equal(plain, flipped) or np.array_equal(plain, flipped[:, ::-1])


def test_tensors_span_minus_one_to_one():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3).expand(2, 4, 5, 3)
    images = to_tensor(pixels)
    assert images.shape == (2, 3, 4, 5) and images.dtype == torch.float32 and images.is_contiguous()
    assert images[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
