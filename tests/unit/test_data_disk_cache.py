"""The node's disk cache: fetched once by a node, bounded, verified, and never a reason to fail."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipelines import disk_cache
from pipelines.config import load_config
from pipelines.dataset import DataError
from pipelines.disk_cache import DiskCache, fetch_through
from pipelines.errors import UserError
from pipelines.shard_reader import fetch_verified
from pipelines.shards import sha256
from pipelines.storage import open_storage
from tests.support.data import WatchedStorage, dataset_of
from tests.support.s3 import HostileS3, use_endpoint

MANY = 2**40


class Place:
    """Ten objects of 100 bytes, watched, and a cache of them."""

    def __init__(self, folder: Path, max_bytes: int = MANY) -> None:
        self.storage = WatchedStorage(open_storage(str(folder / "store")))
        self.hashes: list[str] = []
        for number in range(10):
            data = bytes([number]) * 100
            self.storage.put(str(number), data)
            self.hashes.append(sha256(data))
        self.given = folder / "cache"
        self.folder = self.given / f"ddpm-cache-{os.getuid()}"
        self.cache = DiskCache(self.given, max_bytes)

    def get(self, number: int) -> None:
        assert self.cache(self.storage, str(number), self.hashes[number]) == bytes([number]) * 100

    def file(self, number: int) -> Path:
        return self.folder / self.hashes[number][:2] / self.hashes[number]

    def kept(self) -> set[int]:
        return {number for number in range(10) if self.file(number).exists()}


def test_what_was_fetched_once_is_not_fetched_again_also_by_another_process(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for number in (1, 2, 1):
        place.get(number)
    place.cache = DiskCache(place.given, MANY)
    place.get(2)
    assert place.storage.gets == {"1": 1, "2": 1}


def test_it_reads_into_the_memory_that_it_is_given(tmp_path: Path) -> None:
    place = Place(tmp_path)
    lent: list[bytearray] = []

    def memory(num_bytes: int) -> memoryview:
        lent.append(bytearray(num_bytes))
        return memoryview(lent[-1])

    # from the storage, from the disk, and where there can be no cache
    for hash_or_not in (place.hashes[1], place.hashes[1]):
        got = place.cache(place.storage, "1", hash_or_not, memory)
        assert isinstance(got, memoryview)
        assert got.obj is lent[-1]
        assert lent[-1] == bytes([1]) * 100
    assert place.storage.gets == {"1": 1}
    place.folder.chmod(0o700)
    shutil.rmtree(place.folder)
    place.folder.write_text("in the way")
    got = place.cache(place.storage, "2", place.hashes[2], memory)
    assert isinstance(got, memoryview)
    assert got.obj is lent[-1]


def test_what_was_used_longest_ago_goes_and_the_bound_holds(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=300)
    for age, number in enumerate((0, 1, 2)):
        place.get(number)
        os.utime(place.file(number), (1000 + age, 1000 + age))
    place.get(0)
    place.get(3)
    assert place.kept() == {0, 2, 3}
    place.get(1)
    assert place.storage.gets["1"] == 2
    assert place.kept() == {0, 1, 3}


def disk(monkeypatch: pytest.MonkeyPatch, place: Place, total: int, others: int) -> None:
    """A disk of this size, which others fill so far."""

    def usage(folder: Path) -> SimpleNamespace:
        own = sum(file.stat().st_size for file in place.folder.glob("??/*"))
        return SimpleNamespace(total=total, used=others + own, free=total - others - own)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_share_of_the_disk_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    place.cache = DiskCache(place.given, MANY, keep_free=0.1)
    disk(monkeypatch, place, total=2000, others=1500)  # 300 are ours
    for age, number in enumerate((0, 1, 2)):
        place.get(number)
        os.utime(place.file(number), (1000 + age, 1000 + age))
    assert place.kept() == {0, 1, 2}
    place.get(3)
    assert place.kept() == {1, 2, 3}
    # others take more: less is kept, then no more, and what is here can still be used
    disk(monkeypatch, place, total=2000, others=1650)
    place.get(4)
    assert place.kept() == {4}
    disk(monkeypatch, place, total=2000, others=1750)
    for number in (5, 6):
        place.get(number)
    assert place.kept() == {4}
    assert caplog.text.count("the disk is 90% full; going on without it") == 1
    place.get(4)
    assert place.storage.gets["4"] == 1


def test_only_a_folder_that_nobody_chose_leaves_a_share_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    disk(monkeypatch, place, total=2000, others=1950)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    s3 = open_storage("s3://bucket/x")
    for setting, kept in (("auto", 0), (str(tmp_path / "chosen"), 1)):
        fetch = fetch_through(setting, MANY, s3)
        fetch(place.storage, "1", place.hashes[1])
        folder = tmp_path / ("temporary" if setting == "auto" else "chosen")
        assert len(list(folder.glob("*/??/*"))) == kept


def num_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * 2 ** {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def test_the_pods_of_kubernetes_may_use_as_much_disk_as_the_cache_takes() -> None:
    """A pod that uses more than its limit is evicted; what it writes into /tmp counts, logs and the image's too."""
    root = Path(__file__).resolve().parents[2]
    job = yaml.safe_load((root / "k8s" / "base" / "rayjob.yaml").read_text(encoding="utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    config = re.search(r"--config (\S+)", job["spec"]["entrypoint"])
    assert config
    cache = load_config(config[1]).data.disk_cache_bytes
    templates = [
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]
    for template, needed in zip(templates, (0, cache), strict=True):
        (container,) = template["spec"]["containers"]
        for kind in ("requests", "limits"):
            # besides: what is being written, Ray's logs
            assert num_bytes(container["resources"][kind]["ephemeral-storage"]) >= needed + 5 * 2**30


def test_an_object_larger_than_the_cache_is_not_kept_and_drops_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=250)
    place.get(0)
    big = bytes(1000)
    place.storage.put("big", big)
    assert place.cache(place.storage, "big", sha256(big)) == big
    assert place.kept() == {0}
    assert len([file for file in place.folder.glob("*/*") if file.parent.name != ".locks"]) == 1


@pytest.mark.parametrize("damaged", [b"", bytes(99), b"\1" * 99 + b"\2"])
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    place.get(1)
    place.file(1).write_bytes(damaged)
    place.get(1)
    place.get(1)
    assert place.storage.gets["1"] == 2
    assert caplog.text.count("is damaged; fetching it again") == 1


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.get(0)
    left = place.folder / ".new-left_42x"
    left.write_bytes(b"half")
    # before its first byte it is not locked yet
    empty, new = place.folder / ".new-empty_42", place.folder / ".new-new_1234"
    empty.touch()
    os.utime(empty, (0, 0))
    new.touch()
    with (place.folder / ".new-living_4").open("wb") as living:
        living.write(b"half")
        living.flush()
        fcntl.flock(living, fcntl.LOCK_EX)
        place.get(1)
    assert not left.exists()
    assert not empty.exists()
    assert new.exists()
    assert (place.folder / ".new-living_4").exists()


@pytest.mark.parametrize("what", ["write", "lock", "read"])
def test_a_full_or_broken_disk_costs_one_warning_and_nothing_else(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "write":
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    elif what == "lock":
        place.given.write_bytes(b"a file where the folder should be")
    else:
        monkeypatch.setattr(disk_cache, "_read", full)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 1):
            place.get(number)
    assert caplog.text.count("going on without it") == 1


def test_a_write_that_fails_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)

    def full(self: DiskCache, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DiskCache, "_make_room", full)
    place.get(1)
    assert place.kept() == set()
    assert not list(place.folder.glob(".new-*"))


