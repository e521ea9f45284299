"""Exact expectations over Gaussian noise of what is quadratic in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_core.hierarchy import Chain, PathTerms, encode_path, path_terms


def noise_directions(count: int) -> tuple[Tensor, Tensor]:
    """Points `[2·count + 1, count]` and weights: Σ w·f(point) = E f(noise), noise ~ N(0, I), for every quadratic f.

    E f = f(0) + ½·Σ_i [f(e_i) + f(−e_i) − 2·f(0)].
    """
    unit = torch.eye(count, dtype=torch.float64)
    weights = torch.full((2 * count + 1,), 0.5, dtype=torch.float64)
    weights[0] = 1.0 - count
    return torch.cat([torch.zeros(1, count, dtype=torch.float64), unit, -unit]), weights


def exact_mean(chain: Chain, x: Tensor, dims: Sequence[int]) -> PathTerms:
    """E of the path terms over the encoder's noise and over the rows of x `[B, ...]`; dims: of each z_t.

    Exact for a linear-Gaussian chain, whose terms are quadratic in the noise.
    """
    directions, weights = noise_directions(sum(dims))
    parts = directions.split(list(dims), dim=1)
    means = []
    for row in x:
        rows = row[None].expand(len(directions), *row.shape)
        path = encode_path(chain, rows, lambda t, mean: parts[t].reshape(mean.shape))
        means.append(PathTerms(*(torch.tensordot(weights, term, 1) for term in path_terms(chain, path))))
    return PathTerms(*(torch.stack(terms).mean(0) for terms in zip(*means, strict=True)))


def mean_total(terms: PathTerms) -> float:
    return float(terms.reconstruction + terms.consistency.sum() + terms.prior)
