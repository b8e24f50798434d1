"""manifest.json: what the states of a cache depend on, written beside the shards and compared with what a run needs. People
read the file, so it also explains taps. A checksum covers every byte of it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from hyperdflash.contracts import ENGINES as SERVED
from hyperdflash.files import write_text
from hyperdflash.settings import one_of
from hyperdflash.states.codecs import CODECS

FORMAT_VERSION = 3
NAME = "manifest.json"
IN_PROCESS = "none"
ENGINES = (IN_PROCESS, *SERVED)
TAPS = {
    "residual": "the residual before hc_head collapses it, [tokens, paths, hidden_size]; every shard has it",
    "layer<i>": "output of layer i, transformers' hidden_states[i + 1], same shape; added when a run first needs it",
}


@dataclass(frozen=True)
class CacheKey:
    """What cached states depend on, besides the documents themselves. The states of an engine differ by rounding from those of
    the target in process, so each engine has its own caches."""

    target: str  # fingerprint of the weights
    target_dtype: str  # dtype of the target's weights and products
    num_paths: int
    hidden_size: int
    dtype: str  # the codec
    tokenizer: str = ""  # fingerprint of its file; empty when documents come as token ids
    mode: str = ""  # chat mode of the documents
    encoding_version: int = 1  # of the chat encoding
    format_version: int = FORMAT_VERSION
    engine: str = IN_PROCESS  # which engine ran the target

    def __post_init__(self):
        one_of("cache.dtype", self.dtype, tuple(CODECS))
        one_of("target.engine", self.engine, ENGINES)

    @classmethod
    def of(cls, content: dict) -> Self:
        """Makes the key with ``content``; ignores other entries."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})

    @property
    def content(self) -> dict:
        """Entries of the manifest and of the digest; ``engine`` only when an engine ran the target."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("engine", IN_PROCESS)}

    @property
    def digest(self) -> str:
        return json_digest(self.content)


def write_manifest(directory: Path, key: CacheKey) -> None:
    """Writes manifest.json; processes that do so at once write the same bytes."""
    token = CODECS[key.dtype].bytes_per_token(key.num_paths, key.hidden_size)
    write_checked(directory / NAME, {**key.content, "bytes_per_token": token, "taps": TAPS})


def check_manifest(directory: Path, key: CacheKey) -> None:
    """Raises ValueError when ``directory`` holds states of another target, codec, encoding or format, or a damaged manifest."""
    remedy = "give another cache.directory, remove it and capture again"
    found = {"engine": IN_PROCESS, **read_checked(directory / NAME, FORMAT_VERSION, f"cache {directory}", remedy)}
    wanted = asdict(key).items()
    pairs = [f"{name}={found.get(name)!r} where this run needs {value!r}" for name, value in wanted if found.get(name) != value]
    if pairs:
        raise ValueError(f"cache {directory} was written with {', '.join(pairs)}: give another cache.directory or remove it")


def write_checked(path: Path, content: dict) -> None:
    """Writes ``content`` as JSON with a checksum, whole or not at all."""
    write_text(path, _text(content))


def read_checked(path: Path, version: int, what: str, remedy: str) -> dict:
    """Returns what `write_checked` wrote. ValueError when a byte differs, or when ``format_version`` is not ``version``: that
    sentence names ``what`` and ends with ``remedy``."""
    damaged = f"{path} is damaged: remove {path.parent} and capture again"
    try:
        text = path.read_bytes().decode()
        found = json.loads(text)
        written = found["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{damaged} (not readable as a manifest: {error!r})") from error
    if written != version:
        age = "a newer" if isinstance(written, int) and written > version else "another"
        raise ValueError(f"{what} is in {age} format, {written!r} where this version of the code reads {version}: {remedy}")
    found.pop("checksum", None)
    if text != _text(found):
        raise ValueError(f"{damaged} (its checksum does not fit)")
    return found


def json_digest(content: object) -> str:
    """Returns 16 hex digits over a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _text(content: dict) -> str:
    return json.dumps({**content, "checksum": json_digest(content)}, indent=2) + "\n"
