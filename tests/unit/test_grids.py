"""Images laid out in one picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.grids import grid_png, tile
from tests.support.data import random_images


def test_every_pixel_becomes_a_square_in_its_place() -> None:
    images = random_images(5, (3, 4, 6))
    canvas = tile(images, columns=3, scale=2, gap=1)
    assert canvas.shape == (2 * 8 + 1, 3 * 12 + 2, 3)
    for index, image in enumerate(images):
        top, left = (index // 3) * 9, (index % 3) * 13
        large = image.transpose(1, 2, 0).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(canvas[top : top + 8, left : left + 12], large)


def test_between_and_beyond_the_images_it_is_white() -> None:
    canvas = tile(np.zeros((4, 1, 2, 2), np.uint8), columns=3, scale=1, gap=1)
    assert canvas.shape == (5, 8, 1)
    assert canvas[2].min() == canvas[:, 2].min() == canvas[:, 5].min() == 255
    # two places of the second row are empty
    assert canvas[3:, 3:].min() == 255
    assert int((canvas == 0).sum()) == 16


def test_few_images_make_no_wide_picture() -> None:
    assert tile(random_images(2), columns=8, scale=1, gap=2).shape == (8, 18, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_png_is_the_canvas(channels: int, mode: str) -> None:
    images = random_images(10, (channels, 8, 8))
    picture = Image.open(io.BytesIO(grid_png(images)))
    assert (picture.format, picture.mode) == ("PNG", mode)
    canvas = tile(images, columns=8, scale=4, gap=2)
    np.testing.assert_array_equal(np.asarray(picture).reshape(canvas.shape), canvas)
