"""Following a job's log to its end, over as many connections as that takes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Write = Callable[[str], object]
Answer = TypeVar("Answer")

_POLL_S = 1.0
_UNREACHABLE_S = 60.0
# of a dashboard that starts again, or of a gate before it that finds it busy
_PASSING_STATUS = re.compile(r"status code (429|5\d\d)\b")


def patiently(url: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask()` answers; what may pass (HTTP 5xx, a reset) is asked again, for a minute at most.

    `ask` must be safe to repeat.  Raises `UserError` after that minute, and at once for any other failure.
    """
    first = time.monotonic()
    while True:
        try:
            return ask()
        # requests' exceptions are OSErrors, and Ray's client makes RuntimeErrors of answers other than 2xx
        except (RuntimeError, OSError) as error:
            passing = isinstance(error, OSError) or _PASSING_STATUS.search(str(error))
            if not passing or time.monotonic() - first > _UNREACHABLE_S:
                raise UserError(f"{url}: does not answer well ({one_line(error, 160)})") from None
        time.sleep(_POLL_S)


def follow(
    client: JobSubmissionClient, submission_id: str, url: str, write: Write, ended: Callable[[], bool]
) -> None:
    """Write the job's log until the job has ended.

    Raises `UserError` if nothing is heard of the log for a minute.
    """
    import aiohttp

    once = _Once(write)
    heard = _Heard()
    while True:
        try:
            asyncio.run(_tail(client, submission_id, once, heard))
            heard.now()
        except BrokenPipeError:
            # the reader of our own output left
            raise
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if heard.ago_s() > _UNREACHABLE_S:
                raise UserError(
                    f"{url}: does not answer any more ({one_line(error, 160)}); {submission_id} may still run"
                ) from None
        if ended():
            # the server's own end of the log comes seconds later
            once.rewind()
            once.write(patiently(url, lambda: client.get_job_logs(submission_id)))
            return
        time.sleep(_POLL_S)


async def _tail(client: JobSubmissionClient, submission_id: str, once: _Once, heard: _Heard) -> None:
    """Write the log as it comes until the job or the connection ends."""

    async def read() -> None:
        once.rewind()
        async for text in client.tail_job_logs(submission_id):
            once.write(text)
            heard.now()

    reading = asyncio.ensure_future(read())
    try:
        while not (await asyncio.wait({reading}, timeout=_POLL_S))[0]:
            known = await asyncio.to_thread(client.get_job_info, submission_id)
            # of a job that prints nothing, this is what says that the cluster is there
            heard.now()
            if known.status.is_terminal():
                reading.cancel()
                await asyncio.wait({reading})
                return
        reading.result()
    finally:
        reading.cancel()


class _Heard:
    """When the cluster was last heard."""

    def __init__(self) -> None:
        self.now()

    def now(self) -> None:
        self._at = time.monotonic()

    def ago_s(self) -> float:
        return time.monotonic() - self._at


class _Once:
    """Passes each character of a text on once, though every connection tells the text from its start."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._written = 0
        self._seen = 0

    def rewind(self) -> None:
        self._seen = 0

    def write(self, text: str) -> None:
        fresh = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        self._written = max(self._written, self._seen)
        if fresh:
            self._write(fresh)
