"""Preparing onto and reading from S3 servers: moto's, an emulator, and Ceph's."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from pipelines.adapters.s3 import S3Storage
from pipelines.dataset import DataError, Dataset
from pipelines.errors import UserError
from pipelines.index_only import index_tars
from pipelines.prepare import prepare
from pipelines.reader import StreamBatches
from pipelines.shards import Sample, pack
from pipelines.storage import StorageError, open_storage
from pipelines.stored_order import read_split
from pipelines.verify_dataset import verify_dataset as verify
from tests.support.data import random_images, write_image
from tests.support.s3 import S3Server, client

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    """An empty bucket of the test's own, and an environment that leads to it."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number, pixels in enumerate(random_images(120)):
        write_image(root / ("cat" if number % 2 else "größe") / f"{number:03d}.png", pixels[0])
    return root


def test_a_data_set_comes_to_s3_as_it_comes_to_a_disk(
    bucket: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{bucket}/data/photos"
    there = prepare(str(photos), uri, shard_count=5)
    out = tmp_path / "out"
    here = prepare(str(photos), str(out), shard_count=5)
    assert there == here
    storage = open_storage(uri)
    assert {info.key: storage.get(info.key) for info in storage.list()} == {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    # any WebDataset reader reads them: here webdataset itself, from the bytes that S3 gives back
    seen = 0
    for info in storage.list("train/"):
        if info.key.endswith(".tar"):
            (tmp_path / "copy.tar").write_bytes(storage.get(info.key))
            seen += sum(1 for _ in webdataset.WebDataset(str(tmp_path / "copy.tar"), shardshuffle=False))
    assert seen == there.count("train")
    # a second call writes nothing
    for method in ("put", "put_if_absent"):
        monkeypatch.setattr(S3Storage, method, lambda *_: pytest.fail("the work was done already"))
    assert prepare(str(photos), uri, shard_count=5) == there


def test_streams_read_from_s3_what_they_read_from_a_disk(bucket: str, photos: Path, tmp_path: Path) -> None:
    there = prepare(str(photos), f"s3://{bucket}/x", samples_per_shard=16)
    here = prepare(str(photos), str(tmp_path / "out"), samples_per_shard=16)
    batches = []
    for dataset in (Dataset.load(there.uri), here):
        with StreamBatches(
            dataset, "train", seed=1, num_streams=3, streams=[0, 2], micro_batch_size=8, start_step=4
        ) as stream:
            batches.append([next(stream) for _ in range(6)])
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(a.x_start, b.x_start) for a, b in zip(one, two, strict=True))
    assert all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(read_split(there, "test"), read_split(here, "test"), strict=True)
    )


def test_a_preparation_that_is_killed_is_completed(bucket: str, photos: Path, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/x"
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys\n"
            "from pipelines.prepare import prepare\n"
            "def progress(done, total):\n"
            "    if done == 50: os.kill(os.getpid(), signal.SIGKILL)\n"
            "prepare(sys.argv[1], sys.argv[2], samples_per_shard=16, progress=progress)\n",
            str(photos),
            uri,
        ],
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    left = {info.key for info in open_storage(uri).list()}
    assert "train/shard-000002.index.parquet" in left
    assert "dataset.json" not in left
    with pytest.raises(DataError, match="no finished data set"):
        Dataset.load(uri)
    assert prepare(str(photos), uri, samples_per_shard=16) == prepare(
        str(photos), str(tmp_path / "undisturbed"), samples_per_shard=16
    )


