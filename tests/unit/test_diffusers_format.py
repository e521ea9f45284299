"""Pipeline folders: diffusers makes our images from what we write, and we its images from what it writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ddpm_core import (
    DiTConfig,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    UNet,
    UNetConfig,
    respaced_timesteps,
    rng,
    sample,
)
from pipelines.diffusers_format import (
    ImportedPipeline,
    Sampling,
    export_pipeline,
    import_pipeline,
    sampling_of,
)
from pipelines.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.schedulers import scheduling_ddpm

TINY = UNetConfig(8, 1, 8, (1, 2), 1, (4,), 0.0, 4)
SHAPE = (1, 8, 8)
INDEX = torch.arange(3)
SCHEDULES = {
    "linear": Schedule.from_config(ScheduleConfig(num_timesteps=20, beta_start=0.01, beta_end=0.4)),
    "scaled_linear": Schedule.from_betas(torch.linspace(0.1, 0.6, 20, dtype=torch.float64).square()),
    "squaredcos_cap_v2": Schedule.from_config(ScheduleConfig(kind="cosine", num_timesteps=20)),
    "trained": Schedule.from_betas(torch.logspace(-2.5, -0.3, 20, dtype=torch.float64)),
}


def weights(config: UNetConfig, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = UNet(config).state_dict()
    return {name: torch.randn_like(tensor) * 0.15 for name, tensor in state.items()}


def network(config: UNetConfig, tensors: dict[str, Tensor]) -> UNet:
    net = UNet(config)
    net.load_state_dict(tensors)
    return net.eval()


def images(folder: Path, step: Callable[[Any, Tensor, int, Tensor, int], Tensor], steps: list[int]) -> Tensor:
    """Images by diffusers' own network and scheduler from our noise."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
    pipeline.scheduler.set_timesteps(len(steps))
    assert pipeline.scheduler.timesteps.tolist() == steps
    x = rng.normal(5, "sample", INDEX, SHAPE, draw=0)
    with torch.no_grad():
        for t in steps:
            x = step(pipeline.scheduler, pipeline.unet(x, t).sample, t, x, t + 1)
    return x


def noise(draw: int) -> Tensor:
    return rng.normal(5, "sample", INDEX, SHAPE, draw=draw)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [20, 7])
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_ancestral_images_agree(
    kind: str, num_steps: int, variance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, tensors = SCHEDULES[kind], weights(TINY)
    export_pipeline(tmp_path / "p", TINY, tensors, schedule, Sampling("ancestral", variance=variance))
    config = SamplerConfig("ancestral", num_steps, variance_type=variance)
    ours = sample(network(TINY, tensors), schedule, config, seed=5, index=INDEX, shape=SHAPE)

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: int) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise(draw))
        return torch.as_tensor(scheduler.step(output, t, x).prev_sample)

    steps = respaced_timesteps(20, num_steps).flip(0).tolist()
    theirs = images(tmp_path / "p", step, steps)
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["linear", "trained"])
def test_ddim_images_agree(kind: str, clip: bool, eta: float, tmp_path: Path) -> None:
    schedule, tensors = SCHEDULES[kind], weights(TINY)
    export_pipeline(tmp_path / "p", TINY, tensors, schedule, Sampling("ddim", clip=clip))
    config = SamplerConfig("ddim", 20, eta=eta, clip=clip)
    ours = sample(network(TINY, tensors), schedule, config, seed=5, index=INDEX, shape=SHAPE)

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: int) -> Tensor:
        done = scheduler.step(
            output, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise(draw)
        )
        return torch.as_tensor(done.prev_sample)

    theirs = images(tmp_path / "p", step, list(range(19, -1, -1)))
    # not clipped, the images of this made-up network are large
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


SOLVERS = {"dpm_solver_pp_2m": "dpmsolver++", "dpm_solver_pp_2m_sde": "sde-dpmsolver++"}


