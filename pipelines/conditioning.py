"""What a network is asked with beside x_t, and what its answer holds."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ddpm_core.conditioning import NetworkConfig
from ddpm_core.guidance import guided
from ddpm_core.networks import as_eps_theta
from ddpm_core.process import LinearGaussianProcess
from ddpm_core.samplers import SamplerConfig
from ddpm_core.types import EpsTheta


def fitted(sampler: SamplerConfig, model: NetworkConfig) -> SamplerConfig:
    """The sampler for a network: of any kind it must know of the output's second half, if there is one."""
    return replace(sampler, variance_type="learned_range") if model.learned_variance else sampler


def network_labels(label: Tensor, num_classes: int) -> Tensor:
    """What a network of so many classes is told of images with these labels, int64 [B], −1 for none."""
    return label.masked_fill(label < 0, num_classes)


def conditioned(
    network: nn.Module, process: LinearGaussianProcess, labels: Tensor | None, guidance_scale: float = 1.0
) -> EpsTheta:
    """The network asked for these labels, guided away from what it says without; at 1.0 as it is."""
    if labels is None or guidance_scale == 1.0:
        return as_eps_theta(network, process, labels)

    def told(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return as_eps_theta(network, process, labels)(x_t, t)

    config = network.config
    assert isinstance(config, NetworkConfig)
    assert config.num_classes is not None
    return guided(told, labels, config.num_classes, guidance_scale)
