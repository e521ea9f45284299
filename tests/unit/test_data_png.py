"""Writing PNG files: Pillow's very bytes by its compressor, the same pixels by fpng."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipelines import png
from pipelines.decode import decode
from pipelines.errors import UserError
from pipelines.png import check_encoder, encode_pngs

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


def test_many_images_are_each_their_own() -> None:
    # more than lie in one strip
    images = pictures("gradient", 200, (3, 32, 32))
    assert encode_pngs(images) == [saved(image) for image in images]
    assert encode_pngs(images[:0]) == []


def test_pillows_compressor_is_used_and_no_file_written_by_save(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures("gradient", 3, (3, 8, 9))
    expected = [saved(image) for image in images]
    assert png._compressor_is_known()
    monkeypatch.setattr(Image.Image, "save", None)
    assert encode_pngs(images) == expected


def test_with_a_pillow_whose_compressor_is_another_save_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures("gradient", 3, (3, 8, 9))
    expected = [saved(image) for image in images]

    def fails(*arguments: object) -> bytes:
        raise TypeError("takes other arguments")

    def other(stacked: NDArray[np.uint8], height: int) -> list[bytes]:
        return [b"something else"]

    monkeypatch.setattr(png, "_compressor_is_known", png._compressor_is_known.__wrapped__)
    assert png._compressor_is_known()
    for name, replaced in (("_head", fails), ("_by_compressor", other)):
        with monkeypatch.context() as patch:
            patch.setattr(png, name, replaced)
            assert not png._compressor_is_known()
            assert encode_pngs(images) == expected


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
