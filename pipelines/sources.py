"""Where images come from before they are a data set, and what every kind of source has in common."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError, printable
from pipelines.images import encode_png

if TYPE_CHECKING:
    from pipelines.prepare_shards import Workers

__all__ = ["Entry", "Loaded", "Source", "key_of", "open_source", "printable"]

logger = logging.getLogger(__name__)

DIGITS = "digits"
DIGIT_LEVELS = 17
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm")
SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# a plain tar header holds names of 100 bytes, and ".png" follows the key
_MAX_KEY_BYTES = 96
_MAX_CLASSES = 2**20
KINDS = (
    "a folder of images or of .tar or .parquet files, a .zip, .tar, .parquet, .npy or .npz file, "
    f"the like below s3://BUCKET/PREFIX, or {DIGITS!r}"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: `key` it gets in the data set, `label` (−1 for none), `name` by which it is
    known, `place` by which its source's reader finds it, `group` what is read as a whole to get at it (nothing
    where it can be read alone).
    """

    key: str
    label: int
    name: str
    place: Any = None
    group: str = ""


@dataclass(frozen=True)
class Loaded:
    """What a source holds of one sample: the image file's bytes, or where there is no file its pixels (uint8
    `[1 or 3, H, W]`); and further members by their extension.
    """

    image: bytes | NDArray[np.uint8]
    members: Mapping[str, bytes] = field(default_factory=dict)


