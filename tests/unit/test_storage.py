"""One contract for both kinds of storage."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipelines.adapters.s3 import S3Storage, _server
from pipelines.errors import UserError
from pipelines.shards import sha256
from pipelines.storage import FileStorage, ObjectInfo, ObjectMissing, Storage, StorageError, open_storage
from tests.support.data import hashed
from tests.support.s3 import BUCKET, SERVERS, S3Server, free_port, use_endpoint, use_server

HOSTILE = ["a\0b", "\udce9", "", "/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "a/./b", "a//b", "a/"]
KEYS = ["plain", "a/b/c.tar", "a b+c", "%2F and %41", "é 漢", "x" * 200, "q?x=1&y=2#z", "<&>\"'"]

_numbers = count()


@pytest.fixture
def endpoint(s3_server: S3Server) -> str:
    return s3_server.endpoint


@pytest.fixture
def s3(endpoint: str) -> Storage:
    return open_storage(f"s3://{BUCKET}/test-{next(_numbers)}")


@pytest.fixture(params=["file", *SERVERS])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    if request.param == "file":
        return open_storage(str(tmp_path / "some where"))
    use_server(monkeypatch, request.getfixturevalue(request.param))
    return open_storage(f"s3://{BUCKET}/test-{next(_numbers)}")


def test_what_is_put_is_got(storage: Storage) -> None:
    for key in KEYS:
        storage.put(key, key.encode() * 3)
    assert {key: storage.get(key) for key in KEYS} == {key: key.encode() * 3 for key in KEYS}
    assert [info.key for info in storage.list()] == sorted(KEYS)


def test_put_replaces_and_may_be_empty(storage: Storage) -> None:
    storage.put("x", b"long content")
    storage.put("x", b"")
    assert storage.get("x") == b""
    assert storage.list() == [ObjectInfo("x", 0)]


@pytest.mark.parametrize("num_bytes", [0, 1, 300_000, 2**21 + 1])
def test_an_object_can_be_had_in_given_memory(storage: Storage, num_bytes: int) -> None:
    storage.put("x", bytes(range(256)) * 8193)
    storage.put("x", (bytes(range(256)) * 8193)[:num_bytes])
    asked: list[int] = []

    def memory(num_bytes: int) -> memoryview:
        asked.append(num_bytes)
        return memoryview(bytearray(b"?" * num_bytes))

    got = storage.get_hashed("x", memory)
    assert bytes(got.data) == (bytes(range(256)) * 8193)[:num_bytes] == storage.get("x")
    assert got.sha256 == sha256(got.data)
    assert asked == [num_bytes]


def test_a_file_that_is_cut_while_it_is_read_is_not_filled_up(tmp_path: Path) -> None:
    """With what lay in the memory before."""
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000)

    def memory(num_bytes: int) -> memoryview:
        os.truncate(path, 400)
        return memoryview(bytearray(b"?" * num_bytes))

    assert open_storage(str(tmp_path)).get_hashed("x", memory) == hashed(b"a" * 400)


def test_a_version_changes_with_the_content(storage: Storage) -> None:
    storage.put("x", b"12")
    (before,) = storage.list()
    assert before.version
    assert storage.list()[0].version == before.version
    time.sleep(0.05)  # a file system's clock ticks no faster than every few ms
    storage.put("x", b"34")
    assert storage.list()[0].version not in ("", before.version)


def test_ranges(storage: Storage) -> None:
    storage.put("x", bytes(range(100)))
    assert storage.get_range("x", 0, 100) == bytes(range(100))
    assert storage.get_range("x", 98, 2) == bytes([98, 99])
    assert storage.get_range("x", 5, 1) == bytes([5])
    assert storage.get_range("x", 5, 0) == b""
    with pytest.raises(ObjectMissing):
        storage.get_range("missing", 0, 1)


@pytest.mark.parametrize(("start", "length"), [(98, 3), (100, 1), (500, 2)])
def test_a_range_past_the_end_is_an_error_and_never_short(
    storage: Storage, start: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)
    storage.put("x", bytes(range(100)))
    with pytest.raises(StorageError, match="x") as caught:
        storage.get_range("x", start, length)
    assert not isinstance(caught.value, ObjectMissing)


def test_listing(storage: Storage) -> None:
    for key in ("b/2", "b/10", "a", "b1", "b/c/d"):
        storage.put(key, b"12345")
    assert [info.key for info in storage.list()] == ["a", "b/10", "b/2", "b/c/d", "b1"]
    assert [info.key for info in storage.list("b")] == ["b/10", "b/2", "b/c/d", "b1"]
    assert [info.key for info in storage.list("b/")] == ["b/10", "b/2", "b/c/d"]
    assert [info.key for info in storage.list("b/1")] == ["b/10"]
    assert storage.list("none/") == []
    assert {info.num_bytes for info in storage.list()} == {5}


def test_listing_where_nothing_was_ever_put(storage: Storage) -> None:
    assert storage.child("nowhere").list() == []


def test_listing_more_than_one_page(s3: Storage, endpoint: str) -> None:
    names = [f"{number:02d}" for number in range(23)]
    for name in names:
        s3.put(name, b"")
    events = _server(os.getpid(), endpoint).client.meta.events
    pages = []

    def small_page(params: dict[str, object], **_: object) -> None:
        pages.append(params.setdefault("MaxKeys", 10))

    events.register("provide-client-params.s3.ListObjectsV2", small_page)
    try:
        assert [info.key for info in s3.list()] == names
    finally:
        events.unregister("provide-client-params.s3.ListObjectsV2", small_page)
    assert len(pages) == 3


def test_deleting_more_than_one_request_takes(s3: Storage) -> None:
    s3.put("first", b"")
    s3.put("last", b"")
    s3.delete(["first", *(f"missing-{number}" for number in range(1500)), "last"])
    assert s3.list() == []


def test_children(storage: Storage) -> None:
    child = storage.child("a", "b/c")
    child.put("x", b"1")
    assert storage.get("a/b/c/x") == b"1"
    assert [info.key for info in child.list()] == ["x"]
    assert child.uri == f"{storage.uri}/a/b/c"
    assert open_storage(child.uri).get("x") == b"1"


def test_a_child_does_not_see_its_neighbour_of_a_longer_name(storage: Storage) -> None:
    storage.put("run/x", b"1")
    storage.put("run2/x", b"2")
    assert [info.key for info in storage.child("run").list()] == ["x"]


def test_delete_and_exists(storage: Storage) -> None:
    storage.put("a/x", b"1")
    storage.put("a/y", b"2")
    assert storage.exists("a/x")
    assert not storage.exists("a")
    assert not storage.exists("a/z")
    storage.delete(["a/x", "a/missing", "nowhere/at/all"])
    assert [info.key for info in storage.list()] == ["a/y"]
    assert not storage.exists("a/x")
    storage.delete([])
    storage.delete(iter(["a/y"]))
    assert storage.list() == []


def test_folders_that_a_delete_empties_go_but_for_one_that_was_there_before(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "made" / "here"))
    for key in ("a/b/x", "a/y"):
        storage.put(key, b"")
    storage.delete(["a/b/x"])
    assert not (tmp_path / "made/here/a/b").exists()
    storage.delete(["a/y"])
    assert list(tmp_path.iterdir()) == []
    for elsewhere in (open_storage(str(tmp_path)), open_storage(str(tmp_path / "other"))):
        (tmp_path / "other").mkdir(exist_ok=True)
        elsewhere.put("a/x", b"")
        elsewhere.delete(["a/x"])
        assert [path.name for path in tmp_path.rglob("*")] == ["other"]


def test_a_folder_that_goes_while_something_is_written_into_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, times = Path.mkdir, 0

    def made_and_gone(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal times
        make(path, *arguments, **options)
        times += 1
        if times < 4:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_gone)
    open_storage(str(tmp_path)).put("a/x", b"1")
    assert (tmp_path / "a/x").read_bytes() == b"1"
    times = -100
    with pytest.raises(StorageError, match="No such file"):
        open_storage(str(tmp_path)).put("b/x", b"1")


@pytest.mark.parametrize("key", ["x", "folder", "file/below", "no/such/folder/x"])
def test_a_missing_object_is_named(storage: Storage, key: str) -> None:
    storage.put("folder/y", b"")
    storage.put("file", b"")
    for attempt in (lambda: storage.get(key), lambda: storage.get_hashed(key)):
        with pytest.raises(ObjectMissing, match=key):
            attempt()


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_keys_are_refused_by_everything(storage: Storage, key: str) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: storage.get(key),
        lambda: storage.get_hashed(key),
        lambda: storage.get_range(key, 0, 1),
        lambda: storage.put(key, b""),
        lambda: storage.put_if_absent(key, b""),
        lambda: storage.exists(key),
        lambda: storage.delete([key]),
        lambda: storage.child(key),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match="is no object key"):
            attempt()
    assert storage.list() == []


@pytest.mark.parametrize("prefix", ["../", "../neighbour", "a/../../neighbour/", "/", "/etc/"])
def test_a_listing_cannot_leave_its_prefix(storage: Storage, prefix: str) -> None:
    storage.put("neighbour/x", b"")
    storage = storage.child("own")
    storage.put("x", b"")
    try:
        found = storage.list(prefix)
    except UserError:
        return
    assert found == []


def test_a_link_to_itself_is_named_by_a_listing(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/loop").symlink_to("loop")
    with pytest.raises(StorageError) as caught:
        FileStorage(tmp_path).list("train/")
    assert str(caught.value) == f"{tmp_path}/train/loop: {os.strerror(errno.ELOOP)}"


def test_put_if_absent(storage: Storage) -> None:
    assert storage.put_if_absent("a/commit", b"first") is True
    assert storage.put_if_absent("a/commit", b"second") is False
    # not even with the same bytes
    assert storage.put_if_absent("a/commit", b"first") is False
    assert storage.get("a/commit") == b"first"
    assert [info.key for info in storage.list()] == ["a/commit"]


def test_put_if_absent_has_one_winner_of_eight_threads(storage: Storage) -> None:
    for round_number in range(5):
        barrier = threading.Barrier(8)
        outcomes: dict[int, bool] = {}

        def attempt(
            number: int,
            key: str = f"commit-{round_number}",
            barrier: threading.Barrier = barrier,
            outcomes: dict[int, bool] = outcomes,
        ) -> None:
            barrier.wait()
            outcomes[number] = storage.put_if_absent(key, str(number).encode() * 1000)

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [number for number, won in outcomes.items() if won]
        assert len(outcomes) == 8
        assert len(winners) == 1
        assert storage.get(f"commit-{round_number}") == str(winners[0]).encode() * 1000


_RACER = """\
import sys, time
from pathlib import Path
from pipelines.storage import FileStorage
root, number = Path(sys.argv[1]), sys.argv[2]
storage = FileStorage(root / "objects")
(root / f"ready-{number}").touch()
while not (root / "go").exists():
    pass
