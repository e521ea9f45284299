"""MLflow by its client; the only file that imports it."""

from __future__ import annotations

import http.client
import json
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

# set before the import: at MLflow's defaults a server that is down blocks a call for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException, RestException

from pipelines.errors import UserError, one_line, without_password
from pipelines.records import RecordError
from pipelines.storage import Storage, StorageError
from pipelines.tracking import TRACKING_RECORD, End, Row, RunDescription, Turn, flatten, tracked_as

log = logging.getLogger(__name__)

_METRICS_A_CALL = 1000
_PARAMS_A_CALL = 100
_PARAM_LENGTH = 6000
# requests' errors are OSErrors
_AWAY = (MlflowException, OSError)


def check_server(uri: str, timeout_s: float = 5) -> None:
    """Raise a `UserError` of one line unless an MLflow server answers at `uri` (databases are not asked)."""
    if not uri.startswith(("http://", "https://")):
        return
    shown = without_password(uri)
    try:
        urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        # a server behind a gate that wants credentials answers too
        if error.code not in (401, 403):
            raise UserError(
                f"MLFLOW_TRACKING_URI {shown}: the server there is no healthy MLflow server ({error.code})"
            ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = one_line(Exception(str(getattr(error, "reason", error))))
        raise UserError(f"MLFLOW_TRACKING_URI {shown}: no MLflow server answers there ({reason})") from None


def open_mlflow_run(uri: str, description: RunDescription, run: Storage) -> MLflowTracker:
    """Go on with the MLflow run recorded in the run's storage, or make one and record it."""
    check_server(uri)
    client = MlflowClient(tracking_uri=uri)
    try:
        run_id = _recorded(client, run)
        if run_id is None:
            run_id = _create(client, description, run)
        turn = Turn(run)
        client.update_run(run_id, status="RUNNING")
        for key, value in description.tags.items():
            client.set_tag(run_id, key, value)
        return MLflowTracker(client, run_id, description.name, turn)
    except _AWAY as error:
        raise UserError(f"MLFLOW_TRACKING_URI {without_password(uri)}: {one_line(error)}") from None


def _recorded(client: MlflowClient, run: Storage) -> str | None:
    run_id = tracked_as(run)
    if run_id is None:
        return None
    try:
        found = client.get_run(run_id)
    except RestException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None or found.info.lifecycle_stage != "active":
        log.warning("the MLflow run %s of this run was deleted there; a new one takes its place", run_id)
        run.delete([TRACKING_RECORD])
        return None
    return run_id


def _create(client: MlflowClient, description: RunDescription, run: Storage) -> str:
    experiment = client.get_experiment_by_name(description.experiment)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: {description.experiment!r} is deleted in MLflow; restore it there"
        )
    experiment_id = (
        experiment.experiment_id if experiment else _create_experiment(client, description.experiment)
    )
    tags = {"ddpm.run": description.name}
    if description.parent_run_id:
        tags["mlflow.parentRunId"] = description.parent_run_id
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=description.name).info.run_id)
    # before the record, since a run that is on record is taken as it is
    params = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in flatten(description.params).items()]
    for start in range(0, len(params), _PARAMS_A_CALL):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_CALL])
    if not run.put_if_absent(TRACKING_RECORD, json.dumps({"run_id": run_id}).encode()):
        client.delete_run(run_id)
        return str(tracked_as(run))
    return run_id


def _create_experiment(client: MlflowClient, name: str) -> str:
    try:
        return str(client.create_experiment(name))
    except RestException:
        # another run of the same experiment came first
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def end_mlflow_run(uri: str, run: Storage, end: End) -> None:
    """Give the MLflow run recorded in the run's storage this end, unless it has that or has finished."""
    run_id = tracked_as(run)
    if run_id is None:
        return
    client = MlflowClient(tracking_uri=uri)
    try:
        if client.get_run(run_id).info.status not in ("FINISHED", end):
            if end != "FAILED":
                client.set_tag(run_id, "ddpm.stopped", "true")
            client.set_terminated(run_id, end)
    except _AWAY as error:
        log.warning("MLflow was not told of the end of run %s: %s", run_id, one_line(error, 160))


