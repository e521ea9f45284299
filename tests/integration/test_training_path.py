"""Training on a real Ray cluster with a real S3 server and a real MLflow server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from mlflow import MlflowClient

from infra.local import Stack
from jobs import submission
from pipelines.checkpoints import Checkpoints
from pipelines.dataset import Dataset
from pipelines.storage import open_storage
from pipelines.tracking import tracked_as
from pipelines.train import Run, open_run
from pipelines.training import Learner
from tests.support.jobs import committed, ddpm, losses, settings, succeeded, tiny_config, tiny_run

DATA = "data.uri=s3://ddpm/tests/digits"
STEPS = 20
# a cache that holds the whole shard under its hash would hide what is wrong with the one on S3
NO_CACHE = "data.disk_cache=none"


@pytest.fixture(scope="module", autouse=True)
def prepared(stack: Stack) -> None:
    assert stack
    said = succeeded(ddpm("prepare", "digits", *settings(DATA)))
    assert "1445 train images" in said


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return Checkpoints(run.storage).open(STEPS).read("weights")


def _train(*overrides: str) -> Run:
    succeeded(ddpm("train", *settings(DATA, *overrides)))
    return tiny_run(DATA, *overrides)


def test_weights_do_not_depend_on_the_number_of_workers(stack: Stack) -> None:
    common = (f"train.steps={STEPS}", "train.eval_every=20", "train.checkpoint_every=20", "data.flip=true")
    one = _train(*common, "workers.num=1", "storage=s3://ddpm/tests/one", "model.dropout=0.1")
    two = _train(*common, "workers.num=2", "storage=s3://ddpm/tests/two", "model.dropout=0.1")
    assert one.name == two.name
    a, b = _weights(one), _weights(two)
    start = Learner(one.config, torch.device("cpu")).model.state_dict()
    assert a.keys() == b.keys() == start.keys()
    for name in a:
        # softmax does not feel the keys' bias: its gradient is rounding alone, which Adam makes into whole steps
        if not name.endswith("key.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=2e-6)
    # the comparison means something only if the weights moved by far more than its tolerance
    assert max(float((a[name] - start[name]).abs().max()) for name in a) > 1e-3
    first, second = losses(one), losses(two)
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    for step in first:
        assert first[step] == pytest.approx(second[step], rel=1e-5)


def _interrupted(stack: Stack, overrides: tuple[str, ...], after_step: int) -> Run:
    """Submit, SIGKILL the driver and every worker of the job once a checkpoint is there, submit again."""
    run = tiny_run(DATA, *overrides)
    config = tiny_config(DATA, *overrides)
    submitted = submission.submit(
        "train", [], config.to_yaml(), run="killed", wait=False, write=lambda text: None
    )
    deadline = time.monotonic() + 240
    while not any(step >= after_step for step in committed(run)):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert not submission.status(submitted.job.submission_id).terminal
        time.sleep(0.05)
    _kill_job(stack, submitted.job.submission_id)
    while not submission.status(submitted.job.submission_id).terminal:
        assert time.monotonic() < deadline, "the job survived"
        time.sleep(0.2)
    assert committed(run)[-1] < config.train.steps, "the job was through before it was killed"
    again = submission.submit("train", [], config.to_yaml(), run="killed", write=lambda text: None)
    assert again.job.submission_id != submitted.job.submission_id
    assert again.job.status == "SUCCEEDED", again.job.message
    return run


def _kill_job(stack: Stack, submission_id: str) -> None:
    """SIGKILL to the job's driver and to its training workers."""
    drivers, workers = [], []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environment = process.info["environ"] or {}
        if environment.get("DDPM_STACK_ID") != stack.stack_id:
            continue
        command = " ".join(process.info["cmdline"] or [])
        if "jobs train" in command and "config.yaml" in command:
            drivers.append(process)
        elif "RayTrainWorker" in command:
            workers.append(process)
    assert drivers, submission_id
    assert len(workers) == 2
    for process in (*workers, *drivers):
        process.send_signal(signal.SIGKILL)


def test_a_killed_job_submitted_again_is_the_undisturbed_run(stack: Stack) -> None:
    common = (
        "train.steps=120",
        "train.eval_every=120",
        "train.checkpoint_every=8",
        "workers.num=2",
        "model.dropout=0.1",
        "seed=3",
    )
    killed = _interrupted(stack, (*common, "storage=s3://ddpm/tests/killed"), after_step=16)
    whole = _train(*common, "storage=s3://ddpm/tests/whole")

    assert losses(killed) == losses(whole)
    assert list(losses(whole)) == list(range(1, 121))
    a = Checkpoints(killed.storage).open(120)
    b = Checkpoints(whole.storage).open(120)
    for group in ("weights", "ema", "optimizer"):
        left, right = a.read(group), b.read(group)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), (group, name)

    client = MlflowClient(stack.mlflow_uri)
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id], f"tags.`ddpm.storage` = '{killed.storage.uri}'")
    assert len(runs) == 1, "one MLflow run, however often the job was started"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert Counter(metric.step for metric in history) == Counter(range(1, 121)), "each step once"
    assert {metric.step: metric.value for metric in history} == pytest.approx(losses(whole))
    for key in ("grad_norm", "learning_rate", "images_per_s"):
        assert key in runs[0].data.metrics
    for term in ("total", "reconstruction", "consistency", "prior"):
        assert f"held_out/{term}" in runs[0].data.metrics
    assert runs[0].data.tags["ddpm.dataset_identity"] == whole.dataset.identity
    files = {item.path for item in client.list_artifacts(runs[0].info.run_id)}
    assert {"config.yaml", "samples"} <= files


