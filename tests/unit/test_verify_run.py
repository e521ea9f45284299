"""`ddpm verify` of runs and checkpoints: every kind of damage is named, and a whole one has none."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.checkpoints import Checkpoints
from pipelines.storage import open_storage
from pipelines.train import claim, open_run, train
from pipelines.verify import kind_at, verify
from pipelines.world import SingleWorker
from tests.support.data import dataset_of
from tests.support.runs import tiny_config
from tests.unit.test_verify import change, ddpm_verify, flip, no_stack  # noqa: F401 (a fixture for all of them)

STEP = "checkpoints/step-000000004"
COMMIT = f"{STEP}/commit.json"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with two checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    dataset_of(root / "data", [10, 7])
    config = tiny_config(
        f"data.uri={root}/data", f"storage={root}", "train.steps=4", "train.eval_every=2",
        "train.checkpoint_every=2", "ema.power_sigma_rels=[0.1]", "objective.timestep_sampling=loss_second_moment",
    )  # fmt: skip
    run = open_run(config)
    claim(run)
    train(run, SingleWorker(torch.device("cpu")))
    return root / "runs" / run.name


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / template.name)
    return tmp_path / template.name


def lines(address: Path, deep: bool = False) -> list[str]:
    return [
        str(problem).replace(address.as_uri(), "RUN") for problem in verify(str(address), deep=deep).problems
    ]


def only(address: Path, deep: bool = False) -> str:
    [line] = lines(address, deep)
    assert "\n" not in line
    return line


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for name, value in changes.items():
        section, key = values, name
        while "__" in key:
            first, _, key = key.partition("__")
            section = section[first]
        section[key] = value
    path.write_text(json.dumps(values))


def object_of(run: Path, group: str) -> Path:
    [path] = (run / STEP).glob(f"{group}-*.safetensors")
    return path


def replace_object(run: Path, group: str, data: bytes) -> None:
    """Another object in its place, of which the commit record knows."""
    path = object_of(run, group)
    path.write_bytes(data)
    named = {"key": path.name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(run / COMMIT, **{f"objects__{group}": named})


def test_a_whole_run_has_no_problem(run: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(str(run), deep=True, progress=lambda *x: told.append(x))
    assert (found.problems, found.notes) == ((), ())
    assert (found.kind, found.identity) == ("run", run.name)
    objects = list(run.glob("checkpoints/*/*.safetensors"))
    # weights, ema, optimizer, the losses by t, and the other average, twice
    assert found.looked == {
        "checkpoints": 2,
        "objects": 10,
        "num_bytes": sum(path.stat().st_size for path in objects),
    }
    assert told == [(number, 10) for number in range(1, 11)]


def test_a_checkpoint_alone(run: Path) -> None:
    found = verify(str(run / STEP), deep=True)
    assert (found.problems, found.notes, found.kind, found.looked["objects"]) == ((), (), "checkpoint", 5)
    [path] = (run / STEP).glob("weights-*")
    change(path, flip(path.stat().st_size - 3))
    [problem] = verify(str(run / STEP)).problems
    assert str(problem) == f"{path.as_uri()}: its SHA-256 differs from its commit record's"
    (run / COMMIT).write_text('{"format_version": 1')
    [problem] = verify(str(run / STEP)).problems
    assert str(problem) == f"{(run / COMMIT).as_uri()}: is not JSON; the object is damaged"


@pytest.mark.parametrize("group", ["weights", "ema", "ema-0.1", "optimizer", "loss_moments"])
def test_every_object_that_is_missing_cut_or_altered_is_named(run: Path, group: str) -> None:
    [path] = [one for one in (run / STEP).iterdir() if one.name.rpartition("-")[0] == group]
    name, whole = f"RUN/{STEP}/{path.name}", path.read_bytes()
    path.unlink()
    assert only(run) == f"{name}: is named by its commit record and missing"
    path.write_bytes(whole[:-7])
    assert only(run) == f"{name}: has {len(whole) - 7} bytes, its commit record says {len(whole)}"
    path.write_bytes(whole)
    change(path, flip(len(whole) // 2))
    assert only(run) == f"{name}: its SHA-256 differs from its commit record's"


def test_swapped_objects_are_named_both(run: Path) -> None:
    weights, ema = object_of(run, "weights"), sorted((run / STEP).glob("ema-[0-9a-f]*.safetensors"))[-1]
    first, second = weights.read_bytes(), ema.read_bytes()
    weights.write_bytes(second)
    ema.write_bytes(first)
    found = lines(run)
    assert len(found) == 2
    for path in (weights, ema):
        assert any(line.startswith(f"RUN/{STEP}/{path.name}: ") for line in found)


NOT_HEX = "../../../run.json"


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        (COMMIT, {"format_version": 2}, "has format version 2, this program reads 1"),
        ("run.json", {"format_version": 7}, "has format version 7, this program reads 1"),
        (COMMIT, {"kind": "ddpm-sweep"}, "is a 'ddpm-sweep', not a checkpoint"),
        ("run.json", {"kind": "ddpm-sweep"}, "is a 'ddpm-sweep', not a run"),
        (COMMIT, {"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (COMMIT, {"step": 3}, "is of step 3, and lies in step-000000004"),
        (COMMIT, {"seed": 9}, "seed: 9, and run.json says 0"),
        (COMMIT, {"config__train__steps": 3}, "is of step 4, and its configuration trains 3"),
        (COMMIT, {"objects__weights__key": NOT_HEX}, f"objects.weights.key: '{NOT_HEX}' is no object key"),
        (
            COMMIT,
            {"objects__weights__key": "/etc/passwd"},
            "objects.weights.key: '/etc/passwd' is no object key",
        ),
        (COMMIT, {"objects__weights__num_bytes": -1}, "objects.weights.num_bytes: "),
        (COMMIT, {"objects__weights__sha256": "x"}, "objects.weights.sha256: "),
        (COMMIT, {"objects__weights": {"key": "k"}}, "objects.weights.num_bytes: Field required"),
        (COMMIT, {"config__ema__decay": 0.5}, "its configuration makes the run 'tiny-"),
        (COMMIT, {"config__trian": {}}, "config: trian: no such setting; did you mean 'train'?"),
        (COMMIT, {"config": []}, "config: "),
        ("run.json", {"identity__seed": 1}, "has the name 'tiny-"),
    ],
)
def test_a_record_that_says_something_else_is_named(
    run: Path, path: str, changes: dict[str, Any], said: str
) -> None:
    edit_json(run / path, **changes)
    found = lines(run)
    assert any(line.startswith(f"RUN/{path}: ") and said in line for line in found), found
    assert all("\n" not in line and len(line) < 400 for line in found)


def test_the_record_of_another_run_is_named(run: Path) -> None:
    edit_json(run / COMMIT, dataset="0" * 64)
    found = lines(run)
    # of another data set it would be another run, which run.json does not know
    assert len(found) == 2
    assert re.fullmatch(
        rf"RUN/{COMMIT}: its configuration makes the run 'tiny-\w{{10}}', and it says '{run.name}'", found[0]
    )
    assert found[1].startswith(f"RUN/{COMMIT}: dataset: '0000")
    edit_json(run / COMMIT, dataset="mine")
    assert any("dataset: must be a data set's identity (SHA-256), got 'mine'" in line for line in lines(run))
    moved = run.parent / "tiny-0123456789"
    run.rename(moved)
    assert any("lies in 'tiny-0123456789'" in line for line in lines(moved))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff", '{"format_version": 1}'])
@pytest.mark.parametrize("path", ["run.json", COMMIT])
def test_a_record_that_is_cut_or_none_is_one_line(run: Path, path: str, text: str) -> None:
    (run / path).write_bytes(text.encode("latin-1"))
    assert only(run).startswith(f"RUN/{path}: ")


def test_a_run_without_its_record_is_a_run(run: Path) -> None:
    (run / "run.json").unlink()
    assert only(run) == "RUN/run.json: is missing, though there are checkpoints"


@pytest.mark.parametrize("group", ["weights", "ema", "ema-0.1", "optimizer"])
def test_a_tensor_that_is_not_there_is_named_in_every_group(run: Path, group: str) -> None:
    [path] = [one for one in (run / STEP).iterdir() if one.name.rpartition("-")[0] == group]
    tensors = safetensors.torch.load(path.read_bytes())
    name = sorted(tensors)[-1]
    del tensors[name]
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    values = json.loads((run / COMMIT).read_text())
    values["objects"][group] |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (run / COMMIT).write_text(json.dumps(values))
    assert only(run).startswith(f"RUN/{STEP}/{path.name}: {name!r}: has no such tensor")


def test_tensors_that_are_not_the_networks_are_named_though_every_hash_is_right(run: Path) -> None:
    tensors = safetensors.torch.load(object_of(run, "weights").read_bytes())
    name = sorted(tensors)[0]
    kept = tensors.pop(name)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (tensors, "no such tensor"),
        ({**tensors, name: kept[..., None]}, "has the shape"),
        ({**tensors, name: kept, "zz": kept.clone()}, "and the network of its configuration none"),
    ]
    for wrong, said in cases:
        replace_object(run, "weights", safetensors.torch.save(wrong))
        assert said in only(run)
    for data in (b"", b"words", (10**9).to_bytes(8, "little") + b"{}"):
        replace_object(run, "weights", data)
        assert "is not safetensors" in only(run)
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    replace_object(run, "weights", len(header).to_bytes(8, "little") + header + b"abc")
    assert "is not safetensors" in only(run)


def test_a_number_that_is_not_finite_is_named_with_deep_alone(run: Path) -> None:
    tensors = safetensors.torch.load(object_of(run, "weights").read_bytes())
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = torch.nan
    replace_object(run, "weights", safetensors.torch.save(tensors))
    assert lines(run) == []
    assert only(run, deep=True).endswith(f"{name!r}: has numbers that are not finite")


def test_a_group_that_the_record_leaves_out_is_named(run: Path) -> None:
    values = json.loads((run / COMMIT).read_text())
    for group in ("optimizer", "ema-0.1"):
        changed = {name: one for name, one in values["objects"].items() if name != group}
        (run / COMMIT).write_text(json.dumps({**values, "objects": changed}))
        assert only(run) == f"RUN/{COMMIT}: names no {group!r}, which a run of its configuration has"


def test_history_that_is_missing_or_damaged_is_named(run: Path) -> None:
    path = run / "history" / "step-000000004.jsonl"
    rows = path.read_text()
    for damaged in ("{", rows + "\nwords", '{"loss": 1}', "[1]", '{"step": []}'):
        path.write_text(damaged)
        assert only(run).startswith("RUN/history/step-000000004.jsonl: is not rows of metrics")
    path.write_text('{"step": 5}')
    assert only(run) == "RUN/history/step-000000004.jsonl: has rows of other steps than 1 to 4"
    path.unlink()
    assert only(run) == "RUN/history/step-000000004.jsonl: is missing, though step 4 was committed after it"


def test_what_killed_attempts_left_is_a_note(run: Path) -> None:
    (run / STEP / "weights-0123.safetensors").write_bytes(b"12345")
    (run / "checkpoints/step-000000006").mkdir()
    for name in ("weights", "ema"):
        (run / "checkpoints/step-000000006" / f"{name}-x.safetensors").write_bytes(b"123")
    found = verify(str(run))
    assert found.problems == ()
    assert [note.split(" that ")[0] for note in found.notes] == [
        "step-000000004: 1 objects (5 bytes)",
        "step-000000006: 2 objects (6 bytes)",
    ]
    [note] = verify(str(run / STEP)).notes
    assert note.startswith("step-000000004: 1 objects (5 bytes)")
    (run / COMMIT).unlink()
    assert [line.split(": ")[1] for line in lines(run)] == []
    assert len(verify(str(run)).notes) == 2
    # and at its own address it is no whole checkpoint
    [problem] = verify(str(run / STEP)).problems
    assert "no committed checkpoint here (commit.json is missing)" in str(problem)


def test_a_run_that_has_just_begun_is_whole_and_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    found = verify(str(run))
    assert (found.problems, found.notes) == ((), ("no checkpoint is there yet",))


def test_a_bit_flipped_anywhere_in_the_objects_of_a_run_is_found(template: Path, tmp_path: Path) -> None:
    run = tmp_path / template.name
    shutil.copytree(template, run)
    generator = np.random.default_rng(0)
    for path in sorted(run.glob("checkpoints/*/*.safetensors")):
        whole = path.read_bytes()
        change(path, flip(int(generator.integers(len(whole))), int(generator.integers(8))))
        assert path.name in only(run)
        path.write_bytes(whole)
    assert lines(run) == []


def test_what_verify_finds_whole_can_be_read_and_what_not_can_not(run: Path) -> None:
    """The newest checkpoint is the one that a resumed run goes on from."""
    checkpoints = Checkpoints(open_storage(str(run)))
    assert checkpoints.open(4).check().step == 4
    edit_json(run / COMMIT, objects__weights__key=NOT_HEX)
    found = checkpoints.newest_whole()
    assert found is not None
    assert found.step == 2


def test_the_kinds_are_told_by_their_records(run: Path) -> None:
    assert kind_at(open_storage(str(run))) == "run"
    assert kind_at(open_storage(str(run / STEP))) == "checkpoint"


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddpm_verify(str(run), "--deep") == 0
    assert f"run {run.name}: whole; 2 checkpoints, 10 objects, " in capsys.readouterr().out
    object_of(run, "weights").unlink()
    (run / "history" / "step-000000002.jsonl").unlink()
    assert ddpm_verify(str(run)) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert f"run {run.name}: 2 problems; " in out[-1]
    assert ddpm_verify(str(run), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["whole"], len(told["problems"]), told["checkpoints"]) == ("run", False, 2, 2)


def test_a_run_at_work_that_prunes_meanwhile_is_no_damage(run: Path) -> None:
    storage = open_storage(str(run))

    def prune(done: int, total: int) -> None:
        if done == 1:
            Checkpoints(storage).prune(1)

    # without a measured bound the older one is not kept as the best
    edit_json(run / "checkpoints/step-000000002/commit.json", metrics={})
    found = verify(str(run), progress=prune)
    assert found.problems == ()
    assert found.notes == ("step-000000002: was deleted meanwhile, as a run at work does",)
    assert verify(str(run)).problems == ()


def test_a_checkpoint_that_is_written_again_meanwhile_is_no_damage(run: Path) -> None:
    path = object_of(run, "optimizer")
    whole = path.read_bytes()

    def write(done: int, total: int) -> None:
        # of ten objects the last checkpoint's are the last five
        if done == 6 and path.exists():
            path.rename(path.with_name("optimizer-again.safetensors"))
            values = json.loads((run / COMMIT).read_text())
            values["objects"]["optimizer"]["key"] = "optimizer-again.safetensors"
            (run / COMMIT).write_text(json.dumps(values))

    found = verify(str(run), progress=write)
    assert found.problems == ()
    [note] = [note for note in found.notes if "written again" in note]
    assert note.startswith("step-000000004: ")
    # but what stays as it was found is damage
    path.with_name("optimizer-again.safetensors").write_bytes(whole[:-1])
    assert len(lines(run)) == 1


def test_rows_of_metrics_that_come_with_their_checkpoint_meanwhile_are_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = run.parent / "away"
    (run / STEP).rename(away)
    rows = run / "history/step-000000004.jsonl"
    text = rows.read_text()
    rows.unlink()
    steps = Checkpoints.steps

    def commit(checkpoints: Checkpoints) -> list[int]:
        rows.write_text(text)
        away.rename(run / STEP)
        return steps(checkpoints)

    monkeypatch.setattr(Checkpoints, "steps", commit)
    assert lines(run) == []


def test_a_checkpoint_without_its_commit_record_is_named_once(run: Path) -> None:
    (run / COMMIT).unlink()
    [problem] = verify(str(run / STEP)).problems
    assert str(problem) == f"{(run / STEP).as_uri()}: no committed checkpoint here (commit.json is missing)"


@pytest.mark.parametrize("name", ["backup-2026010203", "copy", "tiny-2026-0123456789"])
def test_a_copy_may_be_called_as_one_likes(run: Path, name: str) -> None:
    copy = run.parent / name
    shutil.copytree(run, copy)
    assert lines(copy) == []


def test_a_checkpoint_that_is_deleted_before_it_is_opened_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Checkpoints.steps

    def delete(checkpoints: Checkpoints) -> list[int]:
        found = steps(checkpoints)
        shutil.rmtree(run / STEP)
        return found

    monkeypatch.setattr(Checkpoints, "steps", delete)
    found = verify(str(run))
    assert found.problems == ()
    assert found.notes == ("step-000000004: was deleted meanwhile, as a run at work does",)
