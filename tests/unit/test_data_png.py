"""Writing PNG files: Pillow's very bytes, the same pixels by fpng."""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, features

from pipelines import png
from pipelines.decode import decode
from pipelines.errors import UserError
from pipelines.png import check_encoder, encode_pngs
from pipelines.png_filters import _paeth, filtered

KINDS = ("noise", "gradient", "flat", "two values")
SHAPES = st.tuples(st.sampled_from((1, 3)), st.integers(1, 70), st.integers(1, 70))


def pictures(kind: str, count: int, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.uint8]:
    draw = np.random.default_rng(seed)
    size = (count, *shape)
    if kind == "noise":
        return draw.integers(0, 256, size, dtype=np.uint8)
    if kind == "flat":
        return np.broadcast_to(draw.integers(0, 256, (count, shape[0], 1, 1), dtype=np.uint8), size)
    if kind == "two values":
        return (255 * draw.integers(0, 2, size)).astype(np.uint8)
    y, x = np.mgrid[0 : shape[1], 0 : shape[2]]
    slopes = draw.uniform(-9, 9, (2, count, shape[0], 1, 1))
    return (128 + slopes[0] * y + slopes[1] * x + draw.normal(0, 3, size)).clip(0, 255).astype(np.uint8)


def saved(image: NDArray[np.uint8]) -> bytes:
    """As anybody would write it."""
    picture = Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
    with io.BytesIO() as file:
        picture.save(file, format="PNG")
        return file.getvalue()


