"""t by the second moment of its loss: exact probabilities, an unbiased mean, less variance, on any workers."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import ReverseProcess, Schedule, ScheduleConfig, bound_term, rng
from ddpm_core.timesteps import (
    HISTORY,
    UNIFORM_SHARE,
    LossMoments,
    draw_by_probability,
    draw_timesteps,
    second_moment_probabilities,
)
from tests.support.oracles import GaussianData, symmetric_grid_at_every_t

LINEAR = Schedule.from_config(ScheduleConfig())
SHORT = Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.005, beta_end=0.7))


def _full(num_timesteps: int) -> Tensor:
    return torch.full((num_timesteps,), HISTORY)


def _losses(num_timesteps: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(2, -3, num_timesteps, dtype=torch.float64)
    return scale[:, None] * torch.rand(num_timesteps, HISTORY, generator=generator, dtype=torch.float64)


def _bound_moments() -> tuple[Tensor, Tensor]:
    """E[L_t] and E[L_t²] of the bound's terms for Gaussian data, x_0 = ±s and ε = ±1."""
    data = GaussianData(0.25)
    x_start, noise, t = symmetric_grid_at_every_t(data, LINEAR)
    terms = bound_term(
        data.eps_theta(LINEAR), ReverseProcess(LINEAR, clip=False), x_start, t, noise, levels=17
    )
    terms = terms.reshape(-1, 4)
    return terms.mean(1), terms.square().mean(1)


def test_uniform_draws_keep_their_values() -> None:
    assert draw_timesteps(LINEAR, 5, torch.arange(6)).tolist() == [611, 91, 279, 473, 377, 384]


def test_probabilities_are_the_roots_of_the_second_moments() -> None:
    losses = _losses(50)
    got = second_moment_probabilities(losses, _full(50))
    root = losses.square().mean(1).sqrt()
    expected = (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / 50
    torch.testing.assert_close(got, expected, rtol=0, atol=1.01 * 2.0**-32)
    # of the spread of the losses, not of their means
    constant = losses.mean(1, keepdim=True).expand(-1, HISTORY)
    assert float((second_moment_probabilities(constant, _full(50)) - got).abs().max()) > 1e-3


def test_probabilities_do_not_depend_on_the_scale_of_the_loss() -> None:
    losses = _losses(20)
    expected = second_moment_probabilities(losses, _full(20))
    for scale in (1e-250, 1e-30, 1e30, 1e250):
        torch.testing.assert_close(
            second_moment_probabilities(losses * scale, _full(20)), expected, rtol=0, atol=1.01 * 2.0**-32
        )


@pytest.mark.parametrize("num_timesteps", [1, 3, 1000, 4000])
def test_probabilities_lie_on_the_grid_of_the_draws_and_sum_to_one(num_timesteps: int) -> None:
    got = second_moment_probabilities(_losses(num_timesteps), _full(num_timesteps))
    assert float(got.sum()) == float(got.flip(0).sum()) == 1.0
    assert torch.equal((got * 2.0**32).round(), got * 2.0**32)
    # one loss that is all: the others keep their share of the uniform part
    one = torch.zeros(num_timesteps, HISTORY)
    one[-1] = 1e6
    least = second_moment_probabilities(one, _full(num_timesteps))[:-1]
    assert bool((least > 0.999 * UNIFORM_SHARE / num_timesteps).all())


def test_probabilities_are_uniform_until_every_t_has_a_history() -> None:
    counts = _full(20)
    counts[7] = HISTORY - 1
    uniform = torch.full((20,), 1 / 20, dtype=torch.float64)
    for got in (
        second_moment_probabilities(_losses(20), counts),
        second_moment_probabilities(torch.zeros(20, HISTORY), _full(20)),
        LossMoments(20).probabilities,
    ):
        torch.testing.assert_close(got, uniform, rtol=0, atol=1.01 * 2.0**-32)


def test_a_draw_is_the_inverse_of_the_distribution() -> None:
    """t is the number of partial sums that u has reached, u = `rng.uniform`'s; counted here one by one."""
    probabilities = second_moment_probabilities(_losses(20), _full(20))
    index = torch.arange(500)
    t, weights = draw_by_probability(probabilities, 9, index)
    uniform = rng.uniform(9, "importance timestep", index, dtype=torch.float64).tolist()
    sums = [math.fsum(probabilities[: i + 1].tolist()) for i in range(20)]
    assert t.tolist() == [sum(u >= s for s in sums) for u in uniform]
    assert t.dtype == torch.int64
    torch.testing.assert_close(weights, 1 / (20 * probabilities[t]), rtol=1e-15, atol=0)
    assert torch.equal(draw_by_probability(probabilities, 9, index[70:75])[0], t[70:75])
    assert not torch.equal(draw_by_probability(probabilities, 8, index)[0], t)


def test_an_edge_belongs_to_the_t_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """u in [0, ¼) is t = 0, [¼, ¼) is none, [¼, 1) is t = 2."""
    values = torch.tensor([0.0, 0.25 - 2.0**-32, 0.25, 1 - 2.0**-32], dtype=torch.float64)
    monkeypatch.setattr(rng, "uniform", lambda *args, **kwargs: values)
    t, weights = draw_by_probability(torch.tensor([0.25, 0.0, 0.75]).double(), 0, torch.arange(4))
    assert t.tolist() == [0, 0, 2, 2]
    assert weights.tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 9, 4 / 9])


