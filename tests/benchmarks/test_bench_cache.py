"""The cache's benchmark at sizes that take seconds: every part becomes a table."""

from __future__ import annotations

import json

import pytest

from benchmarks import cache
from benchmarks.cache import rates


def test_rates_are_medians_and_shares_are_paired():
    times = {"bytes": 2_000_000, "write_s": [2.0, 1.0, 4.0], "sequential_s": [1.0, 2.0, 8.0], "shuffled_s": [2.0, 2.0, 4.0]}
    assert rates(times) == {"write": 1.0, "sequential": 1.0, "shuffled": 1.0, "share": 1.0}


def test_the_parts_become_files(tmp_path, capsys, mini_target):
    out = tmp_path / "out"
    small = ["--rounds=2", "--records=6", "--tokens=8", "--paths=4", "--hidden=32", "--prompts=1", f"--out={out}"]
    cache.main(["rates", f"--scratch={tmp_path}", *small])
    cache.main(["codecs", f"--target={mini_target}", *small])  # leaves the first part as it is
    assert {path.name for path in out.iterdir()} == {"cache.json", "cache.md"}
    record = json.loads((out / "cache.json").read_text())
    assert set(record) == {"rates", "codecs"} and len(record["rates"]["shuffled_s"]) == 2
    assert record["rates"]["bytes"] > record["rates"]["tokens"] * 4 * 32 * 2
    text = (out / "cache.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### Rates: 6 records, {record['rates']['tokens']} tokens of 4 x 32 bf16 (256 bytes), all in the page cache",
        "### Codecs",
    ]
    errors = record["codecs"]["errors"]
    assert errors["fp32"]["states"] == 0 and errors["fp32"]["kl_mean_pool"] == 0 and errors["fp32"]["same_top"] == 1
    assert 0 < errors["bf16"]["states"] < 2**-8 < errors["fp8"]["states"] < 2**-4
    assert 0 < errors["bf16"]["kl_mean_pool"] < errors["fp8"]["kl_mean_pool"] < 0.1


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        cache.main(["speed"])
    assert "no part speed: there are rates, codecs" in capsys.readouterr().err