def test_an_object_that_stays_wrong_is_named_and_not_kept(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with pytest.raises(DataError, match="store/1: is damaged or was exchanged"):
        place.cache(place.storage, "1", place.hashes[2])
    assert place.kept() == set()


def test_threads_of_a_process_fetch_an_object_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    threads = [threading.Thread(target=place.get, args=(number % 3,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.storage.gets == {"0": 1, "1": 1, "2": 1}


def test_nothing_but_its_own_files_is_counted_or_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, max_bytes=250)
    object_name = place.hashes[9]
    theirs = [
        place.given / "thesis/chapter1.tex",
        place.given / object_name[:2] / object_name,
        place.given / ".new-thesis01",
        # also in the cache's own folder, where nobody should put anything
        place.folder / "ab/chapter1.tex",
        place.folder / "thesis" / object_name,
        place.folder / object_name[:2] / f"{object_name}.txt",
        place.folder / f"{'00' if object_name[:2] != '00' else '01'}" / object_name,
        place.folder / ".new-thesis",
    ]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 5000)
        os.utime(file, (1, 1))
    for number in range(5):
        place.get(number)
    assert all(file.read_bytes() == b"x" * 5000 for file in theirs)
    assert len(place.kept()) == 2
    assert caplog.text == ""


def test_a_folder_or_a_link_in_the_way_does_not_stop_caching(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, max_bytes=250)
    (place.folder / "ab/folder").mkdir(parents=True)
    place.file(0).mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 5000)
    linked = place.folder / "ab" / f"ab{'0' * 62}"
    linked.symlink_to(precious)
    for number in (1, 2, 3, 0):
        place.get(number)
    assert place.kept() == {0, 2, 3}
    assert place.file(0).is_dir()
    assert linked.is_symlink()
    assert precious.stat().st_size == 5000


def test_a_folder_that_is_a_link_or_anothers_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linked, others = Place(tmp_path / "linked"), Place(tmp_path / "others")
    aim = tmp_path / "aim"
    aim.mkdir()
    linked.given.mkdir()
    linked.folder.symlink_to(aim)
    for _ in range(2):
        linked.get(1)
    assert list(aim.iterdir()) == []
    assert caplog.text.count(f"data.disk_cache {linked.folder}: is a link; going on without it") == 1
    others.folder.mkdir(parents=True)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    for _ in range(2):
        others.get(1)
    assert list(others.folder.iterdir()) == []
    assert others.storage.gets == {"1": 2}
    assert caplog.text.count(f"belongs to the user with the number {owner}; going on without it") == 1


def test_nobody_else_may_enter_the_folder_also_one_made_before(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.get(1)
    for _ in range(2):
        assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
        place.folder.chmod(0o777)
        place.get(1)
    assert place.storage.gets == {"1": 1}


def test_a_lock_does_not_empty_what_a_link_in_its_place_leads_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    place.get(0)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for name in (f"{int(place.hashes[1][:3], 16) >> 2:03x}", "evict"):
        lock = place.folder / ".locks" / name
        lock.unlink(missing_ok=True)
        lock.symlink_to(precious)
    place.get(1)
    assert precious.read_bytes() == b"precious"
    assert caplog.text.count("going on without it") == 1


def test_a_pipe_in_an_objects_place_is_not_waited_for(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.file(1).parent.mkdir(parents=True)
    os.mkfifo(place.file(1))
    worker = threading.Thread(target=place.get, args=(1,), daemon=True)
    worker.start()
    worker.join(60)
    assert not worker.is_alive()
    assert place.file(1).read_bytes() == b"\1" * 100


def test_a_link_in_an_objects_place_is_not_followed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.file(1).parent.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"\1" * 100)
    place.file(1).symlink_to(precious)
    place.get(1)
    assert place.storage.gets == {"1": 1}
    assert not place.file(1).is_symlink()


@pytest.mark.parametrize("form", ["{}", "../../{}", "zz"])
def test_what_is_no_sha256_names_no_file(tmp_path: Path, form: str) -> None:
    place = Place(tmp_path)
    place.get(0)
    precious = place.given / "precious"
    precious.write_bytes(b"precious")
    for name in (str(precious), "precious"):
        with pytest.raises(DataError, match="damaged or was exchanged"):
            place.cache(place.storage, "1", form.format(name))
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("what", ["damaged", "old"])
def test_a_file_that_cannot_be_deleted_is_no_reason_to_fail(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, max_bytes=250)
    place.get(1)
    place.get(2)
    kept = place.file(1)
    os.utime(kept, (1, 1))
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == kept:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    if what == "damaged":
        kept.write_bytes(b"damaged")
        place.get(1)
        assert "Permission denied" in caplog.text
    else:
        # the bound holds all the same: the next oldest goes
        place.get(3)
        assert place.kept() == {1, 3}


# holds the lock of one object, or that of making room, and says so
HOLDER = """
import sys, time
from pathlib import Path
from pipelines.disk_cache import DiskCache
with DiskCache(Path(sys.argv[1]), 2**30)._lock(sys.argv[2]):
    print("holds it", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("lock", ["fetch", "evict"])
def test_a_stopped_process_is_not_waited_for_without_end(
    tmp_path: Path, lock: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_cache, "LOCK_WAIT_S", 0.2)
    place = Place(tmp_path)
    name = f"{int(place.hashes[1][:3], 16) >> 2:03x}" if lock == "fetch" else "evict"
    command = [sys.executable, "-c", HOLDER, str(place.given), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds it\n"
        holder.send_signal(signal.SIGSTOP)
        try:
            got: list[int] = []

            def get_all() -> None:
                for number in (1, 2, 1):
                    place.get(number)
                    got.append(number)
                    # nor waited for once more
                    monkeypatch.setattr(disk_cache, "LOCK_WAIT_S", 1000.0)

            worker = threading.Thread(target=get_all, daemon=True)
            worker.start()
            worker.join(60)
            assert got == [1, 2, 1]
        finally:
            holder.kill()
    assert caplog.text.count("perhaps by a stopped process; going on without it") == 1
    assert place.kept() == ({1, 2} if lock == "fetch" else set())
    assert not list(place.folder.glob(".new-*"))
    # it is dead now, and its lock free
    place.get(3)
    assert 3 in place.kept()


@pytest.mark.parametrize("keep_free", [0.0, 0.85])
def test_room_is_made_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_free: float
) -> None:
    """Of the cache's own bound, or of a disk of which 300 bytes are to be taken."""
    place = Place(tmp_path, max_bytes=300)
    disk(monkeypatch, place, total=2000, others=0)
    making = threading.Lock()
    overlaps = []
    evict = DiskCache._evict

    def watched(self: DiskCache, kept: Any, num_bytes: int) -> None:
        if not making.acquire(blocking=False):
            overlaps.append(num_bytes)
            return
        try:
            evict(self, kept, num_bytes)
            # whoever else wants to make room comes meanwhile
            time.sleep(0.02)
        finally:
            making.release()

    monkeypatch.setattr(DiskCache, "_evict", watched)
    start = threading.Barrier(10)

    def get(number: int) -> None:
        start.wait()
        # as another process would: with nothing in common but the folder
        cache = DiskCache(place.given, MANY if keep_free else 300, keep_free)
        assert cache(place.storage, str(number), place.hashes[number]) == bytes([number]) * 100

    threads = [threading.Thread(target=get, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    # on a disk those that are just being written come on top
    assert keep_free or len(place.kept()) == 3


READER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipelines.dataset import Dataset
from pipelines.disk_cache import DiskCache
from pipelines.shard_reader import ShardReader
dataset = Dataset.load(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
reader = ShardReader(dataset, "train", fetch=DiskCache(Path(sys.argv[2]), 2**30))
print(sum(int(reader.read(shard, [0])[0].sum()) for shard in range(6)), flush=True)
"""


def test_two_workers_of_a_node_fetch_each_shard_once_by_the_servers_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images = dataset_of(tmp_path / "set", [4] * 6)
    files = [file for file in (tmp_path / "set").rglob("*") if file.is_file()]
    server = HostileS3(objects={f"/data/{file.relative_to(tmp_path)}": file.read_bytes() for file in files})
    with server.running() as endpoint:
        use_endpoint(monkeypatch, endpoint)
        command = [sys.executable, "-c", READER, "s3://data/set", str(tmp_path / "cache")]
        workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "ab"
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        sums = [worker.communicate("go\n", timeout=120)[0] for worker in workers]
    assert sums == [f"{images[::4].astype(int).sum()}\n"] * 2
    gets = Counter(line for line in server.requests if "/train/" in line)
    assert len(gets) == 12
    assert set(gets.values()) == {1}


def test_where_the_cache_is(tmp_path: Path) -> None:
    local, remote = open_storage(str(tmp_path)), open_storage("s3://bucket/set")
    assert fetch_through("auto", MANY, local) is fetch_verified
    assert fetch_through("none", MANY, remote) is fetch_verified
    chosen = fetch_through("auto", MANY, remote)
    assert isinstance(chosen, DiskCache)
    assert chosen._folder == Path(tempfile.gettempdir()) / f"ddpm-cache-{os.getuid()}"
    assert isinstance(fetch_through(str(tmp_path), MANY, local), DiskCache)
    for wrong in ("here", "~nobody-of-this-name/here", "/a\0b"):
        with pytest.raises(
            UserError, match=r"data\.disk_cache: must be auto, none or an absolute folder, got"
        ) as error:
            fetch_through(wrong, MANY, remote)
        assert repr(wrong) in str(error.value)
