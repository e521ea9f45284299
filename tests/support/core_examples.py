"""One small call of every public callable of ddpm_core that takes tensors, in float64.

The sweeps cast, lay out, cut and spoil the tensors of these calls. A call takes its tensors by their own names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ddpm_core as core
from ddpm_core import LinearGaussianProcess, ReverseProcess, SamplerConfig, rng
from ddpm_core.hierarchy import log_joint, log_posterior
from ddpm_core.reverse import dynamic_threshold
from ddpm_core.samplers import step_tables
from ddpm_core.steps import advance
from tests.support.core_example import (
    BATCH,
    INNER_STEP,
    LEVELS,
    NETWORK_SAYS,
    SHAPE,
    Example,
    Given,
    awake,
    in_dtype_of,
    labelled_network,
    network,
    wide_network,
)


def examples(process: LinearGaussianProcess) -> dict[str, Example]:
    """The examples on a process that ends with some signal; two_sided_term's needs two steps or more."""
    given = Given(process)
    return {
        **_of_q(process, given),
        **_of_predictions(process, given),
        **_of_losses(process, given),
        **_of_samplers(process, given),
        **_of_paths(process, given),
        **_of_networks(process, given),
        **_of_tables(process, given),
        **_keyed(process, given),
    }


def _data(call: Callable[..., Any], num_t: int, tensors: dict[str, Tensor], **fields: Any) -> Example:
    batch = fields.pop("batch", {})
    return Example(call, tensors, dict.fromkeys(tensors, 0) | batch, num_t=num_t, **fields)


