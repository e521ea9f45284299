"""The step rules of the samplers, one pure function each. All of them are one formula:

    x_{t−1} = on_x_t·x_t + on_x_start·D + sigma·z,    D = x̂_0 + on_other·(x̂_0' − x̂_0),

x̂_0' being another estimate of x_0: the one of the step before (multistep solvers), or one at the point that
the step without it reaches (Heun). A rule is therefore four float64 tables of a chain. With λ = ½·log-SNR,
h = λ_{t−1} − λ_t and r = e^{−h}, every rule here takes the exact solution for a constant x̂_0 of the diffusion's
reverse process with the share η of its noise: η = 0 is the probability flow, η = 1 the posterior of Ho et al. The
rules differ in η and in D.

At index 0 the step ends at the data, where h = ∞: D is x̂_0 and x_{−1} = x̂_0, without noise (z = 0 in the last
step of Algorithm 2). The same h = ∞ stands where a chain starts without signal (zero terminal SNR).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core._checks import (
    check_batch,
    check_floating,
    check_same_shape,
    check_tensor,
    require,
    require_number,
)
from ddpm_core.process import LinearGaussianProcess, shifted
from ddpm_core.reverse import ReverseProcess


class Step(NamedTuple):
    """The coefficients of one step: numbers, or tensors `[B, 1, ..., 1]` where each sample has its own t."""

    on_x_t: float | Tensor
    on_x_start: float | Tensor
    on_other: float | Tensor
    sigma: float | Tensor


class StepTables(NamedTuple):
    """The coefficients of the steps t → t−1 of a whole chain, float64 `[T]` each; on_other = 0 where D = x̂_0."""

    on_x_t: Tensor
    on_x_start: Tensor
    on_other: Tensor
    sigma: Tensor

    def steps(self) -> list[Step]:
        """The coefficients as numbers, one Step a t."""
        return [Step(*row) for row in torch.stack(tuple(self)).T.tolist()]

    def gather(self, process: LinearGaussianProcess, t: Tensor, like: Tensor) -> Step:
        """The coefficients at t int64 `[B]`, to broadcast over like; see `LinearGaussianProcess.gather`."""
        return Step(*(process.gather(table, t, like) for table in self))


def advance(
    step: Step, x_t: Tensor, pred_x_start: Tensor, other: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    """x_{t−1} of the module's formula, like x_t. other is x̂_0' (None for D = x̂_0), noise is z (None for 0).

    Raises ValueError naming the argument that has not the shape of x_t or is not floating-point; NaN passes.
    """
    check_batch("x_t", x_t)
    check_tensor("pred_x_start", pred_x_start)
    for name, tensor in (("pred_x_start", pred_x_start), ("other", other), ("noise", noise)):
        if tensor is not None:
            check_floating(name, tensor)
            check_same_shape(name, tensor, "x_t", x_t)
    if other is not None:
        pred_x_start = pred_x_start + step.on_other * (other - pred_x_start)
    x_prev = step.on_x_start * pred_x_start + step.on_x_t * x_t
    if noise is None:
        return x_prev
    return x_prev + step.sigma * noise


def ancestral_tables(reverse: ReverseProcess) -> StepTables:
    """Algorithm 2, line 4: x_{t−1} = μ̃_t(x_t, x̂_0) + σ_t·z, σ_t that of `reverse`.

    For "learned_range", where σ_t depends on x_t, sigma is nan but for 0 at index 0.
    """
    process = reverse.process
    if reverse.variance_type == "learned_range":
        sigma = torch.full_like(process.posterior_variance, torch.nan)
    else:
        sigma = (0.5 * reverse.log_variance_table()).exp()
    sigma[0] = 0.0
    return StepTables(
        process.posterior_mean_coef2, process.posterior_mean_coef1, torch.zeros_like(sigma), sigma
    )


def ddim_tables(process: LinearGaussianProcess, eta: float = 0.0) -> StepTables:
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12): a_{t−1}·x̂_0 + √(b²_{t−1} − σ²)·ε̂ + σ·z, σ² = η²·β̃_t.

    ε̂ = (x_t − a_t·x̂_0)/b_t, so that it and x̂_0 always fit x_t, clipped or not. eta in [0, 1].
    """
    require_number("eta", eta)
    require(0 <= eta <= 1, "eta", "between 0 and 1", eta)
    loss = process.snr_loss  # 1 − r²
    # b²_{t−1} − σ² = (b_{t−1}·keep)², which cannot round below zero
    keep = (1.0 - eta**2 * loss).clamp(min=0.0).sqrt()
    ratio = (1.0 - loss).clamp(min=0.0).sqrt()
    # 1 − r·keep, without the cancellation of short steps
    share = loss * (1.0 + eta**2 * (1.0 - loss)) / (1.0 + ratio * keep)
    before = shifted(process.b, 0.0)
    return StepTables(
        before / process.b * keep,
        shifted(process.a, 1.0) * share,
        torch.zeros_like(loss),
        eta * before * loss.sqrt(),
    )


def dpm_solver_pp_2m_tables(process: LinearGaussianProcess) -> StepTables:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): D = x̂_0 + h/(2·h_before)·(x̂_0 − x̂_0').

    x̂_0' is the x̂_0 of the step before. The first step and the last, to the data, are of first order (DDIM's).
    """
    return ddim_tables(process)._replace(on_other=_on_the_step_before(process))


def dpm_solver_pp_2m_sde_tables(process: LinearGaussianProcess) -> StepTables:
    """SDE-DPM-Solver++(2M) (the same paper): the D of 2M with the noise of η = 1."""
    return ddim_tables(process, eta=1.0)._replace(on_other=_on_the_step_before(process))


def heun_tables(process: LinearGaussianProcess) -> StepTables:
    """Heun's rule in σ = b/a (Karras et al. 2022, arXiv:2206.00364, Algorithm 1): D = x̂_0 + (x̂_0' − x̂_0)/(2r).

    x̂_0' is the estimate at the x_{t−1} that Euler's step (DDIM's, `advance` with other None) reaches. The trapezoid
    of the slopes (x/a − x̂_0)/σ at both ends gives this D. Steps from σ = ∞ and to σ = 0 are Euler's.
    """
    growth = 0.5 * (_half_log_snr_gain(process)).exp()
    return ddim_tables(process)._replace(on_other=torch.where(growth.isinf(), 0.0, growth))


def _on_the_step_before(process: LinearGaussianProcess) -> Tensor:
    gain = _half_log_snr_gain(process)
    # after a step from no signal at all (an infinite gain) the weight is 0: that x̂_0' tells no slope
    weight = -0.5 * gain / torch.cat((gain[1:], gain.new_full((1,), torch.inf)))
    weight[0] = 0.0
    return weight.nan_to_num(nan=0.0)


def _half_log_snr_gain(process: LinearGaussianProcess) -> Tensor:
    """h = λ_{t−1} − λ_t."""
    return 0.5 * (shifted(process.log_snr, torch.inf) - process.log_snr)
