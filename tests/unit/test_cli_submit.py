"""`ddpm submit`: what travels to a job, and a job of the same run that is under way with other settings."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import submission
from jobs.cli import command_parser, main
from jobs.submission import JobStatus, Submission
from jobs.submit import JOBS

NAME = "train-digits-1"


def answers(monkeypatch: pytest.MonkeyPatch, *outcomes: Submission) -> list[str]:
    """Have `submission.submit` say these in turn; returns the configurations that it is called with."""
    asked: list[str] = []
    left: Iterator[Submission] = iter(outcomes)

    def submit(job: str, argv: list[str], config_text: str, **others: object) -> Submission:
        asked.append(config_text)
        return next(left)

    monkeypatch.setattr(submission, "submit", submit)
    return asked


def ended(status: str = "SUCCEEDED", *, as_asked: bool) -> Submission:
    job = JobStatus(NAME, "train", "digits", status, "its last line")
    return Submission(job, attached=not as_asked, detached=False, as_asked=as_asked)


def code_of(*more: str) -> int:
    return main(["submit", "train", "--config", "digits.yaml", *more])


def test_what_was_asked_for_follows_a_job_with_other_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(monkeypatch, ended(as_asked=False), ended(as_asked=True))
    assert code_of() == 0
    assert len(asked) == 2
    assert asked[0] == asked[1]
    assert f"{NAME} had other settings" in capsys.readouterr().out


def test_a_failure_of_the_other_job_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, ended("FAILED", as_asked=False))
    assert code_of() == 1
    assert f"{NAME} failed: its last line" in capsys.readouterr().err


def test_without_waiting_other_settings_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, ended("RUNNING", as_asked=False))
    assert code_of("--no-wait") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{NAME}: is under way with other settings" in error


def test_with_the_same_settings_it_is_submitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, ended(as_asked=True))
    assert code_of() == 0
    assert len(asked) == 1


# what says where it runs; the configuration travels as a file
NOT_CARRIED = {"config", "overrides", "address", "local", "help"}


def example(action: argparse.Action) -> list[str]:
    """An argument that says something else than the default."""
    value = str(list(action.choices)[-1]) if action.choices else f"s3://bucket/it's {action.dest}"
    if not action.option_strings:
        return [value]
    return [action.option_strings[-1]] if action.nargs == 0 else [action.option_strings[-1], value]


@pytest.mark.parametrize("job", JOBS)
def test_whatever_a_job_takes_travels_to_it(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[list[str]] = []

    def submit(job: str, argv: list[str], config_text: str, **others: object) -> Submission:
        carried.append(argv)
        return ended(as_asked=True)

    monkeypatch.setattr(submission, "submit", submit)
    own = [action for action in command_parser(job)._actions if action.dest not in NOT_CARRIED]
    given = [word for action in own for word in example(action)]
    assert main(["submit", job, *given, "--config", "digits.yaml", "--set", "name=x"]) == 0
    command = shlex.split(submission.entrypoint(job, carried[0]))
    assert command[:4] == ["python", "-m", "jobs", job]
    parser = command_parser(job)
    arrived = parser.parse_args(command[4:])
    for action in own:
        value = getattr(arrived, action.dest)
        assert value != action.default, f"{action.dest} of {job} does not travel"
        assert action.nargs == 0 or value == example(action)[-1]


def test_the_options_of_prepare_are_among_them() -> None:
    names = {action.dest for action in command_parser("prepare")._actions} - NOT_CARRIED
    assert names >= {"source", "out", "index_only", "labels", "image", "label"}


@pytest.mark.parametrize("given", [["--out", "here"], ["--out=here"], ["--out", "there", "--out", "here"]])
def test_a_folder_of_this_process_is_one_there_too(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    carried: list[list[str]] = []

    def submit(job: str, argv: list[str], config_text: str, **others: object) -> Submission:
        carried.append(argv)
        return ended(as_asked=True)

    monkeypatch.setattr(submission, "submit", submit)
    assert main(["submit", "prepare", "digits", "--config", "digits.yaml", *given, "--index-only"]) == 0
    assert carried == [["digits", "--index-only", "--out", str(tmp_path / "here")]]


@pytest.mark.parametrize("job", ["train", "tune", "sample"])
def test_stages_are_looked_at_before_anything_is_sent(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sent_nowhere.py").write_text("")
    asked = answers(monkeypatch, ended(as_asked=True))
    stages = "data.stages=[no_such_package.x, sent_nowhere.crop]"
    code = main(["submit", job, "--config", "digits.yaml", "--set", stages])
    # a job that reads no training images imports nothing
    assert (code, len(asked)) == ((0, 1) if job == "sample" else (2, 0))
    error = capsys.readouterr().err
    assert ("data.stages[1]: sent_nowhere.crop: the module sent_nowhere has no 'crop'" in error) == (
        code == 2
    )
