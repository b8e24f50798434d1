"""Documents and states made on the spot; a store needs no target."""

from __future__ import annotations

import pytest
import torch

from hyperdflash.contracts import Document
from hyperdflash.states.manifest import CacheKey
from hyperdflash.states.store import Shard, StateStore, make_shards

KEY = {
    "target": "beef",
    "target_dtype": "fp32",
    "num_paths": 4,
    "hidden_size": 16,
    "tokenizer": "cafe",
    "mode": "non_think",
    "encoding_version": 1,
}


def make_key(dtype: str = "bf16", **changes) -> CacheKey:
    return CacheKey(**{**KEY, "dtype": dtype, **changes})


def make_documents(count: int = 7) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    lengths = [9 + 5 * i for i in range(count)]
    return [
        Document(f"d{i}", "code", torch.randint(8, 320, (length,), generator=generator), torch.arange(length) >= 4)
        for i, length in enumerate(lengths)
    ]


def random_states(shard: Shard, seed: int = 0, key: CacheKey | None = None) -> torch.Tensor:
    """[N, M, D] fp32 with paths of very different size, as in a target."""
    key = key or make_key()
    generator = torch.Generator().manual_seed(seed)
    shape = (shard.num_tokens, key.num_paths, key.hidden_size)
    sizes = torch.exp(4 * torch.randn(*shape[:2], 1, generator=generator))
    return sizes * torch.randn(shape, generator=generator)


@pytest.fixture
def filled(tmp_path):
    """filled(dtype, layer_ids) -> store, its shards, tap -> states of each shard."""

    def fill(dtype: str = "bf16", layer_ids: tuple[int, ...] = (2,), folder: str = "cache"):
        store = StateStore(tmp_path / folder, make_key(dtype))
        shards = make_shards(make_documents(), 3)
        states = []
        for number, shard in enumerate(shards):
            taps = {tap: random_states(shard, 10 * number + order) for order, tap in enumerate((*layer_ids, None))}
            for tap, value in taps.items():
                store.write(shard, value, tap)
            states.append(taps)
        return store, shards, states

    return fill