def test_four_at_once_make_one_data_set(bucket: str, photos: Path) -> None:
    uri = f"s3://{bucket}/x"
    made: list[Dataset] = []
    threads = [threading.Thread(target=lambda: made.append(prepare(str(photos), uri))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert {dataset.identity for dataset in made} == {Dataset.load(uri).identity}
    assert len(list(read_split(made[0], "train"))) == made[0].count("train")


def test_a_bad_image_leaves_no_object(bucket: str, photos: Path) -> None:
    (photos / "cat" / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat/bad\.png: it is empty"):
        prepare(str(photos), f"s3://{bucket}/x", samples_per_shard=8, channels=1)
    assert open_storage(f"s3://{bucket}/x").list() == []


def test_an_altered_or_missing_object_is_named_with_its_address(bucket: str, photos: Path) -> None:
    dataset = prepare(str(photos), f"s3://{bucket}/x", samples_per_shard=16)
    key = dataset.splits["train"][1].key
    dataset.storage.put(key, dataset.storage.get(key)[:-1])
    with pytest.raises(DataError, match=f"s3://{bucket}/x/{key}: is damaged"):
        list(read_split(dataset, "train"))
    dataset.storage.delete([key])
    with pytest.raises(DataError, match=f"s3://{bucket}/x/{key}: is missing"):
        list(read_split(dataset, "train"))


def test_a_bucket_that_is_not_there_is_named(bucket: str, photos: Path) -> None:
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        prepare(str(photos), "s3://nowhere/x")
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        Dataset.load("s3://nowhere/x")


def put_sources(bucket: str, photos: Path) -> None:
    """The photos three times over: as files, as Parquet and as tars, each below a prefix of its own."""
    storage = open_storage(f"s3://{bucket}/raw")
    files = sorted(path for path in photos.rglob("*.png"))
    names = [path.relative_to(photos).as_posix() for path in files]
    for path, name in zip(files, names, strict=True):
        storage.put(f"files/{name}", path.read_bytes())
    storage.put("files/.hidden/x.png", b"x")
    with io.BytesIO() as file:
        table = pa.table({"image": [path.read_bytes() for path in files], "label": [n[:3] for n in names]})
        pq.write_table(table, file, row_group_size=50)
        storage.put("parquet/all.parquet", file.getvalue())
    for number in range(3):
        piece = list(zip(files, names, strict=True))[number::3]
        packed = pack(
            Sample(name[:-4], path.read_bytes(), int(name[0] == "c"), {"txt": name.encode()})
            for path, name in piece
        )
        storage.put(f"tars/{number:02d}.tar", packed.tar)


def test_sources_on_s3_give_what_they_give_on_a_disk(bucket: str, photos: Path, tmp_path: Path) -> None:
    put_sources(bucket, photos)
    from_files = prepare(f"s3://{bucket}/raw/files", str(tmp_path / "files"), samples_per_shard=16)
    here = prepare(str(photos), str(tmp_path / "here"), samples_per_shard=16)
    assert [shard.sha256 for shard in from_files.shards("train")] == [s.sha256 for s in here.shards("train")]
    tars = prepare(f"s3://{bucket}/raw/tars/{{00..02}}.tar", str(tmp_path / "tars"), samples_per_shard=16)
    assert [s[0] for s in read_split(tars, "test")] == [s[0] for s in read_split(here, "test")]
    parquet = prepare(f"s3://{bucket}/raw/parquet", str(tmp_path / "parquet"), samples_per_shard=16)
    assert parquet.classes == ("cat", "grö")
    for dataset in (tars, parquet):
        found = sorted(
            image.tobytes() for split in dataset.splits for _, image, _ in read_split(dataset, split)
        )
        assert found == sorted(
            image.tobytes() for split in here.splits for _, image, _ in read_split(here, split)
        )
    with pytest.raises(UserError, match=r"raw/tars/07\.tar does not exist"):
        prepare(f"s3://{bucket}/raw/tars/07.tar", str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no file"):
        prepare(f"s3://{bucket}/nothing", str(tmp_path / "none"))


def test_tars_on_s3_are_indexed_where_they_are(bucket: str, photos: Path, tmp_path: Path) -> None:
    put_sources(bucket, photos)
    before = open_storage(f"s3://{bucket}/raw/tars").list()
    for out in (f"s3://{bucket}/indexed", f"s3://{bucket}/raw", str(tmp_path / "out")):
        dataset = index_tars(f"s3://{bucket}/raw/tars", out)
        keys = {shard.key for split in dataset.splits for shard in dataset.shards(split)}
        prefix = "tars/" if out.endswith("/raw") else f"s3://{bucket}/raw/tars/"
        assert keys == {f"{prefix}{number:02d}.tar" for number in range(3)}
        assert sum(1 for split in dataset.splits for _ in read_split(dataset, split)) == 120
        assert verify(dataset, deep=True).problems == ()
    assert open_storage(f"s3://{bucket}/raw/tars").list() == before
    open_storage(f"s3://{bucket}/raw").delete(["tars/01.tar"])
    said = [str(problem) for problem in verify(Dataset.load(f"s3://{bucket}/indexed")).problems]
    assert said == [f"s3://{bucket}/raw/tars/01.tar: is missing"]


def test_objects_that_were_replaced_in_place_are_noticed_by_their_etags(
    bucket: str, photos: Path, tmp_path: Path
) -> None:
    put_sources(bucket, photos)
    raw = open_storage(f"s3://{bucket}/raw")
    makers: list[tuple[Any, str, str]] = [
        (prepare, "files", "files/cat/001.png"),
        (prepare, "tars", "tars/01.tar"),
        (index_tars, "tars", "tars/01.tar"),
    ]
    for number, (make, name, key) in enumerate(makers):
        out = str(tmp_path / str(number))
        made = make(f"s3://{bucket}/raw/{name}", out)
        data = raw.get(key)
        raw.put(key, data)
        assert make(f"s3://{bucket}/raw/{name}", out) == made, "it was written again, and is the same"
        at = data.index(b"IDAT") + 8
        raw.put(key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match="may hold other images"):
            make(f"s3://{bucket}/raw/{name}", out)
        raw.put(key, data)
