"""Requests to servers: JSON over HTTP, and a pool that retries and spreads requests over several servers. `Refused` means that
a retry on this server gives the same (HTTP 4xx); `Unavailable` (5xx, 408, 429, no connection, too slow, no JSON) and
`BadAnswer` mean that a retry can succeed."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar

from hyperdflash.settings import positive_int, positive_number


class Refused(ValueError):
    """The server refused the request with HTTP ``status``."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unavailable(ValueError):
    """The server gave no usable answer."""


class BadAnswer(ValueError):
    """An answer that cannot belong to the request."""


def request_json(url: str, timeout_s: float, body: dict | None = None) -> dict:
    """Sends a JSON object by POST, or GET without a body, and returns a JSON object."""
    return _object(request_text(url, timeout_s, body), url)


def request_text(url: str, timeout_s: float, body: dict | None = None) -> bytes:
    with _open(url, timeout_s, body) as answer:
        return answer.read()


def stream_json(url: str, body: dict, timeout_s: float) -> Iterator[dict]:
    """Sends a JSON object by POST and yields the object of each ``data:`` line as it arrives, until ``[DONE]`` or the end."""
    with _open(url, timeout_s, body) as answer:
        for line in answer:
            if line.startswith(b"data:"):
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield _object(data, url)


def served_models(base: str, timeout_s: float) -> dict[str, dict]:
    """Returns name -> description of the models that the OpenAI-compatible server at ``base`` (http://host:port/v1) serves."""
    rows = request_json(f"{base}/models", timeout_s).get("data")
    return {str(row.get("id")): row for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}


@contextmanager
def _open(url: str, timeout_s: float, body: dict | None = None) -> Iterator[http.client.HTTPResponse]:
    """Opens a request; ``timeout_s`` bounds the connection and each wait for data."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        text = error.read(500).decode(errors="replace").strip().replace("\n", " ")
        message = f"{url} answered HTTP {error.code}{f': {text}' if text else ''}"
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise Refused(message, error.code) from None
        raise Unavailable(message) from None
    except (OSError, http.client.HTTPException) as error:  # OSError includes URLError and TimeoutError
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise Unavailable(f"{url} sent nothing for {timeout_s:g} s") from None
        raise Unavailable(f"{url} cannot be reached ({reason})") from None


def _object(text: bytes, url: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Unavailable(f"{url} answered with something other than JSON ({error})") from None
    if not isinstance(found, dict):
        raise Unavailable(f"{url} answered a JSON {type(found).__name__}, wanted an object")
    return found


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Base URLs ``servers``, with ``concurrency`` open requests each. ``timeout_s`` is the longest silence of a request,
    ``attempts`` the tries per request, ``backoff_s`` the wait after the first failure, which doubles with each further one.
    ``wanted`` and ``prefix`` say how a user gives the options."""

    servers: tuple[str, ...]
    concurrency: int = 4
    timeout_s: float = 600.0
    attempts: int = 4
    backoff_s: float = 1.0
    wanted: ClassVar[str] = ""
    prefix: ClassVar[str] = ""

    def __post_init__(self):
        if not self.servers or not all(isinstance(s, str) and s.startswith(("http://", "https://")) for s in self.servers):
            raise ValueError(f"{self.wanted}, got {list(self.servers)}: start the servers first (docs/deepseek_v4_flash.md)")
        for name in ("concurrency", "attempts"):
            positive_int(self.prefix + name, getattr(self, name))
        for name in ("timeout_s", "backoff_s"):
            positive_number(self.prefix + name, getattr(self, name))


class ServerPool:
    """Sends requests to the least busy server; retries a failed one on another server where possible."""

    def __init__(self, settings: Servers):
        self.settings = settings
        self._busy = dict.fromkeys(settings.servers, 0)
        self._lock = threading.Lock()

    def map(self, ask: Callable[[str, Any], Any], requests: Sequence) -> list:
        """Returns ``ask(server, request)`` of each request in order; the first one without an answer ends all."""
        workers = min(len(requests), self.settings.concurrency * len(self.settings.servers))
        with ThreadPool(max(workers, 1)) as threads:
            return list(threads.imap(lambda pair: self.ask(ask, pair[1], pair[0]), enumerate(requests)))

    def ask(self, ask: Callable[[str, Any], Any], request: Sequence, number: int = 0) -> Any:
        """Sends one request; a refused one goes to each other server, which can have another limit of length. `Refused` where
        all servers refuse it; ValueError with the last error after ``settings.attempts`` failures."""
        failed: list[str] = []
        refused: set[str] = set()
        pause_s = 0.0
        while len(failed) < self.settings.attempts:
            time.sleep(pause_s)
            pause_s = 0.0
            server = self._take(failed, refused)
            try:
                return ask(server, request)
            except Refused:
                refused.add(server)
                if len(refused) == len(self._busy):
                    raise
            except (BadAnswer, Unavailable) as error:
                last = error
                pause_s = self.settings.backoff_s * 2 ** len(failed)
                failed.append(server)
            finally:
                with self._lock:
                    self._busy[server] -= 1
        raise ValueError(
            f"sequence {number} ({len(request)} tokens) has no usable answer after {len(failed)} attempts, the last from "
            f"{failed[-1]}: {last}; nothing of it is cached: repair the server and run the same command again"
        )

    def _take(self, failed: Sequence[str], refused: set[str]) -> str:
        """Picks the least busy server, of those where this request has not failed if there are any."""
        recent = failed[-(len(self._busy) - 1) :]
        with self._lock:
            left = [server for server in self._busy if server not in refused]
            server = min(left, key=lambda s: (s in recent, self._busy[s]))
            self._busy[server] += 1
            return server
