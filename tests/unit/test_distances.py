"""Distances against closed forms and a naive double loop."""

from itertools import combinations

import numpy as np
import pytest

from pipelines.distances import frechet_distance, frechet_from_moments, kernel_distance, moments


def draw(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, size=(n, d))


def with_exact_moments(rows: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """`rows` moved and stretched until their sample mean and unbiased covariance are exactly these."""
    centred = rows - rows.mean(axis=0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T))).T
    return white @ np.linalg.cholesky(cov).T + mean


def naive_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


class TestFrechet:
    def test_one_dimension_is_the_textbook_formula(self):
        a, b = draw(0, 50, 1) * 2 + 1, draw(1, 70, 1) * 0.5 - 3
        expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)

    def test_gaussians_whose_covariances_commute(self):
        # Equal eigenvectors: the trace term is the sum of squared differences of the standard deviations.
        rotation, _ = np.linalg.qr(draw(2, 4, 4))
        std_a, std_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.5, 0.1])
        mean_a, mean_b = np.array([1.0, 0, 0, 0]), np.array([0, 0, 2.0, 0])
        cov_a, cov_b = (rotation @ np.diag(std**2) @ rotation.T for std in (std_a, std_b))
        expected = 5.0 + np.sum((std_a - std_b) ** 2)
        assert frechet_from_moments(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-12)
        a = with_exact_moments(draw(3, 40, 4), mean_a, cov_a)
        b = with_exact_moments(draw(4, 60, 4), mean_b, cov_b)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)

    def test_two_dimensions_that_do_not_commute(self):
        # For 2 × 2, tr √M = √(tr M + 2√det M) with M = Σ_a Σ_b.
        cov_a, cov_b = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
        product = cov_a @ cov_b
        trace_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
        expected = np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
        zero = np.zeros(2)
        assert frechet_from_moments(zero, cov_a, zero, cov_b) == pytest.approx(expected, rel=1e-12)
        assert frechet_from_moments(zero, cov_b, zero, cov_a) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("n", "d"), [(200, 8), (5, 32)])
    def test_identical_sets_are_at_distance_zero_even_when_rank_deficient(self, n: int, d: int):
        a = draw(5, n, d, shift=10.0)
        assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize(("n", "d"), [(200, 8), (5, 32)])
    def test_a_shift_alone_costs_its_squared_length(self, n: int, d: int):
        a, shift = draw(6, n, d), np.linspace(-1, 2, d)
        assert frechet_distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)

    def test_rank_deficient_sets_match_the_same_sets_without_the_empty_directions(self):
        small_a, small_b = draw(7, 30, 3), draw(8, 30, 3) * 2
        embed, _ = np.linalg.qr(draw(9, 20, 3))
        expected = frechet_distance(small_a, small_b)
        assert frechet_distance(small_a @ embed.T, small_b @ embed.T) == pytest.approx(expected, rel=1e-9)

    def test_order_of_rows_and_of_arguments_rotation_and_scale(self):
        a, b = draw(10, 40, 6), draw(11, 50, 6, shift=0.5) * 1.3
        expected = frechet_distance(a, b)
        rotation, _ = np.linalg.qr(draw(12, 6, 6))
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(a[::-1], b) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-10)
        assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * expected, rel=1e-10)

    def test_float32_features_far_from_the_origin_keep_their_digits(self):
        a, b = draw(13, 500, 4) + 1000, draw(14, 500, 4) + 1000
        expected = frechet_distance(a, b)
        assert frechet_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(
            expected, rel=1e-2
        )

    def test_moments_are_the_unbiased_ones(self):
        a = draw(15, 30, 4)
        mean, cov = moments(a)
        np.testing.assert_allclose(mean, a.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(a.T), rtol=1e-12, atol=1e-15)