class Reader(Protocol):
    """Reads entries in any process: it pickles, and opens what it needs where it is."""

    def load(self, entry: Entry) -> Loaded:
        """Raises `UserError` naming the entry where it can't be read."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """`kind`: "digits", "folder", "zip", "tar", "parquet" or "numpy". `entries`: sorted by key, keys unique.
    `fingerprint`: a hash over what the entries are (names, sizes, places, labels; a zip's CRCs), by which a
    second preparation knows its source again. `state`: a hash over what further shows a change of content (the
    files' times of change, the objects' ETags), which a copy may not share; empty where the fingerprint is of the
    content itself.
    """

    kind: str
    name: str
    levels: int
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    fingerprint: str
    reader: Reader
    state: str = ""

    def read(self, entry: Entry) -> bytes:
        """The image file's bytes, or those of a PNG of its pixels; `UserError` naming it."""
        image = self.reader.load(entry).image
        return image if isinstance(image, bytes) else encode_png(image)


def open_source(
    source: str,
    *,
    labels: str | None = None,
    image: str | None = None,
    label: str | None = None,
    workers: Workers | None = None,
) -> Source:
    """The source of this name: "digits" (scikit-learn's 1,797 handwritten digits, 8×8, 17 levels); a folder
    of images, or a .zip of one; Parquet files with image bytes; WebDataset tars; an array of images (.npy,
    .npz). A folder, an `s3://bucket/prefix` and a pattern such as `a-{000..031}.tar` may hold many files.

    `labels`: a table (CSV or Parquet) with the columns `file` and `label`, for a folder or a zip; for a .npy
    file another one with the labels. `image` and `label`: the column, array or member's extension that holds
    the image and the label, where it is not the usual one. `workers` read through tars, which a source of many
    of them takes long for; without it threads of this process do.

    Raises `UserError` if there is no image, if only some have a label, or if two images would get the same
    key.
    """
    # each kind has imports of its own that no other needs
    if source == DIGITS:
        _refuse_options("digits", labels=labels, image=image, label=label)
        return _digits()
    if source.startswith("pipe:"):
        raise UserError(f"source: {source}: a pipe: address would run a program, and is not taken")
    if "://" in source and not source.startswith(("s3://", "file://")):
        raise UserError(f"source: {source}: is not taken; give {KINDS}")
    from pipelines.source_find import find, local_path

    if source.lower().endswith((".npy", ".npz")) and not source.startswith("s3://"):
        from pipelines.source_numpy import open_arrays

        return open_arrays(local_path(source), labels, image, label)
    found = find(source)
    if found.kind == "tar":
        from pipelines.source_tar import open_tars

        _refuse_options("tar", labels=labels)
        return open_tars(found, image, label, workers)
    if found.kind == "parquet":
        from pipelines.source_parquet import open_parquet

        _refuse_options("parquet", labels=labels)
        return open_parquet(found, image, label)
    _refuse_options(found.kind, image=image, label=label)
    if found.kind == "zip":
        from pipelines.source_zip import open_zip

        return open_zip(local_path(source), labels)
    from pipelines.source_files import folder

    return folder(found, labels)


def _refuse_options(kind: str, **options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name} {value}: means nothing to a source of kind {kind}")


@dataclass(frozen=True)
class _DigitReader:
    def load(self, entry: Entry) -> Loaded:
        return Loaded(self._values[entry.place][None])

    @cached_property
    def _values(self) -> Any:
        # scikit-learn takes a second to import, and no other source needs it
        from sklearn.datasets import load_digits

        return np.rint(load_digits().images * 255.0 / (DIGIT_LEVELS - 1)).astype(np.uint8)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    reader = _DigitReader()
    entries = tuple(
        Entry(f"digit-{number:04d}", int(label), f"digit {number}", number)
        for number, label in enumerate(bundle.target)
    )
    return Source(
        kind=DIGITS,
        name=DIGITS,
        levels=DIGIT_LEVELS,
        classes=tuple(str(name) for name in bundle.target_names),
        entries=entries,
        fingerprint=hashlib.sha256(
            reader._values.tobytes() + bundle.target.astype("<i8").tobytes()
        ).hexdigest(),
        reader=reader,
    )


def number_labels(
    where: str,
    labels: Sequence[str | int | None],
    names: Sequence[str] | None = None,
    name_of: Any = str,
) -> tuple[tuple[str, ...], list[int]]:
    """The classes of these labels, and each label as the number of its class (−1 where there is no label).

    Numbers (also as text) stay as they are, and their classes are `names` or "0", "1", …; texts are numbered
    in their order. `name_of(place)` says which one is at fault. Raises `UserError` if only some have a label
    (None, or the number −1), if a number has no class, or if one number is written in two ways.
    """
    known = [None if value in (None, -1, "-1") else value for value in labels]
    absent = sum(value is None for value in known)
    if absent == len(known):
        return (), [-1] * len(known)
    if absent:
        raise UserError(
            f"source: {where}: {absent} of {len(known)} images such as {name_of(known.index(None))} have no "
            "label: give all of them one, or none"
        )
    texts = [str(value) for value in known]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        wrong = next(
            (n for n, value in enumerate(known) if isinstance(value, int) and not 0 <= value < _MAX_CLASSES),
            None,
        )
        if wrong is not None:
            raise UserError(
                f"source: {where}: {name_of(wrong)} has the label {texts[wrong]}, which is no class"
            )
        classes = sorted(set(texts))
        numbers = {name: number for number, name in enumerate(classes)}
        return tuple(printable(name) for name in classes), [numbers[text] for text in texts]
    values = [int(text) for text in texts]
    spelt: dict[int, int] = {}
    for place, value in enumerate(values):
        if texts[spelt.setdefault(value, place)] != texts[place]:
            raise UserError(
                f"source: {where}: {name_of(spelt[value])} has the label {texts[spelt[value]]}, and "
                f"{name_of(place)} {texts[place]}, which would both be the class {value}: write it one way"
            )
    largest = max(values)
    if largest >= (_MAX_CLASSES if names is None else len(names)):
        known_classes = (
            f"the source names {len(names)} classes" if names is not None else "is no class's number"
        )
        raise UserError(
            f"source: {where}: {name_of(values.index(largest))} has the label {largest}: {known_classes}"
        )
    return tuple(printable(name) for name in names or map(str, range(largest + 1))), values


def ordered(where: str, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries by key; `UserError` if two share one."""
    result = sorted(entries, key=lambda entry: entry.key)
    for one, two in pairwise(result):
        if one.key == two.key:
            raise UserError(
                f"source: {one.name} and {two.name} would both be the sample {one.key!r}: rename one"
            )
    if not result:
        raise UserError(f"source: {where} holds no image")
    return tuple(result)


def fingerprint(lines: Iterable[str]) -> str:
    """SHA-256 of the lines."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(f"\n{line}".encode() if number else line.encode())
    return digest.hexdigest()


def state_of(versions: Mapping[str, str]) -> str:
    """The hash of these objects' versions (`pipelines.storage.ObjectInfo.version`) by name."""
    return fingerprint(f"{name!r} {versions[name]}" for name in sorted(versions))


def warn_passed_over(where: str, names: Sequence[str], what: str) -> None:
    if names:
        logger.warning(
            "%s: passed over %d %s, such as %s", where, len(names), what, printable(sorted(names)[0])
        )


def tell_hidden(where: str, names: Sequence[str]) -> None:
    """Of what is left out on purpose, so that whoever misses a file finds out why."""
    if names:
        logger.info(
            "%s: %d hidden, and not looked at (a name begins with '.' or __MACOSX), such as %s",
            where,
            len(names),
            printable(min(names)),
        )


def key_of(path: str) -> str:
    """The sample key of an image's relative path: the path without its suffix, as `sample_key` spells it."""
    return sample_key(str(PurePosixPath(path).with_suffix("")))


def sample_key(name: str) -> str:
    """This name in a form that every reader of WebDataset takes as a key.

    Such a reader splits a name at the first dot of its last part, and passes over names that look like its
    own `__meta__` entries; so these and control characters are percent-encoded. A key that is too long for a
    plain tar header ends in a hash of the whole instead.
    """
    folder, _, base = name.rpartition("/")
    base = base.replace("%", "%25").replace(".", "%2E")
    key = f"{folder.replace('%', '%25')}/{base}" if folder else base
    # what is not UTF-8 in a file's name arrives as lone surrogates
    key = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", key)
    key = re.sub(r"^__", "%5F_", key)
    raw = key.encode()
    if len(raw) <= _MAX_KEY_BYTES:
        return key
    digest = hashlib.blake2b(raw, digest_size=12).hexdigest()
    head = raw[: _MAX_KEY_BYTES - 1 - len(digest)].decode(errors="ignore")
    # a dot of a folder's name may now stand in the last part
    return f"{head.replace('.', '_')}~{digest}"