@pytest.mark.parametrize("num_steps", [20, 5])
@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_dpm_solver_images_agree(
    solver: Any,
    prediction: Any,
    threshold: float | None,
    num_steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule, tensors = SCHEDULES["linear"], weights(TINY)
    config = SamplerConfig(solver, num_steps, clip=False, spacing="trailing", threshold_quantile=threshold)
    export_pipeline(tmp_path / "p", TINY, tensors, schedule, sampling_of(config, prediction))
    arguments: dict[str, Any] = {"seed": 5, "index": INDEX, "shape": SHAPE, "prediction_type": prediction}
    ours = sample(network(TINY, tensors), schedule, config, **arguments)

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: int) -> Tensor:
        return torch.as_tensor(scheduler.step(output, t, x, variance_noise=noise(draw)).prev_sample)

    steps = list(range(19, -1, -20 // num_steps))
    theirs = images(tmp_path / "p", step, steps)
    assert float(ours.std()) > 0.03
    # diffusers keeps ᾱ in float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_diffusers_own_pipeline_runs_a_solver(tmp_path: Path) -> None:
    config = SamplerConfig("dpm_solver_pp_2m_sde", clip=False)
    export_pipeline(tmp_path / "p", TINY, weights(TINY), SCHEDULES["linear"], sampling_of(config, "v"))
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images
    assert made.shape == (2, 8, 8, 1)
    assert bool((made == made).all())


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"kind": "heun"}, "sampler.kind: must be .*, got 'heun'"),
        ({"kind": "ancestral", "variance_type": "analytic"}, "sampler.variance_type: .*, got 'analytic'"),
        ({"kind": "dpm_solver_pp_2m"}, "sampler.clip: must be false to export dpm_solver_pp_2m"),
    ],
)
def test_a_sampler_that_diffusers_lacks_is_named(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        sampling_of(SamplerConfig(**sampler), "eps")


@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_a_chain_without_signal_goes_out_and_makes_the_same_images(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule.from_config(
        ScheduleConfig(num_timesteps=20, beta_start=0.01, beta_end=0.4, zero_terminal_snr=True)
    )
    config, tensors = SamplerConfig(kind, 20, variance_type="fixed_small"), weights(TINY)
    export_pipeline(tmp_path / "p", TINY, tensors, schedule, sampling_of(config, "v"))
    ours = sample(
        network(TINY, tensors), schedule, config, seed=5, index=INDEX, shape=SHAPE, prediction_type="v"
    )

    def step(scheduler: Any, output: Tensor, t: int, x: Tensor, draw: int) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise(draw))
        more = {"use_clipped_model_output": True} if kind == "ddim" else {}
        return torch.as_tensor(scheduler.step(output, t, x, **more).prev_sample)

    torch.testing.assert_close(ours, images(tmp_path / "p", step, list(range(19, -1, -1))), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", list(SCHEDULES))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling("ddim", "v_prediction", clip=False),
        Sampling("ancestral", "sample", "fixed_small"),
        Sampling("ancestral", variance="learned_range"),
        Sampling("dpm_solver_pp_2m", clip=False),
        Sampling("dpm_solver_pp_2m_sde", "v_prediction", clip=False),
    ],
)
def test_there_and_back(kind: str, sampling: Sampling, tmp_path: Path) -> None:
    config = replace(TINY, learned_variance=sampling.variance == "learned_range", scale_shift_norm=True)
    tensors = weights(config)
    export_pipeline(tmp_path / "p", config, tensors, SCHEDULES[kind], sampling)
    written = json.loads((tmp_path / "p" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["trained_betas"] is None) == (kind != "trained")
    assert kind in ("trained", written["beta_schedule"])
    again = import_pipeline(tmp_path / "p")
    assert again.config == replace(config)
    assert again.sampling == sampling
    torch.testing.assert_close(again.schedule.betas, SCHEDULES[kind].betas, rtol=1e-9, atol=0)
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in (tmp_path / "p").rglob("*"))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_schedule_near_a_named_one_is_not_taken_for_it(kind: str, tmp_path: Path) -> None:
    betas = SCHEDULES[kind].betas.clone()
    betas[7] *= 1 + 1e-6
    export_pipeline(tmp_path / "p", TINY, weights(TINY), Schedule.from_betas(betas), Sampling())
    assert torch.equal(import_pipeline(tmp_path / "p").schedule.betas, betas)