class TestKernel:
    @pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (7, 4, 3), (5, 12, 8)])
    def test_equals_the_naive_double_loop(self, n: int, m: int, d: int):
        a, b = draw(20, n, d), draw(21, m, d, shift=0.3)
        assert kernel_distance(a, b) == pytest.approx(naive_kernel_distance(a, b), rel=1e-11, abs=1e-13)

    @pytest.mark.parametrize("block_rows", [1, 2, 3, 16, 17, 18, 1000])
    def test_the_block_size_changes_nothing(self, block_rows: int):
        a, b = draw(22, 17, 5), draw(23, 35, 5, shift=0.3)
        expected = naive_kernel_distance(a, b)
        assert kernel_distance(a, b, block_rows=block_rows) == pytest.approx(expected, rel=1e-11)

    def test_unbiased_on_tiny_sets_from_one_distribution(self):
        # Every way to split 8 points into 3 and 5 as if drawn without replacement: the estimates average to
        # exactly zero, since each pair is within and between equally often by the estimator's weights.
        points = draw(24, 8, 2)
        values = []
        for chosen in combinations(range(8), 3):
            rest = [i for i in range(8) if i not in chosen]
            values.append(kernel_distance(points[list(chosen)], points[rest]))
        assert np.mean(values) == pytest.approx(0.0, abs=1e-12)
        assert min(values) < 0 < max(values)

    def test_closed_form_of_two_point_masses(self):
        # k is constant on each set: MMD² = k(x,x) + k(y,y) − 2k(x,y).
        a, b = np.full((3, 2), 1.0), np.full((4, 2), -0.5)
        assert kernel_distance(a, b) == pytest.approx(2.0**3 + 1.25**3 - 2 * 0.5**3, rel=1e-12)

    def test_grows_with_the_shift_and_is_symmetric(self):
        a = draw(25, 200, 4)
        values = [kernel_distance(a, draw(26, 200, 4, shift=s)) for s in (0.0, 0.5, 1.0, 2.0)]
        assert values == sorted(values)
        b = draw(26, 150, 4, shift=1.0)
        assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)


GOOD = draw(30, 4, 3)
WITH_NAN = np.array([[1.0, np.nan, 0.0], [0.0, 1.0, 2.0]])


class TestErrorsNameTheArgument:
    @pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            (GOOD[:1], GOOD, r"^a: needs at least 2 rows, got 1$"),
            (GOOD, GOOD[:0], r"^b: needs at least 2 rows, got 0$"),
            (GOOD, GOOD[:, :2], r"^b: must have as many columns as a \(3\), got 2$"),
            (WITH_NAN, GOOD, r"^a: holds values that are not finite"),
            (GOOD, np.full((2, 3), np.inf), r"^b: holds values that are not finite"),
            (GOOD[0], GOOD, r"^a: must have shape \[n, d\]"),
        ],
    )
    def test_features(self, distance, a, b, message: str):
        with pytest.raises(ValueError, match=message):
            distance(a, b)

    def test_moments(self):
        zero, one = np.zeros(2), np.eye(2)
        for arguments, message in (
            ((zero, one, np.zeros(3), np.eye(3)), r"^mean_b: must have mean_a's length 2, got 3$"),
            ((zero, np.eye(3), zero, one), r"^cov_a: must have shape \[2, 2\]"),
            ((zero, one, zero, np.array([[1.0, 0.5], [0.0, 1.0]])), r"^cov_b: must be symmetric$"),
            ((zero, one, zero, np.diag([1.0, -0.5])), r"^cov_b: must be positive semi-definite"),
            ((zero * np.nan, one, zero, one), r"^mean_a: holds values that are not finite"),
            ((np.zeros((2, 2)), one, zero, one), r"^mean_a: must have shape \[d\]"),
        ):
            with pytest.raises(ValueError, match=message):
                frechet_from_moments(*arguments)

    def test_block_rows(self):
        with pytest.raises(ValueError, match=r"^block_rows: must be at least 1, got 0$"):
            kernel_distance(GOOD, GOOD, block_rows=0)