@given(SHAPES, st.sampled_from(KINDS), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_the_bytes_are_those_of_pillows_save(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    images = pictures(kind, 3, shape, seed)
    assert encode_pngs(images) == [saved(image) for image in images]


@pytest.mark.parametrize("channels", [1, 3])
def test_also_those_of_images_that_pillow_cuts_into_several_chunks(channels: int) -> None:
    # more compressed bytes than Pillow takes at a time, and a row that is longer than that
    for size in ((300, 301), (5, 70_000)):
        images = pictures("noise", 2, (channels, *size))
        assert encode_pngs(images) == [saved(image) for image in images]
    assert saved(images[0]).count(b"IDAT") > 1


def test_also_where_a_chunk_ends_just_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures("noise", 1, (3, 40, 9))
    monkeypatch.setattr(ImageFile, "MAXBLOCK", len(saved(images[0])) - 57)
    assert saved(images[0]).count(b"IDAT") == 1
    assert encode_pngs(images) == [saved(images[0])]
    for at_most in (64, 100, 997):
        monkeypatch.setattr(ImageFile, "MAXBLOCK", at_most)
        assert encode_pngs(images) == [saved(images[0])]


def test_also_where_zlib_moves_its_window() -> None:
    """Which it does at byte 65,274 if it has seen no more yet, and then passes over a match that begins there."""
    differing = 0
    for seed in range(12):
        lines = np.random.default_rng(seed).integers(-20, 21, (300, 257)).astype(np.uint8)
        # the bytes that name the filter, one of which lies in the match
        lines[:, 0] = lines.reshape(-1)[32_768 + -65_274 % 257] = 0
        lines.reshape(-1)[65_274:65_288] = lines.reshape(-1)[32_768:32_782]
        images = lines[None, None, :, 1:].copy()
        assert encode_pngs(images) == [saved(images[0])]
        stored = filtered(images[0, 0], 300, 1)
        whole = zlib.compressobj(-1, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
        differing += whole.compress(stored.tobytes()) + whole.flush() not in saved(images[0]).replace(
            b"IDAT", b""
        )
    assert differing > 0


def test_lines_that_are_too_long_for_pillows_sums_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures("noise", 2, (3, 2, 100))
    monkeypatch.setattr(png, "_by_zlib", None)
    monkeypatch.setattr(png, "_by_compressor", None)
    monkeypatch.setattr(png, "_as_pillow", lambda: None)
    monkeypatch.setattr(png, "_LONGEST_LINE", 300)
    assert encode_pngs(images) == [saved(image) for image in images]


def test_many_images_are_each_their_own() -> None:
    # more than lie in one strip
    images = pictures("gradient", 200, (3, 32, 32))
    assert encode_pngs(images) == [saved(image) for image in images]
    assert encode_pngs(images[:0]) == []


def test_images_of_many_lines_are_filtered_across_the_borders_of_bands() -> None:
    # bands of 65,536 bytes, so that their borders lie within images, at their tops and at their bottoms
    for height in (1, 31, 64, 100):
        images = pictures("gradient", 12, (3, height, 341))
        assert encode_pngs(images) == [saved(image) for image in images]


WAYS = [png._by_zlib, png._by_compressor, png._by_save]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_the_bytes_of_pillow(
    monkeypatch: pytest.MonkeyPatch, way: Callable[[NDArray[np.uint8], int], list[bytes]]
) -> None:
    monkeypatch.setattr(png, "_as_pillow", lambda: way)
    for shape in ((3, 8, 9), (1, 8, 9), (3, 150, 500)):
        for kind in KINDS:
            images = pictures(kind, 3, shape)
            assert encode_pngs(images) == [saved(image) for image in images]


def test_the_fastest_way_whose_bytes_are_pillows_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = png._as_pillow.__wrapped__
    same = features.version("zlib") == zlib.ZLIB_RUNTIME_VERSION
    assert choose() is (png._by_zlib if same else png._by_compressor)
    for pythons, pillows in (("1.2.3", "1.2.4"), ("1.3.1.zlib-ng", "1.3.1.zlib-ng")):
        with monkeypatch.context() as patch:
            patch.setattr(zlib, "ZLIB_RUNTIME_VERSION", pythons)
            patch.setattr(features, "version", {"zlib": pillows}.get)
            assert choose() is png._by_compressor

    def fails(*arguments: object) -> list[bytes]:
        raise RuntimeError("takes other arguments")

    def other(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
        return [b"something else"]

    for wrong in (fails, other):
        with monkeypatch.context() as patch:
            patch.setattr(png, "_by_zlib", wrong)
            assert choose() is png._by_compressor
            patch.setattr(png, "_by_compressor", wrong)
            assert choose() is png._by_save


def test_the_choice_of_a_way_sees_every_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def noted(lines: NDArray[np.uint8], height: int, step: int) -> NDArray[np.uint8]:
        stored = filtered(lines, height, step)
        seen.update(stored[:, 0].tolist())
        return stored

    monkeypatch.setattr(png, "filtered", noted)
    png._as_pillow.__wrapped__()
    assert seen == {0, 1, 2, 4}


def test_the_prediction_by_bytes_is_paeths_for_all_of_them() -> None:
    every = np.arange(256)
    for c in range(256):
        a, b = (each.ravel() for each in np.meshgrid(every, every))
        distances = np.abs(a + b - c - np.stack([a, b, np.full_like(a, c)]))
        nearest = distances.argmin(axis=0)
        expected = np.where(nearest == 0, a, np.where(nearest == 1, b, c))
        found = _paeth(*(each.astype(np.uint8) for each in (a, b, np.full_like(a, c))))
        assert np.array_equal(found, expected)


@given(SHAPES.map(lambda shape: (3, *shape[1:])), st.sampled_from(KINDS), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_fpng_keeps_every_pixel(shape: tuple[int, int, int], kind: str, seed: int) -> None:
    images = pictures(kind, 2, shape, seed)
    for image, file in zip(images, encode_pngs(images, "fpng"), strict=True):
        assert b"fdEC" in file
        assert np.array_equal(decode(file, shape), image)
        with Image.open(io.BytesIO(file)) as copy:
            copy.verify()
        with Image.open(io.BytesIO(file)) as opened:
            assert np.array_equal(np.asarray(opened).transpose(2, 0, 1), image)


@pytest.mark.parametrize("encoder", ["pillow", "fpng"])
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 3, 8, 8)),
        np.zeros((1, 2, 8, 8), np.uint8),
        np.zeros((1, 4, 8, 8), np.uint8),
        np.zeros((1, 3, 0, 8), np.uint8),
        np.zeros((1, 3, 8, 0), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(wrong: NDArray[np.uint8], encoder: png.PngEncoder) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        encode_pngs(wrong, encoder)


def test_a_wrong_choice_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder("pillow", 1, "prepare.png_encoder")
    check_encoder("fpng", 3, "prepare.png_encoder")
    with pytest.raises(UserError, match=r"^prepare\.png_encoder: must be pillow for grey images, got fpng"):
        check_encoder("fpng", 1, "prepare.png_encoder")
    with pytest.raises(ValueError, match="fpng writes RGB alone"):
        encode_pngs(np.zeros((1, 1, 8, 8), np.uint8), "fpng")
    monkeypatch.setitem(sys.modules, "fpng", None)
    monkeypatch.setattr(png, "_fpng", png._fpng.__wrapped__)
    with pytest.raises(
        UserError, match=r"^sample\.png_encoder: .*pip install 'ddpm-cluster\[fpng\]'"
    ) as error:
        check_encoder("fpng", 3, "sample.png_encoder")
    assert "\n" not in str(error.value)
