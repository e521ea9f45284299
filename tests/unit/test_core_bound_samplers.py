"""Which samplers have a bound, and whose it is."""

import pytest
import torch

from ddpm_core import (
    ReverseProcess,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    VarianceType,
    reverse_of_sampler,
)
from ddpm_core.samplers import step_tables
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


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (
            SamplerConfig(kind="ddim", eta=0.0),
            "eta",
            r"\(steps without noise give almost no image a probability\), got 0\.0$",
        ),
        (
            SamplerConfig(kind="ddim", eta=0.5),
            "eta",
            r"\(between 0 and 1 the mean of a step is not the posterior's.*got 0\.5$",
        ),
        (SamplerConfig(kind="dpm_solver_pp_2m"), "kind", r"steps without noise"),
        (SamplerConfig(kind="heun"), "kind", r"steps without noise"),
        (SamplerConfig(kind="dpm_solver_pp_2m_sde"), "kind", r"depends on an earlier prediction"),
    ],
    ids=lambda value: value.kind if isinstance(value, SamplerConfig) else None,
)
def test_a_sampler_without_a_bound_is_refused_by_name(config: SamplerConfig, name: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must be .*{why}"):
        reverse_of_sampler(SHORT, config)


def test_the_sampler_that_is_refused_for_its_memory_has_noise_and_a_memory() -> None:
    """What the refusals say is so: σ = 0 of the two, σ > 0 and an earlier prediction of the third."""
    reverse = ReverseProcess(SHORT)
    for kind in ("dpm_solver_pp_2m", "heun"):
        assert not bool(step_tables(reverse, SamplerConfig(kind=kind)).sigma.any())
    tables = step_tables(reverse, SamplerConfig(kind="dpm_solver_pp_2m_sde"))
    assert bool((tables.sigma[1:] > 0).all())
    assert bool((tables.on_other[1:-1] != 0).all())


def test_the_mean_of_ddim_between_its_ends_is_not_the_posterior_s() -> None:
    posterior = SHORT.posterior_mean_coef1, SHORT.posterior_mean_coef2
    for eta, same in ((0.5, False), (1.0, True)):
        tables = step_tables(ReverseProcess(SHORT), SamplerConfig(kind="ddim", eta=eta))
        for got, expected in zip((tables.on_x_start, tables.on_x_t), posterior, strict=True):
            assert torch.allclose(got, expected, rtol=1e-9) == same


def test_the_bound_limits_x_start_as_the_sampler_does() -> None:
    config = SamplerConfig(kind="ancestral", threshold_quantile=0.9)
    assert reverse_of_sampler(SHORT, config).threshold_quantile == 0.9
