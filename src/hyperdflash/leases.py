"""Leases: small locked files that show the processes of one directory who works on what, who needs what and who is alive.

A living owner holds the file's lock (flock). The system releases it when the owner ends, however it ends, so a file that nobody
locks is abandoned. Processes on several hosts see each other where the file system shares locks, as NFS does unless it is
mounted with local_lock; elsewhere they can at most repeat work: both results are equal, and each appears whole.
"""

import fcntl
import json
import math
import os
import platform
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self


class Leases:
    """The files of this process below ``directory``, by names such as ``leases/ab12``, until `close`."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._owned: dict[Path, IO] = {}
        _everywhere.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def acquire(self, name: str, **record) -> bool:
        """Takes the file of this name; False when a living process, this one included, has it."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            if not _lock(file):
                return False
            if not _stands_at(file, path):  # its owner removed or replaced it after it was opened
                return self.acquire(name, **record)
            self.post(name, **record)
        return True

    def post(self, name: str, **record) -> None:
        """Writes or replaces a file that only this process writes."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}"), "w")  # noqa: SIM115, `release` closes it
        json.dump({"name": path.name, "host": platform.node(), "pid": os.getpid(), **record}, file)
        file.flush()
        _lock(file)
        os.replace(file.name, path)
        before, self._owned[path] = self._owned.get(path), file
        if before:
            before.close()

    def release(self, name: str) -> None:
        """Removes a file of this process, if it owns one of that name."""
        if file := self._owned.pop(path := self._path(name), None):
            path.unlink(missing_ok=True)
            file.close()

    def owner(self, name: str) -> str:
        """Returns the process and host that own a file, for messages."""
        with suppress(OSError, ValueError, KeyError):
            record = json.loads(self._path(name).read_text())
            return f"process {record['pid']} on {record['host']}"
        return "another process"

    def living(self, folder: str) -> dict[str, dict]:
        """Returns name -> record of every lease in ``folder`` whose owner is alive; removes the other leases, and no file of
        anybody else's."""
        found: dict[str, dict] = {}
        for path in sorted((self.directory / folder).glob("*.json")):
            with suppress(FileNotFoundError, IsADirectoryError), open(path, "r+", errors="replace") as file:
                record = _record(path, file.read())
                if not _lock(file):
                    found |= {path.stem: record} if record else {}
                elif record and _stands_at(file, path):
                    path.unlink()
        return found

    def close(self) -> None:
        for path in list(self._owned):
            self.release(str(path.relative_to(self.directory).with_suffix("")))

    def disown(self) -> None:
        """Leaves the files to the parent of this fork, which would hold their locks beyond the parent's end."""
        for file in self._owned.values():
            file.close()
        self._owned.clear()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


_everywhere: weakref.WeakSet[Leases] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [leases.disown() for leases in _everywhere])


@contextmanager
def exclusive(directory: str | Path, name: str, *, wait_s: float = math.inf, busy: str = "") -> Iterator[None]:
    """Runs a block in one process at a time; the others wait and print which process has it. Raises ValueError with the
    sentence ``busy`` after ``wait_s`` seconds."""
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


def _lock(file: IO) -> bool:
    """Locks an open file; False when another process has its lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        where = Path(file.name).parent
        raise ValueError(f"{where} lies on a file system without file locks ({error.strerror}): use another folder") from None
    return True


def _record(path: Path, text: str) -> dict | None:
    """Returns what a lease at ``path`` says, {} while its owner takes it; None for another's file or a copy."""
    with suppress(ValueError):
        record = json.loads(text or "{}")
        return record if record == {} or (isinstance(record, dict) and record.get("name") == path.name) else None
    return None


def _stands_at(file: IO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
