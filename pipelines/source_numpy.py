"""Arrays of images as a source: .npy, or .npz with labels and further arrays beside the images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.columns import Coded, Numbered, pieces
from pipelines.entries import Entries
from pipelines.errors import UserError, one_line, printable
from pipelines.labels import number_labels
from pipelines.sources import Entry, Loaded, Source, fingerprint

_IMAGES = ("images", "image", "x", "data", "arr_0")
_LABELS = ("labels", "label", "y", "arr_1")
# what a .npy and a .npz (a zip, which may be empty) begin with; of another file NumPy says how to unpickle it
_BEGINNINGS = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")


def _load(path: Path, what: str) -> dict[str, Any]:
    """The arrays of a file by name (that of a .npy is "images"), without unpickling anything."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            if not file.read(6).startswith(_BEGINNINGS):
                raise ValueError("it does not begin like a .npy or .npz file")
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"its member {printable(name)!r} is no array")
        return arrays
    except Exception as error:  # noqa: BLE001  a broken file raises whatever zipfile and zlib raise
        reason = getattr(error, "strerror", None) or one_line(error, 120)
        if "allow_pickle" in reason or "Python objects" in reason:
            reason = "it holds Python objects, which are not read: save numbers or texts"
        raise UserError(f"{what}{printable(str(path))}: can't be read as NumPy arrays ({reason})") from None


@dataclass
class _ArrayReader:
    path: Path
    images: str
    others: tuple[str, ...]
    _arrays: dict[str, Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "images": self.images, "others": self.others, "_arrays": None}

    def load(self, entry: Entry) -> Loaded:
        if self._arrays is None:
            self._arrays = _load(self.path, "")
        pixels = np.asarray(self._arrays[self.images][entry.place])
        image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        members = {f"{name.lower()}.npy": _npy(self._arrays[name][entry.place]) for name in self.others}
        return Loaded(image, members)


def _npy(value: Any) -> bytes:
    with io.BytesIO() as file:
        np.save(file, np.asarray(value), allow_pickle=False)
        return file.getvalue()


def open_arrays(path: Path, labels: str | None, image: str | None, label: str | None) -> Source:
    """The images of an array of uint8 [N, H, W] or [N, H, W, C] with C = 1 or 3, each with the key of its
    number.

    Of a .npz, the images are the array `image`, or the first there of images, image, x, data, arr_0; the labels
    (int or text [N]) the array `label`, or the first of labels, label, y, arr_1. Its other arrays of N rows are
    carried, a row as the member NAME.npy. `labels`: a .npy file with the labels.
    """
    where = printable(str(path))
    arrays = _load(path, "source: ")
    chosen = _choose(where, arrays, image, _IMAGES, "--image")
    if chosen is None:
        raise UserError(
            f"source: {where}: has the arrays {', '.join(arrays) or 'none'}: say with --image NAME which holds "
            "the images"
        )
    pixels = arrays.pop(chosen)
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (3, 4)
        or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3))
    ):
        raise UserError(
            f"source: {where}: array {chosen!r} must be uint8 [N, H, W] or [N, H, W, 1 or 3], got "
            f"{pixels.dtype} {list(pixels.shape)}{_advice(pixels)}"
        )
    if 0 in pixels.shape:
        raise UserError(f"source: {where}: array {chosen!r} of shape {list(pixels.shape)} holds no image")
    if labels is not None:
        if label is not None:
            raise UserError(f"--labels {labels}, --label {label}: give one of them")
        values = next(iter(_load(Path(labels).expanduser(), "--labels ").values()), None)
        told = f"--labels {printable(labels)}"
    else:
        named = _choose(where, arrays, label, _LABELS, "--label")
        values = None if named is None else arrays.pop(named)
        told = f"source: {where}: array {named!r}"
    count = len(pixels)
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != count:
            raise UserError(
                f"source: {where}: array {name!r} has the shape {list(array.shape)}, and there are {count} images"
            )
    _check_names(where, arrays)
    classes, numbers = number_labels(where, [_labels(told, values, count)], name_of=lambda n: f"image {n}")
    reader = _ArrayReader(path.absolute(), chosen, tuple(sorted(arrays)), {chosen: pixels, **arrays})
    # the whole content, since two arrays of one shape have one size
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    for name in reader.others:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return Source(
        kind="numpy",
        name=printable(path.stem),
        levels=256,
        classes=classes,
        entries=Entries([_Rows(where, count)], numbers),
        fingerprint=fingerprint(
            chain(
                [digest.hexdigest(), f"{pixels.shape} {reader.others}", *classes], map(str, pieces(numbers))
            )
        ),
        reader=reader,
    )


@dataclass(frozen=True)
class _Rows:
    where: str
    count: int

    @property
    def keys(self) -> Numbered:
        return Numbered("image-", self.count, len(str(self.count - 1)))

    def entry(self, row: int, label: int) -> Entry:
        return Entry(self.keys[row], label, f"{self.where}[{row}]", row)

    def groups(self) -> Iterator[tuple[str, int]]:
        yield "", self.count


def _check_names(where: str, names: Iterable[str]) -> None:
    """Each array must give a member of its own, of a name that WebDataset reads."""
    taken: dict[str, str] = {}
    for name in names:
        member = f"{name.lower()}.npy"
        if (first := taken.setdefault(member, name)) != name:
            raise UserError(
                f"source: {where}: arrays {first!r} and {name!r} would both be the member {member!r}: rename one"
            )
        if name[:1] in ("", "_", ".") or "/" in name:
            raise UserError(
                f"source: {where}: array {name!r} would be the member {member!r}, and WebDataset passes over such "
                "names: rename it, without '_' or '.' in front and without '/'"
            )


def _choose(
    where: str, arrays: dict[str, Any], asked: str | None, usual: tuple[str, ...], option: str
) -> str | None:
    if asked is None:
        return next((name for name in usual if name in arrays), None)
    if asked not in arrays:
        raise UserError(f"{option} {asked}: {where} has the arrays {', '.join(arrays) or 'none'}")
    return asked


def _advice(pixels: NDArray[Any]) -> str:
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[3] not in (1, 3):
        return ": put the channels last, array.transpose(0, 2, 3, 1)"
    if pixels.dtype.kind == "f":
        return ": of numbers from 0 to 1 (255 * array).round().astype('uint8') makes such"
    return ""


def _labels(told: str, values: Any, count: int) -> Coded[Any]:
    if values is None:
        return Coded((None,), np.zeros(count, np.uint8))
    if values.shape != (count,) or values.dtype.kind not in "iuU":
        raise UserError(
            f"{told}: must be integers or texts [{count}], one for each image, got {values.dtype} "
            f"{list(values.shape)}"
        )
    return Coded.of(pieces(values))
