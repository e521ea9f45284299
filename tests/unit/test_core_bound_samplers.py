"""Which samplers have a bound, and whose it is."""

from typing import Any

import pytest

from ddpm_core import SamplerConfig, Schedule, ScheduleConfig, VarianceType, reverse_of_sampler
from tests.support.oracles import GaussianData

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))
FIXED: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "analytic")
DATA = GaussianData(0.25)


def test_the_reverse_process_of_a_sampler() -> None:
    for variance_type in FIXED:
        config = SamplerConfig(kind="ancestral", num_steps=None, variance_type=variance_type, clip=False)
        mse = DATA.bayes_x_start_mse(SHORT)
        got = reverse_of_sampler(SHORT, config, prediction_type="v", x_start_mse=mse)
        assert (got.variance_type, got.prediction_type, got.clip) == (variance_type, "v", False)
        assert got.process is SHORT
    got = reverse_of_sampler(SHORT, SamplerConfig(kind="ddim", eta=1.0))
    assert (got.variance_type, got.prediction_type, got.clip) == ("fixed_small", "eps", True)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_sampler_without_a_bound_is_refused_by_name(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"^eta: must be 1 .*sigma = 0 there is none.*, got {eta}"):
        reverse_of_sampler(SHORT, SamplerConfig(kind="ddim", eta=eta))


def test_another_deterministic_sampler_is_refused_by_name() -> None:
    config: Any = SamplerConfig()
    object.__setattr__(config, "kind", "heun")
    with pytest.raises(ValueError, match=r"^kind: must be 'ancestral'.*sigma = 0.*got 'heun'"):
        reverse_of_sampler(SHORT, config)


def test_the_bound_limits_x_start_as_the_sampler_does() -> None:
    config = SamplerConfig(kind="ancestral", threshold_quantile=0.9)
    assert reverse_of_sampler(SHORT, config).threshold_quantile == 0.9