def test_the_mean_is_unbiased() -> None:
    """Σ p_t·w_t·L_t = (1/T)·Σ L_t, with the p_t of the draws themselves: their frequencies are these."""
    losses = _losses(20)
    probabilities = second_moment_probabilities(losses, _full(20))
    index = torch.arange(100_000)
    t, weights = draw_by_probability(probabilities, 0, index)
    weight_of = torch.zeros(20, dtype=torch.float64)
    weight_of[t] = weights
    seen = torch.bincount(t, minlength=20)
    assert int(seen.min()) > 0
    mean = losses.mean(1)
    assert float((probabilities * weight_of * mean).sum()) == pytest.approx(float(mean.mean()), rel=1e-14)
    expected = probabilities * 100_000
    chi_square = float(((seen - expected).square() / expected).sum())
    assert abs(chi_square - 19) < 5 * (2 * 19) ** 0.5


def test_the_variance_is_the_least_there_is_and_far_below_uniforms() -> None:
    """Of L_t·w_t: E = (1/T²)Σ E[L_t²]/p_t − mean², least at p_t ∝ √E[L_t²]: ((1/T)Σ√E[L_t²])² − mean²."""
    mean, second = _bound_moments()
    mean_square = float(mean.mean()) ** 2
    table = second.sqrt()[:, None].expand(-1, HISTORY)  # ten losses with that second moment

    def variance(p: Tensor) -> float:
        return float((second / p).sum()) / 1000**2 - mean_square

    uniform = variance(torch.full((1000,), 1e-3, dtype=torch.float64))
    assert uniform == pytest.approx(float(second.mean()) - mean_square, rel=1e-12)
    least = float(second.sqrt().mean()) ** 2 - mean_square
    got = variance(second_moment_probabilities(table, _full(1000)))
    assert least < got < least + 2 * UNIFORM_SHARE * (least + mean_square)
    assert got < 0.05 * uniform
    # what is drawn has that variance
    t, weights = draw_by_probability(second_moment_probabilities(table, _full(1000)), 1, torch.arange(50_000))
    drawn = weights.square() * second[t] - mean_square
    assert float(drawn.mean()) == pytest.approx(got, abs=5 * float(drawn.std()) / math.sqrt(50_000))
    assert float((weights * mean[t]).mean()) == pytest.approx(
        float(mean.mean()), abs=5 * math.sqrt(got / 50_000)
    )


def _one_by_one(history: list[tuple[int, float]], num_timesteps: int) -> list[list[float]]:
    kept: list[list[float]] = [[] for _ in range(num_timesteps)]
    for t, loss in history:
        kept[t] = [*kept[t], loss][-HISTORY:]
    return kept


def test_the_last_ten_losses_of_each_t_are_kept() -> None:
    """Batches with none, some and more than ten of one t, against a list a timestep."""
    moments = LossMoments(4)
    history: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(4)
    for size in (0, 1, 7, 60, 3, 200, 33):
        t = torch.randint(4, (size,), generator=generator)
        loss = torch.rand(size, generator=generator)
        moments.update(t, loss)
        history += zip(t.tolist(), loss.tolist(), strict=True)
        expected = _one_by_one(history, 4)
        for row, (losses, count) in enumerate(
            zip(moments.tensors["losses"].tolist(), moments.tensors["counts"].tolist(), strict=True)
        ):
            assert count == sum(t == row for t, _ in history)
            assert sorted(losses[: min(count, HISTORY)]) == sorted(expected[row])
            if count:
                assert losses[(count - 1) % HISTORY] == expected[row][-1]
    assert len(history) > 4 * HISTORY


