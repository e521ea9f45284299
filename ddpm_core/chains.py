"""Noise levels that no schedule of integer timesteps holds, for samplers in continuous time.

A chain at any levels is `ddpm_core.processes.process_from_log_snr`. A sampler visits its points, and asks its
network for their positions 0..S−1. `retimed` puts in their place what the network is made for: the log-SNR, or the
nearest timestep of the schedule it was trained with.
"""

import math

import torch
from torch import Tensor

from ddpm_core._checks import check_floating, check_tensor, require, require_int, require_number
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.respacing import check_num_steps
from ddpm_core.types import EpsTheta


def karras_log_snr(largest: float, smallest: float, num_points: int, rho: float = 7.0) -> Tensor:
    """Log-SNRs float64 `[num_points]` from largest down to smallest, evenly spaced in σ^{1/ρ}, σ = exp(−log-SNR/2).

    Karras et al. 2022, arXiv:2206.00364, Eq. 5, without its σ = 0. One point is smallest alone.
    Raises ValueError naming the argument that is wrong.
    """
    for name, value in (("largest", largest), ("smallest", smallest), ("rho", rho)):
        require_number(name, value)
    require(math.isfinite(smallest), "smallest", "finite", smallest)
    require(smallest < largest < math.inf, "largest", f"finite and above smallest ({smallest})", largest)
    require_int("num_points", num_points, 1)
    require(0 < rho < math.inf, "rho", "positive and finite", rho)
    # in units of the largest σ^{1/ρ}, so that nothing overflows; the way down from it, so that one point is it
    ratio = math.exp((smallest - largest) / (2.0 * rho))
    roots = torch.linspace(1.0, ratio, num_points, dtype=torch.float64)
    return (smallest - 2.0 * rho * roots.log()).flip(0)


def nearest_timesteps(process: LinearGaussianProcess, log_snr: Tensor) -> Tensor:
    """For each log-SNR `[S]` the timestep of process whose log-SNR is nearest, int64 `[S]`, on the CPU.

    ±∞ is a log-SNR too. Raises ValueError naming log_snr if it is not floating-point, or holds a NaN.
    """
    check_floating("log_snr", log_snr)
    if log_snr.dim() != 1:
        raise ValueError(f"log_snr: must have the shape [S], got {list(log_snr.shape)}")
    require(not bool(log_snr.isnan().any()), "log_snr", "numbers or ±inf", math.nan)
    noise = -process.log_snr.cpu()  # rising
    wanted = -log_snr.to("cpu", torch.float64).contiguous()
    above = torch.searchsorted(noise, wanted).clamp(max=len(noise) - 1)
    below = (above - 1).clamp(min=0)
    # (an infinite level is nearest to itself alone: inf − inf is nan, and no comparison holds)
    return torch.where(wanted - noise[below] <= noise[above] - wanted, below, above)


def karras_timesteps(process: LinearGaussianProcess, num_steps: int, rho: float = 7.0) -> Tensor:
    """num_steps different timesteps of process nearest in log-SNR to those of `karras_log_snr`, int64, increasing.

    They span 0 to T−1; one step is T−1 alone. Where two points are nearest to one timestep, they move to the next
    free ones. Of a process that ends without signal T−1 (σ = ∞) is visited, and the others are spaced without it.
    Raises ValueError naming the argument that is wrong.
    """
    num_timesteps = process.num_timesteps
    check_num_steps(num_steps, num_timesteps)
    silent = int(process.ends_without_signal)
    count, last = num_steps - silent, num_timesteps - 1 - silent
    position = torch.arange(count)
    if last > 0 and count > 0:
        log_snr = process.log_snr.cpu()
        points = karras_log_snr(float(log_snr[0]), float(log_snr[last]), count, rho)
        nearest = nearest_timesteps(process, points)
        # strictly increasing, and low enough that those after it find room
        spread = (nearest - position).cummax(0).values + position
        position = torch.minimum(spread, last - (count - 1) + position)
    return torch.cat((position, torch.full((silent,), num_timesteps - 1)))


def retimed(eps_theta: EpsTheta, times: Tensor) -> EpsTheta:
    """The network that is asked for times[t] where the sampler asks for t.

    times `[S]`: the chain's log_snr for a network of the log-SNR, `nearest_timesteps` for one of integer t.
    Raises ValueError naming times if it has another shape.
    """
    check_tensor("times", times)
    if times.dim() != 1:
        raise ValueError(f"times: must have the shape [S], got {list(times.shape)}")

    def asked(x_t: Tensor, t: Tensor) -> Tensor:
        return eps_theta(x_t, times[t.to(times.device)].to(x_t.device))

    return asked