class MLflowTracker:
    """One MLflow run.  Not for several threads."""

    def __init__(self, client: MlflowClient, run_id: str, name: str, turn: Turn) -> None:
        self._client = client
        self._name = name
        self.run_id = run_id
        self._turn = turn
        self._silent = False
        self._pending: list[Metric] = []
        self._away_until = 0.0
        self._pause_s = 1.0
        # a resumed run computes again what it had already sent
        self._sent = self._known()
        self._look_again = turn.taken_over

    def _known(self) -> dict[str, int]:
        """The last step of each metric that the server has."""
        keys = self._client.get_run(self.run_id).data.metrics
        return {key: max(m.step for m in self._client.get_metric_history(self.run_id, key)) for key in keys}

    def log(self, rows: Iterable[Row]) -> None:
        if self._silent:
            return
        now_ms = int(time.time() * 1000)
        for row in rows:
            for key, value in row.metrics.items():
                if row.step > self._sent.get(key, -1):
                    self._pending.append(Metric(key, float(value), now_ms, row.step))
                    self._sent[key] = row.step
        if self._pending and time.monotonic() >= self._away_until:
            self._flush()

    def _flush(self) -> bool:
        """Send what is pending; what the server did not take stays pending."""
        if self._pending and not self._may_send():
            return self._silent
        while self._pending:
            batch = self._pending[:_METRICS_A_CALL]
            if not self._try("metrics", partial(self._client.log_batch, self.run_id, metrics=batch)):
                return False
            del self._pending[: len(batch)]
        return True

    def _may_send(self) -> bool:
        """It is this tracker's turn, and nothing that is pending has come from the one before it."""
        if not self._has_turn():
            return False
        if self._look_again:
            # by now what the one before had on its way has arrived
            if not self._try("the question what it has", self._drop_known):
                return False
            self._look_again = False
        return True

    def _drop_known(self) -> None:
        known = self._known()
        self._pending = [metric for metric in self._pending if metric.step > known.get(metric.key, -1)]
        self._sent |= {key: max(step, self._sent.get(key, -1)) for key, step in known.items()}

    def _has_turn(self) -> bool:
        if not self._silent:
            try:
                successor = self._turn.successor()
            except (StorageError, RecordError) as error:
                self._wait(f"whose turn it is to track {self._name} is not known", error)
                return False
            if successor is not None:
                log.warning(
                    "another trainer of %s was started (%s); that one tells MLflow of the run from here on, "
                    "and this one does not; stop one of them",
                    self._name,
                    successor,
                )
                self._silent = True
                self._pending.clear()
        return not self._silent

    def _wait(self, what: str, error: Exception) -> None:
        log.warning("%s: %s", what, one_line(error, 160))
        self._away_until = time.monotonic() + self._pause_s
        self._pause_s = min(60.0, self._pause_s * 2)

    def _try(self, what: str, call: Callable[[], Any]) -> bool:
        try:
            call()
        except _AWAY as error:
            self._wait(f"MLflow did not take {what} of {self._name}", error)
            return False
        self._pause_s = 1.0
        return True

    def artifact(self, path: str, data: bytes) -> None:
        if not self._has_turn():
            return
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="ddpm-artifact-") as scratch:
            file = Path(scratch) / name
            file.write_bytes(data)
            self._try(path, lambda: self._client.log_artifact(self.run_id, str(file), folder or None))

    def finish(self, end: End) -> None:
        if not self._flush():
            log.warning(
                "%d metrics of %s did not reach MLflow; they stand in the run's history, and starting the "
                "run again sends them",
                len(self._pending),
                self._name,
            )
        if self._has_turn():
            self._try("its end", lambda: self._client.set_terminated(self.run_id, end))
