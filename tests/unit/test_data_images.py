"""Pixels, bytes and the model's numbers; and how images of every kind become the stored PNG."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.images import decode_image, decode_png, encode_png, quantise, to_model, to_uint8
from pipelines.preprocess import EXIF_ORIENTATION, Preprocessing, inspect
from tests.support.data import image_bytes, random_images


def test_the_digits_levels_survive_storage_and_are_exact_for_the_model() -> None:
    values = np.arange(17)
    stored = np.rint(values * 255 / 16).astype(np.uint8)
    assert len(set(stored.tolist())) == 17
    model = to_model(stored, 17)
    assert model.dtype == torch.float32
    assert model.tolist() == [-1 + 2 * level / 16 for level in range(17)]
    assert to_uint8(model, 17).tolist() == stored.tolist()


@pytest.mark.parametrize("levels", [2, 3, 16, 17, 100, 255, 256])
def test_every_level_survives_the_way_to_the_model_and_back(levels: int) -> None:
    stored = np.rint(np.arange(levels) * 255 / (levels - 1)).astype(np.uint8)
    model = to_model(stored, levels)
    exact = -1 + 2 * np.arange(levels) / (levels - 1)
    assert np.array_equal(model.numpy(), exact.astype(np.float32))
    assert to_uint8(model, levels).tolist() == stored.tolist()
    # a number anywhere within its bin of width 2/(levels-1) goes to that bin's level
    inside = torch.from_numpy(exact + 0.98 / (levels - 1))
    assert to_uint8(inside, levels).tolist() == stored.tolist()


def test_to_model_takes_a_byte_that_is_no_level_to_the_nearest_one() -> None:
    assert to_model(np.array([126, 130], np.uint8), 17).tolist() == [0.0, 0.0]
    assert quantise(np.array([0, 3, 13, 126, 255], np.uint8), 17).tolist() == [0, 0, 16, 128, 255]


def test_to_uint8_clips_what_lies_outside_and_refuses_what_is_no_number() -> None:
    assert to_uint8(torch.tensor([-7.0, -1.0, 1.0, 1e30, float("inf"), -float("inf")])).tolist() == [
        0, 0, 255, 255, 255, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match="floating"):
        to_uint8(torch.tensor([0]))
    with pytest.raises(ValueError, match="uint8"):
        to_model(torch.zeros(3))
    with pytest.raises(ValueError, match=r"levels: must be 2\.\.256, got 1"):
        to_model(np.zeros(3, np.uint8), 1)


def test_to_uint8_of_half_precision_does_not_lose_levels_of_its_own() -> None:
    x = torch.linspace(-1, 1, 17).to(torch.bfloat16)
    assert torch.equal(to_uint8(x, 256), to_uint8(x.float(), 256))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 1, 1)])
def test_png_keeps_every_pixel(shape: tuple[int, int, int]) -> None:
    image = random_images(1, shape)[0]
    assert np.array_equal(decode_png(encode_png(image), shape), image)
    assert encode_png(torch.from_numpy(image)) == encode_png(image)


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8), np.uint8), np.zeros((1, 8, 8)), np.zeros((2, 8, 8), np.uint8)]
)
def test_encode_png_refuses_what_is_no_image(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image: must be uint8"):
        encode_png(wrong)


def png_of(
    width: int, height: int, depth: int, colour: int, body: bytes, *, interlaced: bool = False
) -> bytes:
    """A PNG written by hand, since Pillow writes none with 16 bits of colour and none that lies."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


GREY = Image.new("L", (8, 8), 7)
ANIMATION = {"save_all": True, "append_images": [Image.new("L", (8, 8), 200)]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes that are no PNG"),
        (image_bytes(GREY, "JPEG"), "no PNG"),
        (image_bytes(GREY)[:20], "no PNG"),
        (image_bytes(GREY)[:-30], "broken PNG"),
        (image_bytes(GREY.resize((8, 9))), r"shape \[1, 9, 8\], not \[1, 8, 8\]"),
        (image_bytes(GREY.convert("RGB")), r"shape \[3, 8, 8\], not \[1, 8, 8\]"),
        (image_bytes(GREY.convert("P")), "colour type 3"),
        (image_bytes(GREY.convert("RGBA")), "colour type 6"),
        (image_bytes(GREY.convert("1")), "bit depth 1"),
        (image_bytes(GREY.convert("I;16")), "bit depth 16"),
        (image_bytes(GREY, "PNG", **ANIMATION), "animated"),
    ],
)
def test_decode_png_refuses_every_other_file_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_png(data, (1, 8, 8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_is_decoded_to_pillows_pixels(mode: str) -> None:
    shape = (len(mode), 12, 16)
    picture = Image.effect_noise((16, 12), 90).convert(mode)
    data = image_bytes(picture, "JPEG")
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(
        decode_image(data, shape), pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image_bytes(GREY, "JPEG")[:3], "broken JPEG"),
        (image_bytes(GREY, "JPEG")[:-20], "broken JPEG"),
        (image_bytes(GREY.resize((8, 9)), "JPEG"), r"shape \[1, 9, 8\], not \[1, 8, 8\]"),
        (image_bytes(GREY.convert("RGB"), "JPEG"), r"shape \[3, 8, 8\], not \[1, 8, 8\]"),
        (image_bytes(GREY.convert("CMYK"), "JPEG"), "mode CMYK"),
        (image_bytes(GREY, "MPO", save_all=True, append_images=[GREY]), "2 images"),
    ],
)
def test_decode_image_refuses_every_other_jpeg_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_image(data, (1, 8, 8))