print(sum(storage.put_if_absent(f"commit-{n}", number.encode()) << n for n in range(40)))
"""


def test_put_if_absent_has_one_winner_of_four_processes(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", _RACER, str(tmp_path), str(number)], stdout=subprocess.PIPE)
        for number in range(4)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(racer.poll() is None for racer in racers)
    (tmp_path / "go").touch()
    won = [int(racer.communicate()[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    # bit n is set for exactly one
    assert sum(won) == won[0] | won[1] | won[2] | won[3] == 2**40 - 1
    storage = FileStorage(tmp_path / "objects")
    for number in range(40):
        assert won[int(storage.get(f"commit-{number}"))] >> number & 1
    assert len(list((tmp_path / "objects").iterdir())) == 40


def test_storages_cross_process_borders(storage: Storage) -> None:
    storage.put("x", b"1")
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301  what Ray does with arguments
    assert again.uri == storage.uri
    assert again.get("x") == b"1"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "an empty storage address"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("gs://bucket/x", "not gs://"),
        ("pipe:cat x", "not pipe:$"),
        ("file://tmp/x", "names a host"),
        ("ftp://host/x", "not ftp://"),
        ("https:///x", "names no host"),
        ("https://u:secret@host/x", "no user name or password"),
        ("https://host/x?versionId=1", "no part behind"),
        ("https://host:port/x", "https://host:port/x"),
        ("http://[x/y", r"^http://\[x/y: Invalid IPv6 URL$"),
        ("s3://[x/y", r"^s3://\[x/y: Invalid IPv6 URL$"),
        ("http://u:secret@[x/y", r"^http://\[x/y: Invalid IPv6 URL$"),
        ("file:///a%00b", r"^/a\\x00b: a folder's name may not contain a zero byte$"),
        ("~nobody-of-this-name/x", "^~nobody-of-this-name/x: "),
    ],
)
def test_a_wrong_address(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_storage(uri)


def test_addresses_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("a/b").uri == (tmp_path / "a/b").as_uri()
    assert open_storage(f"{tmp_path.as_uri()}/with%20space").uri == (tmp_path / "with space").as_uri()
    assert list(tmp_path.iterdir()) == []


def test_addresses_of_buckets() -> None:
    assert open_storage("s3://b/").uri == "s3://b"
    assert open_storage("s3://b/x/y/").uri == "s3://b/x/y"
    assert open_storage("s3://b").child("x").uri == "s3://b/x"
    assert open_storage("s3://b/a#1?x=y %20").uri == "s3://b/a#1?x=y %20"


def test_a_bucket_without_prefix(endpoint: str) -> None:
    root = open_storage(f"s3://{BUCKET}")
    root.put("rooted/x", b"1")
    assert [info.key for info in root.list("rooted/")] == ["rooted/x"]
    assert root.get("rooted/x") == b"1"
    root.delete(["rooted/x"])


def _everything(storage: Storage) -> list[Callable[[], object]]:
    return [
        lambda: storage.get("x"),
        lambda: storage.get_range("x", 0, 1),
        lambda: storage.put("x", b""),
        lambda: storage.put_if_absent("x", b""),
        lambda: storage.list(),
        lambda: storage.exists("x"),
        lambda: storage.delete(["x"]),
    ]


def _one_line(attempt: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        attempt()
    assert not isinstance(caught.value, ObjectMissing)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_bucket_is_no_missing_object(endpoint: str) -> None:
    for attempt in _everything(open_storage("s3://no-such-bucket/x")):
        assert f"{endpoint} has no bucket 'no-such-bucket'; check its name, or make it first" in _one_line(
            attempt
        )


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    use_endpoint(monkeypatch, address)
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)
    for attempt in _everything(open_storage("s3://b/p")):
        message = _one_line(attempt)
        assert message.startswith("s3://b/p")
        assert f"{address} does not answer; check AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize(
    "address", ["localhost:9000", "http://", "http://no spaces/", "http://h:99999", "ftp://h"]
)
def test_an_endpoint_that_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, address)
    monkeypatch.setattr("pipelines.retries.time.sleep", lambda s: None)
    with pytest.raises(UserError) as caught:
        open_storage("s3://b/p").get("x")
    assert "\n" not in str(caught.value)
    assert "AWS_ENDPOINT_URL" in str(caught.value) or address in str(caught.value)


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = _one_line(lambda: open_storage("s3://b/p").get("x"))
    assert (
        message
        == "s3://b/p/x: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
    )


def test_a_profile_that_is_not_there(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "none-such")
    _server.cache_clear()
    try:
        line = _one_line(lambda: open_storage(f"s3://{BUCKET}").exists("x"))
    finally:
        _server.cache_clear()
    assert line == f"s3://{BUCKET}/x: AWS_PROFILE: The config profile (none-such) could not be found"


def test_certificates_that_are_not_there(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem")
    _server.cache_clear()
    # who needs none does without
    assert not open_storage(f"s3://{BUCKET}").exists("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{free_port()}")
    try:
        with pytest.raises(UserError, match=r"^AWS_CA_BUNDLE: /no/such/bundle\.pem: no such file$"):
            open_storage(f"s3://{BUCKET}").exists("x")
    finally:
        _server.cache_clear()


def test_an_impossible_bucket_name(endpoint: str) -> None:
    assert "s3://Not_A_Bucket!" in _one_line(lambda: open_storage("s3://Not_A_Bucket!/p").put("x", b""))


def test_a_process_has_one_client_for_an_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _server(os.getpid(), endpoint) is _server(os.getpid(), endpoint)
    # neither after a fork nor for another server
    assert _server(os.getpid() + 1, endpoint) is not _server(os.getpid(), endpoint)
    first = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", first)
    assert _server(os.getpid(), first) is not _server(os.getpid(), endpoint)
    assert _server(os.getpid(), first).client.meta.endpoint_url == first


def test_the_more_special_endpoint_variable_wins(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    storage = S3Storage(BUCKET, "special")
    storage.put("x", b"1")
    assert storage.get("x") == b"1"