def test_a_stopped_job_says_so_to_mlflow_and_can_go_on(stack: Stack) -> None:
    overrides = ("train.steps=100000", "train.checkpoint_every=2", "train.eval_every=100000", "seed=8")
    where = "storage=s3://ddpm/tests/stopped"
    config, run = tiny_config(DATA, *overrides, where), tiny_run(DATA, *overrides, where)
    job = submission.submit("train", [], config.to_yaml(), run="stopped", wait=False).job
    deadline = time.monotonic() + 240
    while not committed(run):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert not submission.status(job.submission_id).terminal
        time.sleep(0.2)
    assert submission.stop(job.submission_id).status == "STOPPED"
    told: list[str] = []
    submission.logs(job.submission_id, write=told.append)
    assert "ddpm train: interrupted; the same command goes on from here" in "".join(told)
    found = MlflowClient(stack.mlflow_uri).get_run(tracked_as(run.storage))
    assert found.info.status == "KILLED"
    newest = Checkpoints(run.storage).newest_whole()
    assert newest is not None
    assert newest.step >= 2


def test_two_trainers_of_one_run_tell_mlflow_each_step_once(stack: Stack) -> None:
    overrides = ("train.steps=60", "train.eval_every=60", "train.checkpoint_every=20", "seed=6")
    where = "storage=s3://ddpm/tests/twice"
    command = [sys.executable, "-m", "jobs", "train", *settings(DATA, *overrides, where), "--local"]
    trainers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [trainer.communicate(timeout=200)[1] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0, 0], said
    run = tiny_run(DATA, *overrides, where)
    assert committed(run) == [20, 40, 60]
    client = MlflowClient(stack.mlflow_uri)
    history = client.get_metric_history(tracked_as(run.storage), "loss")
    assert Counter(metric.step for metric in history) == Counter(range(1, 61))
    assert client.get_run(tracked_as(run.storage)).info.status == "FINISHED"
    assert sum(text.count("another trainer of") for text in said) <= 1


def test_train_local_runs_without_ray(stack: Stack) -> None:
    overrides = ("train.steps=4", "train.eval_every=4", "train.checkpoint_every=4", "seed=5")
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    where = ("storage=s3://ddpm/tests/local",)
    said = succeeded(ddpm("train", *settings(DATA, *overrides, *where), "--local", env=environment))
    assert "trained 4 steps" in said
    again = succeeded(ddpm("train", *settings(DATA, *overrides, *where), "--local", env=environment))
    assert "trained 4 steps already" in again


def test_dry_run_says_data_steps_memory_and_output_and_writes_nothing(stack: Stack) -> None:
    said = succeeded(
        ddpm("train", *settings(DATA, "storage=s3://ddpm/tests/dry", "train.steps=50"), "--dry-run")
    )
    for word in (
        "1445 training",
        "352 held-out",
        "50 to go",
        "MiB of state",
        "s3://ddpm/tests/dry/runs/digits-",
    ):
        assert word in said
    config = tiny_config(DATA, "storage=s3://ddpm/tests/dry", "train.steps=50")
    assert open_run(config).storage.list() == []


def test_divergence_is_one_line_and_is_not_retried(stack: Stack) -> None:
    overrides = ("optimizer.learning_rate=1e30", "optimizer.grad_clip=1e30", "optimizer.warmup_steps=0")
    result = ddpm(
        "train", *settings(DATA, *overrides, "train.steps=50", "storage=s3://ddpm/tests/nan", "workers.num=2")
    )
    assert result.returncode == 1
    assert "training diverged; lower optimizer.learning_rate" in result.stderr.strip().splitlines()[-1]
    assert result.stdout.count("going on from") == 0


def test_what_every_attempt_would_meet_again_ends_a_run_after_one(stack: Stack) -> None:
    """One worker alone reads the damaged shard; lost workers, which are tried again, are another matter."""
    dataset = Dataset.load("s3://ddpm/tests/digits")
    copy = open_storage("s3://ddpm/tests/damaged")
    for info in dataset.storage.list():
        copy.put(info.key, dataset.storage.get(info.key))
    data, where = "data.uri=s3://ddpm/tests/damaged", "storage=s3://ddpm/tests/damaged-run"
    workers = ("workers.num=2", "workers.max_failures=3", "train.eval_every=200", NO_CACHE)
    succeeded(ddpm("train", *settings(data, where, "train.steps=4", *workers)))
    shard = dataset.shards("train")[-1].key
    whole = copy.get(shard)
    copy.put(shard, whole[:-1] + b"?")
    # of one epoch, which needs each shard
    steps = ("train.steps=200", *workers)
    result = ddpm("train", *settings(data, where, *steps))
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ddpm train: {copy.uri}/{shard}: is damaged or was exchanged")
    assert last.endswith("`ddpm verify s3://ddpm/tests/damaged` names all that is damaged, and what to do")
    told = result.stdout + result.stderr
    assert "Error in training function" not in told
    assert "Traceback" not in told
    run = tiny_run(data, where, *steps)
    found = MlflowClient(stack.mlflow_uri).get_run(tracked_as(run.storage))
    assert found.info.status == "FAILED"
    # mended, the run goes on
    copy.put(shard, whole)
    succeeded(ddpm("train", *settings(data, where, *steps)))
    assert MlflowClient(stack.mlflow_uri).get_run(tracked_as(run.storage)).info.status == "FINISHED"
