"""Sends requests to the least busy of several servers, and retries a failed one on another server where possible."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hyperdflash.engines.answers import BadAnswer
from hyperdflash.engines.http import Unavailable
from hyperdflash.engines.settings import EngineSettings

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class ServerPool:
    """``settings.concurrency`` open requests per server, ``settings.attempts`` per request with doubling waits in between."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self._busy = dict.fromkeys(settings.servers, 0)
        self._failed = dict.fromkeys(settings.servers, 0)
        self._lock = threading.Lock()

    def map(self, ask: Callable[[str, Request], Answer], requests: Sequence[Request]) -> list[Answer]:
        """Returns ``ask(server, request)`` of each request in order; the first one without an answer ends all."""
        workers = min(len(requests), self.settings.concurrency * len(self.settings.servers))
        with ThreadPoolExecutor(max_workers=max(workers, 1)) as threads:
            futures = [threads.submit(self.ask, ask, request, number) for number, request in enumerate(requests)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def ask(self, ask: Callable[[str, Request], Answer], request: Request, number: int = 0) -> Answer:
        """Sends one request. `Refused` passes at once; ValueError with the last error after ``settings.attempts`` attempts."""
        tried: list[str] = []
        for attempt in range(self.settings.attempts):
            if attempt:
                time.sleep(self.settings.backoff_s * 2 ** (attempt - 1))
            server = self._take(tried)
            try:
                answer = ask(server, request)
            except (BadAnswer, Unavailable) as error:
                tried.append(server)
                self._give_back(server, failed=True)
                last = error
                continue
            except BaseException:
                self._give_back(server, failed=False)
                raise
            self._give_back(server, failed=False)
            return answer
        raise ValueError(
            f"sequence {number} ({len(request)} tokens) has no usable answer after {len(tried)} attempts, the last from "
            f"{tried[-1]}: {last}; nothing of it is cached: repair the server and run the same command again"
        )

    def _take(self, tried: Sequence[str]) -> str:
        """Picks a server where this request has not failed, then the least busy, then the one with the fewest failures."""
        with self._lock:
            server = min(self._busy, key=lambda s: (s in tried[-(len(self._busy) - 1) :], self._busy[s], self._failed[s]))
            self._busy[server] += 1
            return server

    def _give_back(self, server: str, failed: bool) -> None:
        with self._lock:
            self._busy[server] -= 1
            self._failed[server] += failed
