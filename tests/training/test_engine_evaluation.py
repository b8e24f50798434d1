"""AR and native MTP through running servers: the rounds are those of our own loop, and the tables come out."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.engines.serving import ask, counters
from hyperdflash.evaluation import engine_evaluation
from hyperdflash.evaluation.engine_evaluation import evaluate_in_engine, prompt_counts
from hyperdflash.targets.load import load_target
from tests.targets.engine_server import SGLangServer, VLLMServer


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture(params=["sglang", "vllm"])
def kind(request):
    return request.param


@pytest.fixture
def servers(kind, target, mini_target, tmp_path):
    """AR and MTP (2) of the same tiny target."""
    stop = (special_ids(load_tokenizer(mini_target)).eos,)
    make = SGLangServer if kind == "sglang" else lambda *a, **k: VLLMServer(*a, folder=tmp_path, **k)
    drafter = MTPChain(target.mtp, 2).eval().proposer(target.heads)
    with make(target, stop_ids=stop) as plain, make(target, drafter=drafter, stop_ids=stop) as mtp:
        yield {"AR": plain, "MTP2": mtp}


@pytest.fixture
def config(kind, compose_config, mini_target, tmp_path):
    def make(servers: dict, *more):
        urls = ",".join(f"{name}:{getattr(server, 'url', server)}" for name, server in servers.items())
        return compose_config(
            "evaluate",
            [
                f"engine={kind}",
                f"engine.servers={{{urls}}}",
                f"target.path={mini_target}",
                f"out={tmp_path}/out",
                "benchmarks.per_domain=1",
                "benchmarks.max_new_tokens=8",
                "temperature=[0]",
                "num_resamples=20",
                *more,
            ],
        )

    return make


def rows_in(out: Path) -> list[dict]:
    _, *rows = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    return rows


def test_the_tables_of_a_served_target(config, servers, tmp_path):
    evaluate_in_engine(config(servers))
    out = tmp_path / "out"
    rows = rows_in(out)
    assert len(rows) == 3
    for row in rows:
        for plain, drafted in zip(row["methods"]["AR"], row["methods"]["MTP (2)"], strict=True):
            assert drafted["ids"] == plain["ids"] and plain["rounds"] == 0 and plain["survived"] == []
            emitted = len(drafted["ids"]) - 1
            assert drafted["after_first"] == emitted and drafted["rounds"] > 0 and len(drafted["survived"]) == 2
            # a round gains its accepted drafts and one more token, less what the end of the text cuts off
            assert 0 <= drafted["rounds"] + drafted["accepted"] - emitted <= 1
            assert drafted["accepted"] == sum(drafted["survived"]) and drafted["decode_s"] > 0 < drafted["first_s"]
    table = (out / "paper.md").read_text()
    assert "| MTP (2) |" in table and "batch size 1" in table and (out / "figure1_non_think.png").stat().st_size
    engine = (out / "engine.md").read_text()
    total = sum(len(row["methods"]["MTP (2)"]) for row in rows)
    assert f"| {total} of {total} |" in engine and "| AR | 0 |" in engine
    assert "docs/serving.md says which engine serves which drafter" in engine
    assert list(json.loads((out / "evaluation.json").read_text())["servers"]) == ["AR", "MTP (2)"]
    assert "| MTP (2) | 0 | engine |" in engine and "| replay |" not in engine
    record = csv.DictReader((out / "paper.csv").read_text().splitlines())
    turns = [turn for row in rows for turn in row["methods"]["MTP (2)"] if row["benchmark"] == "math"]
    tau = sum(t["after_first"] for t in turns) / sum(t["rounds"] for t in turns)
    place = {"method": "MTP (2)", "group": "math", "metric": "tau"}
    assert [float(row["value"]) for row in record if place.items() <= row.items()] == pytest.approx([tau], abs=1e-6)
    asked = len(servers["AR"].bodies)
    place = {"method": "MTP (2)", "group": "mean", "temperature": 0.0}
    replayed = [place | {"metric": "tau", "slot": None, "value": 1.25}, place | {"metric": "survival", "slot": 1, "value": 0.2}]
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": replayed}))
    evaluate_in_engine(config(servers, f"engine.replay={tmp_path}"))  # all rows are there: nothing is asked again
    assert len(servers["AR"].bodies) == asked
    assert re.search(r"\| MTP \(2\) \| 0 \| replay \| 1\.250 \| 0\.200 \| \S+ \|", (out / "engine.md").read_text())
    with pytest.raises(ValueError, match="by=replay out="):
        evaluate_in_engine(config(servers, f"engine.replay={tmp_path}/none"))


def test_a_broken_evaluation_goes_on(config, servers, kind, tmp_path):
    if kind == "vllm":
        pytest.skip("the same code")
    servers["MTP2"].faults = [None] * 3 + ["500"]
    with pytest.raises(ValueError, match="HTTP 500"):
        evaluate_in_engine(config(servers))
    done = len(rows_in(tmp_path / "out"))
    assert 0 < done < 3
    evaluate_in_engine(config(servers))
    assert len(rows_in(tmp_path / "out")) == 3


def test_a_server_must_run_what_it_is_named_for(config, servers):
    plain, drafting = servers["AR"], servers["MTP2"]
    for named, sentence in [
        ({"AR": drafting}, "was named AR but drafts"),
        ({"AR": plain, "MTP2": plain}, "drafts nothing"),
        ({"AR": plain, "MTP6": drafting}, r"named MTP \(6\) but drafts 2 tokens per round"),
        ({"MTP2": drafting}, "has no AR"),
        ({"AR": plain, "HyperDFlash": drafting}, "by its method and drafts per round, as MTP3 or HyperDFlash6"),
        ({"AR": plain, "HyperDFlash6": drafting}, r"named HyperDFlash \(6\) but drafts 2 tokens per round"),
        ({"AR": "localhost"}, "must be a URL"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            evaluate_in_engine(config(named))


def test_a_server_without_a_histogram_is_refused(config, servers, kind):
    if kind == "vllm":
        pytest.skip("vLLM counts by position")
    servers["MTP2"].histogram = False
    with pytest.raises(ValueError, match="drafts and reports no spec_accept_histogram: use an SGLang that"):
        evaluate_in_engine(config(servers))


def test_vllm_counters_are_read_as_they_are_written(target, tmp_path, monkeypatch, kind):
    if kind == "sglang":
        pytest.skip("vLLM's")
    drafter = MTPChain(target.mtp, 2).eval().proposer(target.heads)
    with VLLMServer(target, folder=tmp_path, drafter=drafter) as server:
        assert counters(server.url, 5) == {"drafts": 0, "accepted": [0, 0]}
        server.drafts, server.accepted = 7, [5, 3]
        assert counters(server.url, 5) == {"drafts": 7, "accepted": [5, 3]}  # not the _created time stamps
        stream = server.stream

        def beside_others(body):
            yield from stream(body)
            server.drafts += 40

        sampling = {"max_new_tokens": 6, "stop_ids": (), "temperature": 0, "top_p": 1.0, "seed": 0}
        assert ask("vllm", server.url, [1, 2, 3], 5, **sampling).rounds > 0
        monkeypatch.setattr(server, "stream", beside_others)
        with pytest.raises(ValueError, match="another client uses it"):
            ask("vllm", server.url, [1, 2, 3], 5, **sampling)


def test_counts_of_a_prompt_by_hand():
    def turn(after_first, rounds, accepted, survived):
        return {"after_first": after_first, "rounds": rounds, "accepted": accepted, "survived": survived}

    counts = prompt_counts([[turn(5, 2, 3, [2, 1, 0]), turn(4, 3, 1, [1, 0, 0])], [turn(1, 1, 0, [0, 0, 0])]], 3)
    assert counts.emitted.tolist() == [9, 1] and counts.rounds.tolist() == [5, 1] and counts.accepted.tolist() == [4, 0]
    assert counts.survived.tolist() == [[3, 1, 0], [0, 0, 0]]
    assert counts.reached.tolist() == [[5, 3, 1], [1, 0, 0]]
    plain = prompt_counts([[turn(5, 0, 0, [])]], 0)
    assert plain.rounds.tolist() == [5] and plain.num_slots == 0


def test_seeds_name_the_request():
    seeds = {engine_evaluation.seed_of(f"0:non_think:1.0:{p}:{m}:{n}") for p in "ab" for m in ("AR", "MTP") for n in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
