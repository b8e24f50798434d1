"""The cache's bench at sizes that take seconds: every format gives back what it was given, and every part becomes a table."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cache, cache_scale
from benchmarks.cache_formats import FORMATS, write_all
from benchmarks.cache_rates import make_records, rates, state_source
from hyperdflash.states.store import make_shards


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_back_every_record(tmp_path, name):
    shards = make_shards(make_records(7, 12), 3)
    states = state_source(shards, 2, 16)
    form = FORMATS[name](tmp_path, 2, 16)
    write_all(form, shards, states)
    read = form.open(shards)
    for shard in shards:
        rows = states(shard).split([len(document.input_ids) for document in shard.documents])
        for index in reversed(range(len(shard.documents))):
            ids, mask, found = read(shard, index)
            assert torch.equal(ids, shard.documents[index].input_ids) and torch.equal(mask, shard.documents[index].loss_mask)
            assert found.dtype == torch.bfloat16 and torch.equal(found, rows[index])


def test_rates_are_medians_and_shares_are_paired():
    times = {"bytes": 2_000_000, "write_s": [2.0, 1.0, 4.0], "sequential_s": [1.0, 2.0, 8.0], "shuffled_s": [2.0, 2.0, 4.0]}
    found = rates({**times, "first_s": [0.001, 0.003, 0.002]})
    assert found == {"write": 1.0, "sequential": 1.0, "shuffled": 1.0, "share": 1.0, "first_ms": 2.0}


def test_the_parts_become_files(tmp_path, monkeypatch, capsys, mini_target):
    monkeypatch.setattr(cache_scale, "run_alone", lambda *arguments: cache_scale.measure_one(*map(str, arguments)))
    small = ["--rounds=2", "--records=6", "--tokens=8", "--paths=4", "--hidden=32", "--shards=20", "--prompts=1"]
    cache.main(["formats", "codecs", f"--out={tmp_path}", f"--target={mini_target}", f"--scratch={tmp_path}", *small])
    assert set(json.loads((tmp_path / "cache.json").read_text())) == {"formats", "codecs", "environment"}
    cache.main(["scale", f"--out={tmp_path}", *small])
    assert {path.name for path in tmp_path.iterdir()} == {"cache.json", "cache.md", "cache.png"}
    record = json.loads((tmp_path / "cache.json").read_text())
    assert {"formats", "scale", "codecs"} < set(record)
    text = (tmp_path / "cache.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### Formats: 6 records, {record['formats']['tokens']} tokens of 4 x 32 bf16 (256 bytes), all in the page cache",
        "### 20 shards",
        "### Codecs: 4 x 32 per token",
    ]
    assert all(text.count(f"| {name} ") == 2 for name in FORMATS)
    errors = record["codecs"]["errors"]
    assert errors["fp32"]["states"] == 0 and errors["fp32"]["kl_mean_pool"] == 0 and errors["fp32"]["same_top"] == 1
    assert 0 < errors["bf16"]["states"] < 2**-8 < errors["fp8"]["states"] < 2**-4
    assert 0 < errors["bf16"]["kl_mean_pool"] < errors["fp8"]["kl_mean_pool"] < 0.1
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        cache.main(["speed"])
    assert "no part speed: there are formats, scale, codecs" in capsys.readouterr().err
