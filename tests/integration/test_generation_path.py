"""Sampling, judging and tuning on the real stack, from a checkpoint that really was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import webdataset as wds
from mlflow import MlflowClient

from infra.local import Stack
from jobs.sample import locate
from pipelines.checkpoints import open_checkpoint
from pipelines.sampling import load_model, make_images
from tests.support.jobs import ddpm, one_line_mistake, settings, succeeded, tiny_config

DATA = (
    "data.uri=s3://ddpm/tests/digits-samples",
    "storage=s3://ddpm/tests/generation",
    "train.steps=30",
    "train.eval_every=30",
    "train.checkpoint_every=30",
    "sample.count=2000",
    "sample.unit_size=250",
    "sample.batch_size=125",
    "tracking.experiment=generation",
)


@pytest.fixture(scope="module", autouse=True)
def trained(stack: Stack) -> None:
    assert stack
    succeeded(ddpm("prepare", "digits", *settings(*DATA)))
    before = ddpm("sample", *settings(*DATA))
    one_line_mistake(before, "no committed checkpoint here", "ddpm train")
    succeeded(ddpm("train", *settings(*DATA), "--local"))


def test_two_thousand_images_once_by_two_actors(stack: Stack, tmp_path: Path) -> None:
    said = succeeded(ddpm("sample", *settings(*DATA), "--set", "workers.num=2"))
    assert "2000 images in 8 shards" in said
    recipe, samples = locate(tiny_config(*DATA))
    before = samples.storage.list()
    said = succeeded(ddpm("sample", *settings(*DATA)))
    assert "all 2000 images are there already" in said
    assert samples.storage.list() == before

    images = dict(samples.images())
    assert sorted(images) == list(range(2000))
    # different numbers give different images, on both workers
    assert len({image.tobytes() for image in images.values()}) == 2000

    checkpoint = open_checkpoint(recipe.checkpoint)
    model, schedule = load_model(checkpoint, torch.device("cpu"))
    alone = make_images(model, schedule, recipe, [1234], torch.device("cpu"))
    beside = make_images(model, schedule, recipe, range(1125, 1250), torch.device("cpu"))
    torch.testing.assert_close(alone[0], beside[1234 - 1125], rtol=0, atol=1e-5)
    # the stored copy is the nearest of 17 levels, half a level (1/16) away at most
    stored = torch.from_numpy(images[1234].copy()).float() / 127.5 - 1
    assert float((stored - alone[0].clamp(-1, 1)).abs().max()) <= 1 / 16 + 0.01

    # any WebDataset reader reads the shards
    shard = samples.record().units[0].shard
    (tmp_path / "shard.tar").write_bytes(samples.storage.get(shard.key))
    keys = [sample["__key__"] for sample in wds.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False)]
    assert keys == [f"{number:09d}" for number in range(250)]

    out = tmp_path / "report"
    said = succeeded(ddpm("evaluate", *settings(*DATA), "--out", str(out)))
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["distances"]] == ["samples", "real", "noise"]
    assert {row["count"] for row in report["distances"]} == {352}
    assert report["num_samples"] == 2000
    _, real, noise = report["distances"]
    assert real["frechet"] < noise["frechet"] / 5
    assert sum(report["class_shares"].values()) == pytest.approx(1)
    bound = report["bound"]
    assert bound["total"] == pytest.approx(bound["reconstruction"] + bound["consistency"] + bound["prior"])
    for name in ("schedule", "loss", "bound", "samples", "trajectory", "distances"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert f"{bound['total']:.4f}" in said

    again = succeeded(ddpm("evaluate", *settings(*DATA), "--out", str(tmp_path / "again")))
    assert "done already" in again
    assert again.splitlines()[1:-1] == said.splitlines()[:-1]
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    client = MlflowClient(stack.mlflow_uri)
    experiment = client.get_experiment_by_name("generation")
    judged = client.search_runs([experiment.experiment_id], "tags.mlflow.runName LIKE 'evaluation %'")
    assert len(judged) == 1


def test_a_damaged_shard_is_made_again_on_the_cluster(stack: Stack) -> None:
    overrides = (*DATA, "sample.count=500", "sample.seed=3")
    succeeded(ddpm("sample", *settings(*overrides)))
    _, samples = locate(tiny_config(*overrides))
    before = {number: image.tobytes() for number, image in samples.images()}
    key = samples.unit(1).shard.key
    samples.storage.put(key, samples.storage.get(key)[:-512])
    judged = ddpm("evaluate", *settings(*overrides))
    assert judged.returncode == 2
    assert key in judged.stderr.splitlines()[-1]
    assert judged.stderr.endswith("; `ddpm sample --check` makes it again\n")
    said = succeeded(ddpm("sample", *settings(*overrides)))
    assert said.startswith("damaged, and made again: ")
    assert key in said.splitlines()[0]
    # by another process: the same images, but for rounding at the border of two levels
    after = {number: image.tobytes() for number, image in samples.images()}
    assert after.keys() == before.keys()
    assert sum(after[number] != before[number] for number in before) <= 5


def test_an_unfinished_set_is_gone_on_with_and_not_judged(stack: Stack) -> None:
    overrides = (*DATA, "sample.count=500", "sample.seed=7")
    one_line_mistake(ddpm("evaluate", *settings(*overrides)), "no finished sample set", "ddpm sample")
    recipe, samples = locate(tiny_config(*overrides))
    model, schedule = load_model(open_checkpoint(recipe.checkpoint), torch.device("cpu"))
    from pipelines.images import to_uint8
    from pipelines.sample_recipe import unit_range

    x = make_images(model, schedule, recipe, unit_range(recipe, 1), torch.device("cpu"))
    first = samples.write_unit(recipe, 1, to_uint8(x, recipe.levels))
    succeeded(ddpm("sample", *settings(*overrides), "--local"))
    assert samples.record().units[1] == first
    assert sorted(number for number, _ in samples.images()) == list(range(500))


def test_a_sweep_ranks_on_the_bound_and_nests_its_trials(stack: Stack, tmp_path: Path) -> None:
    overrides = (
        *DATA,
        "tune.num_timesteps=[50, 100]",
        "tune.num_trials=3",
        "tune.steps=16",
        "tune.eval_every=8",
        "tune.grace_steps=8",
    )
    succeeded(ddpm("tune", *settings(*overrides), "--out", str(tmp_path), timeout_s=500))
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert len(sweep["trials"]) == 3
    values = [trial["bits_per_dim"] for trial in sweep["trials"]]
    assert values == sorted(values)
    assert {trial["status"] for trial in sweep["trials"]} <= {"completed", "stopped"}
    assert {trial["step"] for trial in sweep["trials"]} <= {8, 16}
    assert (tmp_path / "sweep.png").stat().st_size > 1000

    client = MlflowClient(stack.mlflow_uri)
    experiment = client.get_experiment_by_name("generation")
    parents = client.search_runs([experiment.experiment_id], "tags.mlflow.runName LIKE 'sweep %'")
    assert len(parents) == 1
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}'"
    )
    assert len(nested) == 3
    assert {run.info.status for run in nested} == {"FINISHED"}

    again = succeeded(ddpm("tune", *settings(*overrides)))
    assert "done already" in again
