"""Fast decoding: Pillow's pixels and refusals for images of every kind, and the fast libraries where they may."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from pipelines import decode as decode_module
from pipelines.decode import decode, decode_into, decode_many, decode_reference
from pipelines.images import encode_png
from tests.support.data import image_bytes
from tests.unit.test_data_images import png_of

HEIGHT, WIDTH = 21, 19


def picture(mode: str, seed: int = 0) -> Image.Image:
    """A gradient with noise, so that filters, prediction and quantisation all have something to do."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(seed).integers(0, 40, (HEIGHT, WIDTH, 3))
    colours = np.stack([x * 11, y * 10, (x + y) * 5], -1) + noise
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8)).convert(mode)


def with_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "café")
    return info


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def jpeg(mode: str, **options: object) -> bytes:
    return image_bytes(picture(mode), "JPEG", **options)


def png(mode: str, **options: object) -> bytes:
    return image_bytes(picture(mode), "PNG", **options)


FAST = {
    "grey PNG": png("L"),
    "RGB PNG": png("RGB"),
    "stored PNG": png("RGB", compress_level=0),
    "PNG with text": png("RGB", pnginfo=with_text()),
    "PNG with a density": png("RGB", dpi=(72, 72)),
    "PNG by fpng": encode_png(np.asarray(picture("RGB")).transpose(2, 0, 1), "fpng"),
    "grey JPEG": jpeg("L"),
    "JPEG": jpeg("RGB"),
    "JPEG 4:4:4": jpeg("RGB", subsampling=0, quality=95),
    "JPEG 4:2:2": jpeg("RGB", subsampling=1),
    "progressive JPEG": jpeg("RGB", progressive=True),
    "progressive grey JPEG": jpeg("L", progressive=True),
    "optimised JPEG": jpeg("RGB", optimize=True, quality=10),
    "JPEG that keeps RGB": jpeg("RGB", keep_rgb=True),
    "JPEG with restarts": jpeg("RGB", restart_marker_blocks=1),
    "JPEG turned by EXIF": jpeg("RGB", exif=turned()),
}
BY_PILLOW = {
    "PNG with a profile": png("RGB", icc_profile=b"profile" * 9),
    "RGB PNG with a transparent colour": png("RGB", transparency=(11, 10, 5)),
    "grey PNG with a transparent shade": png("L", transparency=7),
    "16-bit grey": image_bytes(Image.new("I;16", (WIDTH, HEIGHT), 5000)),
    "16-bit RGB": png_of(WIDTH, HEIGHT, 16, 2, (b"\0" + bytes(range(6 * WIDTH))) * HEIGHT),
    "1-bit": png("1"),
    "2-bit grey": png_of(WIDTH, HEIGHT, 2, 0, (b"\0" + bytes(range(5))) * HEIGHT),
    "4-bit grey": png_of(WIDTH, HEIGHT, 4, 0, (b"\0" + bytes(range(10))) * HEIGHT),
    "palette": image_bytes(picture("RGB").quantize(16)),
    "palette with transparency": image_bytes(picture("RGB").quantize(16), transparency=3),
    "RGBA": png("RGBA"),
    "LA": png("LA"),
    "animation": image_bytes(picture("L"), save_all=True, append_images=[picture("L", 1)]),
    "CMYK JPEG": jpeg("CMYK"),
    "two pictures": image_bytes(picture("RGB"), "MPO", save_all=True, append_images=[picture("RGB", 1)]),
    "BMP": image_bytes(picture("RGB"), "BMP"),
    "nothing": b"",
}


def outcome(data: bytes, shape: tuple[int, int, int], *, fast: bool) -> NDArray[np.uint8] | str:
    try:
        return decode(data, shape) if fast else decode_reference(data, shape)
    except ValueError as error:
        return str(error)


def same(one: NDArray[np.uint8] | str, two: NDArray[np.uint8] | str) -> bool:
    if isinstance(one, str) or isinstance(two, str):
        return isinstance(one, str) and isinstance(two, str)
    return np.array_equal(one, two)


