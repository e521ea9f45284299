"""Is there a Ray cluster at this address, and will it let us in?  Answered in seconds, without Ray's client."""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, one_line

_TIMEOUT_S = 4.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Cluster:
    """A cluster's dashboard and the token for it."""

    url: str
    token: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


def connectable(address: str | None = None) -> Cluster:
    """The cluster whose dashboard is at `address` (http://HOST:PORT or HOST:PORT), after it has answered.

    Without an address, DDPM_DASHBOARD or RAY_API_SERVER_ADDRESS names it.  The token is Ray's own: RAY_AUTH_TOKEN,
    the file RAY_AUTH_TOKEN_PATH, or with RAY_AUTH_MODE=token the file ~/.ray/auth_token.

    Raises `UserError`, within about five seconds, if nothing answers there, what answers is not a Ray dashboard,
    or it wants another token.
    """
    cluster = Cluster(_url(address), _token())
    late = _silent(cluster.url, "timed out")
    outcome = _within(_TIMEOUT_S + 1, lambda: _probe(cluster), late)
    if outcome is not None:
        raise UserError(outcome)
    return cluster


def host_and_port(address: str) -> tuple[str, int] | None:
    """Host and port of http://HOST:PORT or HOST:PORT, however it is spelt; None where it is neither."""
    try:
        parts = urllib.parse.urlsplit(_with_scheme(address))
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not port:
        return None
    return "127.0.0.1" if host == "localhost" else host, port


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def _url(address: str | None) -> str:
    address = address or os.environ.get("DDPM_DASHBOARD") or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError(
            "no cluster to submit to: start the local stack with `ddpm up`, or name a cluster's dashboard with "
            "--address http://HOST:8265"
        )
    url = _with_scheme(address)
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(
            f"cluster address {address!r}: must be that of its dashboard, like http://HOST:8265 (not ray://, "
            "and not the port of `ray.init`)"
        )
    return url.rstrip("/")


def _token() -> str | None:
    """The token that Ray's own client would send."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(named).read_text().strip()
        except OSError as error:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={named}: cannot be read ({error.strerror})") from None
    usual = Path.home() / ".ray" / "auth_token"
    return usual.read_text().strip() if mode == "token" and usual.exists() else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect leads to a login page, and the token must not follow it."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


def _probe(cluster: Cluster) -> str | None:
    """None if a Ray dashboard lets us in, else what to tell the user."""
    url = cluster.url
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urllib.parse.urlsplit(url).hostname in _LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    wanted = urllib.request.Request(url + "/api/version", headers=cluster.headers())
    try:
        with urllib.request.build_opener(*handlers).open(wanted, timeout=_TIMEOUT_S) as response:
            if "ray_version" in json.loads(response.read(10_000)):
                return None
            return _not_ray(url, "it tells no Ray version")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            return f"cluster {url}: wants a token; set RAY_AUTH_TOKEN_PATH to the file that holds it"
        if error.code == 403:
            return f"cluster {url}: refuses the token that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH gives"
        return _not_ray(url, f"HTTP {error.code} for /api/version")
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, socket.gaierror):
            return f"cluster {url}: there is no host of that name ({reason.strerror}); check the address"
        if isinstance(reason, (ConnectionRefusedError, TimeoutError)):
            return _silent(
                url, "nothing listens there" if isinstance(reason, ConnectionRefusedError) else "timed out"
            )
        return _silent(url, one_line(reason) if isinstance(reason, BaseException) else str(reason))
    except TimeoutError:
        return _not_ray(url, f"no HTTP answer within {_TIMEOUT_S:.0f} s")
    except HTTPException:
        return _not_ray(url, "its answer is not HTTP")
    except (ValueError, OSError) as error:
        return _not_ray(url, one_line(error))


def _silent(url: str, why: str) -> str:
    return (
        f"cluster {url}: does not answer ({why}); is it up, and is this its dashboard's port (usually 8265)?"
    )


def _not_ray(url: str, why: str) -> str:
    return f"cluster {url}: this is no Ray dashboard ({why}); its usual port is 8265"


def _within(seconds: float, ask: Callable[[], str | None], late: str) -> str | None:
    """What `ask` says, or `late` if it takes too long: looking up a name has no timeout of its own."""
    answers: list[str | None] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return answers[0] if answers else late
