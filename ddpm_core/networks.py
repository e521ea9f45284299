"""The networks by their configurations, and a network as the ε_θ(x_t, t) that samplers and bounds ask for."""

import torch
from torch import Tensor, nn

from ddpm_core._checks import check_timesteps, require
from ddpm_core.conditioning import NetworkConfig
from ddpm_core.dit import DiT, DiTConfig
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.types import EpsTheta
from ddpm_core.unet import UNet, UNetConfig


def build_network(config: UNetConfig | DiTConfig) -> UNet | DiT:
    """The network that config describes, freshly drawn with torch's global generator.

    Its call is network(x_t, t, labels=None); see `UNet.forward`. Raises ValueError for another kind of config.
    """
    if isinstance(config, UNetConfig):
        return UNet(config)
    require(isinstance(config, DiTConfig), "config", "a UNetConfig or a DiTConfig", config)
    return DiT(config)


def as_eps_theta(
    network: nn.Module, process: LinearGaussianProcess, labels: Tensor | None = None
) -> EpsTheta:
    """(x_t, t) → the network's output, whichever noise level the network is conditioned on.

    With conditioning "timestep" the network is given t; with "log_snr" it is given process.log_snr[t], float32.
    t int64 `[B]` in 0..T−1 of process, the process that x_t is a state of: for a respaced chain, whose steps are
    numbered anew, its own. labels: int64 `[B]`, fixed for every call; None means no class.
    The output has 2·in_channels channels if the variance is learned.
    network may be wrapped, as by DistributedDataParallel. Raises ValueError if it has no network's config.
    """
    config = getattr(network, "config", None) or getattr(getattr(network, "module", None), "config", None)
    if not isinstance(config, NetworkConfig):
        raise ValueError(
            f"network: must have the config of a network of ours, got {type(network).__name__} with {config!r}"
        )
    # without labels the call is the two-argument one, which every ε_θ has
    rest = () if labels is None else (labels,)
    if config.conditioning == "timestep":
        return lambda x_t, t: network(x_t, t, *rest)
    tables: dict[torch.device, Tensor] = {}

    def conditioned(x_t: Tensor, t: Tensor) -> Tensor:
        check_timesteps(t, process.num_timesteps, like=x_t)
        if x_t.device not in tables:
            # moved once: a look-up across devices would wait for the accelerator in every call
            tables[x_t.device] = process.log_snr.to(device=x_t.device, dtype=torch.float32)
        return network(x_t, tables[x_t.device][t.to(x_t.device)], *rest)

    return conditioned
