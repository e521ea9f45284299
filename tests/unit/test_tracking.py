"""The run's own history, and the tracking server's copy of it: each row once, none lost, never in the way."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException, RestException

from pipelines.adapters import mlflow as adapter
from pipelines.errors import UserError
from pipelines.records import RecordError
from pipelines.storage import FileStorage, Storage, StorageError, open_storage
from pipelines.tracking import (
    End,
    History,
    NoTracker,
    Row,
    RunDescription,
    Tracker,
    Turn,
    end_tracking,
    ended,
    flatten,
    open_tracker,
    tracked_as,
)
from tests.support.s3 import free_port

URI = "fake://server"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


# --- history ---


def test_history_there_and_back(run: Storage) -> None:
    history = History(run)
    assert history.rows() == []
    history.append(10, [Row(5, {"loss": 0.1}), Row(10, {"loss": 1 / 3, "held_out/total": 3.0})])
    history.append(20, [Row(15, {"loss": 0.2})])
    assert history.rows() == [
        Row(5, {"loss": 0.1}),
        Row(10, {"loss": 1 / 3, "held_out/total": 3.0}),
        Row(15, {"loss": 0.2}),
    ]
    assert [row.step for row in history.rows(up_to=10)] == [5, 10]


def test_rows_of_one_step_become_one(run: Storage) -> None:
    History(run).append(10, [Row(10, {"loss": 0.1}), Row(10, {"held_out/total": 3.0})])
    assert History(run).rows() == [Row(10, {"loss": 0.1, "held_out/total": 3.0})]


def test_an_interval_written_again_replaces_itself(run: Storage) -> None:
    History(run).append(10, [Row(5, {"loss": 0.1}), Row(10, {"loss": 0.2})])
    History(run).append(10, [Row(10, {"loss": 0.3})])
    assert History(run).rows() == [Row(10, {"loss": 0.3})]


def test_where_intervals_overlap_the_later_one_wins(run: Storage) -> None:
    # stopped after 20 with nothing committed, it went on from 10 with other intervals
    History(run).append(20, [Row(15, {"loss": 1.0}), Row(20, {"loss": 1.0})])
    History(run).append(25, [Row(15, {"loss": 2.0}), Row(25, {"loss": 2.0})])
    assert History(run).rows() == [Row(15, {"loss": 2.0}), Row(20, {"loss": 1.0}), Row(25, {"loss": 2.0})]


def test_an_interval_without_rows(run: Storage) -> None:
    History(run).append(10, [])
    History(run).append(20, [Row(20, {"loss": 1.0})])
    assert [row.step for row in History(run).rows()] == [20]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000, "[" * 500 + "]" * 500, "{", "[]", "7", '{"loss": 1}', '{"step": "4"}', '{"step": 1.5}',
        '{"step": true}', '{"step": null}', '{"step": 4, "loss": "x"}', '{"step": 4, "loss": [1]}',
        '{"step": 4, "loss": null}', "\xff",
    ],
)  # fmt: skip
def test_rows_that_are_none_are_one_line_that_names_the_object(run: Storage, line: str) -> None:
    run.put("history/step-000000010.jsonl", b'{"step": 1, "loss": 2}\n' + line.encode("latin-1"))
    with pytest.raises(RecordError, match=f"^{run.uri}/history/step-000000010.jsonl: ") as caught:
        History(run).rows()
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_is_kept(run: Storage) -> None:
    History(run).append(10, [Row(10, {"loss": math.nan, "grad_norm": math.inf})])
    [row] = History(run).rows()
    assert math.isnan(row.metrics["loss"])
    assert row.metrics["grad_norm"] == math.inf


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "null", "{}", '{"run_id": 3}', '{"tracker": []}'])
def test_a_tracking_record_that_is_none_is_one_line_that_names_it(run: Storage, text: str) -> None:
    run.put("mlflow.json", text.encode())
    with pytest.raises(RecordError, match=f"^{run.uri}/mlflow.json: "):
        tracked_as(run)
    turn = Turn(run)
    assert turn.successor() is None
    run.put("tracker.json", text.encode())
    with pytest.raises(RecordError, match=f"^{run.uri}/tracker.json: "):
        turn.successor()


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}


# --- a server ---


@dataclass
class FakeServer:
    """What an MLflow server keeps, as far as our client asks for it."""

    away: bool = False
    experiments: dict[str, SimpleNamespace] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)
    before_create: Callable[[], None] = lambda: None

    def client(self, tracking_uri: str) -> FakeClient:
        assert tracking_uri == URI
        return FakeClient(self)

    def metrics(self, run_id: str) -> list[tuple[str, int, float]]:
        return [(m.key, m.step, m.value) for m in self.runs[run_id]["metrics"]]

    @property
    def only(self) -> dict[str, Any]:
        [found] = [run for run in self.runs.values() if run["stage"] == "active"]
        return found


class FakeClient:
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def _run(self, run_id: str) -> dict[str, Any]:
        if self._server.away:
            raise MlflowException("API request failed: connection refused\nafter 1 retries")
        if run_id not in self._server.runs:
            raise RestException(
                {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"Run with id={run_id} not found"}
            )
        return self._server.runs[run_id]

    def get_run(self, run_id: str) -> SimpleNamespace:
        run = self._run(run_id)
        newest = {metric.key: metric.value for metric in run["metrics"]}
        return SimpleNamespace(
            info=SimpleNamespace(run_id=run_id, lifecycle_stage=run["stage"], status=run["status"]),
            data=SimpleNamespace(metrics=newest),
        )

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self._run(run_id)["metrics"] if metric.key == key]

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        if self._server.away:
            raise MlflowException("away")
        return self._server.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        if name in self._server.experiments:
            raise RestException({"error_code": "RESOURCE_ALREADY_EXISTS", "message": "there already"})
        found = SimpleNamespace(experiment_id=str(len(self._server.experiments)), lifecycle_stage="active")
        self._server.experiments[name] = found
        return str(found.experiment_id)

    def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        self._server.before_create()
        run_id = f"run-{next(self._server.numbers)}"
        self._server.runs[run_id] = {
            "id": run_id, "experiment": experiment_id, "name": run_name, "tags": dict(tags), "params": {},
            "metrics": [], "status": "RUNNING", "stage": "active", "files": {},
        }  # fmt: skip
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def delete_run(self, run_id: str) -> None:
        self._run(run_id)["stage"] = "deleted"

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        run = self._run(run_id)
        assert len(metrics) <= 1000
        assert len(params) <= 100
        for param in params:
            if run["params"].get(param.key, param.value) != param.value:
                raise MlflowException(f"Changing param values is not allowed: {param.key}")
            run["params"][param.key] = param.value
        run["tags"] |= {tag.key: tag.value for tag in tags}
        run["metrics"] += list(metrics)
        self._server.batches.append(len(metrics))

    def update_run(self, run_id: str, status: str) -> None:
        self._run(run_id)["status"] = status

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._run(run_id)["tags"][key] = value

    def set_terminated(self, run_id: str, status: str) -> None:
        self._run(run_id)["status"] = status

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        name = f"{folder}/{Path(path).name}" if folder else Path(path).name
        self._run(run_id)["files"][name] = Path(path).read_bytes()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    found = FakeServer()
    monkeypatch.setattr(adapter, "MlflowClient", found.client)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by a test."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def description(**changes: Any) -> RunDescription:
    values: dict[str, Any] = {
        "experiment": "digits",
        "name": "tiny-123",
        "params": {"seed": 0, "model": {"base_channels": 8}},
        "tags": {"ddpm.workers": "2"},
    }
    return RunDescription(**{**values, **changes})


def opened(run: Storage, **changes: Any) -> Tracker:
    return open_tracker(URI, description(**changes), run)


def rows(*steps: int) -> list[Row]:
    return [Row(step, {"loss": step / 10, "rate": 0.5}) for step in steps]


def test_without_a_server_nothing_is_tracked(run: Storage) -> None:
    for uri in (None, ""):
        tracker = open_tracker(uri, description(), run)
        assert isinstance(tracker, NoTracker)
        tracker.log(rows(1))
        tracker.artifact("x", b"")
        tracker.finish("FINISHED")
    assert run.list() == []


def test_a_run_is_made_and_recorded(run: Storage, server: FakeServer) -> None:
    tracker = opened(run, parent_run_id="run-of-the-sweep")
    assert json.loads(run.get("mlflow.json")) == {"run_id": tracker.run_id}
    made = server.only
    assert (made["name"], made["status"]) == ("tiny-123", "RUNNING")
    assert made["params"] == {"seed": "0", "model.base_channels": "8"}
    assert made["tags"] == {
        "ddpm.run": "tiny-123", "ddpm.workers": "2", "mlflow.parentRunId": "run-of-the-sweep",
    }  # fmt: skip
    tracker.log(rows(1, 2))
    tracker.artifact("samples/a.png", b"png")
    tracker.artifact("config.yaml", b"yaml")
    tracker.finish("FINISHED")
    assert server.metrics(made["id"]) == [
        ("loss", 1, 0.1), ("rate", 1, 0.5), ("loss", 2, 0.2), ("rate", 2, 0.5),
    ]  # fmt: skip
    assert made["files"] == {"samples/a.png": b"png", "config.yaml": b"yaml"}
    assert made["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("error", "end"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_is_called_by_how_it_ended(
    run: Storage, server: FakeServer, error: type[BaseException], end: str
) -> None:
    with pytest.raises(error), ended(opened(run)):
        raise error
    assert server.only["status"] == end
    with ended(opened(run)):
        assert server.only["status"] == "RUNNING"
    assert server.only["status"] == "FINISHED"


@pytest.mark.parametrize("said", [None, "FAILED"])
def test_who_stopped_a_run_says_how_it_ended(run: Storage, server: FakeServer, said: End | None) -> None:
    tracker = opened(run)
    if said:
        # a worker lost its neighbour, which was stopped first
        tracker.finish(said)
    end_tracking(URI, run, "KILLED")
    assert server.only["status"] == "KILLED"
    assert server.only["tags"]["ddpm.stopped"] == "true"


def test_a_run_whose_workers_were_lost_without_a_word_has_failed(run: Storage, server: FakeServer) -> None:
    opened(run)
    end_tracking(URI, run, "FAILED")
    assert server.only["status"] == "FAILED"
    assert "ddpm.stopped" not in server.only["tags"]


def test_a_trial_that_says_it_was_killed_was_stopped_by_its_sweep(run: Storage, server: FakeServer) -> None:
    opened(run).finish("KILLED")
    end_tracking(URI, run, "FINISHED")
    assert server.only["status"] == "FINISHED"
    assert server.only["tags"]["ddpm.stopped"] == "true"


def test_a_run_that_came_to_its_end_is_not_called_stopped(run: Storage, server: FakeServer) -> None:
    opened(run).finish("FINISHED")
    end_tracking(URI, run, "KILLED")
    assert server.only["status"] == "FINISHED"
    assert "ddpm.stopped" not in server.only["tags"]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_and_sends_nothing_twice(
    run: Storage, server: FakeServer
) -> None:
    first = opened(run)
    first.log(rows(1, 2, 3))
    # killed; it goes on from step 1, elsewhere, and computes 2 and 3 again
    second = opened(run, tags={"ddpm.workers": "4"})
    assert second.run_id == first.run_id
    second.log(rows(2))
    second.log([*rows(3), Row(3, {"held_out/total": 3.0}), *rows(4)])
    assert [(key, step) for key, step, _ in server.metrics(str(first.run_id))] == [
        ("loss", 1), ("rate", 1), ("loss", 2), ("rate", 2), ("loss", 3), ("rate", 3),
        ("held_out/total", 3), ("loss", 4), ("rate", 4),
    ]  # fmt: skip
    assert server.only["tags"]["ddpm.workers"] == "4"
    assert server.only["params"] == {"seed": "0", "model.base_channels": "8"}


def test_many_metrics_go_in_batches(run: Storage, server: FakeServer) -> None:
    opened(run).log(rows(*range(1, 1201)))
    assert [size for size in server.batches if size] == [1000, 1000, 400]


def test_many_and_long_params_fit(run: Storage, server: FakeServer) -> None:
    opened(run, params={**{f"p{number}": number for number in range(250)}, "long": "x" * 10_000})
    assert len(server.only["params"]) == 251
    assert len(server.only["params"]["long"]) == 6000


def test_what_a_server_missed_is_sent_when_it_is_back(
    run: Storage, server: FakeServer, clock: list[float]
) -> None:
    tracker = opened(run)
    tracker.log(rows(1))
    server.away = True
    tracker.log(rows(2))
    tracker.artifact("x", b"lost")
    clock[0] += 100
    tracker.log(rows(3))
    server.away = False
    clock[0] += 100
    tracker.log(rows(4))
    steps = [step for key, step, _ in server.metrics(str(tracker.run_id)) if key == "loss"]
    assert steps == [1, 2, 3, 4]


def test_a_server_that_is_away_is_not_asked_at_every_row(
    run: Storage, server: FakeServer, clock: list[float]
) -> None:
    asked = []
    tracker = opened(run)
    server.away = True
    client = tracker._client  # type: ignore[attr-defined]
    log_batch = client.log_batch

    def counted(*args: Any, **options: Any) -> None:
        asked.append(clock[0])
        log_batch(*args, **options)

    client.log_batch = counted
    for step in range(1, 400):
        clock[0] += 1
        tracker.log(rows(step))
    # at growing intervals, and never more than about a minute apart
    assert 5 < len(asked) < 20
    assert max(b - a for a, b in itertools.pairwise(asked)) <= 62
    server.away = False
    tracker.finish("FINISHED")
    assert len(server.metrics(str(tracker.run_id))) == 2 * 399


def test_an_end_without_a_server_warns_and_the_next_start_sends_the_rest(
    run: Storage, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    tracker = opened(run)
    tracker.log(rows(1))
    server.away = True
    with caplog.at_level(logging.WARNING, "pipelines"):
        tracker.log(rows(2))
        tracker.finish("FINISHED")
    assert "2 metrics of tiny-123 did not reach MLflow" in caplog.text
    assert all("\n" not in message for message in caplog.messages)
    server.away = False
    again = opened(run)
    again.log(rows(1, 2))
    assert [step for key, step, _ in server.metrics(str(tracker.run_id)) if key == "loss"] == [1, 2]


def test_a_server_that_is_away_at_the_start_is_one_line(run: Storage, server: FakeServer) -> None:
    server.away = True
    with pytest.raises(UserError, match=f"^MLFLOW_TRACKING_URI {URI}: ") as caught:
        opened(run)
    assert "\n" not in str(caught.value)
    assert run.list() == []


def test_an_address_where_nothing_answers(run: Storage) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"^MLFLOW_TRACKING_URI {uri}: no MLflow server answers there"):
        open_tracker(uri, description(), run)


def test_a_deleted_run_is_replaced(run: Storage, server: FakeServer) -> None:
    first = opened(run)
    first.log(rows(1))
    server.runs[str(first.run_id)]["stage"] = "deleted"
    second = opened(run)
    assert second.run_id != first.run_id
    assert json.loads(run.get("mlflow.json")) == {"run_id": second.run_id}
    # all of its history is news to the new run
    second.log(rows(1, 2))
    assert [step for key, step, _ in server.metrics(str(second.run_id)) if key == "loss"] == [1, 2]


def test_a_server_that_does_not_know_the_run_gets_a_new_one(run: Storage, server: FakeServer) -> None:
    run.put("mlflow.json", b'{"run_id": "of another server"}')
    tracker = opened(run)
    assert tracker.run_id in server.runs
    assert json.loads(run.get("mlflow.json")) == {"run_id": tracker.run_id}


def test_who_loses_the_race_for_the_record_takes_the_winners_run(run: Storage, server: FakeServer) -> None:
    winner: list[Tracker] = []

    def overtake() -> None:
        server.before_create = lambda: None
        winner.append(opened(run))

    server.before_create = overtake
    loser = opened(run)
    assert loser.run_id == winner[0].run_id == server.only["id"]
    assert len(server.runs) == 2
    # the deleted one is the loser's own
    assert server.runs[str(winner[0].run_id)]["stage"] == "active"
    assert json.loads(run.get("mlflow.json")) == {"run_id": loser.run_id}
    assert server.only["params"] == {"seed": "0", "model.base_channels": "8"}


def test_an_experiment_that_another_run_makes_first(
    run: Storage, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = FakeClient.get_experiment_by_name
    outcomes: list[SimpleNamespace | None] = []

    def overtaken(self: FakeClient, name: str) -> SimpleNamespace | None:
        outcomes.append(look(self, name))
        if len(outcomes) == 1:
            self.create_experiment(name)
        return outcomes[-1]

    monkeypatch.setattr(FakeClient, "get_experiment_by_name", overtaken)
    opened(run)
    assert outcomes == [None, server.experiments["digits"]]
    assert server.only["experiment"] == server.experiments["digits"].experiment_id


def test_params_that_did_not_arrive_are_sent_at_the_next_start(
    run: Storage, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch = FakeClient.log_batch

    def broken(self: FakeClient, run_id: str, **what: Any) -> None:
        raise MlflowException("hiccup")

    monkeypatch.setattr(FakeClient, "log_batch", broken)
    with pytest.raises(UserError, match="hiccup"):
        opened(run)
    monkeypatch.setattr(FakeClient, "log_batch", log_batch)
    tracker = opened(run)
    assert server.runs[str(tracker.run_id)]["params"] == {"seed": "0", "model.base_channels": "8"}


def test_a_deleted_experiment_is_named(run: Storage, server: FakeServer) -> None:
    server.experiments["digits"] = SimpleNamespace(experiment_id="0", lifecycle_stage="deleted")
    with pytest.raises(UserError, match=r"^tracking.experiment: 'digits' is deleted in MLflow"):
        opened(run)
    assert run.list() == []


def test_a_refusal_that_is_none_of_ours_is_told(
    run: Storage, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(run)

    def refused(self: FakeClient, run_id: str) -> None:
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "not yours"})

    monkeypatch.setattr(FakeClient, "get_run", refused)
    with pytest.raises(UserError, match="not yours"):
        opened(run)
    # the record of the run stays
    assert run.exists("mlflow.json")


# --- two trainers of one run ---


def sent_steps(server: FakeServer) -> list[int]:
    return [step for key, step, _ in server.metrics(server.only["id"]) if key == "loss"]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, each record once: after Ray has set up logging here, a handler may meet it twice."""
    return list({id(record): record.getMessage() for record in caplog.records}.values())