def pillow(data: bytes) -> NDArray[np.uint8]:
    """Pillow's pixels, without anything of ours."""
    with Image.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("kind", FAST)
def test_the_fast_libraries_give_pillows_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pillow(FAST[kind])
    monkeypatch.setattr(decode_module, "decode_reference", None)  # it must not be needed
    assert np.array_equal(decode(FAST[kind], expected.shape), expected)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 160, 150), (1, 260, 300), (3, 300, 400)])
def test_the_fast_libraries_take_images_of_several_blocks(
    channels: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more bytes than one stored block of zlib holds, and of more than five."""
    images = np.random.default_rng(0).integers(0, 256, (3, channels, height, width), dtype=np.uint8)
    monkeypatch.setattr(decode_module, "decode_reference", None)  # it must not be needed
    out = np.zeros((3, height, width, channels), np.uint8)
    assert decode_many(dict(enumerate(map(encode_png, images))), out) == []
    assert np.array_equal(out.transpose(0, 3, 1, 2), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", BY_PILLOW)
def test_every_other_image_gets_pillows_pixels_or_its_refusal(kind: str, channels: int) -> None:
    shape = (channels, HEIGHT, WIDTH)
    reference = outcome(BY_PILLOW[kind], shape, fast=False)
    found = outcome(BY_PILLOW[kind], shape, fast=True)
    assert same(found, reference)
    if isinstance(reference, str):
        assert found == reference
    elif isinstance(found, np.ndarray):
        assert np.array_equal(found, pillow(BY_PILLOW[kind]))


@pytest.mark.parametrize("kind", [*FAST, *BY_PILLOW])
def test_an_image_of_as_many_pixels_in_another_shape_is_refused(kind: str) -> None:
    data = (FAST | BY_PILLOW)[kind]
    for channels in (1, 3):
        shape = (channels, WIDTH, HEIGHT)
        reason = outcome(data, shape, fast=True)
        assert isinstance(reason, str)
        assert reason == outcome(data, shape, fast=False)
        out = np.zeros((2, WIDTH, HEIGHT, channels), np.uint8)
        assert decode_many({1: data}, out) == [(1, reason)]


def test_which_of_those_images_are_read_at_all() -> None:
    read = {
        kind
        for kind, data in BY_PILLOW.items()
        for channels in (1, 3)
        if not isinstance(outcome(data, (channels, HEIGHT, WIDTH), fast=True), str)
    }
    assert read == {
        "PNG with a profile",
        "RGB PNG with a transparent colour",
        "grey PNG with a transparent shade",
    }


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 31), (33, 17)])
@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": True}])
def test_jpegs_of_odd_sizes_and_qualities_have_pillows_pixels(
    size: tuple[int, int], options: dict[str, object]
) -> None:
    for quality in (5, 50, 75, 100):
        data = image_bytes(picture("RGB").resize(size), "JPEG", quality=quality, **options)
        assert np.array_equal(decode(data, (3, size[1], size[0])), pillow(data))


def test_an_interlaced_png_has_pillows_pixels() -> None:
    """8×8 in Adam7's seven passes, written by hand, since Pillow writes none."""
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    pixels = np.asarray(picture("RGB").resize((8, 8)))
    rows = b"".join(
        b"\0" + pixels[y, x0::dx].tobytes() for x0, y0, dx, dy in passes for y in range(y0, 8, dy)
    )
    data = png_of(8, 8, 8, 2, rows, interlaced=True)
    assert np.array_equal(pillow(data), pixels.transpose(2, 0, 1))
    assert np.array_equal(decode(data, (3, 8, 8)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["RGB PNG", "PNG with text", "JPEG", "progressive JPEG"])
def test_of_a_damaged_file_it_gives_what_pillow_gives(kind: str) -> None:
    draw, whole, shape = random.Random(0), FAST[kind], (3, HEIGHT, WIDTH)
    outcomes: Counter[str] = Counter()
    for _ in range(400):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        if draw.random() < 0.7:
            data[place] ^= 1 << draw.randrange(8)
        else:
            data[place : place + draw.randrange(1, 5)] = draw.randbytes(draw.randrange(4))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        reference = outcome(bytes(data), shape, fast=False)
        assert same(outcome(bytes(data), shape, fast=True), reference)
        outcomes["refused" if isinstance(reference, str) else "read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 5


def with_chunk(kind: bytes, body: bytes) -> bytes:
    """An RGB PNG that has this chunk before its lines."""
    whole = FAST["RGB PNG"]
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return whole[:33] + chunk + whole[33:]


BOMB = zlib.compress(bytes(3 * 2**20))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"gAMA", b"\0"),
        (b"gAMA", b"\0\0\0\0"),
        (b"cHRM", b"\0"),
        (b"cHRM", bytes(32)),
        (b"pHYs", b"\0"),
        (b"pHYs", bytes(9)),
        (b"sRGB", b""),
        (b"sRGB", b"\0"),
        (b"tIME", b""),
        (b"bKGD", b""),
        (b"eXIf", b"garbage"),
        (b"tEXt", b""),
        (b"zTXt", b"k\0\1junk"),
        (b"zTXt", b"k\0\0" + BOMB),
        (b"iTXt", b"k\0\1\0\0\0" + BOMB),
        (b"iCCP", b"junk"),
        (b"iCCP", b"k\0\0" + BOMB),
        (b"IHDR", FAST["RGB PNG"][16:29]),
        (b"tRNS", bytes(6)),
        (b"abCd", b"private"),
    ],
)
def test_of_a_png_with_any_other_chunk_it_gives_what_pillow_gives(kind: bytes, body: bytes) -> None:
    data, shape = with_chunk(kind, body), (3, HEIGHT, WIDTH)
    assert same(outcome(data, shape, fast=True), outcome(data, shape, fast=False))


