"""The cache's benchmark at sizes that take seconds."""

from __future__ import annotations

import json

from benchmarks import cache
from benchmarks.cache import rates


def test_rates_are_medians_and_shares_are_paired():
    times = {"bytes": 2_000_000, "write_s": [2.0, 1.0, 4.0], "sequential_s": [1.0, 2.0, 8.0], "shuffled_s": [2.0, 2.0, 4.0]}
    assert rates(times) == {"write": 1.0, "sequential": 1.0, "shuffled": 1.0, "share": 1.0}


def test_the_rates_become_files(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--rounds=2", "--records=6", "--tokens=8", "--paths=4", "--hidden=32", f"--out={out}"]
    cache.main([f"--scratch={tmp_path}", *small])
    assert {path.name for path in out.iterdir()} == {"cache.json", "cache.md"}
    record = json.loads((out / "cache.json").read_text())
    assert len(record["shuffled_s"]) == 2 and record["bytes"] > record["tokens"] * 4 * 32 * 2
    text = (out / "cache.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### Rates: 6 records, {record['tokens']} tokens of 4 x 32 bf16 (256 bytes), all in the page cache"
    ]