def _one_state(given: Given, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One x_t and its t for every label."""
    count = max(labels.numel(), 1) if isinstance(labels, Tensor) else 1
    return given.x_t[1:2].expand(count, *SHAPE), given.t[1:2].expand(count)


def _of_q(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    x, t, noise = given.x, given.t, given.noise
    total = process.num_timesteps
    return {
        "q_sample": _data(partial(core.q_sample, process), total, {"x_start": x, "t": t, "noise": noise}),
        "q_posterior": _data(
            partial(core.q_posterior, process), total, {"x_start": x, "t": t, "x_t": given.x_t},
            out_batch=(0, 0, 0),
        ),
        "q_step": _data(partial(core.q_step, process), total, {"x_prev": x, "t": t, "noise": noise}),
        "q_sample_all": _data(
            partial(core.q_sample_all, process), total, {"x_start": x, "noise": given.noises},
            batch={"noise": 1}, out_batch=(1,),
        ),
        "q_trajectory": _data(
            partial(core.q_trajectory, process), total, {"x_start": x, "noises": given.noises},
            batch={"noises": 1}, out_batch=(1,),
        ),
        "prior_term": _data(partial(core.prior_term, process), total, {"x_start": x}, results="wide"),
        "two_sided_prior_term": _data(
            partial(core.two_sided_prior_term, process), total, {"x_start": x}, results="wide"
        ),
        "LinearGaussianProcess.prior_bits_per_dim": _data(
            process.prior_bits_per_dim, total, {"x_start": x}, results="wide"
        ),
        "LinearGaussianProcess.gather": Example(
            process.gather, {"like": x, "table": process.a, "t": t}, {"like": 0, "t": 0}, num_t=total,
            nan={"like": "its dtype and shape alone are read", "table": "looked up as it is"},
            whole={"like": "its dtype is the result's", "table": "looked up as it is"},
        ),
    }  # fmt: skip


def _of_predictions(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    total = process.num_timesteps
    seen = {"x_t": given.x_t, "t": given.t, "output": given.noise}
    to_eps: Any = {"source": "v", "target": "eps"}
    reverse = ReverseProcess(process, "v", "fixed_large", threshold_quantile=0.9)
    learned = ReverseProcess(process, "v", "learned_range", clip=False)
    two = {**seen, "output": torch.cat((given.noise, given.other.tanh()), dim=1)}
    made: Any = {"nan": {"x_t": NETWORK_SAYS, "output": NETWORK_SAYS}}
    return {
        "prediction_target": _data(
            partial(core.prediction_target, process, "v"), total,
            {"x_start": given.x, "t": given.t, "noise": given.noise},
        ),
        "convert_prediction": _data(partial(core.convert_prediction, process, **to_eps), total, seen),
        "predict_x_start": _data(partial(core.predict_x_start, process), total, seen, loose=10),
        "predict_eps": _data(partial(core.predict_eps, process), total, seen),
        "predict_v": _data(partial(core.predict_v, process), total, seen),
        "reverse.dynamic_threshold": Example(
            partial(dynamic_threshold, quantile=0.9), {"x_start": 2.0 * given.x}, {"x_start": 0},
            nan={"x_start": NETWORK_SAYS},
        ),
        "ReverseProcess.limit": Example(
            reverse.limit, {"x_start": 2.0 * given.x}, {"x_start": 0}, nan={"x_start": NETWORK_SAYS}
        ),
        "ReverseProcess.split": Example(
            learned.split, {"x_t": given.x_t, "output": two["output"]}, {"x_t": 0, "output": 0}, (0, 0), **made
        ),
        "ReverseProcess.predict": _data(reverse.predict, total, seen, out_batch=(0, 0), **made, loose=4),
        "ReverseProcess.transition": _data(
            learned.transition, total, two, out_batch=(0, 0), results=("like", "wide"), **made, loose=4
        ),
        "ReverseProcess.log_variance": _data(learned.log_variance, total, two, results="wide", **made),
        "ReverseProcess.x_start_error": _data(
            reverse.x_start_error, total,
            {"x_start": given.x, "t": given.t, "noise": given.noise, "output": given.other},
            results="wide", nan=dict.fromkeys(("x_start", "noise", "output"), NETWORK_SAYS),
        ),
        "discretized_gaussian_log_likelihood": Example(
            partial(core.discretized_gaussian_log_likelihood, levels=LEVELS),
            {"x": given.x, "mean": 0.5 * given.noise, "log_scale": given.other[:, :1, :1, :1]},
            {"x": 0, "mean": 0, "log_scale": 0}, shapes=dict.fromkeys(("mean", "log_scale"), "broadcasts to x"),
        ),
    }  # fmt: skip


def _of_losses(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    total = process.num_timesteps
    tensors = {"x_start": given.x, "t": given.t, "noise": given.noise}
    hybrid = core.ObjectiveConfig(prediction_type="v", loss="hybrid", variance_type="learned_range")
    reverse = ReverseProcess(process, "v", clip=False)

    def added(x_start: Tensor, index: Tensor) -> Tensor:
        accumulator = core.BoundAccumulator(reverse, levels=LEVELS, num_strata=2, seed=0)
        accumulator.add(network, x_start, index)
        return accumulator.state()

    def loaded(state: Tensor) -> Tensor:
        accumulator = core.BoundAccumulator(reverse, levels=LEVELS, num_strata=2, seed=0)
        accumulator.load_state(state)
        return accumulator.state()

    def updated(t: Tensor, loss: Tensor) -> list[Tensor]:
        moments = core.LossMoments(total)
        moments.update(t, loss)
        return list(moments.tensors.values())

    two_sided = {**tensors, "noise": given.three, "t": given.t.clamp(max=max(total - 2, 0))}
    return {
        "simple_loss": _data(
            partial(core.simple_loss, network, process, prediction_type="v"), total, tensors, results="wide"
        ),
        "training_loss": _data(
            partial(core.training_loss, wide_network, process, hybrid, levels=LEVELS), total, tensors,
            results="wide", loose=4,
        ),
        "bound_term": _data(
            partial(core.bound_term, network, reverse, levels=LEVELS), total, tensors, results="wide", loose=8
        ),
        "two_sided_term": _data(
            partial(core.two_sided_term, network, reverse), total - 1, two_sided, batch={"noise": 1},
            results="wide", loose=8,
        ),
        "BoundAccumulator.add": Example(
            added, {"x_start": given.x, "index": given.index}, {"x_start": 0, "index": 0}, (None,), "float64",
            loose=16,
        ),
        "BoundAccumulator.load_state": Example(
            loaded, {"state": torch.arange(9.0 + 4 * total, dtype=torch.float64)}, {}, (None,), "float64",
            nan={"state": "a sum over what a network said"},
        ),
        "LossMoments.update": Example(
            updated, {"loss": given.mse.new_tensor([0.1, 0.2, 0.3]), "t": given.t}, {"loss": 0, "t": 0},
            (None, None), ("float64", "integer"), num_t=total,
        ),
    }  # fmt: skip


def _of_samplers(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    total = process.num_timesteps
    reverse = ReverseProcess(process, "v")
    solver = SamplerConfig(kind="dpm_solver_pp_2m_sde")
    best = SamplerConfig(kind="ancestral", num_steps=min(4, total), variance_type="analytic")
    keyed: Any = {"seed": 3, "shape": SHAPE, "prediction_type": "v", "dtype": torch.float64}
    keys = {"index": given.index, "x_start_mse": given.mse}

    def visited(**tensors: Any) -> list[list[Tensor]]:
        return [
            [step.x_t, step.pred_x_start]
            for step in core.trajectory(network, process, best, **keyed, **tensors)
        ]

    def of_sampler(x_start_mse: Tensor) -> Tensor:
        found = core.reverse_of_sampler(process, best, prediction_type="v", x_start_mse=x_start_mse)
        return found.log_variance_table()

    def of_fields(x_start_mse: Tensor) -> Tensor:
        return ReverseProcess(process, "v", "analytic", x_start_mse=x_start_mse).log_variance_table()

    step = step_tables(reverse, solver).steps()[total // 2]
    states = {"x_t": given.x_t, "pred_x_start": given.x, "other": given.other, "noise": given.noise}

    def retimed(**tensors: Tensor) -> Tensor:
        return core.retimed(network, tensors["times"])(given.x_t, given.t)

    def guided(labels: Tensor) -> Tensor:
        return core.guided(labelled_network, labels, 4, 2.5)(*_one_state(given, labels))

    return {
        "denoise_step": _data(
            partial(core.denoise_step, reverse, solver), total,
            {"x_t": given.x_t, "t": given.t, "output": given.noise, "noise": given.other, "other": given.x},
            out_batch=(0, 0), loose=4,
        ),
        "sample": Example(
            partial(core.sample, network, process, best, **keyed), keys, {"index": 0}, results="float64"
        ),
        "trajectory": Example(
            visited, keys, {"index": 0}, (0,) * (2 * min(4, total)), "float64"
        ),
        "reverse_of_sampler": Example(of_sampler, {"x_start_mse": given.mse}, {}, (None,), "float64"),
        "ReverseProcess": Example(of_fields, {"x_start_mse": given.mse}, {}, (None,), "float64"),
        "retimed": Example(
            retimed, {"times": process.log_snr}, {}, (None,), "float64",
            nan={"times": "told to the network as they are"}, whole={"times": "timesteps, or the log-SNR"},
            shapes={"times": "S is the sampler's"},
        ),
        "guided": Example(guided, {"labels": given.labels}, {"labels": 0}, results="float64"),
        "steps.advance": Example(
            partial(advance, step), states, dict.fromkeys(states, 0), nan=dict.fromkeys(states, NETWORK_SAYS)
        ),
    }  # fmt: skip


def _of_paths(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    total = process.num_timesteps
    reverse = ReverseProcess(process, "v", "fixed_large", clip=False)
    chain = core.DiffusionChain(network, reverse, levels=LEVELS)
    generator = torch.Generator().manual_seed(4)
    hierarchy = awake(core.GaussianHierarchy((6, 4, 2)))
    assert isinstance(hierarchy, core.GaussianHierarchy)
    path = {"x_start": given.x, "path": given.path}
    along: Any = {"batch": {"x_start": 0, "path": 1}, "results": "wide"}
    whole = torch.cat((given.x[None], given.path))
    rows = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    inner: Any = {"batch": {"z": 0}, "out_batch": (0, 0), "nan": {"z": INNER_STEP}}

    def terms(path: Tensor) -> core.PathTerms:
        return core.path_terms(chain, list(path))

    def parts(method: Callable[[int, Tensor], Any], t: int) -> Callable[..., list[Tensor]]:
        def of(z: Tensor) -> list[Tensor]:
            found = method(t, z)
            return [found.mean.detach(), found.log_variance.detach()]

        return of

    # many steps add up many roundings of the path itself
    return {
        **{
            name: Example(partial(function, process), path, **along, loose=2.0 * total)
            for name, function in (
                ("log_q_forward", core.log_q_forward),
                ("log_q_backward", core.log_q_backward),
            )
        },
        "log_p_path": Example(partial(core.log_p_path, network, reverse), path, **along, loose=2.0 * total),
        "path_terms": Example(
            terms, {"path": whole}, {"path": 1}, (0, 0, 0), "wide", loose=2.0 * total,
            shapes={"path": "a list of states, whose shapes the chain decides"},
        ),
        **{
            name: Example(
                lambda path, function=function: function(chain, list(path)), {"path": whole}, {"path": 1},
                results="wide", loose=2.0 * total,
                shapes={"path": "a list of states, whose shapes the chain decides"},
            )
            for name, function in (
                ("hierarchy.log_joint", log_joint),
                ("hierarchy.log_posterior", log_posterior),
            )
        },
        "path_bound": Example(
            partial(core.path_bound, chain, seed=1), {"x": given.x, "index": given.index}, {"x": 0, "index": 0},
            (0, 0, 0), "wide", loose=8,
        ),
        "DiffusionChain.encode": Example(parts(chain.encode, 0), {"z": given.x}, **inner),
        "DiffusionChain.decode": Example(
            parts(chain.decode, total - 1), {"z": given.x}, results=("like", "wide"), **inner, loose=4
        ),
        "GaussianHierarchy.encode": Example(parts(hierarchy.encode, 0), {"z": rows}, **inner),
        "GaussianHierarchy.decode": Example(parts(hierarchy.decode, 1), {"z": rows[:, :2]}, **inner),
    }  # fmt: skip


def _of_networks(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    unet = awake(core.UNet(core.UNetConfig(4, 2, 8, (1, 2), 1, (2,), 0.0, 4, num_classes=4)))
    dit = awake(core.DiT(core.DiTConfig(4, 2, 2, 16, 1, 2, num_classes=4)))
    levelled = awake(core.DiT(core.DiTConfig(4, 2, 2, 16, 1, 2, num_classes=4, conditioning="log_snr")))
    tensors = {"x_t": given.x_t, "t": given.t, "labels": given.labels}
    batch = dict.fromkeys(tensors, 0)
    made = {"x_t": NETWORK_SAYS}

    def labelled(labels: Tensor) -> Tensor:
        with torch.no_grad():
            return core.as_eps_theta(levelled, process, labels)(*_one_state(given, labels))

    return {
        "UNet.forward": Example(partial(in_dtype_of, unet), tensors, batch, nan=made, loose=8),
        "DiT.forward": Example(partial(in_dtype_of, dit), tensors, batch, nan=made, loose=8),
        "as_eps_theta": Example(labelled, {"labels": given.labels}, {"labels": 0}, results="float64"),
    }


def _of_tables(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    total = process.num_timesteps
    assert isinstance(process, core.Schedule)
    schedule = process

    def some(made: LinearGaussianProcess) -> list[Tensor]:
        return [made.a, made.b, made.posterior_variance, made.log_snr]

    def table(call: Callable[..., LinearGaussianProcess], **tensors: Tensor) -> Example:
        return Example(lambda **given: some(call(**given)), tensors, {}, (None,) * 4, "float64", loose=100.0)

    def ledger(x_start_mse: Tensor, consistency: Tensor) -> list[float]:
        reverse = ReverseProcess(process, "v")
        parts = core.bound_ledger(reverse, x_start_mse, prior=0.1, decoder=2.0, consistency=consistency)
        return [parts.continuous_time, parts.finite_step, parts.variance_optimum, parts.variance_choice]

    def measured(log_snr: Tensor, x_start_mse: Tensor) -> Tensor:
        return core.MeasuredCurve(log_snr, x_start_mse)(torch.tensor([-1.0, 0.5], dtype=torch.float64))

    left_out = "points that are not finite are left out"
    curve = core.MeasuredCurve(process.log_snr, given.mse)
    shares = torch.linspace(0.2, 0.1, total, dtype=torch.float64)
    visited = torch.unique(torch.tensor([0, total // 2, total - 1]))
    levels = process.log_snr.new_tensor([0.3, -2.0, 1.0])
    limits = "±inf is a level, of no noise or of noise alone"
    return {
        "LinearGaussianProcess": table(
            LinearGaussianProcess, log_a=process.log_a, log_b=process.log_b, log_snr=process.log_snr,
            snr_loss=process.snr_loss, total_variance=process.total_variance,
        ),
        "LinearGaussianProcess.at": table(
            partial(LinearGaussianProcess.at, process), timesteps=visited
        ),
        "Schedule": table(
            core.Schedule, betas=schedule.betas, log_alphas_cumprod=schedule.log_alphas_cumprod
        ),
        "Schedule.at": table(schedule.at, timesteps=visited),
        "Schedule.from_betas": table(core.Schedule.from_betas, betas=schedule.betas),
        "Schedule.from_alphas_cumprod": table(
            core.Schedule.from_alphas_cumprod, alphas_cumprod=schedule.alphas_cumprod
        ),
        "Schedule.from_log_snr": table(core.Schedule.from_log_snr, log_snr=schedule.log_snr),
        "process_at": table(partial(core.process_at, "rectified_flow"), log_snr=process.log_snr),
        "process_from_coefficients": table(core.process_from_coefficients, a=process.a, b=process.b),
        "process_from_log_snr": table(
            core.process_from_log_snr, log_snr=process.log_snr, log_scale=0.1 * process.log_a
        ),
        "consistency_terms": Example(
            partial(core.consistency_terms, ReverseProcess(process, "v", "fixed_large")),
            {"x_start_mse": given.mse}, {}, (None,), "float64",
        ),
        "bound_ledger": Example(
            ledger, {"x_start_mse": given.mse, "consistency": shares}, {}, (None,) * 4, "float64", loose=100.0
        ),
        "MeasuredCurve": Example(
            measured, {"log_snr": process.log_snr, "x_start_mse": given.mse}, {}, (None,), "float64",
            nan={"log_snr": left_out, "x_start_mse": left_out},
        ),
        "MeasuredCurve.__call__": Example(
            curve, {"log_snr": levels}, {"log_snr": 0}, (0,), "float64", inf={"log_snr": limits},
            shapes={"log_snr": "each number for itself"},
        ),
        "nearest_timesteps": Example(
            partial(core.nearest_timesteps, process), {"log_snr": levels}, {"log_snr": 0}, (0,),
            "integer", inf={"log_snr": limits},
        ),
    }  # fmt: skip


def _keyed(process: LinearGaussianProcess, given: Given) -> dict[str, Example]:
    index = {"index": given.index}
    chain = core.DiffusionChain(network, ReverseProcess(process, "v"))
    moments = core.LossMoments(process.num_timesteps)
    normal = partial(rng.normal, 1, "p", shape=SHAPE, dtype=torch.float64)
    uniform = partial(rng.uniform, 1, "p", shape=SHAPE, dtype=torch.float64)
    return {
        "rng.normal": Example(normal, index, {"index": 0}, results="float64"),
        "rng.uniform": Example(uniform, index, {"index": 0}, results="float64"),
        "rng.integers": Example(
            partial(rng.integers, 1, "p", high=10**6), index, {"index": 0}, results="integer"
        ),
        "draw_timesteps": Example(
            partial(core.draw_timesteps, process, 1), index, {"index": 0}, results="integer"
        ),
        "LossMoments.draw": Example(
            partial(moments.draw, 1), index, {"index": 0}, (0, 0), ("integer", "float64")
        ),
        "drop_labels": Example(
            partial(core.drop_labels, null_label=4, probability=0.5, seed=1),
            {"labels": given.labels, **index},
            {"labels": 0, "index": 0},
            results="integer",
        ),
        "generate_path": Example(
            partial(core.generate_path, chain, SHAPE, seed=1, dtype=torch.float64),
            index,
            {"index": 0},
            (0,) * (process.num_timesteps + 1),
            "float64",
        ),
    }
