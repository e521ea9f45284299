"""Distances between two sets of feature vectors: how far generated images are from real ones.

Both work on features of any network; which network made them decides what a value means, so a value is
comparable only with values from the same network (pipelines/features.py names it).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Covariances that passed through float32 have eigenvalues this far below zero by rounding alone.
_ROUNDING = 1e-5


def moments(features: npt.ArrayLike, name: str = "features") -> tuple[Array, Array]:
    """Mean [d] and unbiased covariance [d, d] (divided by n − 1) of the rows of `features` [n, d], in float64.

    Raises ValueError naming the argument for fewer than 2 rows, a wrong shape, or a value that is not finite.
    """
    rows = _feature_rows(features, name)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def frechet_distance(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Squared Fréchet distance between Gaussians fitted to the rows of `a` [n, d] and of `b` [m, d].

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½), Σ the unbiased covariance (Heusel et al. 2017, Eq. 6). It is
    biased upwards by about 1/n + 1/m: compare only values made with equal counts. At least 0; in the features'
    units squared. Raises ValueError naming `a` or `b`: fewer than 2 rows, a value that is not finite, widths
    that differ.
    """
    _check_same_width(rows_a := _feature_rows(a, "a"), rows_b := _feature_rows(b, "b"))
    return frechet_from_moments(*moments(rows_a), *moments(rows_b))


def frechet_from_moments(
    mean_a: npt.ArrayLike, cov_a: npt.ArrayLike, mean_b: npt.ArrayLike, cov_b: npt.ArrayLike
) -> float:
    """Squared Fréchet distance between N(mean_a, cov_a) and N(mean_b, cov_b); means [d], covariances [d, d].

    Covariances may be singular (fewer images than features). Raises ValueError naming the argument for a wrong
    shape, a value that is not finite, or a covariance that is not symmetric and positive semi-definite.
    """
    mu_a, mu_b = _mean_vector(mean_a, "mean_a"), _mean_vector(mean_b, "mean_b")
    if mu_a.shape != mu_b.shape:
        raise ValueError(f"mean_b: must have mean_a's length {mu_a.size}, got {mu_b.size}")
    root_a, root_b = _root(cov_a, "cov_a", mu_a.size), _root(cov_b, "cov_b", mu_b.size)
    # With Σ = R Rᵀ, tr(Σ_a Σ_b)^½ is the sum of the singular values of R_aᵀ R_b. Eigenvalues of the product
    # would square the numbers first, and a null direction would come back as 1e-8 instead of 1e-16.
    trace_root = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    squared_shift = np.sum((mu_a - mu_b) ** 2)
    # tr Σ = |R|²: taken from the same roots, so that the terms cancel for equal covariances.
    distance = squared_shift + np.sum(root_a**2) + np.sum(root_b**2) - 2 * trace_root
    return max(0.0, float(distance))


def kernel_distance(a: npt.ArrayLike, b: npt.ArrayLike, *, block_rows: int = 1024) -> float:
    """Unbiased squared maximum mean discrepancy between the rows of `a` [n, d] and `b` [m, d].

    Kernel k(x, y) = (x·y/d + 1)³, as in the Kernel Inception Distance (Bińkowski et al. 2018). Unbiased at
    every n and m, hence possibly below zero when the two sets come from one distribution. Works through blocks
    of `block_rows` × `block_rows` kernel values, so memory beyond the features does not grow with n or m.
    Raises ValueError naming the argument: fewer than 2 rows, a value that is not finite, widths that differ,
    a block size below 1.
    """
    rows_a, rows_b = _feature_rows(a, "a"), _feature_rows(b, "b")
    _check_same_width(rows_a, rows_b)
    if block_rows < 1:
        raise ValueError(f"block_rows: must be at least 1, got {block_rows!r}")
    n, m = len(rows_a), len(rows_b)
    within_a = _sum_within(rows_a, block_rows) / (n * (n - 1))
    within_b = _sum_within(rows_b, block_rows) / (m * (m - 1))
    between = _sum_between(rows_a, rows_b, block_rows) / (n * m)
    return within_a + within_b - 2 * between


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _sum_between(a: Array, b: Array, block_rows: int) -> float:
    return math.fsum(
        float(_kernel(a[i : i + block_rows], b[j : j + block_rows]).sum())
        for i in range(0, len(a), block_rows)
        for j in range(0, len(b), block_rows)
    )


def _sum_within(rows: Array, block_rows: int) -> float:
    """Sum of k(x_i, x_j) over i ≠ j; blocks above the diagonal stand for their mirror image too."""
    parts: list[float] = []
    for i in range(0, len(rows), block_rows):
        block = rows[i : i + block_rows]
        values = _kernel(block, block)
        np.fill_diagonal(values, 0.0)
        parts.append(float(values.sum()))
        parts.extend(
            2 * float(_kernel(block, rows[j : j + block_rows]).sum())
            for j in range(i + block_rows, len(rows), block_rows)
        )
    return math.fsum(parts)


def _root(cov: npt.ArrayLike, name: str, width: int) -> Array:
    """R with R Rᵀ = cov, by a symmetric eigendecomposition."""
    matrix = _finite(cov, name)
    if matrix.shape != (width, width):
        raise ValueError(f"{name}: must have shape [{width}, {width}], got {list(matrix.shape)}")
    scale = float(np.abs(matrix).max())
    if float(np.abs(matrix - matrix.T).max()) > _ROUNDING * scale:
        raise ValueError(f"{name}: must be symmetric")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] < -_ROUNDING * scale:
        raise ValueError(f"{name}: must be positive semi-definite, smallest eigenvalue is {values[0]:.3g}")
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _mean_vector(mean: npt.ArrayLike, name: str) -> Array:
    vector = _finite(mean, name)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name}: must have shape [d] with d at least 1, got {list(vector.shape)}")
    return vector


def _feature_rows(features: npt.ArrayLike, name: str) -> Array:
    rows = _finite(features, name)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: must have shape [n, d] with d at least 1, got {list(rows.shape)}")
    if len(rows) < 2:
        raise ValueError(f"{name}: needs at least 2 rows, got {len(rows)}")
    return rows


def _finite(values: Any, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds values that are not finite (NaN or infinity)")
    return array


def _check_same_width(a: Array, b: Array) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: must have as many columns as a ({a.shape[1]}), got {b.shape[1]}")
