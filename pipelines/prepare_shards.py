"""Making one shard of a data set, in whichever process."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pipelines.dataset import Shard
from pipelines.errors import UserError
from pipelines.libraries import libraries
from pipelines.preprocess import Preprocessing, inspect
from pipelines.shards import INDEX_ENCODINGS, Sample, check_members, pack, parse_index, sha256
from pipelines.sources import Entry, Reader
from pipelines.storage import Storage

MAX_NAMED = 20
"""So many bad images are told of, and with the last of them the search for more ends."""
_SHAPES_NAMED = 5

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Protocol):
    """Does tasks side by side, in other processes."""

    def __call__(
        self, work: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Generator[tuple[Task, Result], None, None]:
        """Each task with its result, in the order in which they get done; `work` and the tasks pickle.

        When it ends, also by an error of a task (which it raises) or by being closed, no task is running.
        """
        ...


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be: its split, the keys of its two objects, and its samples in order."""

    split: str
    key: str
    index_key: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Recipe:
    """What making a shard needs besides its plan. `shape`: that of every image. `libraries`: those that must make
    its bytes, see `pipelines.libraries`.
    """

    storage: Storage
    reader: Reader
    preprocessing: Preprocessing
    shape: tuple[int, int, int]
    libraries: str


@dataclass(frozen=True)
class Job:
    """One shard to make. `num_bytes`: the tar's size where an earlier attempt left tar and index. `look_only`:
    there will be no data set, and what is wanted is to know of its further bad images. `named`: what a finished
    data set names, which the shard must then be to the last byte.
    """

    number: int
    plan: ShardPlan
    num_bytes: int | None
    look_only: bool = False
    named: Shard | None = None


@dataclass(frozen=True)
class OtherShape:
    """Why an image can't be taken beside the first one; both shapes and what to do about it, in words."""

    found: str
    first: str
    advice: str


@dataclass(frozen=True)
class Bad:
    """An image that can't be taken: its name, and the reason."""

    name: str
    reason: str | OtherShape

    def __str__(self) -> str:
        why = self.reason
        if isinstance(why, OtherShape):
            return f"{self.name}: is {why.found} and the first image {why.first}: {why.advice}"
        return f"{self.name}: {why}"


