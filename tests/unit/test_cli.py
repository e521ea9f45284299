"""The command line: help worth reading, and a user's mistake as one line with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.local import Stack, StackError
from jobs import cli, common
from jobs.interruptions import Interruptions
from pipelines import evaluate, evaluation_pictures, features
from pipelines.checkpoints import Checkpoints
from pipelines.dataset import Dataset
from pipelines.errors import UserError, one_line
from pipelines.sample_set import SampleSet
from pipelines.storage import FileStorage, ObjectInfo, StorageError, open_storage
from pipelines.train_ray import RunFailed
from tests.support.data import dataset_of
from tests.support.runs import TINY
from tests.support.s3 import free_port

COMMANDS = sorted(cli.COMMANDS)
FOREIGN = ("AWS_", "RAY_", "MLFLOW_", "DDPM_", "DO_NOT_TRACK", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No stack, no server in the environment; and after the test, signals, logging and environment as before."""
    environment = dict(os.environ)
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loggers = [logging.getLogger(name) for name in ("pipelines", "jobs", "infra", "")]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ["DDPM_STATE"] = str(tmp_path / "no stack")
    # as in a terminal, also where these tests run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handled.items():
        signal.signal(number, handler)
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def exit_code(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


class Outcome:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        self._capsys.readouterr()
        code = exit_code(*arguments)
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def ddpm(capsys: pytest.CaptureFixture[str]) -> Outcome:
    return Outcome(capsys)


def mistake(outcome: tuple[int, str, str]) -> str:
    """The one line of a mistake."""
    code, out, err = outcome
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.strip()


def test_help_lists_every_command_with_what_it_does(ddpm: Outcome) -> None:
    code, out, err = ddpm("--help")
    assert (code, err) == (0, "")
    for name, summary in cli.COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(summary[:30])}", out, re.MULTILINE), name
    for variable in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DDPM_STATE"):
        assert variable in out
    assert "exit code: 0" in out
    assert max(map(len, out.splitlines())) <= 116


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_explains_all_of_it(command: str, ddpm: Outcome) -> None:
    code, out, err = ddpm(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ddpm {command} ")
    parser = cli.command_parser(command)
    assert parser.description
    assert len(parser.description) > 40
    assert " ".join(parser.description.split()) in " ".join(out.split())
    for action in parser._actions:
        assert action.help, action
        assert action.help is not argparse.SUPPRESS
        assert " ".join((action.help % {"prog": "x"}).split()) in " ".join(out.split())
        for option in action.option_strings:
            assert option in out
    assert max(map(len, out.splitlines())) <= 116


def test_what_takes_a_configuration_takes_overrides() -> None:
    for command in ("prepare", "train", "tune", "sample", "evaluate", "export", "submit"):
        options = {
            option for action in cli.command_parser(command)._actions for option in action.option_strings
        }
        assert {"--config", "--set"} <= options, command


_HEAVY = """\
import sys
from jobs import cli
for command in cli.COMMANDS:
    cli.command_parser(command).format_help()
cli.parser().format_help()
print(sorted({"torch", "ray", "mlflow", "boto3", "pyarrow", "matplotlib", "sklearn"} & set(sys.modules)))
"""


def test_help_imports_nothing_that_takes_long() -> None:
    done = subprocess.run([sys.executable, "-c", _HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "train"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ddpm train ")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("--nonsense",),
        ("train",),
        ("train", "--config"),
        ("train", "--config", "x.yaml", "--nonsense"),
        ("train", "--config", "x.yaml", "extra"),
        # no abbreviations: a script must not change its meaning when an option is added
        ("train", "--conf", "digits.yaml"),
        ("train", "--config", "x.yaml", "--local", "--address", "h:1"),
        ("submit", "nonsense", "--config", "x.yaml"),
        ("up", "--num-cpus", "two"),
        ("status",),
        ("logs", "--follow"),
    ],
)
def test_a_wrong_command_line_is_shown_its_usage(arguments: Sequence[str], ddpm: Outcome) -> None:
    code, out, err = ddpm(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ddpm ")
    assert "Traceback" not in err


def test_the_unknown_word_is_named(ddpm: Outcome) -> None:
    assert "'trian'" in ddpm("trian")[2]
    assert "--nonsense" in ddpm("train", "--config", "x.yaml", "--nonsense")[2]


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Arguments for a tiny run on made-up data, all on disk."""
    dataset_of(tmp_path / "data", [10, 20, 7])
    (tmp_path / "tiny.yaml").write_text(TINY)
    where = [f"data.uri={tmp_path}/data", f"storage={tmp_path}/results"]
    return ["--config", str(tmp_path / "tiny.yaml"), *(part for one in where for part in ("--set", one))]


STEPS = ("--set", "train.steps=2", "--set", "train.eval_every=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--config", "missing.yaml"), "ddpm train: missing.yaml: no such configuration file"),
        (
            ("train", "--config", "digits.yaml", "--set", "trian.steps=1"),
            "ddpm train: digits.yaml: trian: no such setting; did you mean 'train'?",
        ),
        (
            ("sample", "--config", "digits.yaml", "--set", "sample.count=0"),
            "ddpm sample: digits.yaml: sample.count: input should be greater than or equal to 1, got 0",
        ),
        (
            ("tune", "--config", "digits.yaml", "--set", "tune.num_trials"),
            "ddpm tune: --set tune.num_trials: must be section.key=value",
        ),
        (
            ("prepare", "digits", "--config", "digits.yaml", "--out", "ftp://x"),
            "ddpm prepare: ftp://x: storage is s3://BUCKET/PREFIX, file:///FOLDER or a folder "
            "(or https://HOST/PREFIX, to read from), not ftp://",
        ),
        (("prepare", "nowhere", "--config", "digits.yaml", "--out", "x"), "nowhere"),
        (
            ("submit", "prepare", "--config", "digits.yaml"),
            "ddpm submit: submit prepare: the following arguments are required: SOURCE; see `ddpm prepare --help`",
        ),
        (
            ("submit", "train", "digits", "--config", "digits.yaml"),
            "ddpm submit: submit train: unrecognized arguments: digits; see `ddpm train --help`",
        ),
        (
            ("submit", "sample", "--config", "digits.yaml", "--local"),
            "ddpm submit: submit sample: takes no --local: the job runs on the cluster",
        ),
        (("up", "--num-cpus", "0"), "ddpm up: --num-cpus 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments: Sequence[str], message: str, ddpm: Outcome) -> None:
    found = mistake(ddpm(*arguments))
    assert message in found if " " not in message else found == message


def test_an_empty_out_is_not_the_configurations(ddpm: Outcome) -> None:
    """As an unset variable of a shell gives it."""
    code, out, err = ddpm("prepare", "digits", "--config", "digits.yaml", "--local", "--out", "")
    assert (code, out) == (2, "")
    assert err.startswith("ddpm prepare: --out: is empty: give s3://BUCKET/PREFIX or a folder")
    assert err.count("\n") == 1


def test_two_mistakes_are_two_lines(ddpm: Outcome) -> None:
    wrong = ("--set", "sample.count=0", "--set", "trian.steps=1")
    code, out, err = ddpm("sample", "--config", "digits.yaml", *wrong)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "ddpm sample: digits.yaml: sample.count: input should be greater than or equal to 1, got 0",
        "ddpm sample: digits.yaml: trian: no such setting; did you mean 'train'?",
    ]


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "export"])
def test_without_data_it_says_how_to_make_some(command: str, ddpm: Outcome, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    where = ("--set", f"data.uri={tmp_path}/none", *(("--out", "x") if command == "export" else ()))
    found = mistake(ddpm(command, "--config", str(tmp_path / "tiny.yaml"), *where))
    assert "ddpm prepare" in found
    assert not (tmp_path / "none").exists()


def test_what_is_missing_of_a_data_set_is_said_before_any_work(
    ddpm: Outcome, tiny: list[str], tmp_path: Path
) -> None:
    dataset = Dataset.load(str(tmp_path / "data"))
    gone = [dataset.shards("train")[0].key, dataset.shards("test")[0].index_key]
    dataset.storage.delete(gone)
    for command in (["--dry-run"], ["--local"]):
        code, _, said = ddpm("train", *tiny, *STEPS, *command)
        assert (code, said.count("\n")) == (2, 1), said
        for part in (f"{dataset.uri}/{gone[0]} is missing", "and 1 more: `ddpm verify ", "what to do"):
            assert part in said
    assert not list((tmp_path / "results").glob("runs/*"))


def test_who_may_read_a_data_set_and_not_list_it_trains(
    ddpm: Outcome, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = FileStorage.list

    def refused(storage: FileStorage, prefix: str = "") -> list[ObjectInfo]:
        if prefix in ("train/", "test/"):
            raise StorageError("access denied (AccessDenied)")
        return listed(storage, prefix)

    monkeypatch.setattr(FileStorage, "list", refused)
    code, _, err = ddpm("train", *tiny, *STEPS, "--local")
    assert code == 0, err
    assert "what is missing of the data set will show when it is read: access denied (AccessDenied)" in err


@pytest.mark.parametrize(("error", "end"), [(RunFailed("lost"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_run_that_ends_early_on_the_cluster_is_said_to_have(
    ddpm: Outcome, tiny: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, end: str
) -> None:
    """By who started it: its workers may have been lost without a word."""
    said: list[str] = []

    def fit(run: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.tracking.end_tracking", lambda uri, run, end: said.append(end))
    monkeypatch.setattr("pipelines.train_ray.fit", fit)
    monkeypatch.setattr(common, "ray_cluster", lambda address: contextlib.nullcontext())
    assert ddpm("train", *tiny, *STEPS)[0] != 0
    assert said == [end]


def test_train_sample_and_again_in_this_process(ddpm: Outcome, tiny: list[str], tmp_path: Path) -> None:
    """The whole way of two thin commands, and what each finds when it is repeated."""
    assert "train first (ddpm train)" in mistake(ddpm("sample", *tiny, "--local"))
    code, plan, err = ddpm("train", *tiny, *STEPS, "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in plan.splitlines()][:8] == [
        "run", "data", "schedule", "model", "steps", "batch", "memory", "output",
    ]  # fmt: skip
    assert "note " not in plan
    # β of this kind falls at first: a note, and no warning
    code, odd, _ = ddpm("train", *tiny, *STEPS, "--dry-run", "--set", "schedule.kind=log_snr")
    assert code == 0
    assert odd.splitlines()[-1].startswith("note       betas fall at ")
    assert not (tmp_path / "results").exists()
    code, out, err = ddpm("train", *tiny, *STEPS, "--local")
    assert code == 0, err
    assert re.search(
        r"run tiny-\w{10}: trained 2 steps; held out \d+\.\d{4} bits/dim; file:///.*step-000000002$", out
    )
    # progress goes to standard error
    assert "step 2/2  loss" in err
    code, out, _ = ddpm("train", *tiny, *STEPS, "--local")
    assert code == 0
    assert "trained 2 steps already" in out
    code, out, _ = ddpm("sample", *tiny, "--local")
    assert code == 0
    assert re.search(r"samples tiny-\w{10}: 10 images in 3 shards; file:///", out)
    before = [(info.key, info.num_bytes) for info in open_storage(str(tmp_path / "results")).list()]
    code, out, _ = ddpm("sample", *tiny, "--local")
    assert code == 0
    assert "all 10 images are there already" in out
    assert [(info.key, info.num_bytes) for info in open_storage(str(tmp_path / "results")).list()] == before
    # another sampler is another set, and a checkpoint may be named by its step or its address
    code, out, _ = ddpm(
        "sample", *tiny, "--local", "--set", "sampler.eta=0.5", "--set", "sample.checkpoint=2"
    )
    assert code == 0
    uri = re.search(r"file:///\S+step-000000002", out)
    assert uri is not None
    code, again, _ = ddpm(
        "sample", *tiny, "--local", "--set", "sampler.eta=0.5", "--set", f"sample.checkpoint={uri[0]}"
    )
    assert code == 0
    assert "all 10 images are there already" in again
    assert "checkpoint '7'" in mistake(ddpm("sample", *tiny, "--local", "--set", "sample.checkpoint=7"))
    # nothing but the run and the two sets
    assert len(list((tmp_path / "results").glob("*/*"))) == 3


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        *((what, damage) for what in ("weights", "optimizer") for damage in (cut, flip, Path.unlink)),
        ("commit", cut),
    ],
)
def test_a_trained_run_whose_last_checkpoint_is_damaged_trains_its_steps_again(
    ddpm: Outcome, tiny: list[str], what: str, damage: Callable[[Path], None]
) -> None:
    steps = (*STEPS, "--set", "train.checkpoint_every=1")
    code, out, _ = ddpm("train", *tiny, *steps, "--local")
    assert code == 0
    place = Path(out.strip().rpartition("file://")[2])
    expected = Checkpoints(open_storage(str(place.parent.parent))).open(2).identity
    [file] = place.glob(f"{what}*")
    damage(file)
    code, out, err = ddpm("train", *tiny, *steps, "--local")
    assert code == 0, err
    assert "already" not in out
    assert ": to step 2, from the checkpoint of step 1; file:" in out
    assert "trained 2 steps" in out
    if file.exists() or what != "commit":
        # without its commit record it is no checkpoint, and nothing is damaged
        assert re.search(
            rf"passed over a damaged checkpoint: \S+step-000000002/{re.escape(file.name)}: ", err
        )
    assert Checkpoints(open_storage(str(place.parent.parent))).open(2).check().identity == expected
    code, out, err = ddpm("train", *tiny, *steps, "--local")
    assert (code, err) == (0, "")
    assert "trained 2 steps already" in out


def test_what_is_said_of_the_checkpoint_to_go_on_from_is_true(ddpm: Outcome, tiny: list[str]) -> None:
    every = (*STEPS, "--set", "train.checkpoint_every=1", "--local")
    code, out, _ = ddpm("train", *tiny, *every)
    assert code == 0
    assert re.search(r": to step 2; file:", out)
    place = Path(out.strip().rpartition("file://")[2])
    [weights] = place.glob("weights*")
    cut(weights)
    code, out, err = ddpm("train", *tiny, *every, "--set", "train.steps=3")
    assert code == 0
    assert ": to step 3, from the checkpoint of step 2 unless it is damaged; file:" in out
    assert "going on from step 1\n" in err


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_sampling_again_makes_a_damaged_unit_again_and_says_so(
    ddpm: Outcome, tiny: list[str], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert ddpm("train", *tiny, *STEPS, "--local")[0] == 0
    code, out, _ = ddpm("sample", *tiny, "--local")
    assert code == 0
    place = Path(out.strip().rpartition("file://")[2])
    before = {number: image.tobytes() for number, image in SampleSet(open_storage(str(place))).images()}
    [file] = place.glob("shard-000001*.tar")
    damage(file)
    code, out, _ = ddpm("sample", *tiny, "--local")
    assert code == 0
    assert out.startswith("damaged, and made again: ")
    assert out.count(str(file)) == 1
    assert "10 images in 3 shards" in out
    after = {number: image.tobytes() for number, image in SampleSet(open_storage(str(place))).images()}
    assert after == before
    assert "all 10 images are there already" in ddpm("sample", *tiny, "--local", "--check")[1]


def test_evaluating_again_finds_the_work_done(
    ddpm: Outcome, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = functools.partial(features.train_classifier, num_steps=5)
    monkeypatch.setattr(evaluate, "train_classifier", trained)
    assert ddpm("train", *tiny, *STEPS, "--local")[0] == 0
    assert ddpm("sample", *tiny, "--local")[0] == 0
    code, first, err = ddpm("evaluate", *tiny)
    assert code == 0, err
    assert "done already" not in first

    class Again(Exception):
        pass

    def again(*arguments: Any) -> None:
        raise Again

    monkeypatch.setattr(evaluate, "evaluate", again)
    monkeypatch.setattr(evaluation_pictures, "draw", again)
    out = tmp_path / "report"
    code, second, err = ddpm("evaluate", *tiny, "--out", str(out))
    assert (code, err) == (0, "")
    assert re.match(r"evaluation tiny-\w{10}: done already\n", second)
    # the same table, and all the files, though they were not asked for the first time
    assert second.splitlines()[1:-1] == first.splitlines()[:-1]
    names = {"report.json", "schedule.png", "loss.png", "bound.png", "samples.png", "trajectory.png"}
    assert {file.name for file in out.iterdir()} == {*names, "distances.png"}
    with pytest.raises(Again):
        ddpm("evaluate", *tiny, "--set", "bound.num_strata=5")


def test_export_writes_a_pipeline_once(ddpm: Outcome, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    arguments = ("export", *tiny, "--out", str(folder))
    assert "train first (ddpm train)" in mistake(ddpm(*arguments))
    assert ddpm("train", *tiny, *STEPS, "--local")[0] == 0
    assert "checkpoint '7'" in mistake(ddpm(*arguments, "--checkpoint", "7"))
    other = mistake(ddpm(*arguments, "--set", "model.base_channels=12"))
    assert "train first" in other  # another model is another run
    assert not folder.exists()
    code, out, err = ddpm(*arguments, "--checkpoint", "2")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"export: file:///\S+step-000000002 → {re.escape(str(folder))}\n", out)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert f"{folder}: exists and is not empty" in mistake(ddpm(*arguments))


def test_export_of_a_checkpoint_by_its_uri_needs_no_data_set(
    ddpm: Outcome, tiny: list[str], tmp_path: Path
) -> None:
    code, out, _ = ddpm("train", *tiny, *STEPS, "--local")
    assert code == 0
    uri = re.findall(r"file:///\S+step-000000002", out)[-1]
    elsewhere = (*tiny, "--set", f"data.uri={tmp_path}/none", "--checkpoint", uri)
    assert ddpm("export", *elsewhere, "--out", str(tmp_path / "one"))[0] == 0
    assert (tmp_path / "one/model_index.json").is_file()
    wrong = ("--set", "model.base_channels=12", "--out", str(tmp_path / "two"))
    assert "model.base_channels: 12, but the checkpoint" in mistake(ddpm("export", *elsewhere, *wrong))
    assert "no finished data set" in mistake(
        ddpm("export", *elsewhere, "--checkpoint", "best", "--out", str(tmp_path / "two"))
    )


def test_without_a_cluster_it_says_how_to_get_one(ddpm: Outcome, tiny: list[str]) -> None:
    assert mistake_after_output(ddpm("train", *tiny)) == (
        "ddpm train: no Ray cluster: start the local stack with `ddpm up`, name one with --address HOST:PORT, or "
        "use --local"
    )


def mistake_after_output(outcome: tuple[int, str, str]) -> str:
    code, _, err = outcome
    return mistake((code, "", err))


@pytest.mark.parametrize("address", ["nonsense", "host:port", "http://x", ":1", "127.0.0.1:99999"])
def test_an_address_that_is_none(address: str, ddpm: Outcome, tiny: list[str]) -> None:
    found = mistake_after_output(ddpm("train", *tiny, "--address", address))
    assert address in found


def test_an_address_that_does_not_answer(ddpm: Outcome, tiny: list[str], tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    found = mistake_after_output(ddpm("train", *tiny, "--address", address))
    assert found.startswith(f"ddpm train: Ray cluster {address}: does not answer (")


def test_a_cluster_that_refuses_us(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: Any) -> None:
        raise ray.exceptions.AuthenticationError("the token is\nmissing")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError) as caught, common.ray_cluster(address):
            pytest.fail("connected")
    assert str(caught.value).startswith(f"Ray cluster {address}: the token is missing")
    assert "\n" not in str(caught.value)


def test_a_polite_signal_stays_an_interruption_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), Interruptions(), common.ray_cluster("auto"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_rays_exit_on_an_interruption_is_one_as_well() -> None:
    from pipelines.train_ray import _interruptible

    def interrupted_fit() -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        interrupted_fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_tracking_server_that_does_not_answer(ddpm: Outcome, tiny: list[str], tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = uri = f"http://127.0.0.1:{free_port()}"
    found = mistake_after_output(ddpm("train", *tiny, "--local"))
    assert found.startswith(f"ddpm train: MLFLOW_TRACKING_URI {uri}: no MLflow server answers there")
    assert not (tmp_path / "results").exists()


def run_with(monkeypatch: pytest.MonkeyPatch, action: Callable[[], int | None]) -> None:
    """Let `ddpm doctor` do this."""
    from jobs import doctor

    monkeypatch.setattr(doctor, "run", lambda arguments: action())


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, ddpm: Outcome) -> None:
    class Failed(UserError):
        exit_code = 1

    def raising(error: BaseException) -> Callable[[], int]:
        def action() -> int:
            raise error

        return action

    for action, code, err in (
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("x: wrong")), 2, "ddpm doctor: x: wrong\n"),
        (raising(Failed("x: failed")), 1, "ddpm doctor: x: failed\n"),
        (raising(KeyboardInterrupt()), 130, "ddpm doctor: interrupted; the same command goes on from here\n"),
    ):
        run_with(monkeypatch, action)
        assert ddpm("doctor") == (code, "", err)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> int:
        raise ZeroDivisionError

    run_with(monkeypatch, bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_end_of_an_import(
    number: int, monkeypatch: pytest.MonkeyPatch, ddpm: Outcome, tmp_path: Path
) -> None:
    """Torch swallows it while it imports NumPy, of which a half is then missing."""
    (tmp_path / "a_module_that_swallows.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(0.2)\n    whole = True\n"
        "except BaseException:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_module_that_swallows", raising=False)
    modules = []

    def run(arguments: argparse.Namespace) -> int:
        modules.append(importlib.import_module("a_module_that_swallows"))
        time.sleep(20)
        return 0

    monkeypatch.setattr("jobs.train.run", run)
    code, out, err = ddpm("train", "--config", "digits.yaml")
    assert (code, out) == (130, "")
    assert err == "ddpm train: interrupted; the same command goes on from here\n"
    assert modules[0].whole


def test_an_import_that_hangs_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, ddpm: Outcome, tmp_path: Path
) -> None:
    (tmp_path / "a_module_that_hangs.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("jobs.interruptions._PATIENCE_S", 0.3)
    monkeypatch.setattr("jobs.train.run", lambda arguments: importlib.import_module("a_module_that_hangs"))
    began = time.monotonic()
    assert ddpm("train", "--config", "digits.yaml")[0] == 130
    assert time.monotonic() - began < 30


def test_an_interruption_of_the_last_import_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, ddpm: Outcome, tmp_path: Path
) -> None:
    (tmp_path / "a_last_module.py").write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGINT)})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_last_module", raising=False)
    monkeypatch.setattr("jobs.train.run", lambda arguments: importlib.import_module("a_last_module") and 0)
    assert ddpm("train", "--config", "digits.yaml")[0] == 130
    # and comes no second time
    time.sleep(0.2)


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch, ddpm: Outcome) -> None:
    """As a shell without job control has it for what runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr("jobs.train.run", lambda arguments: signal.raise_signal(signal.SIGINT))
    assert ddpm("train", "--config", "digits.yaml")[0] == 0


def test_a_polite_signal_is_an_interruption(monkeypatch: pytest.MonkeyPatch, ddpm: Outcome) -> None:
    cleaned = []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            cleaned.append(True)

    run_with(monkeypatch, work)
    assert ddpm("doctor")[0] == 130
    assert cleaned == [True]


def test_our_records_are_plain_lines_and_others_warnings_are_named(
    monkeypatch: pytest.MonkeyPatch, ddpm: Outcome
) -> None:
    def talk() -> None:
        logging.getLogger("pipelines.train").info("hello")
        logging.getLogger("botocore").info("unheard")

    run_with(monkeypatch, talk)
    _, out, err = ddpm("doctor")
    assert out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello\n", err)


def test_doctor_finds_nothing_wrong_here(ddpm: Outcome, tmp_path: Path) -> None:
    code, out, _ = ddpm("doctor", "--storage", str(tmp_path / "storage"))
    checks = {line.split()[1]: line.split()[0] for line in out.splitlines()}
    assert {"python", "torch", "disk", "mlflow", "ray", "storage"} <= checks.keys()
    assert checks["storage"] == checks["python"] == "ok"
    assert code == (1 if "WRONG" in checks.values() else 0)
    assert open_storage(str(tmp_path / "storage")).list() == []


def test_doctor_says_what_is_wrong(ddpm: Outcome) -> None:
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{free_port()}"
    code, out, _ = ddpm("doctor")
    assert code == 1
    assert re.search(r"^WRONG  ray +Ray cluster 127\.0\.0\.1:\d+: does not answer", out, re.MULTILINE)


# --- the local stack's environment ---


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack on record, as `find` gives it."""
    found = Stack(
        tmp_path, "id", {"s3": 1, "mlflow": 2, "gcs": 3, "dashboard": 4, "client": 5}, tmp_path / "ray", 2
    )
    monkeypatch.setattr(common, "find", lambda folder: found)
    return found


def test_without_a_stack_the_environment_stays() -> None:
    before = dict(os.environ)
    common.use_local_stack()
    assert dict(os.environ) == before


def test_a_stack_gives_what_the_environment_does_not_say(stack: Stack) -> None:
    common.use_local_stack()
    for name, value in stack.environment().items():
        assert os.environ[name] == value


@pytest.mark.parametrize(
    ("own", "group"),
    [
        ("AWS_ENDPOINT_URL", "AWS_"),
        ("AWS_ENDPOINT_URL_S3", "AWS_"),
        ("AWS_ACCESS_KEY_ID", "AWS_"),
        ("AWS_PROFILE", "AWS_"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_"),
        ("RAY_ADDRESS", ("RAY_ADDRESS", "RAY_API", "RAY_AUTH", "DDPM_DASH")),
        ("RAY_API_SERVER_ADDRESS", ("RAY_ADDRESS", "RAY_API", "RAY_AUTH", "DDPM_DASH")),
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING"),
    ],
)
def test_what_the_user_says_wins_as_a_group(own: str, group: str | tuple[str, ...], stack: Stack) -> None:
    """The stack's secret must not go to the user's server, nor the user's to the stack's."""
    os.environ[own] = "the user's"
    common.use_local_stack()
    assert {name: value for name, value in os.environ.items() if name.startswith(group)} == {
        own: "the user's"
    }
    others = {
        name: value
        for name, value in stack.environment().items()
        if not name.startswith(("RAY_", "MLFLOW_", "AWS_", "DDPM_")) or name.endswith("_URI")
    }
    assert all(os.environ[name] == value for name, value in others.items() if name != own)


@pytest.mark.parametrize(
    "address",
    ["elsewhere:6379", "http://127.0.0.1:5", "127.0.0.1:40", "nonsense", "http://[::1", "elsewhere:4", "x:3"],
)
def test_a_given_address_is_not_asked_with_the_stacks_token(address: str, stack: Stack) -> None:
    common.use_local_stack(address)
    assert not [name for name in os.environ if name.startswith(("RAY_ADDRESS", "RAY_AUTH", "RAY_API"))]
    assert os.environ["AWS_ENDPOINT_URL"] == stack.s3_endpoint


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:4",
        "127.0.0.1:4",
        "http://127.0.0.1:4/",
        "localhost:4",
        "HTTP://LocalHost:4",
        "127.0.0.1:3",
    ],
)
def test_the_stacks_own_address_is_known_however_it_is_spelt(address: str, stack: Stack) -> None:
    common.use_local_stack(address)
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(stack.token_path)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_state_folder_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise StackError("stack.json: cannot be read")

    monkeypatch.setattr(common, "find", broken)
    with pytest.raises(UserError, match=r"^stack\.json: cannot be read$"):
        common.use_local_stack()


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_STATE", "here")
    assert common.state_dir() == tmp_path / "here"
    monkeypatch.delenv("DDPM_STATE")
    assert common.state_dir() == tmp_path / ".ddpm"


# --- errors ---


def test_an_error_crosses_processes_unchanged() -> None:
    from jobs.submit import JobFailed
    from pipelines.checkpoints import CheckpointError
    from pipelines.dataset import DataError
    from pipelines.records import RecordError
    from pipelines.sample_set import SampleSetError
    from pipelines.storage import ObjectMissing, StorageError
    from pipelines.training import TrainingError

    kinds: list[type[Any]] = [
        UserError,
        CheckpointError,
        DataError,
        ObjectMissing,
        RecordError,
        SampleSetError,
        StorageError,
        TrainingError,
    ]
    for kind in [*kinds, JobFailed]:
        again = pickle.loads(pickle.dumps(kind("x: wrong")))  # noqa: S301  what Ray does with errors
        assert type(again) is kind
        assert str(again) == "x: wrong"


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 500), 10) == "x" * 9 + "…"
