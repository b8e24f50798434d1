"""Evaluation by decoding: all methods on every prompt, and a killed one goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch
from hydra.utils import instantiate

from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.decoding.loop import decode
from hyperdflash.drafting.proposer import Autoregressive
from hyperdflash.evaluation.conversations import Rows, converse
from hyperdflash.evaluation.decoding import (
    AR,
    compare_texts,
    decode_all,
    decoded_samples,
    evaluate_by_decoding,
    lossless_markdown,
    report,
    turn_row,
)
from hyperdflash.evaluation.methods import make_methods
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.sampling import Sampler, generator_for


@pytest.fixture
def config(compose_config, mini_target, tmp_path):
    overrides = [
        f"target.path={mini_target}",
        "benchmarks.per_domain=1",
        "benchmarks.max_new_tokens=8",
        f"out={tmp_path}/out",
        'methods=[{name: "MTP (2)", native_steps: 2}, {name: "MTP (4)", native_steps: 4}]',
    ]
    return compose_config("evaluate", overrides)


def run(config, modes=("non_think",)):
    config.mode = list(modes)
    return decode_all(config, make_methods(config), instantiate(config.target), load_tokenizer(config.target.path))


def without_times(rows):
    for row in rows:
        for turns in row["methods"].values():
            for turn in turns:
                turn.pop("first_s")
                turn["rounds"] = [r[:4] for r in turn["rounds"]]
    return rows


def test_every_method_decodes_every_prompt_losslessly(config):
    rows = run(config, ("non_think", "think_high"))
    assert len(rows) == 2 * 2 * 3 and len({(r["mode"], r["temperature"], r["id"]) for r in rows}) == 12
    for row in rows:
        assert list(row["methods"]) == [AR, "MTP (2)", "MTP (4)"]
        for name, turns in row["methods"].items():
            for turn in turns:
                emitted = sum(r[3] for r in turn["rounds"])
                assert emitted + 1 == len(turn["ids"]) <= 8
                assert all(len(r[1]) <= {AR: 0, "MTP (2)": 2, "MTP (4)": 4}[name] for r in turn["rounds"])
            if row["temperature"] == 0:
                parted = next((i for i, t in enumerate(turns) if "differs" in t), len(turns))
                assert [t["ids"] for t in turns[:parted]] == [t["ids"] for t in row["methods"][AR]][:parted]
                assert all(t["differs"]["tie"] for t in turns[parted : parted + 1])
                assert parted < len(turns) or len(turns) == len(row["methods"][AR])


def test_the_report_is_made_from_the_rows(config, tmp_path, monkeypatch):
    config.temperature = [0]
    rows = run(config)
    turn = rows[0]["methods"]["MTP (4)"][0]
    turn["differs"] = {"position": 2, "gap": 0.5, "tie": False}
    run_ids = {"MTP (2)": "as shipped", "MTP (4)": "as shipped"}
    report(rows, config, run_ids, "0123456789abcdef", eos_id=-1)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["target"]["fingerprint"] == "0123456789abcdef"
    out = tmp_path / "out"
    for name in ("paper.md", "paper.csv", "figure1_non_think.png"):
        assert (out / name).stat().st_size > 0
    lossless = (out / "lossless.md").read_text()
    assert "| MTP (2) | 3 |" in lossless and "| 3 | 0 | 0 | 0 |" in lossless and "| 2 | 0 | 1 | 0 |" in lossless
    assert "5.0e-01 | **differs** |" in lossless
    samples = decoded_samples(rows, eos_id=-1, run_ids={})
    assert [s.method for s in samples] == list(rows[0]["methods"])
    for sample in samples:
        assert sample.groups == tuple(row["benchmark"] for row in rows) and set(sample.groups) == {"math", "code", "chat"}
        for row, emitted, seconds in zip(rows, sample.counts.emitted, sample.seconds, strict=True):
            turns = row["methods"][sample.method]
            assert emitted == sum(len(t["ids"]) - 1 for t in turns)
            assert seconds == pytest.approx(sum(sum(x[4:]) for t in turns for x in t["rounds"]))


def test_a_rule_that_ends_drafts_has_a_row_of_its_own(config, tmp_path):
    """Its text is AR's too; evaluation.json counts how many drafts were verified."""
    config.temperature, config.stop = [0], [0, 0.02]
    rows = run(config)
    names = [AR, "MTP (2)", "MTP (2), stop 0.02", "MTP (4)", "MTP (4), stop 0.02"]
    assert list(rows[0]["methods"]) == names
    for row in rows:
        texts = {name: [turn["ids"] for turn in turns] for name, turns in row["methods"].items()}
        assert texts["MTP (4), stop 0.02"] == texts[AR] or "differs" in str(row["methods"]["MTP (4), stop 0.02"])
    report(rows, config, dict.fromkeys(names[1:], "as shipped"), "0123456789abcdef", eos_id=-1)
    drafted = json.loads((tmp_path / "out" / "evaluation.json").read_text())["drafted"]
    assert set(drafted["MTP (4)"]) <= set("1234") and sum(drafted["MTP (4)"].values()) > 0
    mean = {name: sum(int(n) * count for n, count in drafted[name].items()) / sum(drafted[name].values()) for name in names[3:]}
    assert mean["MTP (4), stop 0.02"] < mean["MTP (4)"]
    for wrong, sentence in ((0.3, "stop must be a list"), ([2], r"stop must be in \[0, 1\]")):
        config.stop = wrong
        with pytest.raises(ValueError, match=sentence):
            evaluate_by_decoding(config)