def test_a_learned_variance_means_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ln σ² = f·ln β + (1 − f)·ln β̃ with f = (v + 1)/2, the second half of the channels being v."""
    config, schedule = replace(TINY, learned_variance=True), SCHEDULES["linear"]
    export_pipeline(
        tmp_path / "p", config, weights(config), schedule, Sampling("ancestral", variance="learned_range")
    )
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p", local_files_only=True)
    x, t, z = noise(0), 11, noise(1)
    output = pipeline.unet(x, t).sample.detach()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: z)
    got = pipeline.scheduler.step(output, t, x).prev_sample
    eps, v = output.chunk(2, dim=1)
    a, b = float(schedule.alphas_cumprod[t]), float(schedule.betas[t])
    x_start = ((x - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1)
    mean = float(schedule.posterior_mean_coef1[t]) * x_start + float(schedule.posterior_mean_coef2[t]) * x
    low = float(schedule.posterior_variance[t])
    share = (v + 1) / 2
    sigma = b ** (share / 2) * low ** ((1 - share) / 2)
    torch.testing.assert_close(got, mean + sigma * z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_what_diffusers_writes_is_read(kind: str, tmp_path: Path) -> None:
    """A pipeline that diffusers made and saved; its images are ours."""
    torch.manual_seed(3)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=4,
    ).eval()
    made = {"ancestral": ("DDPM", {"variance_type": "fixed_large"}), "ddim": ("DDIM", {})}
    name, more = made[kind]
    scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=20, beta_end=0.3, **more)
    getattr(diffusers, f"{name}Pipeline")(unet, scheduler).save_pretrained(tmp_path / "p")
    read = import_pipeline(tmp_path / "p")
    assert isinstance(read, ImportedPipeline)
    assert read.config == replace(TINY, head_channels=4)
    assert read.sampling == Sampling(kind, "epsilon", "fixed_large")  # type: ignore[arg-type]
    net = network(read.config, read.tensors)
    config = SamplerConfig("ddim", 20, eta=0.0)
    ours = sample(net, read.schedule, config, seed=5, index=INDEX, shape=SHAPE)
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(20)
    x = noise(0)
    with torch.no_grad():
        for t in ddim.timesteps.tolist():
            x = ddim.step(unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> None:
        export_pipeline(folder, TINY, weights(TINY), SCHEDULES["linear"], Sampling())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match="No space left"):
            write(tmp_path / "new" / "p")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]
    with pytest.raises(UserError, match=rf"^{tmp_path}/empty: exists and is not empty"):
        write(tmp_path / "empty")
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "empty" / "model_index.json")


@pytest.mark.parametrize(
    ("message", "config", "sampling"),
    [
        ("model.conditioning: ", replace(TINY, conditioning="log_snr"), Sampling()),
        ("variance: learned_range, but ", TINY, Sampling("ancestral", variance="learned_range")),
        ("variance: fixed_large, but ", replace(TINY, learned_variance=True), Sampling("ancestral")),
        ("model.learned_variance: ", replace(TINY, learned_variance=True), Sampling()),
        (
            "model.learned_variance: DPM",
            replace(TINY, learned_variance=True),
            Sampling("dpm_solver_pp_2m", clip=False),
        ),
        ("model.num_classes: must be null", replace(TINY, num_classes=3), Sampling()),
        ("model.kind: must be 'unet'", DiTConfig(8, 1, 4, 8, 1, 1), Sampling()),
        ("weights: down.0.blocks", replace(TINY, num_res_blocks=2), Sampling()),
    ],
)
def test_what_cannot_be_exported_is_named(
    message: str, config: UNetConfig | DiTConfig, sampling: Sampling, tmp_path: Path
) -> None:
    tensors = weights(replace(config, num_res_blocks=1)) if isinstance(config, UNetConfig) else {}
    with pytest.raises(UserError, match=f"^{message}"):
        export_pipeline(tmp_path / "p", config, tensors, SCHEDULES["linear"], sampling)
    assert list(tmp_path.iterdir()) == []


def test_a_solver_cannot_go_out_with_a_chain_without_signal(tmp_path: Path) -> None:
    schedule = Schedule.from_config(ScheduleConfig(num_timesteps=20, zero_terminal_snr=True))
    with pytest.raises(UserError, match=r"^sampler.kind: dpm_solver_pp_2m can't be exported with a schedule"):
        export_pipeline(
            tmp_path / "p",
            TINY,
            weights(TINY),
            schedule,
            Sampling("dpm_solver_pp_2m", "v_prediction", clip=False),
        )


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "unet: must be a UNet2DModel"),
        ("unet/config.json", {"act_fn": "relu"}, "act_fn: must be 'silu'"),
        ("unet/config.json", {"sample_size": 9}, "image_size: must be a positive multiple of 2"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "_class_name: must be "),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule: must be "),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type: must be "),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, "variance_type: must be "),
        (
            "scheduler/scheduler_config.json",
            {"variance_type": "learned_range"},
            "variance_type: learned_range",
        ),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding: must be False"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: must"),
        ("scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "clip_sample_range: must be 1.0"),
        ("scheduler/scheduler_config.json", {"trained_betas": [2.0]}, "betas: must lie between 0 and 1"),
        ("scheduler/scheduler_config.json", {"trained_betas": "x"}, ""),
    ],
)
def test_what_cannot_be_imported_is_named(
    file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    export_pipeline(tmp_path, TINY, weights(TINY), SCHEDULES["linear"], Sampling("ancestral"))
    _edit(tmp_path / file, **changes)
    with pytest.raises(UserError) as error:
        import_pipeline(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: {message}")
    assert "\n" not in str(error.value)


def test_pickles_and_damage_are_refused_by_name(tmp_path: Path) -> None:
    export_pipeline(tmp_path, TINY, weights(TINY), SCHEDULES["linear"], Sampling())
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is not safetensors"):
        import_pipeline(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"safetensors: no such file"):
        import_pipeline(tmp_path)
    file.with_suffix(".bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: is a pickle"):
        import_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        import_pipeline(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        import_pipeline(tmp_path / "nowhere")