def test_the_table_does_not_depend_on_the_division_among_workers() -> None:
    """Each worker puts its pairs at their places in the batch, and a sum over workers gives all of it to each."""
    batch = torch.arange(64)
    whole, shared = LossMoments(5), LossMoments(5)
    for step in range(4):
        index = step * 64 + batch
        t, _ = whole.draw(0, index)
        loss = rng.uniform(1, "loss", index)
        whole.update(t, loss)

        places = torch.zeros(2, 64, dtype=torch.float64)
        for worker in (batch[40:], batch[:7], batch[7:40]):
            own, _ = shared.draw(0, index[worker])
            part = torch.zeros(2, 64, dtype=torch.float64)
            part[0, worker], part[1, worker] = own.double(), loss[worker].double()
            places += part
        shared.update(places[0].long(), places[1].float())
    for name, table in whole.tensors.items():
        assert torch.equal(table, shared.tensors[name])
    assert int(whole.tensors["counts"].min()) > HISTORY
    assert not torch.equal(whole.probabilities, LossMoments(5).probabilities)


def test_a_saved_table_draws_as_the_one_it_came_from() -> None:
    moments = LossMoments(6)
    moments.update(torch.arange(120) % 6, rng.uniform(0, "loss", torch.arange(120)))
    saved = {name: table.clone() for name, table in moments.tensors.items()}
    other = LossMoments(6)
    other.load(saved)
    index = torch.arange(50)
    assert torch.equal(other.draw(3, index)[0], moments.draw(3, index)[0])
    assert not torch.equal(LossMoments(6).draw(3, index)[0], moments.draw(3, index)[0])
    # a copy: what is saved stays as it was
    other.update(torch.zeros(5, dtype=torch.int64), torch.ones(5))
    assert torch.equal(saved["losses"], moments.tensors["losses"])
    assert torch.equal(saved["counts"], moments.tensors["counts"])


def test_an_update_keeps_no_graph_and_takes_any_layout_and_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        moments = LossMoments(3)
        loss = torch.linspace(0, 1, 8, dtype=dtype)[::2].requires_grad_()
        moments.update(torch.tensor([0, 9, 1, 9, 0, 9, 2, 9])[::2], loss)
        assert not moments.tensors["losses"].requires_grad
        assert moments.tensors["losses"][0, :2].tolist() == loss.detach()[[0, 2]].double().tolist()
        assert moments.tensors["counts"].tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_timesteps", lambda: LossMoments(0)),
        ("t", lambda: LossMoments(3).update(torch.tensor([3]), torch.ones(1))),
        ("t", lambda: LossMoments(3).update(torch.tensor([-1]), torch.ones(1))),
        ("t", lambda: LossMoments(3).update(torch.tensor([1.0]), torch.ones(1))),
        ("t", lambda: LossMoments(3).update(torch.tensor([1]), torch.ones(2))),
        ("loss", lambda: LossMoments(3).update(torch.tensor([1]), torch.ones(1, 1))),
        ("loss", lambda: LossMoments(3).update(torch.tensor([1]), torch.ones(1).long())),
        ("loss", lambda: LossMoments(3).update(torch.tensor([1]), torch.tensor([math.nan]))),
        ("tensors", lambda: LossMoments(3).load({"losses": torch.zeros(3, HISTORY)})),
        ("losses", lambda: LossMoments(3).load(LossMoments(4).tensors)),
        (
            "losses",
            lambda: LossMoments(3).load({**LossMoments(3).tensors, "losses": torch.zeros(3, HISTORY)}),
        ),
        ("losses", lambda: second_moment_probabilities(torch.zeros(3), _full(3))),
        ("losses", lambda: second_moment_probabilities(torch.zeros(3, 2).long(), _full(3))),
        ("losses", lambda: second_moment_probabilities(torch.full((3, 2), math.nan), _full(3))),
        ("counts", lambda: second_moment_probabilities(torch.zeros(3, 2), _full(2))),
        ("counts", lambda: second_moment_probabilities(torch.zeros(3, 2), torch.ones(3))),
        ("uniform_share", lambda: second_moment_probabilities(torch.zeros(3, 2), _full(3), 0.0)),
        ("uniform_share", lambda: second_moment_probabilities(torch.zeros(3, 2), _full(3), 1.1)),
        ("probabilities", lambda: draw_by_probability(torch.ones(2), 0, torch.arange(2))),
        ("probabilities", lambda: draw_by_probability(torch.ones(2).double(), 0, torch.arange(2))),
        (
            "probabilities",
            lambda: draw_by_probability(torch.tensor([2.0, -1.0]).double(), 0, torch.arange(2)),
        ),
        ("index", lambda: LossMoments(3).draw(0, torch.ones(2))),
        ("seed", lambda: LossMoments(3).draw(True, torch.arange(2))),
    ],
)
def test_errors_name_the_argument(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: must "):
        call()