def test_of_two_trainers_the_last_one_started_tells_and_each_row_comes_once(
    run: Storage, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    first = opened(run)
    first.log(rows(1, 2))
    second = opened(run)
    with caplog.at_level(logging.WARNING, "pipelines"):
        for step in range(1, 6):
            second.log(rows(step))
            first.log(rows(step + 2))
        first.artifact("samples/a.png", b"first")
        second.artifact("samples/a.png", b"second")
    assert sent_steps(server) == [1, 2, 3, 4, 5]
    assert server.only["files"] == {"samples/a.png": b"second"}
    [message] = told(caplog)
    assert message.startswith("another trainer of tiny-123 was started (")
    # nor does the end of the first one end the run
    first.finish("FAILED")
    assert server.only["status"] == "RUNNING"
    second.finish("FINISHED")
    assert server.only["status"] == "FINISHED"
    assert told(caplog) == [message]


def test_a_damaged_record_of_whose_turn_it_is_does_not_end_the_training(
    run: Storage, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    tracker = opened(run)
    tracker.log(rows(1))
    run.put("tracker.json", b"[" * 100_000)
    with caplog.at_level(logging.WARNING, "pipelines"):
        tracker.log(rows(2))
        tracker.finish("FINISHED")
    assert sent_steps(server) == [1]
    assert "tracker.json: is not JSON" in told(caplog)[0]
    # the next one writes itself there and sends what is missing
    again = opened(run)
    again.log(rows(1, 2))
    assert sent_steps(server) == [1, 2]


def test_what_the_first_one_had_on_its_way_is_not_sent_again(
    run: Storage, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts after the first has looked whose turn it is, and before its message arrives."""
    first = opened(run)
    second: list[Tracker] = []
    log_batch = FakeClient.log_batch

    def overtaken(self: FakeClient, run_id: str, **what: Any) -> None:
        monkeypatch.setattr(FakeClient, "log_batch", log_batch)
        second.append(opened(run))
        log_batch(self, run_id, **what)

    monkeypatch.setattr(FakeClient, "log_batch", overtaken)
    first.log(rows(1, 2))
    second[0].log(rows(1))
    second[0].log(rows(2, 3))
    assert sent_steps(server) == [1, 2, 3]


def test_what_the_silent_one_left_is_sent_at_the_next_start(run: Storage, server: FakeServer) -> None:
    """Both save the same history; the one that tells dies, and the other trains on in silence."""
    first = opened(run)
    second = opened(run)
    second.log(rows(1))
    first.log(rows(1, 2, 3))
    assert sent_steps(server) == [1]
    opened(run).log(rows(1, 2, 3, 4))
    assert sent_steps(server) == [1, 2, 3, 4]


def test_while_storage_is_away_nothing_is_sent_and_nothing_lost(
    run: Storage, server: FakeServer, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = opened(run)
    get = FileStorage.get

    def away(self: FileStorage, key: str) -> bytes:
        raise StorageError("away")

    monkeypatch.setattr(FileStorage, "get", away)
    tracker.log(rows(1))
    assert sent_steps(server) == []
    monkeypatch.setattr(FileStorage, "get", get)
    clock[0] += 100
    tracker.log(rows(2))
    assert sent_steps(server) == [1, 2]