def test_of_damaged_lines_under_right_checksums_it_gives_what_pillow_gives() -> None:
    """The chunk's CRC is mended, so that zlib's own checks are what is left."""
    draw, shape = random.Random(1), (3, HEIGHT, WIDTH)
    lines = zlib.decompress(FAST["RGB PNG"][41:-16])
    outcomes: Counter[str] = Counter()
    for level in (0, 1, 9):
        whole = zlib.compress(lines, level)
        for _ in range(300):
            body = bytearray(whole)
            for _ in range(draw.choice([1, 1, 2, 5])):
                body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
            if draw.random() < 0.2:
                del body[draw.randrange(len(body)) :]
            chunk = b"IDAT" + bytes(body)
            size, crc = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(chunk))
            data = FAST["RGB PNG"][:33] + size + chunk + crc + FAST["RGB PNG"][-12:]
            reference = outcome(data, shape, fast=False)
            assert same(outcome(data, shape, fast=True), reference)
            outcomes["refused" if isinstance(reference, str) else "read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 2


def test_a_jpeg_sampled_as_simplejpeg_does_not_know_is_what_pillow_says() -> None:
    data = bytearray(jpeg("RGB", subsampling=0))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x11  # the luma's sampling, 1 × 1
    for sampling in (0x14, 0x41, 0x13, 0x33):
        data[frame + 11] = sampling
        for shape in ((3, HEIGHT, WIDTH), (1, HEIGHT, WIDTH)):
            reference = outcome(bytes(data), shape, fast=False)
            assert same(outcome(bytes(data), shape, fast=True), reference)


def damaged_chunks(order: list[int]) -> bytes:
    """An RGB PNG whose compressed lines stand in three chunks, with a comment as chunk 3, in this order."""
    whole = FAST["RGB PNG"]
    start = whole.index(b"IDAT") - 4
    lines = whole[start + 8 : -16]
    third = len(lines) // 3
    parts = [
        (b"IDAT", lines[:third]),
        (b"IDAT", lines[third : 2 * third]),
        (b"IDAT", lines[2 * third :]),
        (b"tEXt", b"Comment\0x"),
    ]
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (parts[number] for number in order)
    )
    return whole[:start] + b"".join(chunks) + whole[-12:]


