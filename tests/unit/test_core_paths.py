"""Whole paths: their moments, and their log-densities against joint Gaussians taken whole."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpm_core import LinearGaussianProcess, ReverseProcess, Schedule, ScheduleConfig, q_sample
from ddpm_core.paths import log_p_path, log_q_backward, log_q_forward, q_sample_all, q_step, q_trajectory
from ddpm_core.processes import rectified_flow, sub_variance_preserving, variance_exploding
from tests.support.oracles import GaussianData, full

SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=12, beta_start=0.005, beta_end=0.7))
PROCESSES: dict[str, LinearGaussianProcess] = {
    "linear": Schedule.from_config(ScheduleConfig(num_timesteps=1000)),
    "linear 4000": Schedule.from_config(ScheduleConfig("linear_scaled", 4000)),
    "cosine": Schedule.from_config(ScheduleConfig("cosine", 100)),
    "log_snr": Schedule.from_config(ScheduleConfig("log_snr", 100, log_snr_max=20.0, log_snr_min=-20.0)),
    "inverse": Schedule.from_config(ScheduleConfig("inverse", 50)),
    "zero terminal": Schedule.from_config(ScheduleConfig(num_timesteps=50, zero_terminal_snr=True)),
    "one step": Schedule.from_betas(torch.tensor([0.4], dtype=torch.float64)),
    "exploding": variance_exploding(60),
    "sub-preserving": sub_variance_preserving(SHORT),
    "rectified flow": rectified_flow(50),
    "short": SHORT,
}
ALL = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(process: LinearGaussianProcess, *shape: int) -> tuple[Tensor, Tensor]:
    x_start = _normal(*shape)
    return x_start, _normal(process.num_timesteps, *shape, seed=1)


@ALL
def test_q_step_is_the_step_that_keeps_the_marginals(process: LinearGaussianProcess) -> None:
    """From a_{t−1}·x_0 with spread b_{t−1}, one step leads to a_t·x_0 with spread b_t."""
    num = process.num_timesteps
    t = torch.arange(num)
    one, zero = torch.ones(num, 1, dtype=torch.float64), torch.zeros(num, 1, dtype=torch.float64)
    kept, spread = q_step(process, one, t, zero).flatten(), q_step(process, zero, t, one).flatten()
    a = torch.cat((torch.ones(1, dtype=torch.float64), process.a))
    b = torch.cat((torch.zeros(1, dtype=torch.float64), process.b))
    torch.testing.assert_close(kept * a[:-1], a[1:], rtol=1e-12, atol=0)
    variance = kept.square() * b[:-1].square() + spread.square()
    torch.testing.assert_close(variance, b[1:].square(), rtol=1e-12, atol=0)


def test_q_step_of_a_schedule_is_equation_2() -> None:
    x, noise = _draw(SHORT, 5, 2)
    t = torch.tensor([0, 1, 5, 10, 11])
    beta = SHORT.betas[t].reshape(5, 1)
    expected = (1 - beta).sqrt() * x + beta.sqrt() * noise[0]
    torch.testing.assert_close(q_step(SHORT, x, t, noise[0]), expected, rtol=1e-14, atol=1e-14)


@ALL
def test_all_timesteps_at_once_are_each_timestep(process: LinearGaussianProcess) -> None:
    x_start, noise = _draw(process, 2, 3)
    got = q_sample_all(process, x_start, noise)
    assert got.shape == (process.num_timesteps, 2, 3)
    for t in {0, process.num_timesteps // 2, process.num_timesteps - 1}:
        assert torch.equal(got[t], q_sample(process, x_start, full(t, x_start), noise[t]))


@ALL
def test_a_trajectory_is_its_steps(process: LinearGaussianProcess) -> None:
    x_start, noises = _draw(process, 2, 3)
    path = q_trajectory(process, x_start, noises)
    assert path.shape == noises.shape
    x_t = x_start
    for t in range(process.num_timesteps):
        x_t = q_step(process, x_t, full(t, x_t), noises[t])
        assert torch.equal(path[t], x_t)


@ALL
def test_a_trajectory_has_the_marginals_and_the_covariances_of_q(process: LinearGaussianProcess) -> None:
    """A linear map of (x_0, ε_1, ..., ε_T): fed with unit vectors, its matrix gives the exact law."""
    num = min(process.num_timesteps, 100)
    process = process.at(torch.arange(num))
    x_start = torch.zeros(num + 1, 1, dtype=torch.float64)
    x_start[0] = 1.0
    noises = torch.zeros(num, num + 1, 1, dtype=torch.float64)
    noises[:, 1:, 0] = torch.eye(num, dtype=torch.float64)
    matrix = q_trajectory(process, x_start, noises).squeeze(-1)
    torch.testing.assert_close(matrix[:, 0], process.a, rtol=1e-12, atol=0)
    covariance = matrix[:, 1:] @ matrix[:, 1:].T
    # Cov(x_s, x_t | x_0) = (a_t/a_s)·b_s² for s ≤ t
    expected = torch.empty_like(covariance)
    for s, t in itertools.combinations_with_replacement(range(num), 2):
        ratio = 1.0 if s == t else process.a[t] / process.a[s]
        expected[s, t] = expected[t, s] = ratio * process.b[s] ** 2
    torch.testing.assert_close(covariance, expected, rtol=1e-11, atol=0)


@ALL
@pytest.mark.parametrize("kind", ["a path of q", "any path"])
def test_both_factorisations_agree(process: LinearGaussianProcess, kind: str) -> None:
    x_start, noises = _draw(process, 3, 2, 2)
    path = q_trajectory(process, x_start, noises) if kind == "a path of q" else 2.0 * noises
    forward, backward = log_q_forward(process, x_start, path), log_q_backward(process, x_start, path)
    assert forward.shape == (3,)
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)


def test_the_density_is_that_of_the_joint_gaussian() -> None:
    x_start, noises = _draw(SHORT, 4, 1)
    path = q_trajectory(SHORT, x_start, noises)
    a, b = SHORT.alphas.cumprod(0).sqrt(), 1 - SHORT.alphas.cumprod(0)
    order = torch.arange(12)
    low, high = torch.minimum(order[:, None], order), torch.maximum(order[:, None], order)
    joint = torch.distributions.MultivariateNormal(
        torch.zeros(12, dtype=torch.float64), covariance_matrix=a[high] / a[low] * b[low]
    )
    expected = joint.log_prob((path.squeeze(-1) - a[:, None] * x_start.T).T)
    torch.testing.assert_close(log_q_forward(SHORT, x_start, path), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_q_backward(SHORT, x_start, path), expected, rtol=1e-10, atol=1e-10)
    # dimensions are independent: their densities add up
    wide = log_q_forward(SHORT, x_start.reshape(1, 4), path.reshape(12, 1, 4))
    torch.testing.assert_close(wide, expected.sum()[None])


@pytest.mark.parametrize("prediction_type", ["eps", "x_start", "v"])
@pytest.mark.parametrize("name", ["linear", "cosine", "short", "one step"])
def test_the_true_reverse_path_has_the_law_of_q(name: str, prediction_type) -> None:
    """For Gaussian data p_θ with ε* and the analytic variance is q(x_{t−1}|x_t), so that on every path
    ln p_θ(path) − ln p(x_T) + ln q(x_T) = ln q(x_0) + Σ ln q(x_t|x_{t−1})."""
    process = PROCESSES[name]
    assert isinstance(process, Schedule)
    data = GaussianData(0.25)
    x_start, noises = _draw(process, 3, 1, 2, 2)
    path = q_trajectory(process, 0.5 * x_start, noises) if name != "short" else 0.7 * noises
    slope = process.a * data.variance / data.marginal_variance(process)

    def best(x_t: Tensor, t: Tensor) -> Tensor:
        a, b, on_x_t = (table[t].reshape(-1, 1, 1, 1) for table in (process.a, process.b, slope))
        pred_x_start = on_x_t * x_t
        eps = (x_t - a * pred_x_start) / b
        return {"eps": eps, "x_start": pred_x_start, "v": a * eps - b * pred_x_start}[prediction_type]

    reverse = ReverseProcess(process, prediction_type, "analytic", False, data.bayes_x_start_mse(process))
    got = log_p_path(best, reverse, x_start, path)

    def gaussian(x: Tensor, variance: float) -> Tensor:
        density = -0.5 * (x.square() / variance + math.log(2 * math.pi * variance))
        return density.flatten(1).sum(1)

    last = float(data.marginal_variance(process)[-1])
    expected = gaussian(x_start, data.variance) + log_q_forward(process, x_start, path)
    expected = expected + gaussian(path[-1], 1.0) - gaussian(path[-1], last)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-9)


def test_the_prior_of_a_path_has_the_variance_of_the_process() -> None:
    """T = 1: ln p_θ = ln N(x_1; 0, a² + b²) + ln N(x_0; x̂_0, σ²), written out."""
    process = LinearGaussianProcess(*torch.tensor([[0.7], [3.0]], dtype=torch.float64).log())
    x_start = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    path = torch.full((1, 1, 1, 1, 1), -1.1, dtype=torch.float64)
    mse = torch.tensor([0.04], dtype=torch.float64)
    reverse = ReverseProcess(process, "x_start", "analytic", True, mse)
    got = float(log_p_path(lambda x, t: 0.5 * x, reverse, x_start, path))
    total = 0.49 + 9.0
    expected = -0.5 * (1.1**2 / total + math.log(2 * math.pi * total))
    expected += -0.5 * ((0.3 + 0.55) ** 2 / 0.04 + math.log(2 * math.pi * 0.04))
    assert got == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts(dtype: torch.dtype) -> None:
    x_start, noises = _draw(SHORT, 2, 3, 4, 4)
    exact = q_trajectory(SHORT, x_start, noises)
    rough_start = x_start.to(dtype).to(memory_format=torch.channels_last)
    rough_noises = noises.to(dtype).transpose(3, 4).contiguous().transpose(3, 4)
    assert not rough_noises.is_contiguous()
    path = q_trajectory(SHORT, rough_start, rough_noises)
    eps = torch.finfo(dtype).eps
    for got, want in [
        (path, exact),
        (q_sample_all(SHORT, rough_start, rough_noises), q_sample_all(SHORT, x_start, noises)),
        (
            q_step(SHORT, rough_start, full(3, x_start), rough_noises[0]),
            q_step(SHORT, x_start, full(3, x_start), noises[0]),
        ),
    ]:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=8 * eps)
    exact_path = path.double()
    for density in (log_q_forward, log_q_backward):
        got = density(SHORT, rough_start, path)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), density(SHORT, rough_start.double(), exact_path), rtol=1e-4, atol=1e-3
        )
    reverse = ReverseProcess(SHORT)
    got = log_p_path(lambda x, t: x, reverse, rough_start, path)
    assert got.dtype == torch.float32
    exact_p = log_p_path(lambda x, t: x, reverse, rough_start.double(), exact_path)
    torch.testing.assert_close(got.double(), exact_p, rtol=1e-4, atol=1e-3)
    alone = q_trajectory(SHORT, rough_start[:1], rough_noises[:, :1])
    assert torch.equal(alone, path[:, :1])


def test_a_long_trajectory_does_not_gather_rounding() -> None:
    """In bf16 √(1 − β) rounds to 1 at the first steps, so a chain that is stepped in it never forgets x_0."""
    process = PROCESSES["linear"]
    x_start, noises = (tensor.to(torch.bfloat16) for tensor in _draw(process, 64, 2))
    path = q_trajectory(process, x_start, noises)
    assert path.dtype == torch.bfloat16
    exact = q_trajectory(process, x_start.double(), noises.double())
    torch.testing.assert_close(path.double(), exact, rtol=2**-8, atol=1e-4)


def test_gradients_pass_to_the_data() -> None:
    x_start, noises = _draw(SHORT, 1, 2)
    path = q_trajectory(SHORT, x_start, noises)
    x_start.requires_grad_()
    for density in (log_q_forward, log_q_backward):
        assert torch.autograd.gradcheck(lambda x, f=density: f(SHORT, x, path), (x_start,))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("t", lambda x, n: q_step(SHORT, x, torch.tensor([0, 12]), n[0])),
        ("t", lambda x, n: q_step(SHORT, x, torch.tensor([0]), n[0])),
        ("noise", lambda x, n: q_step(SHORT, x, torch.tensor([0, 1]), n)),
        ("x_prev", lambda x, n: q_step(SHORT, x.long(), torch.tensor([0, 1]), n[0])),
        ("x_start", lambda x, n: q_sample_all(SHORT, x.long(), n)),
        ("noise", lambda x, n: q_sample_all(SHORT, x, n[0])),
        ("noise", lambda x, n: q_sample_all(SHORT, x, n[:5])),
        ("x_start", lambda x, n: q_trajectory(SHORT, x.long(), n)),
        ("noises", lambda x, n: q_trajectory(SHORT, x, n[:, :1])),
        ("path", lambda x, n: log_q_forward(SHORT, x, n[:1])),
        ("path", lambda x, n: log_q_backward(SHORT, x, n.long())),
        ("x_start", lambda x, n: log_q_forward(SHORT, x.long(), n)),
        ("path", lambda x, n: log_p_path(lambda x, t: x, ReverseProcess(SHORT), x, n[0])),
        ("eps_theta's output", lambda x, n: log_p_path(lambda x, t: x[:1], ReverseProcess(SHORT), x, n)),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call(*_draw(SHORT, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_network_sees_a_path_in_its_own_dtype(dtype: torch.dtype) -> None:
    x_start, noises = (tensor.to(dtype) for tensor in _draw(SHORT, 2, 3))
    seen: list[torch.dtype] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.dtype)
        return x_t

    log_p_path(network, ReverseProcess(SHORT), x_start, noises)
    assert seen == [dtype] * SHORT.num_timesteps
