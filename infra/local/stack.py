"""Start, find and stop the local stack: a Ray head, an S3 server and an MLflow server on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

from infra.local import ports, process, snapshot, state
from infra.local.component import Component
from infra.local.errors import StackError
from infra.local.layout import BUCKETS, Stack
from infra.local.mlflow_server import MLFLOW, remove_database
from infra.local.ray_head import RAY, default_num_cpus, make_temp_dir, make_token, remove_temp_dir
from infra.local.s3_server import S3
from infra.local.state import Record, State

# in the order in which one's address is told to the next
COMPONENTS = (S3, MLFLOW, RAY)

_START_TIMEOUT_S = 240.0
_SILENCE_S = 30.0  # a loaded machine makes a server slow; only a longer silence is an end
_POLL_S = 0.2

Log = Callable[[str], None]


def up(state_dir: Path, *, num_cpus: int | None = None, log: Log = print) -> Stack:
    """Start what of the stack does not run, and return it when all of it answers.

    `num_cpus` is the number of CPUs that Ray may hand out (default: the cores of this machine, at least 2, and
    one more).  The S3 server's buckets come back from the last snapshot.  A stack that is up is left as it is.
    A start that failed or was interrupted is gone on with by the next call.

    Raises `StackError`, one line, if a server does not start or the state folder can't be used.
    """
    if num_cpus is not None and num_cpus < 1:
        raise StackError(f"num_cpus: must be at least 1, got {num_cpus}")
    folder = state.prepare(state_dir)
    with state.locked(folder, log):
        found = state.read(folder) or State.new(num_cpus or default_num_cpus())
        starter = _Starter(folder, found, log)
        missing = starter.missing()
        if not missing and found.complete(component.name for component in COMPONENTS):
            log(f"the local stack is up already ({folder})")
            if num_cpus not in (None, found.num_cpus):
                log(f"Ray keeps its {found.num_cpus} CPUs; for {num_cpus}, stop the stack first")
            return found.stack(folder)
        if RAY in missing and num_cpus is not None:
            starter.put(replace(starter.state, num_cpus=num_cpus))
        starter.start(missing)
        return starter.state.stack(folder)


def down(state_dir: Path, *, save: bool = True, log: Log = print) -> bool:
    """Save the buckets and stop the stack with every process that it started; False if there was none.

    Ray's jobs end first, so that nothing writes while the buckets are saved.  If they can't be saved, the S3
    server goes on with them and `StackError` says why; with `save` false they are given up, and with them MLflow's
    database, unless there is a snapshot of earlier, to whose runs it belongs as well.
    """
    folder = Path(state_dir).expanduser().absolute()
    if not (folder / "stack.json").exists():
        return False
    with state.locked(folder, log):
        found = state.read(folder)
        if found is None:
            return False
        for component in (RAY, MLFLOW):
            _stop(component, found)
            found = found.with_record(component.name, None)
            state.write(folder, found)
        if save:
            _save_buckets(folder, found, log)
        _stop(S3, found)
        stack = found.stack(folder)
        if not save and not stack.snapshot_path.exists():
            remove_database(folder)
        if found.ray_temp_dir:
            remove_temp_dir(stack.ray_temp_dir)
        stack.token_path.unlink(missing_ok=True)
        state.remove(folder)
    log("the local stack is down")
    return True


def find(state_dir: Path) -> Stack | None:
    """The stack of this folder if all of it has started and its processes run; costs milliseconds."""
    folder = Path(state_dir).expanduser().absolute()
    found = state.read(folder)
    if found is None or not found.complete(component.name for component in COMPONENTS):
        return None
    alive = all(process.running(record.process, found.stack_id) for record in found.records.values())
    return found.stack(folder) if alive else None


def problems(state_dir: Path) -> list[str]:
    """What is wrong with the stack of this folder, a line each; empty if it is up and every server answers."""
    folder = Path(state_dir).expanduser().absolute()
    found = state.read(folder)
    if found is None:
        return [f"the local stack is not running ({folder}): `ddpm up` starts it"]
    stack = found.stack(folder)
    lines = []
    for component in COMPONENTS:
        record = found.records.get(component.name)
        log_path = stack.log_path(component.name)
        if record is None or not process.running(record.process, found.stack_id):
            lines.append(f"{component.title}: not running; its log is {log_path}; `ddpm up` starts it again")
        elif wrong := component.probe(stack):
            lines.append(f"{component.title}: does not answer well ({wrong}); its log is {log_path}")
    if not lines and not found.buckets_whole:
        lines.append("S3 server: its buckets are not restored yet; `ddpm up` goes on with it")
    return lines


class _Starter:
    """Carries a state to one in which every component answers, and keeps it on record on the way."""

    def __init__(self, folder: Path, found: State, log: Log) -> None:
        self.folder = folder
        self.state = found
        self.log = log

    def put(self, new: State) -> None:
        state.write(self.folder, new)
        self.state = new

    def missing(self) -> list[Component]:
        """Components that are not there, or are silent; one that another `up` was starting is waited for later."""
        return [component for component in COMPONENTS if not self._usable(component)]

    def _usable(self, component: Component) -> bool:
        record = self.state.records.get(component.name)
        if record is None:
            return False
        deadline = time.monotonic() + _SILENCE_S
        while process.running(record.process, self.state.stack_id):
            if not record.healthy or component.probe(self.state.stack(self.folder)) is None:
                return True
            if time.monotonic() > deadline:
                self.log(f"{component.title}: silent for {_SILENCE_S:.0f} s, starting it again")
                return False
            time.sleep(_POLL_S)
        if record.healthy:
            lost = "; what was written since the last snapshot is lost" if component is S3 else ""
            self.log(f"{component.title}: had ended, starting it again{lost}")
        return False

    def start(self, missing: Collection[Component]) -> None:
        """Start the missing components, side by side; once more if somebody took a port or the machine was busy."""
        for attempt in (1, 2):
            self._launch(self._with_dependents(missing, retry=attempt == 2))
            failed = self._wait()
            for component, error in failed.items():
                passing = any(words in str(error).lower() for words in component.passing_failures)
                if attempt == 2 or not (passing or self._lost_a_port(component)):
                    raise error
                self.log(f"{error}; trying once more")
            if not failed:
                return
            missing = list(failed)

    def _with_dependents(self, missing: Collection[Component], *, retry: bool) -> list[Component]:
        """Choose the ports; the missing components and those that had been told an address that changes."""
        chosen: dict[str, int] = {}
        starting = []
        for component in COMPONENTS:
            moved = any(name in chosen and chosen[name] != self.state.ports[name] for name in component.needs)
            if component not in missing and not (moved and component.name in self.state.records):
                continue
            _stop(component, self.state)
            starting.append(component)
            for name in component.ports:
                taken = {
                    *chosen.values(),
                    *(p for n, p in self.state.ports.items() if n not in component.ports),
                }
                before = self.state.ports[name]
                if component.name in self.state.records:
                    # the last thread of a killed process lets go of it a moment later
                    ports.wait_until_free(before, timeout_s=5.0)
                if retry:
                    chosen[name] = before if ports.is_free(before) else ports.choose_any(taken)
                else:
                    chosen[name] = ports.choose(before, taken)
                if chosen[name] != before:
                    self.log(f"port {before} is taken: {component.title} uses {chosen[name]} ({name})")
        self.state = self.state.with_ports(chosen)
        return starting

    def _launch(self, components: Iterable[Component]) -> None:
        names = {component.name for component in components}
        if RAY.name in names:
            if self.state.ray_temp_dir:
                remove_temp_dir(Path(self.state.ray_temp_dir))
            self.state = replace(self.state, ray_temp_dir=str(make_temp_dir()))
            make_token(self.folder / "ray-token")
        if S3.name in names:
            self.state = replace(self.state, buckets_whole=False)
        for name in names:
            self.state = self.state.with_record(name, None)
        # on record before anything starts: the id alone finds the processes
        self.put(self.state)
        stack = self.state.stack(self.folder)
        for component in COMPONENTS:
            if component.name not in names:
                continue
            log_path = stack.log_path(component.name)
            offset = log_path.stat().st_size if log_path.exists() else 0
            marks = {process.STACK_MARK: self.state.stack_id, process.COMPONENT_MARK: component.name}
            env = {**stack.server_environment(os.environ), **component.environment, **marks}
            started = process.start(component.command(stack), env=env, cwd=self.folder, log=log_path)
            self.put(self.state.with_record(component.name, Record(started, False, offset)))

    def _wait(self) -> dict[Component, StackError]:
        """Wait for every component that has not answered yet; those that failed, with their reasons."""
        begun = time.monotonic()
        if S3.name in self.state.records and self.state.records[S3.name].healthy:
            self._fill_buckets()
        failed: dict[Component, StackError] = {}
        waiting = [component for component in COMPONENTS if not self.state.records[component.name].healthy]
        if waiting:
            self.log("starting " + ", ".join(component.title for component in waiting) + " …")
        while waiting:
            for component in list(waiting):
                outcome = self._look(component, time.monotonic() - begun)
                if outcome is None:
                    continue
                waiting.remove(component)
                if isinstance(outcome, StackError):
                    failed[component] = outcome
                    _stop(component, self.state)
                    self.put(self.state.with_record(component.name, None))
                else:
                    record = self.state.records[component.name]
                    self.put(self.state.with_record(component.name, replace(record, healthy=True)))
                    self.log(f"{component.title}: {outcome} ({time.monotonic() - begun:.0f} s)")
                    if component is S3:
                        self._fill_buckets()
            time.sleep(_POLL_S)
        return failed

    def _look(self, component: Component, waited_s: float) -> str | StackError | None:
        """Its address if it answers, a `StackError` if it never will, None if that is open."""
        stack = self.state.stack(self.folder)
        record = self.state.records[component.name]
        log_path = stack.log_path(component.name)
        running = process.running(record.process, self.state.stack_id)
        if running is None:
            line = process.telling_line(log_path, record.log_offset)
            return StackError(
                f"{component.title}: ended before it was ready; {log_path} says: {line or 'nothing'}"
            )
        own = {self.state.ports[name] for name in component.ports}
        # an answer on our port counts only if it is ours
        wrong = component.probe(stack) if own <= process.listening_ports(running) else "does not listen yet"
        if wrong is None:
            return {"s3": stack.s3_endpoint, "mlflow": stack.mlflow_uri, "ray": stack.dashboard_url}[
                component.name
            ]
        if waited_s > _START_TIMEOUT_S:
            return StackError(
                f"{component.title}: not ready after {_START_TIMEOUT_S:.0f} s ({wrong}); see {log_path}"
            )
        return None

    def _lost_a_port(self, component: Component) -> bool:
        return not all(ports.is_free(self.state.ports[name]) for name in component.ports)

    def _fill_buckets(self) -> None:
        if self.state.buckets_whole:
            return
        stack = self.state.stack(self.folder)
        if stack.snapshot_path.exists():
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(stack.snapshot_path.stat().st_mtime))
            count = snapshot.restore(stack.s3_endpoint, stack.snapshot_path)
            self.log(f"S3 server: {count} objects restored as of {saved}")
        snapshot.make_buckets(stack.s3_endpoint, BUCKETS)
        self.put(replace(self.state, buckets_whole=True))


def _stop(component: Component, found: State) -> None:
    record = found.records.get(component.name)
    left = process.stop(
        found.stack_id,
        component=component.name,
        first=record.process if record else None,
        grace_s=component.stop_grace_s,
    )
    if left:
        numbers = ", ".join(str(one.pid) for one in left)
        raise StackError(f"{component.title}: process {numbers} could not be ended")


def _save_buckets(folder: Path, found: State, log: Log) -> None:
    """Save them if the server has all of them; what a half-restored one has must not replace the snapshot."""
    record = found.records.get(S3.name)
    stack = found.stack(folder)
    if record is None or not found.buckets_whole or not process.running(record.process, found.stack_id):
        if stack.snapshot_path.exists():
            log(f"S3 server: was not running; {stack.snapshot_path} stays as it was")
        return
    try:
        count = snapshot.save(stack.s3_endpoint, stack.snapshot_path)
    except StackError as error:
        raise StackError(
            f"{error}; the S3 server goes on with them: run `ddpm down` again, or with --discard to give them up"
        ) from None
    log(f"S3 server: {count} objects saved to {stack.snapshot_path}")
