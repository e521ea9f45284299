"""By what a source is known again: values that earlier versions put into data sets, which must still be found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import duplicates
from pipelines.sources import Source, open_source
from tests.unit.test_data_source_tar import tar_of
from tests.unit.test_data_sources import put_zip

FILES = [
    "cat/1.png",
    "cat/1.TXT",
    "cat/1.a.png",
    "cat/1.JSON",
    "cat/-1.jpg",
    "cat/1/x.png",
    "cat/1-x.png",
    "größe/2.tar.webp",
    "größe/2.tar.txt",
    "größe/%x__.png",
    "größe/notes.md",
    f"größe/{'long' * 25}.png",
]
VALUES = {
    "folder": "201c13c9679e8340",
    "folder with labels": "6bf7284891ffa10c",
    "zip": "0a1f87d7c5e8e423",
    "tar": "97c0b7f92be059fa",
    "tar with label": "1a43db6d1e7c82d6",
    "npz": "4d6d908d7a37b22a",
}


def source_of(kind: str, root: Path) -> Source:
    (root / "in").mkdir()
    table = None
    if kind.startswith("folder"):
        for number, name in enumerate(FILES):
            path = root / "in" / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(bytes(number))
            os.utime(path, ns=(number, number))
        if "labels" in kind:
            table = root / "labels.csv"
            images = [name for name in FILES if name.endswith(("png", "jpg", "webp"))]
            table.write_text("file,label\n" + "".join(f"{name},l{len(name) % 3}\n" for name in images))
    elif kind == "zip":
        put_zip(root / "in/a.zip", {f"top/{name}": name.encode() for name in FILES})
        return open_source(str(root / "in/a.zip"))
    elif kind.startswith("tar"):
        for tar in range(3):
            members: dict[str, bytes] = {}
            for n in range(4):
                key = f"./d.x/{tar}-{n}%" if n % 2 else f"größe/{'long' * 25}{n}-{tar}"
                members |= {
                    f"{key}.CLS": b"%d\n" % (n + tar),
                    f"{key}.png": bytes(n + 1),
                    f"{key}.a.TXT": b"x",
                }
            path = root / f"in/{tar}.tar"
            path.write_bytes(tar_of({"README": b"x"} | members))
            os.utime(path, ns=(tar, tar))
    elif kind == "npz":
        path = root / "in/a.npz"
        np.savez(
            path, images=np.arange(60, dtype=np.uint8).reshape(15, 2, 2), y=np.arange(15) % 4, z=np.zeros(15)
        )
        return open_source(str(path))
    label = "a.txt" if kind == "tar with label" else None
    return open_source(str(root / "in"), labels=None if table is None else str(table), label=label)


@pytest.mark.parametrize("hashed", [hash, lambda value: 0])
@pytest.mark.parametrize("kind", VALUES)
def test_a_source_is_known_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hashed: Callable[[object], int]
) -> None:
    monkeypatch.setattr(duplicates, "_hash", hashed)
    source = source_of(kind, tmp_path)
    digest = hashlib.sha256(f"{source.fingerprint} {source.state} {source.classes}\n".encode())
    for entry in sorted(source.entries, key=lambda entry: entry.key):
        digest.update(f"{entry.key!r} {entry.label} {entry.place!r} {entry.group!r}\n".encode())
    assert digest.hexdigest()[:16] == VALUES[kind]
