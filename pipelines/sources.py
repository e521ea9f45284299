"""Where images come from before they are a data set, and what every kind of source has in common."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.columns import Numbered, Passed, narrow
from pipelines.entries import Entries, Entry
from pipelines.errors import UserError, printable
from pipelines.images import encode_png
from pipelines.verified import counted

if TYPE_CHECKING:
    from pipelines.prepare_shards import Workers

__all__ = ["Entries", "Entry", "Loaded", "Source", "key_of", "open_source", "printable"]

logger = logging.getLogger(__name__)

DIGITS = "digits"
DIGIT_LEVELS = 17
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "bmp", "webp", "gif", "tif", "tiff", "ppm", "pgm")
SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# a plain tar header holds names of 100 bytes, and ".png" follows the key
_MAX_KEY_BYTES = 96
# what pathlib normalises, or takes for no suffix
_UNUSUAL = re.compile(r"^$|^\.?/|//|/\./|[/.]$")
KINDS = (
    "a folder of images or of .tar or .parquet files, a .zip, .tar, .parquet, .npy or .npz file, "
    f"the like below s3://BUCKET/PREFIX, or {DIGITS!r}"
)


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
    """`kind`: "digits", "folder", "zip", "tar", "parquet" or "numpy". `entries`: in the source's order, keys
    unique.
    `fingerprint`: a hash over what the entries are (names, sizes, places, labels; a zip's CRCs), by which a
    second preparation knows its source again. `state`: a hash over what further shows a change of content (the
    files' times of change, the objects' ETags), which a copy may not share; empty where the fingerprint is of the
    content itself.
    """

    kind: str
    name: str
    levels: int
    classes: tuple[str, ...]
    entries: Entries
    fingerprint: str
    reader: Reader
    state: str = ""

    def read(self, entry: Entry) -> bytes:
        """The image file's bytes, or those of a PNG of its pixels; `UserError` naming it."""
        image = self.reader.load(entry).image
        return image if isinstance(image, bytes) else encode_png(image)


def is_array(source: str) -> bool:
    return source.lower().endswith((".npy", ".npz")) and not source.startswith("s3://")


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
    from pipelines.source_find import find, local_path

    if is_array(source):
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


@dataclass(frozen=True)
class _Digits:
    count: int

    @property
    def keys(self) -> Numbered:
        return Numbered("digit-", self.count, 4)

    def entry(self, row: int, label: int) -> Entry:
        return Entry(self.keys[row], label, f"digit {row}", row)

    def groups(self) -> Iterator[tuple[str, int]]:
        yield "", self.count


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    reader = _DigitReader()
    return Source(
        kind=DIGITS,
        name=DIGITS,
        levels=DIGIT_LEVELS,
        classes=tuple(str(name) for name in bundle.target_names),
        entries=Entries([_Digits(len(bundle.target))], narrow(bundle.target)),
        fingerprint=hashlib.sha256(
            reader._values.tobytes() + bundle.target.astype("<i8").tobytes()
        ).hexdigest(),
        reader=reader,
    )


def fingerprint(lines: Iterable[str]) -> str:
    """SHA-256 of the lines."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(f"\n{line}".encode() if number else line.encode())
    return digest.hexdigest()


def state_of(versions: Mapping[str, str]) -> str:
    """The hash of these objects' versions (`pipelines.storage.ObjectInfo.version`) by name."""
    return fingerprint(f"{name!r} {versions[name]}" for name in sorted(versions))


def warn_passed_over(where: str, passed: Passed, noun: str, what: str) -> None:
    if passed.count:
        number, first = counted(passed.count, noun), printable(passed.first)
        logger.warning("%s: passed over %s %s, such as %s", where, number, what, first)


def tell_hidden(where: str, hidden: Passed) -> None:
    """Of what is left out on purpose, so that whoever misses a file finds out why."""
    if hidden.count:
        logger.info(
            "%s: %d hidden, and not looked at (a name begins with '.' or __MACOSX), such as %s",
            where,
            hidden.count,
            printable(hidden.first),
        )


def key_of(path: str) -> str:
    """The sample key of an image's relative path: the path without its suffix, as `sample_key` spells it."""
    return sample_key(split_suffix(path)[0])


def split_suffix(path: str) -> tuple[str, str]:
    """The path without its suffix, as `PurePosixPath(path).with_suffix("")` gives it; and the suffix."""
    if _UNUSUAL.search(path):
        found = PurePosixPath(path)
        return str(found.with_suffix("")), found.suffix
    # a source may have 10⁸ files
    at = path.rfind(".", path.rfind("/") + 2)
    return (path, "") if at < 0 else (path[:at], path[at:])


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