def test_a_jpeg_bomb_is_refused_from_its_header() -> None:
    small = bytearray(image_bytes(GREY, "JPEG"))
    at = small.index(b"\xff\xc0") + 5
    small[at : at + 4] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(ValueError, match=r"shape \[1, 9000, 9000\]"):
        decode_image(bytes(small), (1, 8, 8))


def test_a_png_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png_of(60000, 60000, 8, 0, b"\0" * 1000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the bomb was opened"))
    with pytest.raises(ValueError, match=r"shape \[1, 60000, 60000\]"):
        decode_png(bomb, (1, 8, 8))


# ---- preprocessing


def stored(data: bytes, image_size: int | None = None, channels: int = 3, levels: int = 256) -> np.ndarray:
    made, shape = Preprocessing(image_size, channels, levels).apply(data)
    return decode_image(made, shape)


def test_a_png_that_needs_no_change_keeps_its_bytes_and_another_does_not() -> None:
    picture = Image.fromarray(random_images(1, (3, 16, 16))[0].transpose(1, 2, 0))
    original = image_bytes(picture, "PNG", compress_level=1)
    assert Preprocessing(None, 3).apply(original) == (original, (3, 16, 16))
    assert Preprocessing(16, 3).apply(original) == (original, (3, 16, 16))
    assert Preprocessing(8, 3).apply(original)[1] == (3, 8, 8)
    # the same pixels out of another container are stored as PNG
    assert np.array_equal(stored(image_bytes(picture, "BMP")), decode_png(original, (3, 16, 16)))
    assert Preprocessing(None, 3, levels=17).apply(original)[0] != original


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize(("image_size", "levels"), [(None, 256), (8, 256), (None, 5), (20, 17)])
def test_pixels_become_what_a_png_of_them_becomes(
    given: int, channels: int, image_size: int | None, levels: int
) -> None:
    image = random_images(1, (given, 16, 18))[0]
    chosen = Preprocessing(image_size, channels, levels)
    assert chosen.apply(image) == chosen.apply(encode_png(image))
    assert inspect(image) == inspect(encode_png(image)) == given


def test_the_encoder_that_is_chosen_writes_what_does_not_keep_its_bytes() -> None:
    image = random_images(1, (3, 16, 16))[0]
    chosen = Preprocessing(None, 3, 256, "fpng")
    made, shape = chosen.apply(image)
    assert b"fdEC" in made
    assert np.array_equal(decode_image(made, shape), image)
    file = encode_png(image)
    assert chosen.apply(file) == (file, shape)
    assert b"fdEC" in Preprocessing(8, 3, 256, "fpng").apply(file)[0]


def test_a_jpeg_that_needs_no_change_keeps_its_bytes_and_another_becomes_a_png() -> None:
    picture = Image.fromarray(random_images(1, (3, 16, 16))[0].transpose(1, 2, 0))
    original = image_bytes(picture, "JPEG", quality=70, progressive=True)
    for image_size in (None, 16):
        assert Preprocessing(image_size, 3).apply(original) == (original, (3, 16, 16))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 1
    upright = image_bytes(picture, "JPEG", exif=exif.tobytes())
    assert Preprocessing(None, 3).apply(upright) == (upright, (3, 16, 16))
    exif[EXIF_ORIENTATION] = 3
    for options, data in (
        ((8, 3), original),
        ((None, 1), original),
        ((None, 3, 17), original),
        ((None, 3), image_bytes(picture, "JPEG", exif=exif.tobytes())),
        ((None, 3), image_bytes(picture.convert("CMYK"), "JPEG")),
        ((None, 3), image_bytes(picture.convert("L"), "JPEG")),
        ((None, 3), image_bytes(picture, "MPO", save_all=True, append_images=[picture])),
    ):
        made, shape = Preprocessing(*options).apply(data)
        assert made.startswith(b"\x89PNG")
        assert decode_png(made, shape).shape == shape
    # losslessly: the pixels are those of the JPEG
    turned = np.asarray(Image.open(io.BytesIO(image_bytes(picture, "JPEG"))))[::-1, ::-1]
    assert np.array_equal(
        stored(image_bytes(picture, "JPEG", exif=exif.tobytes())), turned.transpose(2, 0, 1)
    )


def test_an_image_is_cropped_about_its_centre_and_then_resized_by_lanczos() -> None:
    pixels = random_images(1, (3, 20, 32))[0].transpose(1, 2, 0)
    cut = pixels[:, 6:26]
    assert np.array_equal(stored(image_bytes(Image.fromarray(pixels)), 20), cut.transpose(2, 0, 1))
    small = Image.fromarray(np.ascontiguousarray(cut)).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(
        stored(image_bytes(Image.fromarray(pixels)), 8), np.asarray(small).transpose(2, 0, 1)
    )


def test_resizing_quantised_images_ends_on_their_levels() -> None:
    made = stored(image_bytes(Image.fromarray(random_images(1, (1, 16, 16))[0][0])), 8, 1, 17)
    assert set(made.ravel().tolist()) <= {round(level * 255 / 16) for level in range(17)}


def test_exif_rotation_is_applied() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned clockwise: the top left corner becomes the top right one
    turned = stored(image_bytes(picture, "PNG", exif=exif.tobytes()))
    assert turned.shape == (3, 6, 4)
    assert turned[:, 0, 3].tolist() == [255, 255, 255]


def test_palette_opaque_alpha_cmyk_and_bilevel_images_show_their_colours() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for data in (
        image_bytes(red.convert("P", palette=Image.Palette.ADAPTIVE)),
        image_bytes(red.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        image_bytes(red.convert("RGBA")),
        image_bytes(red.convert("CMYK"), "TIFF"),
    ):
        assert stored(data)[:, 0, 0].tolist() == [255, 0, 0]
        assert inspect(data) == 3
    white = image_bytes(Image.new("1", (4, 4), 1))
    assert stored(white, channels=1).tolist() == np.full((1, 4, 4), 255).tolist()
    assert inspect(white) == 1
    grey = Image.new("LA", (4, 4), (7, 255))
    assert stored(image_bytes(grey), channels=1)[0, 0, 0] == 7


FLIPPED = bytearray(png_of(8, 8, 8, 0, (b"\0" + bytes(range(8))) * 8))
FLIPPED[-14] ^= 1  # in the checksum of the pixels' chunk, which Pillow's decoder does not look at
DEEP = png_of(2, 2, 16, 2, b"\0" + b"\x12\x34" * 6 + b"\0" + b"\x12\x34" * 6)
HALF_CLEAR = Image.new("RGBA", (4, 4), (1, 2, 3, 128))
CLEAR_PALETTE = Image.new("P", (4, 4), 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"these are words", "not an image that Pillow can read"),
        (image_bytes(Image.new("RGB", (64, 64), 3))[:60], "cannot be decoded"),
        (bytes(FLIPPED), "cannot be decoded"),
        (image_bytes(GREY.convert("I;16")), "more than 8 bits"),
        (DEEP, "more than 8 bits"),
        (image_bytes(GREY.convert("F"), "TIFF"), "more than 8 bits"),
        (image_bytes(HALF_CLEAR), "transparent"),
        (image_bytes(CLEAR_PALETTE, "PNG", transparency=0), "transparent"),
        (image_bytes(GREY, "PNG", **ANIMATION), "animated"),
        (image_bytes(GREY, "GIF", **ANIMATION), "animated"),
        (image_bytes(GREY, "TIFF", **ANIMATION), "several pages"),
        (png_of(60000, 60000, 8, 0, b"\0" * 1000), "exceeds limit"),
    ],
)
def test_an_image_that_would_not_come_out_right_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Preprocessing(None, 3).apply(data)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"image_size": 0, "channels": 3}, "image_size: must be at least 1, got 0"),
        ({"image_size": 8, "channels": 2}, "channels: must be 1 .* got 2"),
        ({"image_size": 8, "channels": 3, "levels": 257}, "levels: must be 2..256, got 257"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Preprocessing(**options)


def test_png_bytes_are_those_pillow_writes() -> None:
    image = random_images(1, (1, 8, 8))[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image[0])
