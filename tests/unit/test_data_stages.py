"""A user's own stages: composed as webdataset does, exact in order and number, keyed, and named when they err."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from numpy.typing import NDArray

from ddpm_core import rng
from jobs.submission import stage
from pipelines.checkpoints import Checkpoints
from pipelines.config import Config, parse_config
from pipelines.config_sections import StageConfig
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.images import encode_png
from pipelines.order import Order
from pipelines.reader import MicroBatch, StreamBatches
from pipelines.shards import Sample as Stored
from pipelines.shards import pack
from pipelines.stages import LoadedStage, Sample, StageError, Stages, check_travelling, code_of, load_stages
from pipelines.stored_order import read_split
from pipelines.tracking import History
from pipelines.train import claim, open_run, train
from pipelines.world import SingleWorker
from tests.support.data import dataset_of, put_dataset, random_images
from tests.support.jobs import one_line_mistake, succeeded
from tests.support.runs import TINY, tiny_config

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
COUNTS = [5, 9, 6]


@pytest.fixture
def augment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example of the documentation as augment.py in the working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "augment.py").write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("augment", "mine")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def loaded(*calls: Callable[[Iterable[Sample]], Iterable[Sample]]) -> list[LoadedStage]:
    return [
        LoadedStage(f"data.stages[{place}]: my.{call.__name__}", call) for place, call in enumerate(calls)
    ]


def batches(dataset: Dataset, stages: Iterable[LoadedStage], **options: Any) -> list[list[MicroBatch]]:
    settings: dict[str, Any] = {
        "seed": 5,
        "num_streams": 4,
        "streams": range(4),
        "micro_batch_size": 3,
        "as_bytes": True,
    } | options
    with StreamBatches(dataset, "train", stages=tuple(stages), **settings) as stream:
        return [next(stream) for _ in range(6)]


def negate(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        sample["image"] = 255 - sample["image"]
        yield sample


def relabel(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"label": (sample["label"] + 1) % 10}


# ---- what a stage gets and gives


def test_stages_change_images_and_labels_and_nothing_else(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, COUNTS, (3, 5, 7))
    plain, changed = batches(dataset, []), batches(dataset, loaded(negate, relabel))
    for before, after in zip(plain, changed, strict=True):
        for one, two in zip(before, after, strict=True):
            assert torch.equal(two.x_start, 255 - one.x_start)
            assert torch.equal(two.label, (one.label + 1) % 10)
            for name in ("position", "index", "weight"):
                assert torch.equal(getattr(two, name), getattr(one, name))


def test_a_sample_is_what_the_order_says(tmp_path: Path) -> None:
    dataset, images = dataset_of(tmp_path, COUNTS)
    order, starts = Order(COUNTS, 5, 4), np.array([0, 5, 14])
    seen: dict[int, Sample] = {}

    def look(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            seen[sample["__index__"]] = dict(sample)
            yield sample

    for step in batches(dataset, loaded(look), flip=True):
        for part in step:
            where = order.locate(part.stream, part.position.numpy())
            for index, shard, row in zip(part.index.tolist(), where.shard, where.sample, strict=True):
                sample, number = seen[index], int(starts[shard] + row)
                assert sample["__key__"] == f"sample-{number:06d}"
                assert (sample["__seed__"], sample["label"]) == (5, row % 10)
                assert sample["image"].dtype == np.uint8
                assert np.array_equal(sample["image"].transpose(2, 0, 1), images[number])  # before flips


def shifted(image: NDArray[np.uint8], index: int, seed: int) -> NDArray[np.uint8]:
    y, x = (int(rng.integers(seed, "my shift", torch.tensor([index]), 5, draw=draw)) for draw in (0, 1))
    wide = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    return wide[:, y : y + image.shape[1], x : x + image.shape[2]]


def example_stages() -> tuple[LoadedStage, ...]:
    return load_stages(
        [StageConfig(name="augment.shift"), StageConfig(name="augment.darken", args={"strength": 0.2})]
    )


def test_the_documented_example_does_what_it_says(tmp_path: Path, augment: Path) -> None:
    dataset, _ = dataset_of(tmp_path / "data", COUNTS)
    alone = [example_stages()[0]]
    moved = False
    for before, after in zip(batches(dataset, []), batches(dataset, alone), strict=True):
        for one, two in zip(before, after, strict=True):
            for place, index in enumerate(one.index.tolist()):
                expected = shifted(one.x_start[place].numpy(), index, 5)
                assert np.array_equal(two.x_start[place].numpy(), expected)
                moved |= not torch.equal(one.x_start[place], two.x_start[place])
    assert moved


def test_on_any_number_of_workers_and_after_a_resume_they_do_the_same(tmp_path: Path, augment: Path) -> None:
    dataset, _ = dataset_of(tmp_path / "data", COUNTS)
    alone = batches(dataset, example_stages(), flip=True)
    for options in ({"streams": [2, 0]}, {"streams": [1, 3]}, {"start_step": 2}, {"decode_threads": 3}):
        start = 2 if "start_step" in options else 0
        for parts, expected in zip(
            batches(dataset, example_stages(), flip=True, **options), alone[start:], strict=False
        ):
            assert all(torch.equal(part.x_start, expected[part.stream].x_start) for part in parts)


def test_a_stage_may_look_at_the_whole_micro_batch_and_hand_on_memory_crosswise(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, COUNTS)

    def crosswise(samples: Iterable[Sample]) -> Iterator[Sample]:
        all_of_them = list(samples)
        assert len(all_of_them) == 3
        for one, other in zip(all_of_them, reversed(all_of_them), strict=True):
            yield one | {"image": other["image"]}

    for before, after in zip(batches(dataset, []), batches(dataset, loaded(crosswise)), strict=True):
        for one, two in zip(before, after, strict=True):
            assert torch.equal(two.x_start, one.x_start.flip(0))


def test_webdatasets_own_filters_are_stages(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, COUNTS)
    # a map whose result has the image and the label alone still keeps its place by its key
    bare = wds.map(lambda sample: {"image": 255 - sample["image"], "label": sample["label"]})
    both = [LoadedStage("a", wds.map_dict(image=lambda image: image // 2)), LoadedStage("b", bare)]
    for before, after in zip(batches(dataset, []), batches(dataset, both), strict=True):
        for one, two in zip(before, after, strict=True):
            assert torch.equal(two.x_start, 255 - one.x_start // 2)


def test_bad_samples_pass_by(tmp_path: Path) -> None:
    images = random_images(6)
    files = [encode_png(image)[: -30 if row == 2 else None] for row, image in enumerate(images)]
    shard = pack(Stored(f"s-{row}", data, row) for row, data in enumerate(files))
    dataset = put_dataset(tmp_path, {"train": [shard]}, (1, 8, 8))
    met: list[str] = []

    def look(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            met.append(sample["__key__"])
            yield sample | {"image": 255 - sample["image"]}

    passed_over = 0
    for step in batches(dataset, loaded(look), skip_bad=True):
        for part in step:
            bad = part.weight == 0
            assert bool((part.x_start[bad] == 0).all())
            passed_over += int(bad.sum())
    assert passed_over > 0
    assert set(met) == {f"s-{row}" for row in (0, 1, 3, 4, 5)}


# ---- a stage that does not keep to it


def drop(samples: Iterable[Sample]) -> Iterator[Sample]:
    yield from (sample for sample in samples if sample["__key__"] != "b")


def add(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield from [sample, sample] if sample["__key__"] == "b" else [sample]


def add_at_the_end(samples: Iterable[Sample]) -> Iterator[Sample]:
    yield from samples
    yield {"__key__": "x"}


def reorder(samples: Iterable[Sample]) -> Iterable[Sample]:
    return reversed(list(samples))


def cut(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"image": sample["image"][: -1 if sample["__key__"] == "b" else None]}


def turn_to_float(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"image": sample["image"] / 255.0}


def as_list(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"image": sample["image"].tolist()}


def as_tuples(samples: Iterable[Sample]) -> Iterator[Any]:
    for sample in samples:
        yield sample["image"], sample["label"]


def unlabel(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"label": "cat"}


def mislabel(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"label": 10}


def fail(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if sample["__key__"] == "b":
            raise ZeroDivisionError("of\nmine")
        yield sample


def fail_at_once(samples: Iterable[Sample]) -> Iterator[Sample]:
    raise RuntimeError("not today")


def nothing(samples: Iterable[Sample]) -> Any:
    return None


def leave(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        sys.exit(3)
        yield sample


def interrupt(samples: Iterable[Sample]) -> Iterator[Sample]:
    raise KeyboardInterrupt


def factory(amount: int = 1) -> Any:
    return negate


def swallow(samples: Iterable[Sample]) -> Any:
    with contextlib.suppress(Exception):
        list(samples)


def apply(*stages: Callable[[Iterable[Sample]], Iterable[Sample]], seed: int = 1) -> NDArray[np.uint8]:
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)
    label = np.array([0, 1, 2])
    Stages(loaded(*stages), seed, 10).apply(
        ["a", "b", "c"], np.array([7, 11, 15]), images, label, np.ones(3, "f4")
    )
    return images


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (drop, "sample 'b': yields 'c' in its place"),
        (add, "sample 'c': yields 'b' in its place"),
        (add_at_the_end, "sample 'c': yields a further one after the last"),
        (reorder, "sample 'a': yields 'c' in its place"),
        (cut, r"sample 'b': makes its image uint8 \[3, 4, 1\], not uint8 \[4, 4, 1\]"),
        (turn_to_float, r"sample 'a': makes its image float64 \[4, 4, 1\], not uint8"),
        (as_list, "sample 'a': makes its image list, not an array"),
        (as_tuples, "sample 'a': yields tuple, and a sample is a dict"),
        (unlabel, "sample 'a': makes its label 'cat', not a number"),
        (mislabel, "sample 'a': makes its label 10, and the data set has 10 classes"),
        (fail, "sample 'b': raises ZeroDivisionError: of mine"),
        (fail_at_once, "sample 'a': raises RuntimeError: not today"),
        (leave, "sample 'a': raises SystemExit: 3"),
        (interrupt, "sample 'a': raises KeyboardInterrupt"),
        (nothing, "sample 'a': returns NoneType, not its samples$"),
        (
            factory,
            "sample 'a': returns function, not its samples; "
            "if it makes a stage, write {name: my.factory, args: {}}$",
        ),
        (lambda samples: iter(()), "sample 'a': drops it"),
    ],
)
@pytest.mark.parametrize("before", [[], [negate]])
@pytest.mark.parametrize("behind", [[], [negate]])
def test_it_is_named_with_the_sample(
    wrong: Callable[[Iterable[Sample]], Iterable[Sample]], says: str, before: list[Any], behind: list[Any]
) -> None:
    name = re.escape(wrong.__name__)
    with pytest.raises(StageError, match=rf"^data\.stages\[{len(before)}\]: my\.{name}: {says}") as error:
        apply(*before, wrong, *behind)
    assert "\n" not in str(error.value)


def test_its_line_is_named() -> None:
    def raising(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample | {"label": np.array([[1, 2], [3, 4]]) @ np.array([1, 2, 3])}

    line = raising.__code__.co_firstlineno + 2
    with pytest.raises(
        StageError, match=rf"raises ValueError: matmul: .*\(test_data_stages\.py, line {line}\)$"
    ):
        apply(raising)

    def around(samples: Iterable[Sample]) -> Iterator[Sample]:
        yield from fail(samples)

    # the one in which it was raised, of several
    with pytest.raises(StageError, match=r"of mine \(test_data_stages\.py, line \d+\)$") as error:
        apply(around)
    assert f"line {fail.__code__.co_firstlineno + 3})" in str(error.value)

    def within(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample | {"label": json.loads("{")}

    # its own, and not that of the library which it calls
    line = within.__code__.co_firstlineno + 2
    with pytest.raises(StageError, match=rf"JSONDecodeError: .* \(test_data_stages\.py, line {line}\)$"):
        apply(within)


def test_an_error_that_a_later_stage_catches_is_still_the_earlier_ones() -> None:
    def swallow(samples: Iterable[Sample]) -> Iterator[Sample]:
        try:
            yield from samples
        except Exception:  # noqa: BLE001
            return

    with pytest.raises(StageError, match=r"stages\[0\]: my\.fail: sample 'b': raises ZeroDivisionError"):
        apply(fail, swallow)
    with pytest.raises(StageError, match=r"stages\[0\]: my\.fail: sample 'b': raises ZeroDivisionError"):
        apply(fail, swallow)


def test_an_error_ends_the_stream_also_where_bad_samples_are_skipped(tmp_path: Path) -> None:
    dataset, _ = dataset_of(tmp_path, COUNTS)

    def broken(samples: Iterable[Sample]) -> Iterator[Sample]:
        raise ValueError("a bug")
        yield

    with pytest.raises(StageError, match=r"my\.broken: sample 'sample-\d+': raises ValueError: a bug"):
        batches(dataset, loaded(broken), skip_bad=True)


# ---- names


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("[augment]", r"data\.stages\[0\]: must be the dotted name of a callable.*got 'augment'"),
        ("[a.b, 'a-b.c']", r"data\.stages\[1\]: must be the dotted name of a callable.*got 'a-b\.c'"),
        ("[{name: a.b, args: {x: .nan}}]", r"data\.stages\[0\]\.args\.x.*finite number, got nan"),
        ("[{name: a.b, arg: {}}]", r"data\.stages\[0\]\.arg: no such setting; did you mean 'args'\?$"),
        (
            "[{name: a.b, strength: 1}]",
            r"data\.stages\[0\]\.strength: no such setting; there are name, args$",
        ),
        ("[3]", r"data\.stages\[0\]: "),
    ],
)
def test_a_wrong_entry_costs_a_line(stages: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        tiny_config(f"data.stages={stages}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"name": "no_such_package.augment.x"},
            "no_such_package.augment cannot be imported (ModuleNotFoundError",
        ),
        ({"name": "augment.shfit"}, "the module augment has no 'shfit'"),
        ({"name": "augment.rng"}, "must be a callable, got module"),
        ({"name": "mine.broken.x"}, "mine.broken cannot be imported (SyntaxError: invalid syntax"),
        (
            {"name": "augment.darken", "args": {"stregth": 1}},
            "cannot be made with args {'stregth': 1} (TypeError",
        ),
        (
            {"name": "builtins.dict", "args": {}},
            "with args it must return a stage, which is a callable, got dict",
        ),
    ],
)
def test_a_name_that_is_no_stage_costs_a_line(augment: Path, config: dict[str, Any], line: str) -> None:
    (augment / "mine").mkdir()
    (augment / "mine" / "broken.py").write_text("1 /\n")
    with pytest.raises(UserError) as error:
        load_stages([StageConfig(name="augment.shift"), StageConfig.model_validate(config)])
    assert str(error.value).startswith(f"data.stages[1]: {config['name']}: {line}")
    assert "\n" not in str(error.value)


def test_a_dry_run_says_so_and_an_installed_command_finds_what_lies_where_it_is_called(
    tmp_path: Path, augment: Path
) -> None:
    dataset_of(tmp_path / "data", COUNTS)
    (augment / "tiny.yaml").write_text(TINY)
    command = ["train", "--config", "tiny.yaml", "--dry-run", "--set", f"data.uri={tmp_path}/data"]

    def dry_run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # -P: as an installed command, Python does not look in the working directory
            [sys.executable, "-P", "-m", "jobs", *command, *more],
            env={**os.environ, "PYTHONPATH": str(DOCUMENT.parents[1]), "DDPM_STATE": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "stages     augment.shift, augment.darken\n" in succeeded(
        dry_run("--set", "data.stages=[augment.shift, {name: augment.darken, args: {strength: 0.2}}]")
    )
    one_line_mistake(
        dry_run("--set", "data.stages=[augment.shfit]"),
        "data.stages[0]: augment.shfit: the module augment has no 'shfit'",
    )


# ---- identity


def test_name_and_args_are_part_of_the_identity_only_where_there_are_stages() -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        return tiny_config(*overrides).training_identity("data")

    assert "stages" not in identity()
    names = [
        tiny_config(*([f"data.stages={stages}"] if stages else [])).run_name("data")
        for stages in ("", "[a.b]", "[a.c]", "[a.b, a.c]", "[a.c, a.b]", "[{name: a.b, args: {}}]",
                       "[{name: a.b, args: {x: 1}}]", "[{name: a.b, args: {x: 2}}]")
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert identity("data.stages=[]") == identity()
    assert identity("data.stages=[a.b]") == identity("data.stages=[{name: a.b}]")


def test_a_configuration_with_stages_survives_its_own_yaml() -> None:
    config = tiny_config("data.stages=[a.b, {name: a.c, args: {x: [1, 2.5, null, q], y: {z: true}}}]")
    assert parse_config(config.to_yaml()) == config


# ---- runs


def config_with(folder: Path, *overrides: str) -> Config:
    dataset_of(folder / "data", COUNTS)
    return tiny_config(
        f"data.uri={folder}/data", f"storage={folder}/out", "train.steps=4", "train.eval_every=4", *overrides
    )


def test_a_run_trains_on_what_they_make_and_is_measured_on_what_is_stored(
    tmp_path: Path, augment: Path
) -> None:
    """The same network gets the same bound with stages as without: the held-out images never meet them."""
    stages = "data.stages=[augment.shift, {name: augment.darken, args: {strength: 0.2}}]"
    still = "optimizer.learning_rate=1e-30"
    metrics, gradients = [], []
    for number, overrides in enumerate(([still], [still, stages])):
        run = open_run(config_with(tmp_path / str(number), *overrides))
        claim(run)
        train(run, SingleWorker(torch.device("cpu")))
        commit = Checkpoints(run.storage).open(4).commit
        metrics.append(commit.metrics["held_out/total"])
        gradients.append(
            [row.metrics["grad_norm"] for row in History(run.storage).rows() if "loss" in row.metrics]
        )
    assert metrics[0] == metrics[1]
    assert gradients[0] != gradients[1]


def test_who_reads_held_out_images_imports_nothing(tmp_path: Path) -> None:
    config = config_with(tmp_path, "data.stages=[no_such_module.x]")
    run = open_run(config)  # as sample, evaluate and export do
    assert len(list(read_split(run.dataset, "test"))) == 3


# ---- the code that travels


def test_a_job_takes_along_what_is_not_installed(augment: Path, tmp_path: Path) -> None:
    (augment / "mine" / "deeper").mkdir(parents=True)
    (augment / "mine" / "__init__.py").touch()
    (augment / "mine" / "helper.py").write_text("x = 1\n")
    (augment / "mine" / "deeper" / "stages.py").write_text("from mine.helper import x\n")
    configs = [
        StageConfig(name=name)
        for name in (
            "mine.deeper.stages.y",
            "augment.shift",
            "webdataset.map",
            "builtins.iter",
            "elsewhere.x",
        )
    ]
    code = code_of(configs)
    assert code == {"mine": augment / "mine", "augment": augment / "augment.py"}
    folder = tmp_path / "job"
    folder.mkdir()
    stage(folder, "a: 1\n", code)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {
        "mine/__init__.py",
        "mine/helper.py",
        "mine/deeper/stages.py",
        "augment.py",
        "config.yaml",
    } <= names
    assert code_of([]) == {}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"name": "augment.shfit"}, "the module augment has no 'shfit'"),
        ({"name": "augment.rng"}, "must be a callable, got module"),
        ({"name": "mine.broken.x"}, "mine.broken cannot be imported (SyntaxError: invalid syntax"),
        ({"name": "mine.none.x"}, "mine.none cannot be imported (ModuleNotFoundError: "),
        (
            {"name": "augment.darken", "args": {"stregth": 1}},
            "cannot be made with args {'stregth': 1} (TypeError",
        ),
        (
            {"name": "augment.darken", "args": {}},
            "cannot be made with args {} (TypeError: missing a required",
        ),
    ],
)
def test_code_that_is_wrong_is_told_before_it_travels(
    augment: Path, config: dict[str, Any], line: str
) -> None:
    (augment / "mine").mkdir()
    (augment / "mine" / "broken.py").write_text("1 /\n")
    with pytest.raises(UserError) as error:
        check_travelling([StageConfig(name="augment.shift"), StageConfig.model_validate(config)])
    assert str(error.value).startswith(f"data.stages[1]: {config['name']}: {line}")


def test_what_only_the_cluster_has_is_left_to_it(augment: Path) -> None:
    (augment / "mine").mkdir()
    (augment / "mine" / "uses.py").write_text("import no_such_library.deeper\n")
    (augment / "mine" / "looks.py").write_text("raise SystemExit('no GPU')\n")
    (augment / "mine" / "reads.py").write_text("def make(file):\n    return open(file)\n")
    names: list[Any] = [
        "no_such_package.x",
        "mine.uses.x",
        "augment.shift",
        {"name": "augment.darken", "args": {"strength": 1}},
        "webdataset.no_such_stage",
        {"name": "mine.reads.make", "args": {"file": "of the cluster"}},
        "mine.looks.x",
    ]
    assert check_travelling([StageConfig.model_validate(name) for name in names]) == [
        "data.stages[0]: no_such_package.x: there is no no_such_package here; it must be installed on the cluster",
        "data.stages[1]: mine.uses.x: imports no_such_library, which is not here; it must be installed on the "
        "cluster",
        "data.stages[6]: mine.looks.x: mine.looks cannot be imported (SystemExit: no GPU); what it needs must be "
        "installed on the cluster",
    ]
    assert check_travelling([]) == []
