"""The exact expectation of a path bound whose chain is linear and Gaussian."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_core.hierarchy import Chain, PathTerms, encode_path, path_terms


def exact_mean(chain: Chain, x: Tensor, dims: Sequence[int]) -> PathTerms:
    """E of the path terms over the encoder's noise, exact where they are quadratic in it; x `[B, ...]`.

    For f quadratic and noise of mean 0 and covariance I, E f = f(0) + ½·Σ_i [f(e_i) + f(−e_i) − 2·f(0)].
    dims: of each z_t. The mean over the rows of x is taken too.
    """
    count = sum(dims)
    directions = torch.cat([torch.zeros(1, count), torch.eye(count), -torch.eye(count)]).double()
    weights = torch.cat([torch.full((1,), 1.0 - count), torch.full((2 * count,), 0.5)]).double()
    parts = directions.split(list(dims), dim=1)
    totals = []
    for row in x:
        rows = row[None].expand(len(directions), *row.shape)
        path = encode_path(chain, rows, lambda t, mean: parts[t].reshape(mean.shape))
        totals.append(PathTerms(*(torch.tensordot(weights, term, 1) for term in path_terms(chain, path))))
    return PathTerms(*(torch.stack(terms).mean(0) for terms in zip(*totals, strict=True)))


def mean_total(terms: PathTerms) -> float:
    return float(terms.reconstruction + terms.consistency.sum() + terms.prior)
