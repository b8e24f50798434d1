"""Evaluation by decoding: all methods on every prompt, and a killed one goes on where it was."""

from __future__ import annotations

import json

import pytest
from hydra.utils import instantiate

from src.lit import decoding
from src.lit.agreement import agreement_markdown, agreements
from src.lit.decoding import AR, decode_all, read_rows
from src.lit.methods import make_methods


@pytest.fixture
def config(compose_config, mini_target, tmp_path):
    overrides = [
        f"target.path={mini_target}",
        "benchmarks.per_domain=1",
        "benchmarks.max_new_tokens=8",
        "generate_prompts=1",
        "baseline='MTP (2)'",
        f"out={tmp_path}/out",
        'methods=[{name: "MTP (2)", native_steps: 2}, {name: "MTP (4)", native_steps: 4}]',
    ]
    return compose_config("evaluate", overrides)


def run(config, modes=("non_think",)):
    return decode_all(config, make_methods(config), instantiate(config.target), modes)


def without_times(rows):
    for row in rows:
        row.pop("generate", None)
        for turns in row["methods"].values():
            for turn in turns:
                turn.pop("first_s")
                turn["rounds"] = [r[:4] for r in turn["rounds"]]
    return rows


def test_every_method_decodes_every_prompt_losslessly(config):
    rows = list(read_rows(run(config, ("non_think", "think_high"))))
    assert len(rows) == 2 * 2 * 3 and len({(r["mode"], r["temperature"], r["id"]) for r in rows}) == 12
    for row in rows:
        assert list(row["methods"]) == [AR, "MTP (2)", "MTP (4)"]
        for name, turns in row["methods"].items():
            for turn in turns:
                emitted = sum(r[3] for r in turn["rounds"])
                assert emitted + 1 == len(turn["ids"]) <= 8
                assert all(len(r[1]) <= {AR: 0, "MTP (2)": 2, "MTP (4)": 4}[name] for r in turn["rounds"])
            if row["temperature"] == 0:
                assert [t["ids"] for t in turns] == [t["ids"] for t in row["methods"][AR]] or any("differs" in t for t in turns)
    timed = [row for row in rows if "generate" in row]
    assert {(r["mode"], r["benchmark"]) for r in timed} == {(r["mode"], r["benchmark"]) for r in rows}
    assert len(timed) == 6 and all(row["generate"]["same_text"] for row in timed)


def test_the_report_is_made_from_the_rows(config, tmp_path, monkeypatch):
    config.temperature = [0]
    rows = list(read_rows(run(config)))
    turn = rows[0]["methods"]["MTP (4)"][0]
    turn["differs"] = {"position": 2, "gap": 0.5, "tie": False}
    decoding.report(rows, config, {"MTP (2)": "as shipped", "MTP (4)": "as shipped"})
    out = tmp_path / "out"
    for name in ("paper.md", "paper.json", "table2.csv", "figure1_non_think.png", "cost/cost.md", "cost/cost.png"):
        assert (out / name).stat().st_size > 0
    lossless = (out / "lossless.md").read_text()
    assert "| MTP (2) | 3 |" in lossless and "| 3 | 0 | 0 |" in lossless and "| 2 | 0 | 1 |" in lossless
    assert "5.0e-01 | **differs** |" in lossless and "transformers generate() on 3 of these prompts" in lossless
    cells = decoding.paper_cells(rows, 0, eos_id=-1, run_ids={})
    assert {(c.method, c.benchmark) for c in cells} == {(m, b) for m in rows[0]["methods"] for b in ("math", "code", "chat")}
    for cell in cells:
        mine = [t for r in rows if r["benchmark"] == cell.benchmark for t in r["methods"][cell.method]]
        assert cell.counts.emitted.sum() == sum(len(t["ids"]) - 1 for t in mine)
        assert cell.seconds.sum() == pytest.approx(sum(sum(x[4:]) for t in mine for x in t["rounds"]))


def test_a_killed_evaluation_goes_on(config, monkeypatch, tmp_path):
    whole = without_times(list(read_rows(run(config))))
    path = tmp_path / "out" / "rows.jsonl"
    path.unlink()

    class Killed(Exception):
        pass

    append, count = decoding.Rows.append, []

    def append_three(self, row):
        count.append(row)
        if len(count) == 4:  # the header is one
            with self.path.open("a") as file:
                file.write(json.dumps(row)[:40])
            raise Killed
        append(self, row)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(decoding.Rows, "append", append_three)
        run(config)
    run(config)
    assert without_times(list(read_rows(path))) == whole

    config.seed = 3
    with pytest.raises(ValueError, match="measured with another seed"):
        run(config)


def test_loop_and_replay_agree_and_a_difference_is_seen(config):
    methods = make_methods(config)
    rows = list(read_rows(run(config)))
    target = instantiate(config.target)
    found = agreements(rows, methods, target, config)
    assert [(a.method, a.temperature) for a in found] == [(m, t) for m in ("MTP (2)", "MTP (4)") for t in (0.0, 1.0)]
    for a in found:
        assert a.rounds > 0 and all(d.tie for d in a.differences)
        if a.temperature == 0 and not a.differences:
            assert a.loop_tau == a.replay_tau
        assert a.loop_tau >= 1 and a.replay_tau >= 1 and a.difference.value == pytest.approx(a.loop_tau - a.replay_tau)
    assert "| MTP (4) | 0 |" in agreement_markdown(found)

    greedy = [row for row in rows if row["temperature"] == 0]
    turn = next(t for row in greedy for t in row["methods"]["MTP (2)"] if len(t["rounds"]) > 2)
    first = turn["rounds"][0]
    turn["rounds"][0] = [*first[:2], 0 if first[2] else 1, *first[3:]]
    assert any(a.differences for a in agreements(greedy, methods, target, config))
