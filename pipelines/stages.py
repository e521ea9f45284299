"""A user's own stages behind the decoder, found by their dotted names and composed as webdataset composes them.

A stage is what webdataset calls one: a callable that takes an iterable of samples, which are dicts, and yields
samples. It gets one micro-batch at a time, decoded, in the order of its stream, before flips:

    "__key__"    str, the sample's name
    "__index__"  int, the draw's number, unique over the run: the key of its own randomness
    "__seed__"   int, the run's
    "image"      uint8 [H, W, C], its own to change
    "label"      int, −1 for none

and yields as many, in that order, with images of that shape and dtype, and labels of the data set. So that a run
stays the same on any number of workers and after every resume, what a stage does must follow from the micro-batch
alone: its randomness from `ddpm_core.rng` with ("__seed__", a purpose of its own, "__index__"), and nothing kept
from one call to the next. Bad samples that are passed over pass by the stages too; a stage that raises ends the run
always, since it is code that is wrong, not data. What is held out never meets a stage.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import webdataset
from numpy.typing import NDArray

from pipelines.dataset import DataError
from pipelines.errors import UserError, one_line

if TYPE_CHECKING:
    from pipelines.config_sections import StageConfig

Sample = dict[str, Any]


class StageError(DataError):
    """A stage failed, or did not keep to one sample out for each in."""


@dataclass(frozen=True)
class LoadedStage:
    """A stage that was found. `label` names it in messages: its place in the configuration, and its name."""

    label: str
    call: Callable[[Iterable[Sample]], Iterable[Sample]]


def load_stages(configs: Sequence[StageConfig]) -> tuple[LoadedStage, ...]:
    """The stages of `data.stages`: a bare name is the stage itself; one with `args` is a factory, called with them.

    Modules in the working directory are found, behind those that are installed. Raises `UserError` naming
    `data.stages[i]` where a name cannot be imported, a factory fails, or what is there is no stage.
    """
    _see_working_directory(configs)
    return tuple(_load(_label(place, config), config) for place, config in enumerate(configs))


def _label(place: int, config: StageConfig) -> str:
    return f"data.stages[{place}]: {config.name}"


def _load(label: str, config: StageConfig) -> LoadedStage:
    found = _find(label, config)
    if config.args is None:
        return LoadedStage(label, found)
    try:
        made = found(**config.args)
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{label}: cannot be made with args {config.args} ({_told(error)})") from None
    if not callable(made):
        raise UserError(
            f"{label}: with args it must return a stage, which is a callable, got {type(made).__name__}"
        )
    return LoadedStage(label, made)


def _find(label: str, config: StageConfig) -> Callable[..., Any]:
    module_name, _, name = config.name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # a user's module may fail in every way
        raise UserError(f"{label}: {module_name} cannot be imported ({_told(error)})") from error
    if not hasattr(module, name):
        raise UserError(f"{label}: the module {module_name} has no {name!r}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{label}: must be a callable, got {type(found).__name__}")
    return found


def check_travelling(configs: Sequence[StageConfig]) -> list[str]:
    """What can be known here of stages that another machine will load.

    Raises `UserError` like `load_stages` for those whose code travels (`code_of`), where it would fail everywhere:
    a module of it that is missing or has no such name, what is no callable, `args` that its parameters don't take.
    A factory is not called. Returns a line for each that can't be looked at here: it, or what it needs when it is
    imported, may be there on the cluster alone.
    """
    code = code_of(configs)
    notes = []
    for place, config in enumerate(configs):
        label = _label(place, config)
        top = config.name.partition(".")[0]
        if top not in code:
            if importlib.util.find_spec(top) is None:
                notes.append(f"{label}: there is no {top} here; it must be installed on the cluster")
            continue
        try:
            _check_args(label, _find(label, config), config.args)
        except UserError as error:
            reason = error.__cause__
            if reason is None or isinstance(reason, SyntaxError):
                raise
            name = (reason.name or "") if isinstance(reason, ModuleNotFoundError) else ""
            if name and name.partition(".")[0] in code:
                raise
            what = f"{label}: imports {name}, which is not here; it" if name else f"{error}; what it needs"
            notes.append(f"{what} must be installed on the cluster")
    return notes


def _check_args(label: str, found: Callable[..., Any], args: Mapping[str, Any] | None) -> None:
    if args is None:
        return
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # of a callable in C, which says nothing of its parameters
    try:
        signature.bind(**args)
    except TypeError as error:
        raise UserError(f"{label}: cannot be made with args {args} ({_told(error)})") from None


def code_of(configs: Sequence[StageConfig]) -> dict[str, Path]:
    """The user's own packages (folders) and modules (files) that stages lie in, by their top-level names, to travel
    with a job. What is installed, and what is not here at all, is left to the cluster.
    """
    _see_working_directory(configs)
    found: dict[str, Path] = {}
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")]
    for name in dict.fromkeys(config.name.partition(".")[0] for config in configs):
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        folders = list(spec.submodule_search_locations or ())
        place = folders[0] if folders else spec.origin if spec.has_location else None
        if place is None:
            continue
        path = Path(place).resolve()
        if not any(path.is_relative_to(folder) for folder in installed):
            found[name] = path
    return found


def _see_working_directory(configs: Sequence[StageConfig]) -> None:
    """A command that is installed does not look for modules where it was called."""
    here = str(Path.cwd())
    if configs and here not in sys.path:
        sys.path.append(here)


@dataclass
class _Batch:
    """A micro-batch on its way through the stages: what is known of each of its good samples."""

    keys: list[str]
    index: list[int]
    error: StageError | None = None
    """The first one, which a later stage may catch and say nothing of."""


class Stages:
    """Stages composed by webdataset's `DataPipeline`, anew for every micro-batch. `seed`: the run's.

    `num_classes`: the data set's; labels may be −1 or one of them.
    """

    def __init__(self, stages: Sequence[LoadedStage], seed: int, num_classes: int) -> None:
        self._stages = tuple(stages)
        self._seed = seed
        self._num_classes = num_classes

    def apply(
        self,
        keys: Sequence[str],
        index: NDArray[np.int64],
        images: NDArray[np.uint8],
        label: NDArray[np.int64],
        weight: NDArray[np.float32],
    ) -> None:
        """Replace images uint8 `[b, H, W, C]` and labels `[b]` by what the stages make of those of weight above 0.

        Raises `StageError` naming the stage and the sample.
        """
        places = np.flatnonzero(weight).tolist()
        batch = _Batch([keys[place] for place in places], index[places].tolist())
        samples = (
            # a copy, so that a stage may hand on one sample's memory as another's
            {"image": images[place].copy(), "label": int(label[place])}
            for place in places
        )
        steps = [partial(self._run, stage, batch, images.shape[1:]) for stage in self._stages]
        pipeline = webdataset.DataPipeline(lambda: self._named(batch, samples), *steps)
        for place, sample in zip(places, pipeline, strict=True):
            images[place] = sample["image"]
            label[place] = sample["label"]

    def _named(self, batch: _Batch, samples: Iterable[Sample]) -> Iterator[Sample]:
        for key, number, sample in zip(batch.keys, batch.index, samples, strict=True):
            yield {"__key__": key, "__index__": number, "__seed__": self._seed, **sample}

    def _run(
        self, stage: LoadedStage, batch: _Batch, shape: tuple[int, ...], source: Iterable[Sample]
    ) -> Iterator[Sample]:
        """What a stage yields, each compared with the one that it must be."""
        done, total = 0, len(batch.keys)
        for sample in self._pulled(stage, batch, source):
            if done == total:
                raise _error(stage, batch, total - 1, "yields a further one after the last")
            if reason := self._wrong(sample, batch.keys[done], batch.index[done], shape):
                raise _error(stage, batch, done, reason)
            yield {
                **sample,
                "__key__": batch.keys[done],
                "__index__": batch.index[done],
                "__seed__": self._seed,
            }
            done += 1
        if batch.error is not None:
            # an earlier stage's, which this one caught
            raise batch.error
        if done < total:
            raise _error(stage, batch, done, "drops it: every sample that goes in must come out")

    def _pulled(self, stage: LoadedStage, batch: _Batch, source: Iterable[Sample]) -> Iterator[Sample]:
        """The samples that a stage yields; its exceptions name it, and the sample that it took last."""
        taken = 0

        def counted() -> Iterator[Sample]:
            nonlocal taken
            for sample in source:
                taken += 1
                yield sample

        try:
            given = stage.call(counted())
            if not isinstance(given, Iterable):
                name = stage.label.rpartition(": ")[2]
                hint = f"; if it makes a stage, write {{name: {name}, args: {{}}}}" if callable(given) else ""
                raise batch.error or _error(
                    stage, batch, 0, f"returns {type(given).__name__}, not its samples{hint}"
                )
            yield from given
        except StageError:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            # in a thread that reads no signal raises the last one
            if batch.error is not None:
                raise batch.error from None
            raise _error(stage, batch, max(0, taken - 1), f"raises {_told(error)}{_where(error)}") from error

    def _wrong(self, sample: Any, key: str, index: int, shape: tuple[int, ...]) -> str | None:
        if not isinstance(sample, Mapping):
            return f"yields {type(sample).__name__}, and a sample is a dict"
        if sample.get("__key__") != key or sample.get("__index__", index) != index:
            return f"yields {sample.get('__key__')!r} in its place: all must come out once, in their order"
        image, label = sample.get("image"), sample.get("label")
        if not isinstance(image, np.ndarray):
            return f"makes its image {type(image).__name__}, not an array"
        if image.dtype != np.uint8 or image.shape != shape:
            return f"makes its image {image.dtype} {list(image.shape)}, not uint8 {list(shape)}"
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            return f"makes its label {label!r}, not a number"
        if not -1 <= label < self._num_classes:
            return f"makes its label {label}, and the data set has {self._num_classes} classes (-1: none)"
        return None


def _error(stage: LoadedStage, batch: _Batch, place: int, reason: str) -> StageError:
    batch.error = StageError(f"{stage.label}: sample {batch.keys[place]!r}: {reason}")
    return batch.error


def _told(error: BaseException) -> str:
    said = one_line(error, 160)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"


def _where(error: BaseException) -> str:
    """The line of the stage's file that its exception comes from, or came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
