"""Every kind of model goes through all commands in this process; what can't be exported costs a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.data import dataset_of
from tests.support.runs import TINY
from tests.unit.test_cli import Outcome, as_it_was, mistake  # noqa: F401 (as_it_was: a fixture for all of them)

LEARNED = (
    "model.learned_variance=true", "objective.loss=hybrid", "objective.variance_type=learned_range",
    "bound.variance_type=learned_range", "objective.timestep_sampling=loss_second_moment",
)  # fmt: skip
DIT = (
    "model={kind: dit, image_size: 8, in_channels: 1, patch_size: 4, hidden_size: 8, depth: 1, num_heads: 2}"
)
SILENT = ("objective.prediction_type=v", "schedule.zero_terminal_snr=true")
SOLVER = ("sampler.kind=dpm_solver_pp_2m", "sampler.clip=false")
MODELS = {
    "hybrid": ((*LEARNED, "sampler.kind=ancestral", "sampler.variance_type=learned_range"), None),
    "hybrid by ddim": (LEARNED, "model.learned_variance: DDIMScheduler has no place for it"),
    "no signal": (SILENT, None),
    "no signal, 2M": ((*SILENT, *SOLVER), "sampler.kind: dpm_solver_pp_2m can't be exported with a schedule"),
    "x_0 by 2M": (("objective.prediction_type=x_start", *SOLVER), None),
    "2M clipped": (SOLVER[:1], "sampler.clip: must be false to export dpm_solver_pp_2m"),
    "classes": (
        ("model.num_classes=10", "sample.guidance_scale=2", "sample.labels=[1, 2]"),
        "model.num_classes: must be null to be exported, got 10",
    ),
    "dit": ((DIT, "model.conditioning=log_snr"), "model.kind: must be 'unet' to be exported"),
    "log-SNR": (
        ("model.conditioning=log_snr",),
        "model.conditioning: UNet2DModel has 'timestep' alone, got 'log_snr'",
    ),
    "Heun": (("sampler.kind=heun",), "sampler.kind: must be "),
}
CLASS_NAMES = {
    "hybrid": "DDPMScheduler", "no signal": "DDIMScheduler", "x_0 by 2M": "DPMSolverMultistepScheduler",
}  # fmt: skip
PREDICTIONS = {"hybrid": "epsilon", "no signal": "v_prediction", "x_0 by 2M": "sample"}


def arguments_of(tmp_path: Path, *settings: str) -> list[str]:
    dataset_of(tmp_path / "data", [10, 20, 7])
    (tmp_path / "tiny.yaml").write_text(TINY)
    where = [f"data.uri={tmp_path}/data", f"storage={tmp_path}/results"]
    steps = ["train.steps=2", "train.eval_every=2", "train.checkpoint_every=1", "train.keep_checkpoints=2"]
    overrides = (part for one in (*where, *steps, *settings) for part in ("--set", one))
    return ["--config", str(tmp_path / "tiny.yaml"), *overrides]


@pytest.mark.parametrize("name", list(MODELS))
def test_train_sample_evaluate_and_export(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings, refusal = MODELS[name]
    ddpm, folder = Outcome(capsys), tmp_path / "pipeline"
    tiny = arguments_of(tmp_path, *settings)
    code, out, err = ddpm("train", *tiny, "--local")
    assert code == 0, err
    assert "held out" in out
    code, out, err = ddpm("sample", *tiny, "--local")
    assert code == 0, err
    assert "10 images in 3 shards" in out
    if name in ("hybrid", "classes", "dit", "no signal, 2M"):
        code, out, err = ddpm("evaluate", *tiny, "--local", "--out", str(tmp_path / "report"))
        assert code == 0, err
        assert "bits/dim" in out
        assert (tmp_path / "report" / "trajectory.png").exists()
    exported = ddpm("export", *tiny, "--out", str(folder))
    if refusal is not None:
        assert mistake(exported).startswith(f"ddpm export: {refusal}")
        assert not folder.exists()
        return
    assert exported[0] == 0, exported
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == (CLASS_NAMES[name], PREDICTIONS[name])


def test_an_average_of_another_length_is_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ddpm = Outcome(capsys)
    tiny = arguments_of(tmp_path, "ema.power_sigma_rels=[0.05, 0.1]")
    assert ddpm("train", *tiny, "--local")[0] == 0
    made = {}
    for name, more in {"plain": [], "short": ["--sigma-rel", "0.05"], "long": ["--sigma-rel", "0.2"]}.items():
        code, out, err = ddpm("export", *tiny, *more, "--out", str(tmp_path / name))
        assert (code, err) == (0, "")
        assert ("σ_rel" in out) == bool(more)
        made[name] = (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert len(set(made.values())) == 3
    wrong = ("export", *tiny, "--out", str(tmp_path / "x"), "--sigma-rel", "0.9")
    assert mistake(ddpm(*wrong)) == "ddpm export: sigma_rel: must be in 1e-6..12**-0.5, got 0.9"
    [run] = (tmp_path / "results" / "runs").iterdir()
    uri = f"{run}/checkpoints/step-000000002"
    told = mistake(
        ddpm("export", *tiny, "--checkpoint", uri, "--sigma-rel", "0.1", "--out", str(tmp_path / "y"))
    )
    assert told.startswith("ddpm export: --sigma-rel: needs the run's other checkpoints")
