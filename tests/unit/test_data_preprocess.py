"""Image files that Pillow would take, or fail at in ways of its own: each is refused with one reason."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.preprocess import Preprocessing, check_plain, inspect
from pipelines.sources import IMAGE_EXTENSIONS
from tests.support.data import image_bytes, random_images

PICTURE = Image.fromarray(random_images(1, (3, 12, 16))[0].transpose(1, 2, 0))
DEEP = np.arange(8 * 8 * 3).reshape(8, 8, 3) * 300
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(first: bytes, depth: int, colour: int, rows: bytes) -> bytes:
    """An 8×8 PNG with this chunk before its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + first + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(depth: int) -> bytes:
    """An uncompressed RGB TIFF of 8×8 pixels with so many bits a channel."""
    pixels = DEEP.astype("<u2" if depth == 16 else "u1").tobytes()
    strip = 8 + 2 + 10 * 12 + 4 + 6
    entries = [
        (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, strip - 6), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, strip), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(pixels)), (284, 3, 1, 1),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        struct.pack("<2sHIH", b"II", 42, 8, len(entries))
        + table
        + bytes(4)
        + struct.pack("<3H", *[depth] * 3)
    ) + pixels


def sgi() -> bytes:
    head = struct.pack(">HBBHHHHll4s80sl", 474, 0, 2, 3, 8, 8, 3, 0, 65535, b"", b"", 0).ljust(512, b"\0")
    return head + DEEP.transpose(2, 0, 1).astype(">u2").tobytes()


ROWS = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P6 8 8 65535\n" + DEEP.astype(">u2").tobytes(), "more than 8 bits"),
        (b"P6\n# a comment\n8 8\n1023\n" + (DEEP % 1024).astype(">u2").tobytes(), "more than 8 bits"),
        (b"P3 8 8 256\n" + b"0 " * 192, "more than 8 bits"),
        (b"P5 8 8 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), "more than 8 bits"),
        (b"Pf\n8 8\n-1.0\n" + bytes(4 * 64), "more than 8 bits"),
        (tiff(16), "more than 8 bits"),
        (png_with(b"", 16, 2, ROWS), "more than 8 bits"),
        (png_with(chunk(b"tEXt", b"k\0" + bytes(30)), 16, 2, ROWS), "cannot be decoded .*no PNG"),
        (sgi(), "not an image that Pillow can read as PNG"),
    ],
)
def test_more_than_8_bits_are_not_cut_off_without_a_word(data: bytes, reason: str) -> None:
    for look in (Preprocessing(None, 3).apply, inspect, check_plain):
        with pytest.raises(ValueError, match=reason):
            look(data)


def test_a_ppm_of_any_small_maximum_and_an_8_bit_tiff_are_taken() -> None:
    pixels = (DEEP % 256).astype(np.uint8)
    for data in (
        b"P6 8 8 255\n" + pixels.tobytes(),
        b"P6 8 8 17\n" + (pixels % 18).tobytes(),
        b"P3 8 8 255\n" + b"7 " * 192,
        b"P5 8 8 255\n" + pixels[..., 0].tobytes(),
        b"P4 8 8\n" + bytes(8),
        tiff(8),
    ):
        assert Preprocessing(None, 3).apply(data)[1] == (3, 8, 8)


def test_no_other_program_is_run_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/run\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    for look in (Preprocessing(8, 3).apply, inspect, check_plain):
        with pytest.raises(ValueError, match="not an image that Pillow can read as PNG"):
            look(EPS)
    assert not (tmp_path / "run").exists()


def test_every_format_of_a_source_is_taken() -> None:
    Image.init()
    formats = {Image.EXTENSION[f".{extension}"] for extension in IMAGE_EXTENSIONS}
    for kind in formats:
        assert Preprocessing(None, 3).apply(image_bytes(PICTURE, kind))[1] == (3, 12, 16)


EXIFS = [b"garbage!", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
WITH_EXIF: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})]


@pytest.mark.parametrize("exif", EXIFS)
@pytest.mark.parametrize(("kind", "options"), WITH_EXIF)
def test_broken_exif_data_end_in_an_image_or_a_reason(
    kind: str, options: dict[str, Any], exif: bytes
) -> None:
    data = image_bytes(PICTURE, kind, exif=b"Exif\0\0" + exif, **options)
    looks: list[Callable[[bytes], object]] = [Preprocessing(None, 3).apply, Preprocessing(8, 1).apply]
    for look in [*looks, check_plain, inspect]:
        try:
            look(data)
        except ValueError as error:
            assert "its EXIF data cannot be read" in str(error)  # noqa: PT017  an image is as good


def test_broken_exif_data_are_a_reason_for_some_kind() -> None:
    for look in (Preprocessing(None, 3).apply, check_plain):
        with pytest.raises(ValueError, match=r"its EXIF data cannot be read .*: take them out"):
            look(image_bytes(PICTURE, "PNG", exif=b"garbage!"))


def test_a_png_that_is_cut_short_is_no_plain_one() -> None:
    whole = image_bytes(PICTURE)
    check_plain(whole)
    for cut in (80, len(whole) // 2, len(whole) - 40):
        with pytest.raises(ValueError, match="cannot be decoded"):
            check_plain(whole[:cut])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_limit_is_one_and_not_twice_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_bytes(PICTURE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 16)
    assert Preprocessing(None, 3).apply(data) == (data, (3, 12, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 16 - 1)
    for look in (Preprocessing(None, 3).apply, Preprocessing(8, 3).apply, inspect, check_plain):
        with pytest.raises(ValueError, match="it has 192 pixels, which exceeds limit of 191 pixels"):
            look(data)
