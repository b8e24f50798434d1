"""A dataset: every document that a training reads, in the order of its shards, and the fingerprints of their states.

    <runs>/datasets/<name>-<target>/
        train.safetensors        one record per document (states/shard_file.py): input_ids [N] int32, loss_mask [N] bool;
        validation.safetensors   others: ids, domain_names, shard_names (text), domains [R] uint8, shard_starts [S + 1]
        dataset.json             what documents and states depend on, the local files that the rows came from, row statistics,
                                 a digest and a checksum; written last

N tokens, R documents and S shards per split. Both index files are mapped: opening one reads everything but the tokens, and
reading a document checks its bytes. A directory without dataset.json counts as missing.

The states are not copied: the name of a shard, which is a digest of its documents, finds them in the cache directory. So two
datasets share the shards that they have in common, and a layer tap is added later without a new index.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from hyperdflash.contracts import ENCODING_VERSION, Document
from hyperdflash.files import sha256_of
from hyperdflash.states.manifest import FORMAT_VERSION as CACHE_FORMAT
from hyperdflash.states.manifest import CacheKey, read_checked, write_checked
from hyperdflash.states.shard_file import DamagedShard, ShardFile, write_shard_file
from hyperdflash.states.store import Shard

FORMAT_VERSION = 2
NAME = "dataset.json"
SPLITS = ("train", "validation")
REMEDY = "remove the directory and capture again"


class Index(Sequence[Document]):
    """The documents of one split, read from its mapped file; unpickling opens the file again."""

    def __init__(self, path: Path, identity: Mapping[str, str]):
        self.path, self.identity = path, dict(identity)
        try:
            self._file = ShardFile(path, identity)
        except ValueError as error:
            raise ValueError(f"{path} is damaged or missing: {error}; {REMEDY}") from error
        others = self._file.others
        self._ids = others["ids"].numpy()  # one array: 300,000 strings would take 20 MB
        self._id_ends = np.flatnonzero(self._ids == 0)[: len(self._file.offsets) - 1]
        self._domains, self._domain_names = others["domains"], _texts(others["domain_names"])
        self.num_tokens = np.diff(self._file.offsets)  # of each document
        rows = (Subset(self, range(start, stop)) for start, stop in pairwise(others["shard_starts"].tolist()))
        self.shards = list(map(IndexedShard, _texts(others["shard_names"]), rows))

    def __reduce__(self):
        return Index, (self.path, self.identity)

    def __len__(self) -> int:
        return len(self._id_ends)

    def id(self, row: int) -> str:
        return bytes(self._ids[self._id_ends[row - 1] + 1 if row else 0 : self._id_ends[row]]).decode()

    def __getitem__(self, row: int) -> Document:
        """ValueError when a byte of the document differs from what was written."""
        try:
            record = self._file.record(row)
        except DamagedShard as error:
            raise DamagedShard(f"record {row} ({self.id(row)}) of {self.path} is damaged: {error}; {REMEDY}") from error
        domain = self._domain_names[int(self._domains[row])]
        return Document(self.id(row), domain, record["input_ids"].long(), record["loss_mask"])


class IndexedShard(Shard):
    """A shard whose documents are a run of rows of an `Index`."""

    documents: Subset[Document]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document; reads none of them."""
        rows = self.documents.indices
        return self.documents.dataset.num_tokens[rows.start : rows.stop].tolist()


@dataclass(frozen=True)
class Dataset:
    """``shards`` of each split in order, and ``record``, the content of dataset.json."""

    directory: Path
    record: dict
    shards: Mapping[str, Sequence[Shard]]

    @cached_property
    def key(self) -> CacheKey:
        return CacheKey.of(self.record["states"])

    @property
    def digest(self) -> str:
        """16 hex digits of the key and of all documents and labels in order."""
        return self.record["digest"]

    @property
    def mask_token_id(self) -> int:
        return self.record["mask_token_id"]

    @property
    def rows(self) -> dict:
        """Row statistics: ``sources``, and counts per split."""
        return self.record["rows"]

    def summary(self) -> list[str]:
        """Returns one line per split: documents, tokens, documents of the maximum length, conversations without a document."""
        lines = []
        for split in SPLITS:
            count = self.rows[split]
            text = f"{count['documents']:,} documents, {count['tokens']:,} tokens, {count['supervised_tokens']:,} supervised"
            notes = (("at_max_length", "as long as max_length"), ("without_document", "conversations without one"))
            more = ", ".join(f"{count[key]:,} {words}" for key, words in notes if count[key])
            lines.append(f"{split}: {text}" + (f" ({more})" if more else ""))
        return lines


def is_complete(directory: Path) -> bool:
    return (directory / NAME).exists()


