"""Finds the files of this project, writes a file whole or not at all, and says in one sentence what is wrong with one."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PACKAGE = Path(__file__).resolve().parent
REFETCH = "fetch it again from where the target came"
POINTER = b"version https://git-lfs"  # begins what Git LFS leaves in the place of a file that it did not fetch
ELSEWHERE = "or set HYPERDFLASH_RUNS to another folder"
EFFECTIVE = os.access in os.supports_effective_ids
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: beyond the limit of `ulimit -f`
CURES = {
    **dict.fromkeys(FULL, f"free some space, {ELSEWHERE}, then run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"let this user write there, {ELSEWHERE}"),
    errno.EMFILE: "let a process open more files, by `ulimit -n 4096`",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), f"a file stands where a folder is wanted, so move it, {ELSEWHERE}"),
}  # errno -> what the user can do


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that appears under ``path`` when the block ends, and leaves nothing behind when the block fails. When
    several processes write ``path`` at once, the last wins and none fails. ``sync`` forces the bytes to the disk first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        fault = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save raises its own error from it
        if isinstance(fault, OSError) and fault.filename is None:  # that of a write names no file
            raise OSError(fault.errno, fault.strerror, str(path)) from error
        raise


def fault_of(error: OSError) -> str:
    """Returns one sentence about a fault of the file system: the file, what is wrong, what to do."""
    if error.filename is None and error.errno not in CURES:
        return str(error)
    path, cure = error.filename or runs_dir(), CURES.get(error.errno, "restore it, then run the same command again")
    if error.errno == errno.EACCES and os.path.exists(path) and not os.access(path, os.R_OK, effective_ids=EFFECTIVE):
        cure = "let this user read it"
    return f"{path}: {error.strerror or error}: {cure}"


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Around what parses a file: its errors become a ValueError that says the file, what is wrong with it, and ``remedy``."""
    try:
        yield
    except Exception as error:  # libraries raise many unrelated ones
        if isinstance(error, OSError) and error.errno in CURES:
            raise
        what = f"is damaged ({(str(error).splitlines() or [type(error).__name__])[0]})"
        content = path.open("rb").read(len(POINTER)) if path.is_file() else None
        known = {None: "is missing", b"": "is empty", POINTER: "is a pointer of Git LFS (`git lfs pull` fetches the file)"}
        raise ValueError(f"{path} {known.get(content, what)}: {remedy}") from error


def read_json(path: Path, remedy: str, *names: str) -> dict:
    """Returns the JSON object of a file, which has ``names``; ValueError as for `reading`."""
    with reading(path, remedy):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not found.keys() >= set(names):
            raise ValueError(f"wanted an object with {', '.join(names) or 'names'}")
        return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def runs_dir() -> Path:
    """Returns the folder of all that commands write: ``$HYPERDFLASH_RUNS``, or ``runs``; ValueError for an empty name."""
    named = os.path.expanduser(os.environ.get("HYPERDFLASH_RUNS", "runs"))
    if not named.strip() or named.startswith("~"):
        raise ValueError(f"HYPERDFLASH_RUNS={named!r} names no folder: give one, or unset it, which stands for ./runs")
    return Path(named)


def resource(name: str) -> Path:
    """Returns the folder ``conf`` or ``assets``: the copy that a wheel installs in the package, else the repository's."""
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parents[1] / name


def asset(name: str) -> str:
    """Returns the path of ``assets/name``, relative to the current folder when it lies below it, else absolute."""
    path = resource("assets") / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def portable(path: str) -> str:
    """Returns a shipped asset's path as ``assets/NAME``, wherever the project lies, and any other path as it is."""
    assets, whole = resource("assets"), Path(path).resolve()
    return f"assets/{whole.relative_to(assets)}" if whole.is_relative_to(assets) else path


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(text.encode())