class BadImage(Exception):
    """`bad` of it can't be taken."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(bad)
        self.bad = bad


@dataclass(frozen=True)
class Refused:
    """A shard that was not made, and its bad images, `MAX_NAMED` at most."""

    bad: tuple[Bad, ...]


class BadImages(UserError):
    """A source that can't become a data set, with a line for each of its bad images, but one for all that are only
    of another shape than the first one.
    """

    @classmethod
    def of(cls, bad: Iterable[Bad], total: int) -> BadImages:
        """Of a source of so many images; `MAX_NAMED` of them at most."""
        told = sorted(bad, key=str)[:MAX_NAMED]
        lines = _lines(told)
        if len(told) == MAX_NAMED:
            lines.append(f"{MAX_NAMED} images can't be taken, where the search ended: there may be more")
        elif len(told) > 1:
            lines.append(f"{len(told)} of {total} images can't be taken")
        return cls("\n".join(lines))


def _lines(told: Sequence[Bad]) -> list[str]:
    alike: dict[object, list[Bad]] = {}
    for bad in told:
        why = bad.reason
        alike.setdefault((why.first, why.advice) if isinstance(why, OtherShape) else bad, []).append(bad)
    lines = []
    for one, *more in alike.values():
        if not more or not isinstance(one.reason, OtherShape):
            lines.append(str(one))
            continue
        found = Counter(bad.reason.found for bad in (one, *more) if isinstance(bad.reason, OtherShape))
        shapes = ", ".join(f"{shape} ({count})" for shape, count in found.most_common(_SHAPES_NAMED))
        others = len(found) - _SHAPES_NAMED
        rest = f" and {others} more" if others > 0 else ""
        lines.append(
            f"{one.name} and {len(more)} more are not {one.reason.first} like the first image, but {shapes}{rest}: "
            f"{one.reason.advice}"
        )
    return lines


def any_colour(reader: Reader, entries: Iterable[Entry]) -> bool:
    for entry in entries:
        image = reader.load(entry).image
        # one that is none is named when it is to be stored, with all others
        with contextlib.suppress(ValueError):
            if inspect(image) == 3:
                return True
    return False


def make_shard(
    recipe: Recipe, job: Job, tell: Callable[[int], None] = lambda samples: None
) -> Shard | Refused:
    """Put the two objects of a shard, unless they are there; `tell(n)` is called as n samples are done."""
    storage, plan = recipe.storage, job.plan
    if (here := libraries(recipe.preprocessing.png_encoder)) != recipe.libraries:
        raise UserError(
            f"{storage.uri}/{plan.key}: a worker has {here}, and the one who prepares {recipe.libraries}: the same "
            "image must become the same bytes everywhere; install the same on all machines"
        )
    there = None if job.num_bytes is None else _written_before(storage, plan, job.num_bytes)
    if there is not None and job.named in (None, there):
        return there

    samples: dict[str, Sample] = {}
    bad: list[Bad] = []
    # whatever has to be read as a whole is read once, and the samples lie in their order all the same
    for done, entry in enumerate(sorted(plan.entries, key=lambda entry: entry.group), 1):
        try:
            made = convert(recipe.reader, entry, recipe.preprocessing, recipe.shape)
        except BadImage as error:
            bad.append(error.bad)
            if len(bad) == MAX_NAMED:
                break
        else:
            if not (bad or job.look_only):
                samples[entry.key] = made.sample
        tell(done)
    if bad or job.look_only:
        return Refused(tuple(bad))
    # a shard that is made again is what it was, by whichever version of this program
    for encoding in INDEX_ENCODINGS if job.named else INDEX_ENCODINGS[:1]:
        packed = pack((samples[entry.key] for entry in plan.entries), encoding)
        shard = _row(plan, len(packed.tar), packed.tar_sha256, packed.index)
        if job.named in (None, shard):
            break
    else:
        raise UserError(
            f"{storage.uri}/{plan.key}: can't be made again here: its images, or the libraries that store them "
            "(Pillow, zlib, pyarrow), are not those that the data set was made with; use those, or choose another "
            "--out"
        )
    storage.put(plan.key, packed.tar)
    storage.put(plan.index_key, packed.index)
    return shard


def _row(plan: ShardPlan, num_bytes: int, tar_sha256: str, index: bytes) -> Shard:
    return Shard(
        plan.split, plan.key, plan.index_key, len(plan.entries), num_bytes, tar_sha256, sha256(index)
    )


def _written_before(storage: Storage, plan: ShardPlan, num_bytes: int) -> Shard | None:
    """The shard as an earlier attempt left it: its index is put after the tar, and names size and hash."""
    raw = storage.get(plan.index_key)
    try:
        index = parse_index(raw)
    except ValueError:
        return None
    same_samples = index.key.to_pylist() == [entry.key for entry in plan.entries]
    if not same_samples or index.tar_num_bytes != num_bytes:
        return None
    return _row(plan, index.tar_num_bytes, index.tar_sha256, raw)


@dataclass(frozen=True)
class Converted:
    sample: Sample
    shape: tuple[int, int, int]


def convert(
    reader: Reader, entry: Entry, preprocessing: Preprocessing, shape: tuple[int, int, int] | None
) -> Converted:
    """The sample of an entry; raises `BadImage` where it can't be one, `UserError` where it can't be read."""
    loaded = reader.load(entry)
    try:
        image, found = preprocessing.apply(loaded.image)
        check_members(image, entry.label, loaded.members)
    except ValueError as error:
        raise BadImage(Bad(entry.name, str(error))) from None
    if shape is not None and found != shape:
        advice = "set prepare.image_size to make them one size"
        why = OtherShape(f"{found[2]}×{found[1]} pixels", f"{shape[2]}×{shape[1]} pixels", advice)
        raise BadImage(Bad(entry.name, why))
    return Converted(Sample(entry.key, image, entry.label, loaded.members), found)
