"""The forward process, its posterior, and L_simple."""

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    LinearGaussianProcess,
    Schedule,
    ScheduleConfig,
    draw_timesteps,
    predict_eps,
    predict_x_start,
    q_posterior,
    q_sample,
    simple_loss,
)
from tests.support.oracles import GaussianData, full, symmetric_grid, symmetric_grid_at_every_t

LINEAR = Schedule.from_config(ScheduleConfig())
COSINE = Schedule.from_config(ScheduleConfig(kind="cosine"))
DATA = GaussianData(0.25)


def _images(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(batch, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x_start.to(dtype), noise.to(dtype)


def test_q_sample_is_equation_4() -> None:
    x_start, noise = _images(4)
    t = torch.tensor([0, 1, 500, 999])
    a = LINEAR.alphas.cumprod(0)[t].reshape(4, 1, 1, 1)
    torch.testing.assert_close(
        q_sample(LINEAR, x_start, t, noise), a.sqrt() * x_start + (1 - a).sqrt() * noise
    )


def test_q_sample_is_the_chain_of_single_steps() -> None:
    """x_t = √α_t·x_{t−1} + √β_t·ε, applied from x_0 on, has the mean and the variance of q(x_t|x_0)."""
    mean, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(1000):
        mean, variance = LINEAR.alphas[t].sqrt() * mean, LINEAR.alphas[t] * variance + LINEAR.betas[t]
        at = torch.tensor([t])
        assert float(q_sample(LINEAR, one, at, zero)) == pytest.approx(float(mean), rel=1e-11)
        assert float(q_sample(LINEAR, zero, at, one)) == pytest.approx(float(variance.sqrt()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_noise_reaches_low_precision_at_every_timestep(schedule: Schedule, dtype: torch.dtype) -> None:
    t = torch.arange(1000)
    got = q_sample(schedule, torch.zeros(1000, 1, dtype=dtype), t, torch.ones(1000, 1, dtype=dtype))
    assert got.dtype == dtype
    expected = schedule.sqrt_one_minus_alphas_cumprod
    torch.testing.assert_close(got.flatten().double(), expected, rtol=float(torch.finfo(dtype).eps), atol=0)


def test_q_sample_passes_gradients() -> None:
    x_start, noise = _images(2)
    x_start.requires_grad_()
    t = torch.tensor([3, 900])
    q_sample(LINEAR, x_start, t, noise).sum().backward()
    assert x_start.grad is not None
    expected = LINEAR.sqrt_alphas_cumprod[t].reshape(2, 1, 1, 1).expand_as(x_start)
    torch.testing.assert_close(x_start.grad, expected)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_is_bayes_rule(t: int) -> None:
    """q(x_{t−1}|x_t, x_0) ∝ q(x_t|x_{t−1})·q(x_{t−1}|x_0): precisions add, and means weigh by precision."""
    x_start, noise = _images(2)
    at = full(t, x_start)
    x_t = q_sample(LINEAR, x_start, at, noise)
    mean, variance, log_variance = q_posterior(LINEAR, x_start, x_t, at)
    alpha, before = LINEAR.alphas[t], LINEAR.alphas[:t].prod()
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    torch.testing.assert_close(variance.flatten(), (1 / precision).expand(2), rtol=1e-10, atol=0)
    torch.testing.assert_close(log_variance, variance.log())
    weighted = alpha.sqrt() * x_t / (1 - alpha) + before.sqrt() * x_start / (1 - before)
    torch.testing.assert_close(mean, weighted / precision, rtol=1e-9, atol=1e-12)


def test_posterior_at_zero_is_x_start() -> None:
    x_start, noise = _images(2)
    mean, variance, log_variance = q_posterior(LINEAR, x_start, noise, full(0, x_start))
    torch.testing.assert_close(mean, x_start, rtol=1e-12, atol=1e-12)
    assert variance.flatten().tolist() == [0.0, 0.0]
    assert log_variance.flatten().tolist() == pytest.approx([-9.8167251353] * 2)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_predictions_invert_q_sample(t: int) -> None:
    x_start, noise = _images(3)
    at = full(t, x_start)
    x_t = q_sample(LINEAR, x_start, at, noise)
    torch.testing.assert_close(predict_x_start(LINEAR, x_t, at, noise), x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict_eps(LINEAR, x_t, at, x_start), noise, rtol=1e-9, atol=1e-9)


def test_algorithm_2_and_equation_11_give_the_posterior_mean_at_pred_x_start() -> None:
    """(x_t − β/√(1−ᾱ)·ε_θ)/√α = μ̃_t(x_t, x̂_0(x_t, ε_θ)) for any ε_θ."""
    x_t, eps_pred = _images(4)
    t = torch.tensor([1, 20, 500, 999])
    mean, _, _ = q_posterior(LINEAR, predict_x_start(LINEAR, x_t, t, eps_pred), x_t, t)
    beta, alpha = (table[t].reshape(4, 1, 1, 1) for table in (LINEAR.betas, LINEAR.alphas))
    a = LINEAR.alphas.cumprod(0)[t].reshape(4, 1, 1, 1)
    expected = (x_t - beta / (1 - a).sqrt() * eps_pred) / alpha.sqrt()
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_simple_loss_of_the_best_network_is_the_bayes_error(schedule: Schedule) -> None:
    x_start, noise, t = symmetric_grid_at_every_t(DATA, schedule)
    got = simple_loss(DATA.eps_theta(schedule), schedule, x_start, t, noise).reshape(1000, 4).mean(1)
    torch.testing.assert_close(got, DATA.bayes_eps_mse(schedule), rtol=1e-10, atol=1e-14)


def test_bayes_error_golden() -> None:
    table = DATA.bayes_eps_mse(LINEAR)
    assert float(table[0]) == pytest.approx(0.99960012, abs=5e-9)
    assert float(table[500]) == pytest.approx(0.02065429, abs=5e-9)
    assert float(table.mean()) == pytest.approx(0.17305340, abs=1e-8)


def test_no_other_slope_beats_the_best_one() -> None:
    x_start, noise = symmetric_grid(DATA)
    at = full(300, x_start)
    eps_star = DATA.eps_theta(LINEAR)

    def loss(scale: float) -> float:
        return float(simple_loss(lambda x, t: scale * eps_star(x, t), LINEAR, x_start, at, noise).mean())

    assert loss(1.0) < min(loss(0.99), loss(1.01))


def test_simple_loss_is_one_number_a_sample_in_float32() -> None:
    x_start, noise = _images(5, torch.float32)
    t = torch.tensor([0, 1, 2, 3, 999])

    def autocast_network(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    got = simple_loss(autocast_network, LINEAR, x_start, t, noise)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, noise.square().flatten(1).mean(1))


def test_simple_loss_names_a_wrong_output() -> None:
    x_start, noise = _images(2)
    with pytest.raises(ValueError, match=r"^eps_theta's output: "):
        simple_loss(lambda x, t: x[:, :1], LINEAR, x_start, full(0, x_start), noise)


def test_draw_timesteps() -> None:
    index = torch.arange(200_000)
    t = draw_timesteps(LINEAR, 5, index)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=1000)
    assert counts.shape == (1000,)
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    assert abs(chi_square - 999) < 5 * (2 * 999) ** 0.5
    assert torch.equal(draw_timesteps(LINEAR, 5, index[77:80]), t[77:80])
    assert not torch.equal(draw_timesteps(LINEAR, 6, index), t)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_of_the_input_changes_nothing(dtype: torch.dtype, batch: int) -> None:
    x_start, noise = _images(batch, dtype)
    t = torch.tensor([0, 500, 999])[:batch]
    strided = torch.empty(batch, 3, 4, 8, dtype=dtype)[..., ::2].copy_(x_start)
    last = x_start.to(memory_format=torch.channels_last)
    plain = q_sample(LINEAR, x_start, t, noise)
    mean, variance, log_variance = q_posterior(LINEAR, x_start, plain, t)
    for other in (strided, last):
        got = q_sample(LINEAR, other, t, noise)
        assert got.dtype == dtype
        assert torch.equal(got, plain)
        for a, b in zip(q_posterior(LINEAR, other, plain, t), (mean, variance, log_variance), strict=True):
            assert torch.equal(a, b)
    assert q_sample(LINEAR, last, t, last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("t", lambda x: q_sample(LINEAR, x, torch.tensor([0, 1000]), x)),
        ("t", lambda x: q_sample(LINEAR, x, torch.tensor([0.0, 1.0]), x)),
        ("t", lambda x: q_sample(LINEAR, x, torch.tensor([0]), x)),
        ("noise", lambda x: q_sample(LINEAR, x, torch.tensor([0, 1]), x[:, :1])),
        ("x_start", lambda x: q_sample(LINEAR, x.to(torch.uint8), torch.tensor([0, 1]), x)),
        ("x_t", lambda x: q_posterior(LINEAR, x, x[:1], torch.tensor([0, 1]))),
        ("output", lambda x: predict_x_start(LINEAR, x, torch.tensor([0, 1]), x[:1])),
        ("output", lambda x: predict_eps(LINEAR, x, torch.tensor([0, 1]), x[:1])),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call(torch.zeros(2, 3, 4, 4))


def test_a_given_loss_above_1_by_rounding_is_1() -> None:
    """Otherwise a share of the signal-to-noise ratio below 0 would be left, and its root nan."""
    log_a, log_b = torch.tensor([-0.1, -9.0]).double(), torch.tensor([-1.0, -0.1]).double()
    loss = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    process = LinearGaussianProcess(log_a, log_b, snr_loss=loss)
    assert process.snr_loss.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"^snr_loss: must be in \(0, 1\], got 1\.1"):
        LinearGaussianProcess(log_a, log_b, snr_loss=torch.tensor([1.0, 1.1]))
