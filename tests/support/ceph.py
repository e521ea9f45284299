"""A real S3 server for tests: Ceph's gateway over one monitor, one manager and one store in memory.

It needs Debian's packages radosgw, ceph-mon, ceph-osd and ceph-mgr, listens on 127.0.0.1 alone, and takes about
600 MB and 12 s to start.
"""

from __future__ import annotations

import http.client
import secrets
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-mgr")
_PROGRAMS = (
    "ceph-authtool",
    "monmaptool",
    "ceph-mon",
    "ceph-mgr",
    "ceph-osd",
    "ceph",
    "radosgw",
    "radosgw-admin",
)
_START_S = 120.0
_STOP_S = 20.0

_SETTINGS = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}
# a path below a test's folder may be too long for a socket
admin socket =
pid file =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 2
[mon.a]
mon data = {folder}/mon
[mgr]
mgr data = {folder}/mgr
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
[client.rgw.a]
# without it a small answer waits 40 ms for the acknowledgement of its own header
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
"""

_KEYS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
    "client.rgw.a": {"mon": "allow rwx", "osd": "allow rwx", "mgr": "allow rw"},
}


@dataclass
class Ceph:
    """A running gateway at `endpoint`, with one user."""

    folder: Path
    port: int
    access_key: str
    secret_key: str
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *command: str, seconds: float = 60) -> None:
        """One of Ceph's tools; fails with what it said."""
        done = subprocess.run(
            [command[0], "-c", str(self.folder / "ceph.conf"), *command[1:]],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"

    def start(self, name: str, *command: str) -> None:
        """A daemon in the foreground, so that its process id is ours to stop."""
        with (self.folder / f"{name}.out").open("wb") as out:
            self.daemons[name] = subprocess.Popen(
                [command[0], "-c", str(self.folder / "ceph.conf"), "-f", *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def said(self) -> str:
        """The end of what each daemon printed."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.out"))
        )

    def stop(self) -> None:
        """Stop the daemons, the gateway first; one that does not go is killed."""
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in reversed(self.daemons.values()):
            try:
                daemon.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def ceph_server(folder: Path) -> Iterator[Ceph]:
    """A gateway whose files lie in `folder`; all of it is stopped at the end.

    Fails, and does not skip, where Ceph is not installed: a test that asks for it is run on purpose.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    assert not missing, (
        f"Ceph is not installed (no {', '.join(missing)}): "
        f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    )
    port, mon_port = _free_ports(2)
    ceph = Ceph(folder, port, access_key=secrets.token_hex(8), secret_key=secrets.token_hex(16))
    try:
        _start(ceph, mon_port)
        yield ceph
    finally:
        ceph.stop()


def _free_ports(count: int) -> list[int]:
    """Different ones: all are held while they are chosen."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def _start(ceph: Ceph, mon_port: int) -> None:
    folder, fsid, osd_uuid = ceph.folder, str(uuid.uuid4()), str(uuid.uuid4())
    for name in ("mon", "mgr", "osd"):
        (folder / name).mkdir()
    (folder / "ceph.conf").write_text(
        _SETTINGS.format(fsid=fsid, folder=folder, port=ceph.port, mon_port=mon_port)
    )
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    for number, (name, caps) in enumerate(_KEYS.items()):
        create = ["--create-keyring"] if number == 0 else []
        options = [word for service, cap in caps.items() for word in ("--cap", service, cap)]
        ceph.run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *options)
    address = f"[v2:127.0.0.1:{mon_port}]"
    ceph.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
    ceph.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    ceph.start("mon", "ceph-mon", "-i", "a")
    ceph.run("ceph", "osd", "new", osd_uuid, "0")
    ceph.start("mgr", "ceph-mgr", "-i", "x")
    ceph.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
    ceph.start("osd", "ceph-osd", "-i", "0")
    ceph.start("rgw", "radosgw", "-n", "client.rgw.a")
    _wait(ceph)
    user = ["user", "create", "--uid", "tests", "--display-name", "tests"]
    keys = ["--access-key", ceph.access_key, "--secret-key", ceph.secret_key]
    ceph.run("radosgw-admin", *user, *keys)


def _wait(ceph: Ceph) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", ceph.port, timeout=10)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            gone = [name for name, daemon in ceph.daemons.items() if daemon.poll() is not None]
            assert not gone, f"Ceph's {', '.join(gone)} ended at once\n{ceph.said()}"
            assert time.monotonic() < deadline, f"Ceph did not start in {_START_S:.0f} s\n{ceph.said()}"
            time.sleep(0.1)
        finally:
            connection.close()
