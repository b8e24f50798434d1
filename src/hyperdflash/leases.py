"""Leases: small files that show the processes of one directory who works on what, who needs what and who is alive.

A file is abandoned when its owner has ended (same host), or when nobody touched it for ``stale_s`` seconds of the observer's
own clock (another host, whose clock may differ). A race or a paused owner can at most repeat work: both results are equal, and
each appears whole.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hyperdflash.files import write_text

EMPTY_S = 5.0  # age at which an empty file counts as abandoned: its owner died between two system calls


class Leases:
    """The files of this process below ``directory``, by names such as ``leases/ab12``; a thread touches them until `close`."""

    def __init__(self, directory: str | Path, stale_s: float = 60.0):
        self.directory, self.stale_s = Path(directory), stale_s
        self._pid = os.getpid()
        self._owned: set[Path] = set()
        self._seen: dict[Path, tuple[int, float]] = {}  # modification time, and when this process first saw it
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def acquire(self, name: str, **record) -> bool:
        """Creates the file (O_EXCL: one process of all hosts can); False when a living process, this one included, has it."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                with open(path, "x") as file:
                    file.write(_text(record))
            except FileExistsError:
                if (content := self._abandoned(path)) is None:
                    return False
                _take_away(path, content)
            else:
                self._own(path)
                return True
        return False

    def post(self, name: str, **record) -> None:
        """Writes or replaces a file that only this process writes."""
        write_text(self._path(name), _text(record))
        self._own(self._path(name))

    def release(self, name: str) -> None:
        """Removes a file of this process, if it owns one of that name."""
        path = self._path(name)
        with self._lock:
            ours = path in self._owned
            self._owned.discard(path)
        if ours:
            path.unlink(missing_ok=True)

    def owner(self, name: str) -> str:
        """Returns the process and host that own a file, for messages."""
        record = _read(self._path(name))[1]
        return f"process {record['pid']} on {record['host'].partition(' ')[0]}" if record else "another process"

    def living(self, folder: str) -> dict[str, dict]:
        """Returns name -> record of every file in ``folder`` whose owner is alive; removes the others."""
        found = {}
        for path in sorted((self.directory / folder).glob("*.json")):
            if (content := self._abandoned(path)) is not None:
                _take_away(path, content)
            elif record := _read(path)[1]:
                found[path.stem] = record
        return found

    def close(self) -> None:
        """Removes the files of this process; does nothing in a fork of the process that created them."""
        if os.getpid() != self._pid:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            owned, self._owned = self._owned, set()
        for path in owned:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _own(self, path: Path) -> None:
        with self._lock:
            self._owned.add(path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self.stale_s / 4):
            with self._lock:
                owned = list(self._owned)
            for path in owned:
                with suppress(FileNotFoundError):
                    os.utime(path)

    def _abandoned(self, path: Path) -> bytes | None:
        """Returns the content of a file whose owner has ended; None when the owner lives or the file is gone."""
        content, record = _read(path)
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if record and record["host"] == host() and not _runs(record["pid"], record["started"]):
            return content
        before, since = self._seen.get(path, (None, 0.0))
        if before != touched:
            self._seen[path] = (touched, time.monotonic())
            return None
        limit_s = self.stale_s if record else min(EMPTY_S, self.stale_s)
        return content if time.monotonic() - since > limit_s else None


@contextmanager
def exclusive(directory: str | Path, name: str, *, wait_s: float = math.inf, busy: str = "") -> Iterator[None]:
    """Runs a block in one process at a time; the others wait and print which process has it.

    Raises ValueError with the sentence ``busy`` after ``wait_s`` seconds.
    """
    with Leases(directory) as leases:
        started = reported = time.monotonic()
        while not leases.acquire(name):
            now = time.monotonic()
            if now - started >= wait_s:
                raise ValueError(busy)
            if now - reported > 20:
                reported = now
                print(f"waiting for {leases.owner(name)}, which has {leases.directory / name}", flush=True)
            time.sleep(0.2)
        yield


def host() -> str:
    """Returns the name of the machine and of the process-id namespace, within which a process id is unique."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _take_away(path: Path, content: bytes) -> None:
    """Removes an abandoned file, unless somebody replaced it after it was read."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        path.rename(aside)
        if aside.read_bytes() != content:
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _text(record: dict) -> str:
    owner = {"host": host(), "pid": os.getpid(), "started": _started(os.getpid()), "token": uuid.uuid4().hex}
    return json.dumps({**owner, **record})


def _read(path: Path) -> tuple[bytes, dict | None]:
    """Returns the content of a file and its record, which an empty or missing file lacks."""
    content = b""
    with suppress(FileNotFoundError, ValueError):
        content = path.read_bytes()
        return content, json.loads(content)
    return content, None


def _started(pid: int) -> str | None:
    """Returns the start of a process in ticks since boot, which differs from that of a later process with the same id, or
    "ended"; None without an entry in /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] == "Z" else fields[19]


def _runs(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return now is None or (now != "ended" and started in (None, now))
