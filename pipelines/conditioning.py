"""What a network is asked with beside x_t, and what its answer holds."""

from __future__ import annotations

from dataclasses import replace

from ddpm_core.conditioning import NetworkConfig
from ddpm_core.samplers import SamplerConfig


def fitted(sampler: SamplerConfig, model: NetworkConfig) -> SamplerConfig:
    """The sampler for a network: of any kind it must know of the output's second half, if there is one."""
    return replace(sampler, variance_type="learned_range") if model.learned_variance else sampler