@pytest.mark.parametrize("order", [[0, 1, 2], [3, 0, 1, 2], [0, 1, 2, 3], [0, 3, 1, 2], [0, 1], [1, 0, 2]])
def test_a_png_in_several_chunks_is_what_pillow_says(order: list[int]) -> None:
    shape = (3, HEIGHT, WIDTH)
    reference = outcome(damaged_chunks(order), shape, fast=False)
    assert same(outcome(damaged_chunks(order), shape, fast=True), reference)
    assert isinstance(reference, str) == (order in ([0, 3, 1, 2], [0, 1], [1, 0, 2]))


def test_a_png_that_holds_more_or_less_than_its_size_is_what_pillow_says() -> None:
    lines = zlib.decompress(FAST["RGB PNG"][41:-16])
    shape = (3, HEIGHT, WIDTH)
    read = []
    for body in (lines, lines[:-1], lines + b"\0", lines + bytes(10**6), b"\5" + lines[1:]):
        data = png_of(WIDTH, HEIGHT, 8, 2, body)
        reference = outcome(data, shape, fast=False)
        assert same(outcome(data, shape, fast=True), reference)
        read.append(not isinstance(reference, str))
    assert read[0]
    assert not all(read)


@pytest.mark.parametrize("side", [1, 32, 150, 300])
@pytest.mark.parametrize("channels", [1, 3])
def test_many_files_at_once_have_the_pixels_of_each_alone(side: int, channels: int) -> None:
    """Every filter, and sizes at which one stored block holds many images, one, or a part of one."""
    draw = np.random.default_rng(side)
    files = []
    for number in range(9):
        smooth = np.add.outer(np.arange(side), np.arange(side)) * number // 2
        pixels = (smooth[..., None] + draw.integers(0, 1 + 9 * number, (side, side, channels))).astype(
            np.uint8
        )
        files.append(image_bytes(Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels), "PNG"))
    places = [7, 0, 3, 9, 1, 2, 10, 5, 4]
    batch = np.full((11, side, side, channels), 9, np.uint8)
    assert decode_many(dict(zip(places, files, strict=True)), batch) == []
    for place, data in zip(places, files, strict=True):
        assert np.array_equal(batch[place].transpose(2, 0, 1), pillow(data))
    assert (batch[[6, 8]] == 9).all()


def test_of_many_files_the_bad_ones_are_named_and_the_others_read() -> None:
    unknown_filter = png_of(WIDTH, HEIGHT, 8, 2, (b"\5" + bytes(3 * WIDTH)) * HEIGHT)
    kinds = [FAST["RGB PNG"], unknown_filter, FAST["JPEG"], b"nothing", BY_PILLOW["RGBA"], FAST["stored PNG"]]
    batch = np.zeros((len(kinds), HEIGHT, WIDTH, 3), np.uint8)
    bad = decode_many(dict(enumerate(kinds)), batch)
    expected = []
    for place, data in enumerate(kinds):
        reference = outcome(data, (3, HEIGHT, WIDTH), fast=False)
        if isinstance(reference, str):
            expected.append((place, reference))
        else:
            assert np.array_equal(batch[place].transpose(2, 0, 1), reference)
    assert sorted(bad) == expected
    assert [place for place, _ in expected][-2:] == [3, 4]


def test_it_writes_into_the_middle_of_a_batch_and_nowhere_else() -> None:
    for kind in ("RGB PNG", "JPEG", "RGB PNG with a transparent colour"):
        data = (FAST | BY_PILLOW)[kind]
        batch = np.full((3, HEIGHT, WIDTH, 3), 9, np.uint8)
        decode_into(data, batch[1])
        assert np.array_equal(batch[1], pillow(data).transpose(1, 2, 0))
        assert (batch[[0, 2]] == 9).all()
