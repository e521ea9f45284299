"""Following a job's log on a dashboard that hiccups: nothing is lost or told twice, and it ends in bounded time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from aiohttp import WSMsgType, web

from jobs import job_log, submission
from pipelines.errors import UserError

LOG = [f"line {number}\n" for number in range(6)]


@dataclass
class Dashboard:
    """Ray's Jobs API for one job, and what goes wrong: what each request to a path is answered, in turn."""

    address: str = ""
    troubles: dict[str, list[object]] = field(default_factory=dict)
    """An HTTP status, "reset", or None for a good answer; after the last of them all is well."""
    asked: list[str] = field(default_factory=list)
    told: int = 2
    """Lines of the log that are there; each connection to its end finds two more."""

    def trouble(self, path: str) -> object:
        self.asked.append(path)
        left = self.troubles.get(path, [])
        return left.pop(0) if left else None

    def status(self) -> str:
        return "SUCCEEDED" if self.told >= len(LOG) else "RUNNING"


def application(dashboard: Dashboard) -> web.Application:
    async def troubled(request: web.Request, path: str) -> web.Response | None:
        trouble = dashboard.trouble(path)
        if trouble == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(trouble, int):
            return web.Response(status=trouble, text="<html>\nthe gate\nis busy</html>")
        return None

    async def version(request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})

    async def job(request: web.Request) -> web.Response:
        return await troubled(request, "job") or web.json_response(
            {"type": "SUBMISSION", "submission_id": "j", "status": dashboard.status(), "entrypoint": "x"}
        )

    async def logs(request: web.Request) -> web.Response:
        return await troubled(request, "logs") or web.json_response({"logs": "".join(LOG)})

    async def tail(request: web.Request) -> web.StreamResponse:
        trouble = dashboard.trouble("tail")
        if isinstance(trouble, int):
            return web.Response(status=trouble)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in LOG[: dashboard.told]:
            await socket.send_str(line)
        dashboard.told += 2
        if trouble == "reset":
            assert request.transport is not None
            request.transport.abort()
        elif trouble == "silence":
            while (await socket.receive()).type == WSMsgType.TEXT:
                pass
        return socket

    served = web.Application()
    served.router.add_get("/api/version", version)
    served.router.add_get("/api/jobs/j", job)
    served.router.add_get("/api/jobs/j/logs", logs)
    served.router.add_get("/api/jobs/j/logs/tail", tail)
    return served


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    for name in (
        "DDPM_DASHBOARD",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_TOKEN_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    # Ray's client settles once a process whether it sends a token, so that it must have one whatever ran before
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of no meaning to this dashboard")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(job_log, "_POLL_S", 0.02)
    monkeypatch.setattr(submission, "_POLL_S", 0.02)
    found = Dashboard()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application(found), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    found.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield found
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def followed(dashboard: Dashboard) -> tuple[str, str]:
    """What is written, and how the job ended."""
    told: list[str] = []
    job = submission.logs("j", address=dashboard.address, follow=True, write=told.append)
    return "".join(told), job.status


def test_a_log_is_followed_to_its_end(dashboard: Dashboard) -> None:
    assert followed(dashboard) == ("".join(LOG), "SUCCEEDED")


@pytest.mark.parametrize("trouble", [500, 502, 503, 429, "reset"])
@pytest.mark.parametrize("path", ["job", "logs", "tail"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_hiccup_is_waited_out(dashboard: Dashboard, path: str, when: int, trouble: object) -> None:
    dashboard.troubles[path] = [None] * when + [trouble] * 2
    assert followed(dashboard) == ("".join(LOG), "SUCCEEDED")
    if path == "job" or when == 0:
        assert dashboard.troubles[path] == []


def test_a_reset_after_a_long_time_of_following_is_no_end(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is how long nothing was heard, not how long the connection had lasted."""
    now = [0.0]
    monkeypatch.setattr(job_log, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    dashboard.troubles["tail"] = ["reset", "reset"]
    told: list[str] = []

    def write(text: str) -> None:
        now[0] += 1000
        told.append(text)

    job = submission.logs("j", address=dashboard.address, follow=True, write=write)
    assert ("".join(told), job.status) == ("".join(LOG), "SUCCEEDED")


@pytest.mark.parametrize("path", ["job", "tail"])
def test_a_dashboard_that_stays_away_is_one_line_in_bounded_time(
    dashboard: Dashboard, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "_UNREACHABLE_S", 0.3)
    dashboard.troubles[path] = [503] * 1000
    with pytest.raises(UserError, match=f"^{dashboard.address}: does not answer .*503") as caught:
        followed(dashboard)
    assert "\n" not in str(caught.value)
    assert dashboard.asked.count(path) > 2


def test_what_will_not_pass_is_told_at_once(dashboard: Dashboard) -> None:
    dashboard.troubles["job"] = [404]
    with pytest.raises(UserError, match="'j': not known to the cluster"):
        followed(dashboard)
    dashboard.troubles["job"] = [400]
    with pytest.raises(UserError, match=r"does not answer well .*400"):
        followed(dashboard)
    assert dashboard.asked == ["job", "job"]


def test_a_reader_that_leaves_is_no_fault_of_the_dashboard(dashboard: Dashboard) -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        submission.logs("j", address=dashboard.address, follow=True, write=write)