def write_dataset(directory: Path, shards: Mapping[str, Sequence[Shard]], key: CacheKey, record: Mapping) -> None:
    """Writes a dataset; one process at a time may do so. ``record`` holds ``mask_token_id``, ``rows``, ``source_files`` (of
    `record_files`) and other entries of dataset.json."""
    digest = data_digest(key, shards)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.iterdir():
        if re.fullmatch(rf"({'|'.join(SPLITS)})\.safetensors\.\d+\.partial|{NAME}\.\d+\.partial", left.name):
            left.unlink()
    for split, found in shards.items():
        _write_index(directory / f"{split}.safetensors", found, {"dataset": digest, "split": split})
    content = {"format_version": FORMAT_VERSION, "digest": digest, "states": key.content, **record}
    write_checked(directory / NAME, content)


def check_sources(directory: Path, command: str, target_path: str) -> dict:
    """Returns the content of dataset.json; ValueError when a file that the rows came from was edited since, or when the target
    has another tokenizer, with the ``command`` that prepares the dataset again."""
    record = read_record(directory)
    check_tokenizer(target_path, record["states"].get("tokenizer"), directory, f"remove {directory} and capture again")
    check_files(record["source_files"], f"remove {directory}, then run `{command}` to prepare the dataset again")
    return record


def read_record(directory: Path) -> dict:
    """Returns the content of dataset.json; ValueError when it is damaged, or of another format, encoding or cache version."""
    record = read_checked(directory / NAME, FORMAT_VERSION, f"dataset {directory}", REMEDY)
    for name, wanted in (("encoding_version", ENCODING_VERSION), ("format_version", CACHE_FORMAT)):
        if record["states"][name] != wanted:
            made = f"{name}={record['states'][name]}"
            raise ValueError(f"dataset {directory} was captured with {made} and this version of code has {wanted}: {REMEDY}")
    return record


def open_dataset(directory: Path) -> Dataset:
    """Opens a dataset; ValueError as for `read_record`, or when an index file is damaged."""
    record = read_record(directory)
    digest = record["digest"]
    indices = {name: Index(directory / f"{name}.safetensors", {"dataset": digest, "split": name}) for name in SPLITS}
    return Dataset(directory, record, {name: index.shards for name, index in indices.items()})


def data_digest(key: CacheKey, shards: Mapping[str, Sequence[Shard]]) -> str:
    """Returns 16 hex digits over the key and all documents in order; a shard's name is a digest of ids, tokens and masks."""
    names = [key.digest, *(f"{name} {shard.name}" for name in sorted(shards) for shard in shards[name])]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _write_index(path: Path, shards: Sequence[Shard], identity: Mapping[str, str]) -> None:
    documents = [document for shard in shards for document in shard.documents]
    names = sorted({document.domain for document in documents})
    others = {
        "shard_starts": torch.tensor([0, *(len(shard.documents) for shard in shards)]).cumsum(0),
        "domains": _padded(bytes(names.index(document.domain) for document in documents)),
        "ids": _text([document.id for document in documents]),
        "domain_names": _text(names),
        "shard_names": _text([shard.name for shard in shards]),
    }
    rows = {
        "input_ids": torch.cat([document.input_ids.to(torch.int32) for document in documents]),
        "loss_mask": torch.cat([document.loss_mask for document in documents]),
    }
    write_shard_file(path, rows, [len(document.input_ids) for document in documents], identity, others)


def _text(words: Sequence[str]) -> Tensor:
    """Encodes words as uint8: UTF-8 with a zero byte after each."""
    assert not any("\0" in word for word in words)
    return _padded("".join(f"{word}\0" for word in words).encode())


def _padded(content: bytes) -> Tensor:
    """Pads bytes with zeros to a multiple of 8."""
    return torch.frombuffer(bytearray(content + b"\0" * (-len(content) % 8)), dtype=torch.uint8)


def _texts(text: Tensor) -> list[str]:
    return bytes(text.numpy()).rstrip(b"\0").decode().split("\0")


def record_files(paths: Iterable[str | Path]) -> dict[str, dict]:
    """Returns ``size`` in bytes, ``mtime_ns`` and ``sha256`` of the content by path of the files that rows come from."""
    return {str(path): {**_status(Path(path)), "sha256": sha256_of(Path(path))} for path in paths}


def check_files(recorded: Mapping[str, Mapping], remedy: str) -> None:
    """Raises ValueError, which ends with ``remedy``, when a file has another content than recorded; accepts a missing file.
    Reads a file only when its size or modification time differs."""
    for name, before in recorded.items():
        path = Path(name)
        if not path.exists() or _status(path).items() <= before.items():
            continue
        if sha256_of(path) != before["sha256"]:
            raise ValueError(f"{path} was edited after its rows were prepared: {remedy}")


def check_tokenizer(target_path: str, recorded: str, owner: Path, remedy: str) -> None:
    """Raises ValueError, which ends with ``remedy``, where the target's tokenizer is not ``owner``'s ``recorded`` one."""
    tokenizer = Path(target_path) / "tokenizer.json"
    if tokenizer.exists() and sha256_of(tokenizer)[:16] != recorded:
        raise ValueError(f"{tokenizer} is not the tokenizer of {owner}: {remedy}")


def _status(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
