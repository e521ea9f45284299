"""Pictures: each a PNG of the size it should have, drawn from awkward arrays too; image pixels exact."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipelines import plots


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def assert_drawn(path: Path, width: int, height: int) -> None:
    pixels = read(path)
    assert pixels.shape == (height, width, 3)
    # A frame and axes alone would colour about one pixel in a hundred.
    assert (pixels != 255).any(axis=2).mean() > 0.02


def images(count: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, *shape), dtype=np.uint8)


def trial(bits: float, status: str = "completed", **more: Any) -> dict[str, Any]:
    row = {"num_timesteps": 500, "beta_start": 1e-4, "beta_end": 0.04, "stderr": 0.02, "step": 1200}
    return row | {"bits_per_dim": bits, "status": status} | more


TERMS = {"reconstruction": 1.4, "consistency": 1.5, "prior": 7e-6}
ROWS = [
    {"name": "samples", "frechet": 1.1, "kernel": 0.02, "count": 360},
    {"name": "other real images", "frechet": 0.5, "kernel": -0.01},
    {"name": "noise", "frechet": 18.0, "kernel": 1.2},
]


@pytest.mark.parametrize("num_timesteps", [2, 1000])
def test_schedule(tmp_path: Path, num_timesteps: int):
    betas = np.linspace(1e-4, 0.02, num_timesteps)
    alphas_cumprod = np.cumprod(1 - betas)
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    target = tmp_path / "new" / "folder" / "schedule.png"
    assert plots.schedule_figure(betas, alphas_cumprod, log_snr, target) == target
    assert_drawn(target, 1500, 480)


def test_loss_with_and_without_held_out_bound(tmp_path: Path):
    steps = np.arange(300)
    losses = 0.1 + np.exp(-steps / 50)
    losses[[3, 40]] = math.nan, math.inf
    plots.loss_figure(steps, losses, [(100, 3.5, 0.1), (200, 3.0, math.nan)], tmp_path / "both.png")
    assert_drawn(tmp_path / "both.png", 1200, 750)
    plots.loss_figure(steps, losses, [], tmp_path / "alone.png")
    assert_drawn(tmp_path / "alone.png", 1200, 480)


@pytest.mark.parametrize("losses", [[0.5], [math.nan, math.nan], [0.0, 1.0]])
def test_loss_of_hardly_any_steps(tmp_path: Path, losses: list[float]):
    plots.loss_figure(range(len(losses)), losses, [(0, math.nan, math.nan)], tmp_path / "loss.png")
    assert read(tmp_path / "loss.png").shape == (480, 1200, 3)


@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
def test_bound_with_timesteps_never_drawn(tmp_path: Path, num_timesteps: int):
    per_t = np.exp(-np.arange(num_timesteps) / 30.0)
    per_t[1::3] = math.nan
    per_t[2::7] = 0.0
    plots.bound_figure(per_t, TERMS, tmp_path / "bound.png", {"consistency": 0.02})
    assert_drawn(tmp_path / "bound.png", 1500, 540)


def test_bound_of_a_network_that_diverged(tmp_path: Path):
    terms = dict.fromkeys(TERMS, math.nan)
    plots.bound_figure([math.nan] * 10, terms, tmp_path / "bound.png")
    assert read(tmp_path / "bound.png").shape == (540, 1500, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_exactly_the_images_pixels(tmp_path: Path, channels: int):
    batch, scale, gap = images(7, (channels, 8, 10)), 3, 2
    plots.image_grid(batch, tmp_path / "grid.png", columns=4, scale=scale, gap=gap)
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape == (2 * 24 + gap, 4 * 30 + 3 * gap, 3)
    rest = np.ones(pixels.shape[:2], dtype=bool)
    for index, image in enumerate(batch):
        top, left = index // 4 * (24 + gap), index % 4 * (30 + gap)
        tile = pixels[top : top + 24, left : left + 30]
        rest[top : top + 24, left : left + 30] = False
        expected = np.broadcast_to(image.transpose(1, 2, 0), (8, 10, 3))
        for dy in range(scale):
            for dx in range(scale):
                np.testing.assert_array_equal(tile[dy::scale, dx::scale], expected)
    assert (pixels[rest] == 255).all()


def test_grid_by_default_is_about_square_and_large_enough_to_see(tmp_path: Path):
    plots.image_grid(images(9), tmp_path / "grid.png")
    assert read(tmp_path / "grid.png").shape == (3 * 48 + 4, 3 * 48 + 4, 3)


def test_generated_beside_real_shows_the_pixels_of_both_exactly(tmp_path: Path):
    generated, real = images(30, seed=1), images(25, seed=2)
    plots.generated_beside_real(generated, real, tmp_path / "pair.png")
    plots.image_grid(generated[:25], tmp_path / "left.png", columns=10)
    plots.image_grid(real[:25], tmp_path / "right.png", columns=10)
    pixels, left, right = (read(tmp_path / f"{name}.png") for name in ("pair", "left", "right"))
    height, width = left.shape[:2]
    np.testing.assert_array_equal(pixels[54 : 54 + height, 30 : 30 + width], left)
    np.testing.assert_array_equal(pixels[54 : 54 + height, 60 + width : 60 + 2 * width], right)
    assert pixels.shape == (height + 84, 2 * width + 90, 3)
    assert (pixels[:54] != 255).any()


def test_trajectory_thins_to_the_asked_number_and_keeps_both_ends(tmp_path: Path):
    states, predictions = images(50, (3, 8, 8), seed=1), images(50, (3, 8, 8), seed=2)
    frames = [(999 - 20 * i, states[i], predictions[i]) for i in range(50)]
    plots.trajectory_figure(frames, tmp_path / "way.png", max_frames=6)
    pixels = read(tmp_path / "way.png")
    side, gap, left, top = 112, 10, 84, 48
    assert pixels.shape == (top + 2 * side + gap + 24, left + 6 * side + 5 * gap + 24, 3)
    for column, index in ((0, 0), (5, 49)):
        for row, source in enumerate((states, predictions)):
            y, x = top + row * (side + gap), left + column * (side + gap)
            tile = pixels[y : y + side : 14, x : x + side : 14]
            np.testing.assert_array_equal(tile, source[index].transpose(1, 2, 0))


def test_sweep_of_every_kind_of_trial(tmp_path: Path):
    trials = [
        trial(2.9),
        trial(3.4, "stopped", step=300),
        trial(math.nan, "failed", step=10),
        trial(2.5, num_timesteps=100, stderr=None),
    ]
    plots.sweep_figure(trials, tmp_path / "sweep.png")
    assert_drawn(tmp_path / "sweep.png", 1500, 190 + 54 * 4)
    ends = {"log_snr_start": 9.2, "log_snr_end": -10.1}
    plots.sweep_figure([row | ends for row in trials], tmp_path / "snr.png")
    assert_drawn(tmp_path / "snr.png", 1700, 190 + 54 * 4)


@pytest.mark.parametrize("bits", [[math.nan], [2.5], [2.5, 2.5], [2.5, 400.0], [0.0, -1.0]])
def test_sweep_of_awkward_results(tmp_path: Path, bits: list[float]):
    plots.sweep_figure([trial(value) for value in bits], tmp_path / "sweep.png")
    assert_drawn(tmp_path / "sweep.png", 1500, 190 + 54 * 4)


def test_sweep_is_drawn_in_rank_order_and_is_cut_at_the_last_ranks(tmp_path: Path):
    trials = [trial(value) for value in (3.0, 2.0, 4.0, 5.0)] + [trial(1.0, "failed")]
    plots.sweep_figure(trials, tmp_path / "all.png")
    plots.sweep_figure(trials[::-1], tmp_path / "reversed.png")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "reversed.png").read_bytes()
    plots.sweep_figure(trials * 10, tmp_path / "many.png", max_trials=5)
    assert_drawn(tmp_path / "many.png", 1500, 190 + 54 * 5)


def test_distances_with_a_kernel_distance_below_zero(tmp_path: Path):
    plots.distances_figure(ROWS, tmp_path / "distances.png")
    assert_drawn(tmp_path / "distances.png", 1500, 450)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_distances_without_any_bar(tmp_path: Path, value: float):
    row = {"name": "samples", "frechet": value, "kernel": value}
    plots.distances_figure([row], tmp_path / "distances.png")
    assert read(tmp_path / "distances.png").shape == (360, 1500, 3)


def test_same_arrays_same_bytes_and_no_global_state(tmp_path: Path):
    before = dict(matplotlib.rcParams)
    for name in ("a", "b"):
        plots.distances_figure(ROWS, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


EMPTY = np.zeros((0, 1, 8, 8), np.uint8)
PAIR = images(2)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (plots.schedule_figure, ([], [], []), "betas: needs at least 1 value"),
        (plots.schedule_figure, ([0.1], [0.9], []), "log_snr: needs at least 1 value"),
        (
            plots.schedule_figure,
            ([0.1], [0.9, 0.8], [1.0]),
            r"alphas_cumprod: must be as long as betas \(1\)",
        ),
        (plots.schedule_figure, ([[0.1]], [0.9], [1.0]), r"betas: must have shape \[n\]"),
        (plots.loss_figure, ([], [], []), "steps: needs at least 1 value"),
        (plots.loss_figure, ([1, 2], [0.5], []), r"losses: must be as long as steps \(2\), got 1"),
        (
            plots.loss_figure,
            ([1], [0.5], [(1, 2)]),
            r"held_out: must hold \(step, bits/dim, standard error\)",
        ),
        (plots.bound_figure, ([], TERMS), "per_t: needs at least 1 value"),
        (plots.bound_figure, ([1.0], {"prior": 1.0}), "terms: .* lacks reconstruction, consistency"),
        (plots.image_grid, (EMPTY,), "images: needs at least 1 image"),
        (plots.image_grid, (PAIR.astype(float),), "images: must be uint8, got float64"),
        (plots.image_grid, (PAIR[0],), r"images: must have shape \[n, 1 or 3, H, W\], got \[1, 8, 8\]"),
        (plots.generated_beside_real, (EMPTY, PAIR), "generated: needs at least 1 image"),
        (plots.generated_beside_real, (PAIR, EMPTY), "real: needs at least 1 image"),
        (
            plots.generated_beside_real,
            (PAIR, images(2, (3, 8, 8))),
            r"real: must hold images of shape \[1, 8, 8\]",
        ),
        (plots.trajectory_figure, ([],), "frames: needs at least 1 frame"),
        (plots.trajectory_figure, ([(0, PAIR[0], images(1, (3, 8, 8))[0])],), "frames: x_t and pred_x_start"),
        (plots.sweep_figure, ([],), "trials: needs at least 1 trial"),
        (plots.sweep_figure, ([{"step": 1}],), "trials: trial 0 lacks num_timesteps"),
        (plots.sweep_figure, ([trial(1.0, "lost")],), "trials: trial 0 has status 'lost'"),
        (plots.sweep_figure, ([trial(1.0, beta_start=0.0)],), "trials: trial 0 has beta_start 0.0"),
        (plots.distances_figure, ([],), "rows: needs at least 1 row"),
        (plots.distances_figure, ([{"name": "samples"}],), "rows: row 0 lacks frechet, kernel"),
    ],
)
def test_bad_input_names_the_argument_and_leaves_no_file(tmp_path: Path, function, arguments, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(*arguments, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("options", [{"columns": 0}, {"scale": 0}, {"gap": -1}])
def test_grid_options_name_themselves(tmp_path: Path, options: dict[str, int]):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: must be at least"):
        plots.image_grid(PAIR, tmp_path / "grid.png", **options)