def test_turns_after_a_difference_are_not_called_the_same(config, monkeypatch):
    """Three turns, the second made to differ: one is AR's, one differs, one is not compared."""
    target = instantiate(config.target)

    def answer(prompt_ids, number):
        """The target's own next token, which ends the answer, so that turns follow."""
        sampler = Sampler(0.0, 1.0, generator_for(f":{number}", target.model.device))
        every = set(range(target.model.config.vocab_size))
        settings = {"stop_ids": every, "max_new_tokens": 3, "sampler": sampler}
        return turn_row(prompt_ids, decode(target.model, Autoregressive(), prompt_ids, **settings))

    turns = converse(answer, [[5, 6, 7]] * 3, load_tokenizer(config.target.path), "non_think")
    assert len(turns) == 3
    changed = [{**turn, "ids": [(turn["ids"][0] + 1) % 100]} if i else dict(turn) for i, turn in enumerate(turns)]
    rows = {AR: turns, "other": changed}
    compare_texts(target.model, rows)
    assert [("differs" in t, t.get("compared", True)) for t in rows["other"]] == [(False, True), (True, True), (False, False)]
    assert not any("differs" in t or "compared" in t for t in rows[AR])
    differs = rows["other"][1]["differs"]
    text = lossless_markdown([{"id": "a", "mode": "non_think", "methods": rows}])
    assert f"| other | 3 | 3 | 1 | {differs['tie']:d} | {not differs['tie']:d} | 1 |" in text and "another one" in text


def test_a_killed_evaluation_goes_on(config, monkeypatch, tmp_path):
    whole = without_times(run(config))
    path = tmp_path / "out" / "rows.jsonl"
    path.unlink()

    class Killed(Exception):
        pass

    write, count = Rows.write, []

    def write_three(self, row):
        count.append(row)
        if len(count) == 3:
            with self.path.open("a") as file:
                file.write(json.dumps(row)[:40])
            raise Killed
        write(self, row)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Rows, "write", write_three)
        run(config)
    assert without_times(run(config)) == whole
    assert without_times([json.loads(line) for line in path.read_text().splitlines()[1:]]) == whole

    config.seed = 3
    with pytest.raises(ValueError, match="measured with another seed"):
        run(config)
    config.seed = 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.raises(ValueError, match="measured with another threads"):
        run(config)


@pytest.mark.parametrize("dtype", list(CODECS))
def test_the_loop_rounds_states_as_the_cache_does(dtype, config):
    config.cache.dtype = dtype
    method, heads = make_methods(config)[0], instantiate(config.target).heads
    assert method.loop_drafter(config, heads).codec is CODECS[dtype]
    module = method.drafter(config, heads)
    assert method.loop_drafter(config, heads, module).block is module.block


def test_a_method_without_a_run_names_the_command_that_trains_it(compose_config, mini_target):
    given = ['training="corpus.validation=3 blocks.num_anchors=4 experiment=stage1"', f"target.path={mini_target}"]
    with pytest.raises(ValueError) as caught:
        make_methods(compose_config("evaluate", ["methods=[dflash]", *given]))
    command = "python -m src.train method=dflash corpus.validation=3 blocks.num_anchors=4 experiment=stage1"
    assert f"`{command}`" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'nobody' is neither a run's directory nor a method; methods are best, dflash, "):
        make_methods(compose_config("evaluate", ["methods=[nobody]"]))
