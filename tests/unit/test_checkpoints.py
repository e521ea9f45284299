"""Checkpoints: whole or not there, whatever stops the writer; damage is passed over or named."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.checkpoints import (
    COMMIT,
    CheckpointError,
    Checkpoints,
    State,
    kept_steps,
    open_checkpoint,
    select,
    step_name,
)
from pipelines.storage import FileStorage, Hashed, Memory, ObjectInfo, Storage, new_memory, open_storage


def state(step: int, fill: float | None = None) -> State:
    """A small state whose every tensor tells its step apart."""
    value = float(step) if fill is None else fill
    return State(
        step,
        {
            "weights": {"a": torch.full((3, 2), value), "b.bias": torch.tensor(value)},
            "ema": {"a": torch.full((3, 2), value + 0.5)},
            "optimizer": {"step/a": torch.tensor(value), "exp_avg/a": torch.arange(6).reshape(3, 2) * value},
        },
    )


def record(metrics: dict[str, float] | None = None) -> dict[str, Any]:
    return {
        "seed": 3,
        "run": "tiny-123",
        "dataset": "d" * 64,
        "config": {"name": "tiny"},
        "metrics": metrics or {},
        "versions": {"torch": "2"},
    }


def held_out(value: float) -> dict[str, Any]:
    return record({"held_out/total": value})


def same(a: State | None, b: State | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        a.step == b.step
        and a.groups.keys() == b.groups.keys()
        and all(
            tensors.keys() == b.groups[group].keys()
            and all(torch.equal(tensors[name], b.groups[group][name]) for name in tensors)
            for group, tensors in a.groups.items()
        )
    )


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def keys(run: Storage) -> list[str]:
    return [info.key for info in run.list()]


def test_there_and_back(run: Storage) -> None:
    saved = Checkpoints(run).save(state(10), record({"loss": 0.1, "held_out/total": 3.25}))
    assert saved.step == 10
    assert saved.uri == f"{run.uri}/checkpoints/step-000000010"
    found = open_checkpoint(saved.uri)
    assert found.commit == saved.commit
    assert same(found.read_all(), state(10))
    assert torch.equal(found.read("ema")["a"], torch.full((3, 2), 10.5))
    assert (found.commit.held_out, found.commit.seed, found.commit.config) == (3.25, 3, {"name": "tiny"})
    assert same(Checkpoints(run).newest(), state(10))


def test_tensors_keep_their_types_and_layouts(run: Storage) -> None:
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "whole": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([math.inf, -0.0, 1e-45]),
    }
    found = Checkpoints(run).save(State(1, {"weights": tensors}), record()).read("weights")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_run_without_checkpoints(run: Storage) -> None:
    assert Checkpoints(run).steps() == []
    assert Checkpoints(run).newest() is None
    assert Checkpoints(run).commits() == []
    Checkpoints(run).prune(1)


def test_steps_are_numbers_and_not_names(run: Storage) -> None:
    for step in (9, 10, 1_000_000_000, 999_999_999):
        Checkpoints(run).save(state(step), record())
    run.put("checkpoints/step-000000011/weights-x.safetensors", b"uncommitted")
    run.put("checkpoints/step-000000012/notes/commit.json", b"not ours")
    assert Checkpoints(run).steps() == [9, 10, 999_999_999, 1_000_000_000]
    newest = Checkpoints(run).newest()
    assert newest is not None
    assert newest.step == 1_000_000_000


def test_the_identity_is_that_of_the_bytes(run: Storage) -> None:
    first = Checkpoints(run).save(state(1), record())
    elsewhere = Checkpoints(run.child("elsewhere")).save(state(1), held_out(2.0))
    assert elsewhere.identity == first.identity
    assert Checkpoints(run.child("other")).save(state(1, fill=1.001), record()).identity != first.identity


class Stopped(BaseException):
    """What ends a process, in this test: nothing may catch it but a clean-up."""


class StoppingStorage:
    """A storage that stops its user at its n-th operation that writes, before it is done or after."""

    def __init__(
        self, inner: Storage, stop_at: int, *, after: bool, counter: list[str] | None = None
    ) -> None:
        self._inner, self._stop_at, self._after = inner, stop_at, after
        self.done = counter if counter is not None else []

    @property
    def uri(self) -> str:
        return self._inner.uri

    def child(self, *parts: str) -> Storage:
        return StoppingStorage(self._inner.child(*parts), self._stop_at, after=self._after, counter=self.done)

    def _write(self, what: str, call: Callable[[], Any]) -> Any:
        # a stopped process does nothing more, not even its clean-up
        if len(self.done) > self._stop_at:
            raise Stopped
        self.done.append(what)
        stops = len(self.done) == self._stop_at + 1
        if stops and not self._after:
            raise Stopped
        result = call()
        if stops:
            raise Stopped
        return result

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def get_hashed(self, key: str, memory: Memory = new_memory) -> Hashed:
        return self._inner.get_hashed(key, memory)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._inner.get_range(key, start, length)

    def put(self, key: str, data: bytes) -> None:
        self._write(f"put {key}", lambda: self._inner.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return bool(self._write(f"commit {key}", lambda: self._inner.put_if_absent(key, data)))

    def exists(self, key: str) -> bool:
        return self._inner.exists(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self._inner.list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        # a deletion of many is no single operation
        for key in list(keys):
            self._write(f"delete {key}", lambda key=key: self._inner.delete([key]))  # type: ignore[misc]


def _save_and_prune(run: Storage) -> None:
    checkpoints = Checkpoints(run)
    checkpoints.save(state(30), held_out(5.0))
    checkpoints.prune(1)


def _two_saved(folder: Path) -> Storage:
    run = open_storage(str(folder))
    Checkpoints(run).save(state(10), held_out(4.0))
    Checkpoints(run).save(state(20), held_out(6.0))
    return run


def _count_writes(folder: Path) -> int:
    storage = StoppingStorage(_two_saved(folder), 10**9, after=False)
    _save_and_prune(storage)
    return len(storage.done)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_the_old_state_or_the_new_one_is_read(tmp_path: Path, after: bool) -> None:
    writes = _count_writes(tmp_path / "count")
    # three objects, the commit, the commit of 20 away, its three objects away
    assert writes == 8
    newest = []
    for stop_at in range(writes):
        run = _two_saved(tmp_path / f"{after}-{stop_at}")
        with pytest.raises(Stopped):
            _save_and_prune(StoppingStorage(run, stop_at, after=after))
        found = Checkpoints(run).newest()
        assert same(found, state(20)) or same(found, state(30))
        assert found is not None
        newest.append(found.step)
        # whatever is committed can be read whole, and the best one stays
        for step in Checkpoints(run).steps():
            assert same(Checkpoints(run).open(step).read_all(), state(step))
        assert select(run, "best").step == 10
        # the next attempt ends as an undisturbed one
        _save_and_prune(run)
        assert Checkpoints(run).steps() == [10, 30]
        assert same(Checkpoints(run).newest(), state(30))
    assert newest == [20] * (3 if after else 4) + [30] * (5 if after else 4)


@pytest.mark.parametrize("after", [False, True])
def test_an_error_at_any_write_never_takes_the_objects_of_a_commit(tmp_path: Path, after: bool) -> None:
    """A request may be done though its answer is an error; and here the clean-up runs, unlike in a kill."""

    class Failing(StoppingStorage):
        def _write(self, what: str, call: Callable[[], Any]) -> Any:
            self.done.append(what)
            fails = len(self.done) == self._stop_at + 1
            if fails and not self._after:
                raise KeyboardInterrupt
            result = call()
            if fails:
                raise KeyboardInterrupt
            return result

        def child(self, *parts: str) -> Storage:
            return Failing(self._inner.child(*parts), self._stop_at, after=self._after, counter=self.done)

    for stop_at in range(4):
        run = _two_saved(tmp_path / f"{stop_at}")
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(Failing(run, stop_at, after=after)).save(state(30), record())
        for step in Checkpoints(run).steps():
            assert same(Checkpoints(run).open(step).read_all(), state(step))
        assert Checkpoints(run).steps() == ([10, 20, 30] if after and stop_at == 3 else [10, 20])


def test_a_failed_save_takes_its_objects_away(tmp_path: Path) -> None:
    class FullDisk(FileStorage):
        def child(self, *parts: str) -> FileStorage:
            return FullDisk(Path(super().child(*parts).uri.removeprefix("file://")))

        def put(self, key: str, data: bytes) -> None:
            if key.startswith("optimizer"):
                raise OSError("full")
            super().put(key, data)

    with pytest.raises(OSError, match="full"):
        Checkpoints(FullDisk(tmp_path)).save(state(30), record())
    assert open_storage(str(tmp_path)).list() == []


def test_of_two_attempts_at_a_step_the_first_one_stands(run: Storage) -> None:
    first = Checkpoints(run).save(state(10, fill=1.0), held_out(1.0))
    before = keys(run)
    second = Checkpoints(run).save(state(10, fill=2.0), held_out(2.0))
    assert second.commit == first.commit
    assert second.identity == first.identity
    assert same(second.read_all(), state(10, fill=1.0))
    # nothing of the loser is left
    assert keys(run) == before


def test_a_commit_between_our_objects_and_our_commit_wins(run: Storage) -> None:
    class Overtaken(FileStorage):
        def child(self, *parts: str) -> FileStorage:
            return Overtaken(Path(super().child(*parts).uri.removeprefix("file://")))

        def put_if_absent(self, key: str, data: bytes) -> bool:
            Checkpoints(run).save(state(10, fill=1.0), record())
            return super().put_if_absent(key, data)

    standing = Checkpoints(Overtaken(Path(run.uri.removeprefix("file://")))).save(
        state(10, fill=2.0), record()
    )
    assert same(standing.read_all(), state(10, fill=1.0))
    assert len(keys(run)) == 4


def _truncate(data: bytes) -> bytes | None:
    return data[:-1]


def _flip(data: bytes) -> bytes | None:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def _gone(data: bytes) -> bytes | None:
    return None


def _replace(text: bytes) -> Callable[[bytes], bytes | None]:
    return lambda data: text


def _change(**values: Any) -> Callable[[bytes], bytes | None]:
    return lambda data: json.dumps({**json.loads(data), **values}).encode()


DAMAGE: list[tuple[str, Callable[[bytes], bytes | None], str]] = [
    ("weights", _truncate, "bytes, its commit record says"),
    ("weights", _flip, "SHA-256 differs"),
    ("ema", _gone, "is named by its commit record and missing"),
    ("optimizer", _replace(b""), "has 0 bytes, its commit record says"),
    (COMMIT, _replace(b"{"), "is not JSON"),
    (COMMIT, _replace(b""), "is not JSON"),
    (COMMIT, _replace(b"\xff\xfe"), "is not JSON"),
    (COMMIT, _replace(b"[]"), "has format version None, this program reads 1"),
    (COMMIT, _change(format_version=2), "has format version 2, this program reads 1"),
    (COMMIT, _change(kind="something else"), "is a 'something else', not a checkpoint"),
    (COMMIT, _change(step="ten"), "step: "),
    (COMMIT, _change(surprise=1), "surprise: "),
]


def damage(run: Storage, step: int, what: str, change: Callable[[bytes], bytes | None]) -> str:
    """Damage an object of a checkpoint; returns its name."""
    storage = run.child("checkpoints", step_name(step))
    [key] = [info.key for info in storage.list() if info.key.startswith(what)]
    data = change(storage.get(key))
    if data is None:
        storage.delete([key])
    else:
        storage.put(key, data)
    return key


@pytest.mark.parametrize(("what", "change", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_named(
    run: Storage,
    what: str,
    change: Callable[[bytes], bytes | None],
    message: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Checkpoints(run).save(state(10), held_out(9.0))
    Checkpoints(run).save(state(20), held_out(1.0))
    key = damage(run, 20, what, change)
    # the command line, which other tests run in this process, lets no record of ours reach the root
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    with caplog.at_level(logging.WARNING, "pipelines"):
        assert same(Checkpoints(run).newest(), state(10))
    assert key in caplog.text
    for which in ("latest", "best", "20"):
        with pytest.raises(CheckpointError, match=message) as caught:
            select(run, which).read_all()
        assert f"step-000000020/{key}" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert same(select(run, "10").read_all(), state(10))


@pytest.mark.parametrize(("what", "change", "message"), DAMAGE)
def test_a_run_goes_on_past_a_damaged_checkpoint_and_mends_it(
    run: Storage, what: str, change: Callable[[bytes], bytes | None], message: str
) -> None:
    """Resumed at 10, it saves at 15, prunes, and reaches the damaged step again."""
    Checkpoints(run).save(state(10), held_out(9.0))
    Checkpoints(run).save(state(20), held_out(1.0))
    damage(run, 20, what, change)
    checkpoints = Checkpoints(run)
    for step, value in ((15, 8.0), (20, 1.0), (30, 2.0)):
        checkpoints.save(state(step), held_out(value))
        checkpoints.prune(2)
        assert same(checkpoints.open(step).read_all(), state(step))
    assert checkpoints.steps() == [20, 30]
    assert same(select(run, "best").read_all(), state(20))
    # neither the damaged objects nor anything else is left
    assert len(keys(run)) == 8


def test_everything_damaged_is_a_run_that_starts_again(run: Storage) -> None:
    Checkpoints(run).save(state(10), record())
    damage(run, 10, "weights", _flip)
    assert Checkpoints(run).newest() is None
    again = Checkpoints(run).save(state(10, fill=7.0), record())
    assert same(again.read_all(), state(10, fill=7.0))
    assert same(Checkpoints(run).newest(), state(10, fill=7.0))


def test_a_group_that_a_checkpoint_does_not_hold(run: Storage) -> None:
    saved = Checkpoints(run).save(state(10), record())
    with pytest.raises(CheckpointError, match=r"holds no 'scaler', only weights, ema, optimizer$"):
        saved.read("scaler")


def test_a_metric_that_is_no_number_does_not_spoil_the_record(run: Storage) -> None:
    # the standard error of one image is none
    Checkpoints(run).save(state(10), record({"held_out/total": 3.0, "held_out/total_stderr": math.nan}))
    Checkpoints(run).save(state(20), record({"held_out/total": math.nan}))
    Checkpoints(run).save(state(30), record({"held_out/total": math.inf}))
    Checkpoints(run).save(state(40), record({"held_out/total": 5.0}))
    assert same(Checkpoints(run).newest(), state(40))
    assert select(run, "best").step == 10
    Checkpoints(run).prune(1)
    assert Checkpoints(run).steps() == [10, 40]


def test_select(run: Storage) -> None:
    with pytest.raises(CheckpointError, match=r"no committed checkpoint here; train first"):
        select(run, "best")
    for step, value in ((10, 3.0), (20, 1.0), (30, 2.0)):
        Checkpoints(run).save(state(step), held_out(value))
    Checkpoints(run).save(state(40), record())
    assert select(run, "best").step == 20
    assert select(run, "latest").step == 40
    assert select(run, "30").step == 30
    for which in ("35", "newest", "", "-10", "1e1", "²"):
        with pytest.raises(CheckpointError) as caught:
            select(run, which)
        assert str(caught.value) == (
            f"checkpoint {which!r}: {run.uri} has steps 10, 20, 30, 40; give one of them, best, latest or a URI"
        )


def test_the_best_of_unmeasured_ones_is_the_latest(run: Storage) -> None:
    Checkpoints(run).save(state(10), record())
    Checkpoints(run).save(state(20), record())
    assert select(run, "best").step == 20


def test_a_uri_that_is_no_checkpoint(run: Storage) -> None:
    with pytest.raises(CheckpointError, match=r"no committed checkpoint here \(commit.json is missing\)"):
        open_checkpoint(run.uri)


def test_prune_keeps_the_newest_and_the_best(run: Storage) -> None:
    checkpoints = Checkpoints(run)
    for step, value in ((10, 3.0), (20, 1.0), (30, 4.0), (40, 5.0), (50, 2.0)):
        checkpoints.save(state(step), held_out(value))
    checkpoints.prune(2)
    assert checkpoints.steps() == [20, 40, 50]
    assert len(keys(run)) == 3 * 4
    for step in checkpoints.steps():
        assert same(checkpoints.open(step).read_all(), state(step))


def test_prune_takes_what_killed_attempts_left_beside_a_commit(run: Storage) -> None:
    Checkpoints(run).save(state(10), held_out(1.0))
    Checkpoints(run).save(state(20), held_out(2.0))
    run.put("checkpoints/step-000000010/weights-of-another-attempt.safetensors", b"")
    # at work just now, perhaps
    run.put("checkpoints/step-000000015/weights-x.safetensors", b"")
    run.put("checkpoints/step-000000030/weights-y.safetensors", b"")
    Checkpoints(run).prune(5)
    left = keys(run)
    assert "checkpoints/step-000000030/weights-y.safetensors" in left
    assert "checkpoints/step-000000015/weights-x.safetensors" in left
    assert len(left) == 2 * 4 + 2
    assert Checkpoints(run).steps() == [10, 20]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 99), st.one_of(st.none(), st.floats(0, 9))),
        unique_by=lambda c: c[0],
        min_size=1,
    ),
    st.integers(1, 5),
)
def test_kept_steps(commits: list[tuple[int, float | None]], keep: int) -> None:
    kept = kept_steps(commits, keep)
    steps = sorted(step for step, _ in commits)
    assert set(steps[-keep:]) <= kept <= set(steps)
    values = [value for _, value in commits if value is not None]
    if values:
        assert any(step in kept and value == min(values) for step, value in commits)
    assert len(kept) <= min(keep, len(steps)) + 1
