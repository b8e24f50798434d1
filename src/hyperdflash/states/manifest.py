"""What a cache depends on, written beside its shards as manifest.json, and checked against what a run needs.

The file is read by people, so it also says what taps are; it is checked byte by byte, so every change of it is found.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperdflash.files import write_text
from hyperdflash.settings import one_of
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.engine_settings import ENGINES as SERVED

FORMAT_VERSION = 2
NAME = "manifest.json"
IN_PROCESS = "none"
ENGINES = (IN_PROCESS, *SERVED)
TAPS = {
    "final": "the residual before hc_head collapses it, [tokens, paths, hidden_size]; every shard has it",
    "layer<i>": "output of layer i, transformers' hidden_states[i + 1], same shape; added when first asked for",
}


@dataclass(frozen=True)
class CacheKey:
    """What cached states depend on, besides the documents themselves.

    ``tokenizer`` and ``mode`` stay empty where documents come as token ids, without text. An engine's states differ from those
    of the target in process by rounding, so each has caches of its own.
    """

    target: str  # fingerprint of the weights
    target_dtype: str  # what the target computes in
    num_paths: int
    hidden_size: int
    dtype: str  # the codec
    tokenizer: str = ""  # fingerprint of its file
    mode: str = ""  # chat mode that the documents were encoded in
    encoding_version: int = 1  # of the chat encoding
    format_version: int = FORMAT_VERSION
    engine: str = IN_PROCESS  # what ran the target

    def __post_init__(self):
        one_of("cache.dtype", self.dtype, tuple(CODECS))
        one_of("target.engine", self.engine, ENGINES)

    @property
    def content(self) -> dict:
        """What the manifest and the digest hold; an engine is named where there is one."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("engine", IN_PROCESS)}

    @property
    def digest(self) -> str:
        """16 hex digits that every file of the cache carries."""
        return _digest(self.content)


def write_manifest(directory: Path, key: CacheKey) -> None:
    """Several processes may do so at once: they write the same."""
    write_text(directory / NAME, _text(_content(key)))


def check_manifest(directory: Path, key: CacheKey) -> None:
    """ValueError where ``directory`` holds states of another target, codec, encoding or format, or a damaged manifest."""
    path = directory / NAME
    damaged = f"{path} is damaged: remove {directory} and capture again"
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
        version = found["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{damaged} (not readable as a manifest: {error!r})") from error
    if version != FORMAT_VERSION:
        age = "a newer" if isinstance(version, int) and version > FORMAT_VERSION else "another"
        raise ValueError(
            f"cache {directory} is in {age} format, {version!r} where this version of the code reads {FORMAT_VERSION}: "
            "give another cache.directory, remove it, or use the version of the code that wrote it"
        )
    if text != _text(found) or found.get("checksum") != _digest({k: v for k, v in found.items() if k != "checksum"}):
        raise ValueError(f"{damaged} (its checksum does not fit)")
    wanted, found = asdict(key), {"engine": IN_PROCESS, **found}
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        pairs = ", ".join(f"{name}={found.get(name)!r} where this run needs {wanted[name]!r}" for name in differing)
        raise ValueError(f"cache {directory} was written with {pairs}: give another cache.directory or remove it")


def _content(key: CacheKey) -> dict:
    token = CODECS[key.dtype].bytes_per_token(key.num_paths, key.hidden_size)
    content = {**key.content, "bytes_per_token": token, "taps": TAPS}
    return {**content, "checksum": _digest(content)}


def _text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
