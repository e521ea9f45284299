"""`ddpm submit` beside a job of the same run that is under way with other settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs import submission
from jobs.cli import main
from jobs.submission import JobStatus, Submission

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
