"""Where images come from before they are a data set: the bundled digits, a folder, a zip of a folder."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.errors import UserError, one_line
from pipelines.images import encode_png

logger = logging.getLogger(__name__)

DIGITS = "digits"
DIGIT_LEVELS = 17
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# a plain tar header holds names of 100 bytes, and ".png" follows the key
_MAX_KEY_BYTES = 96
_MAX_MEMBER_BYTES = 2**30


@dataclass(frozen=True)
class Entry:
    """One image of a source: `key` it gets in the data set, `label` (−1 for none), `name` by which it is
    known.
    """

    key: str
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Source:
    """`kind`: "digits", "folder" or "zip". `entries`: sorted by key, keys unique. `fingerprint`: a hash over
    what the entries are (a folder's names and sizes; a zip's names, sizes and CRCs), by which a second
    preparation knows its source again. `read(entry)`: the image file's bytes, or `UserError` naming it.
    """

    kind: str
    name: str
    levels: int
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    fingerprint: str
    read: Callable[[Entry], bytes]


def open_source(source: str) -> Source:
    """The source of this name: "digits" (scikit-learn's 1,797 handwritten digits, 8×8, 17 levels), a folder
    of images, or a .zip of such a folder.

    Labels are the names of the sub-folders right below the folder, sorted; images that lie in the folder
    itself have no label. Hidden files are passed over, and so, with a warning that counts them, are files
    that are not named like images. Raises `UserError` if there is no image, if only some have a label, or if
    two images would get the same key.
    """
    if source == DIGITS:
        return _digits()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _zip(path)
    raise UserError(
        f"source: {source} does not exist: give a folder of images, a .zip of such a folder, or {DIGITS!r}"
    )


def _digits() -> Source:
    # scikit-learn takes a second to import, and no other source needs it
    from sklearn.datasets import load_digits

    bundle = load_digits()
    values = np.rint(bundle.images * 255.0 / (DIGIT_LEVELS - 1)).astype(np.uint8)
    entries = tuple(
        Entry(f"digit-{number:04d}", int(label), f"digit {number}")
        for number, label in enumerate(bundle.target)
    )
    numbers = {entry.key: number for number, entry in enumerate(entries)}
    return Source(
        kind=DIGITS,
        name=DIGITS,
        levels=DIGIT_LEVELS,
        classes=tuple(str(name) for name in bundle.target_names),
        entries=entries,
        fingerprint=hashlib.sha256(values.tobytes() + bundle.target.astype("<i8").tobytes()).hexdigest(),
        read=lambda entry: encode_png(values[numbers[entry.key]][None]),
    )


def _folder(root: Path) -> Source:
    try:
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in _walk(root, ())}
    except OSError as error:
        where = printable(str(error.filename or root))
        raise UserError(f"source: {where}: {error.strerror or one_line(error)}") from None

    def read(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{printable(str(root / name))}: {error.strerror or one_line(error)}") from None

    return _collect("folder", root.resolve().name or "images", str(root), sizes, read)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Every file below `folder`; links to folders are followed, except to one that the link lies in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as items:
        for item in sorted(items, key=lambda item: item.name):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                yield from _walk(Path(item.path), (*above, here))
            else:
                yield Path(item.path)


def _zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"source: {path} is neither a folder nor a readable zip ({one_line(error, 120)})"
        ) from None
    members = _members(path, archive)
    # most zips hold one folder with everything in it, which is no class
    tops = {name.partition("/")[0] for name in members}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in members) else ""

    def read(name: str) -> bytes:
        info = members[prefix + name]
        where = f"{path}/{printable(info.filename)}"
        if info.file_size > _MAX_MEMBER_BYTES:
            raise UserError(f"{where}: claims {info.file_size} bytes, which is no image")
        try:
            return archive.read(info)
        except Exception as error:  # noqa: BLE001  each compression method raises errors of its own
            raise UserError(f"{where}: cannot be unpacked ({one_line(error, 120)})") from None

    known = {name.removeprefix(prefix): f"{info.file_size}/{info.CRC:08x}" for name, info in members.items()}
    return _collect("zip", path.stem, str(path), known, read)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip by their names, without hidden ones and those that macOS adds."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = printable(info.filename)
        parts = PurePosixPath(info.filename).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise UserError(f"source: {path}: its member {name!r} points outside the zip")
        if info.is_dir() or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            continue
        if info.filename in members:
            raise UserError(f"source: {path}: holds two members named {name!r}")
        members[info.filename] = info
    return members


def _collect(
    kind: str, name: str, where: str, files: Mapping[str, object], read: Callable[[str], bytes]
) -> Source:
    """The source made of these files: names relative to its root, each with what is known of its content."""
    where = printable(where)
    images = sorted(name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES)
    if not images:
        found = f"{len(files)} other files" if files else "nothing"
        raise UserError(f"source: {where} holds no image, but {found}: images end in {', '.join(SUFFIXES)}")
    if len(images) < len(files):
        other = sorted(set(files) - set(images))
        logger.warning(
            "%s: passed over %d files that are not named like images, such as %s",
            where,
            len(other),
            printable(other[0]),
        )
    label_of = _labels(where, images)
    entries: dict[str, Entry] = {}
    paths: dict[str, str] = {}
    for image in images:
        key = key_of(image)
        entry = Entry(key, label_of.get(image.partition("/")[0], -1), f"{where}/{printable(image)}")
        if key in entries:
            raise UserError(
                f"source: {entries[key].name} and {entry.name} would both be the sample {key!r}: rename one"
            )
        entries[key], paths[key] = entry, image
    listing = "\n".join(f"{os.fsencode(image)!r} {files[image]}" for image in images)
    return Source(
        kind=kind,
        name=printable(name),
        levels=256,
        classes=tuple(printable(name) for name in label_of),
        entries=tuple(entries[key] for key in sorted(entries)),
        fingerprint=hashlib.sha256(listing.encode()).hexdigest(),
        read=lambda entry: read(paths[entry.key]),
    )


def _labels(where: str, images: Iterable[str]) -> dict[str, int]:
    """The number of each class, by the folder of that name, in the order of their names."""
    tops = Counter(image.partition("/")[0] if "/" in image else "" for image in images)
    if "" in tops and len(tops) > 1:
        loose = next(image for image in images if "/" not in image)
        raise UserError(
            f"source: {where}: {tops['']} images such as {printable(loose)} lie beside the class folders and "
            "would have no label: move them into a folder, or put all images into one"
        )
    return {name: number for number, name in enumerate(sorted(name for name in tops if name))}


def key_of(path: str) -> str:
    """The sample key of an image's relative path: the path without its suffix, in a form that every reader of
    WebDataset takes.

    Such a reader splits a name at the first dot of its last part, and passes over names that look like its
    own `__meta__` entries; so these and control characters are percent-encoded. A key that is too long for a
    plain tar header ends in a hash of the whole instead.
    """
    folder, _, base = str(PurePosixPath(path).with_suffix("")).rpartition("/")
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


def printable(name: str) -> str:
    """A file's name as text of one line that every terminal and every UTF-8 file takes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
