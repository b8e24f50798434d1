"""Which rows are taken is a function of what they ask: order, copies and other rows change nothing."""

from __future__ import annotations

import json
import random
import sys
import types
from itertools import islice

import pytest

from hyperdflash.data import selection as selection_module
from hyperdflash.data.selection import asked_hash, select
from hyperdflash.data.sources import read_source
from hyperdflash.data.streamed import StreamedCorpus

THINGS = ("oak", "elm", "fir", "ash", "yew", "box", "bay", "fig")
ROWS = [
    {"conversations": [{"role": "user", "content": f"Tell me of {a} and {b}."}, {"role": "assistant", "content": f"{a}, {b}"}]}
    for a in THINGS
    for b in THINGS
]


def write(path, rows, extra=b""):
    path.write_bytes(extra + "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def chosen(path, tmp_path, seed=0, share=0.25, num_train=20, num_heldout=8):
    found = select(path, "chat", seed, share, num_train=num_train, num_heldout=num_heldout, directory=tmp_path)
    return found, [[c.id for c in side] for side in (found.train, found.heldout)]


def test_shuffled_copied_and_damaged_rows_change_nothing(tmp_path):
    found, (train, heldout) = chosen(write(tmp_path / "a.jsonl", ROWS), tmp_path / "kept")
    assert (len(train), len(heldout)) == (20, 8) and not set(train) & set(heldout)
    assert found.stats.read == 64 == found.stats.taken + found.stats.dropped["on the held-out side"]
    for seed in range(5):
        rng = random.Random(seed)
        rows = rng.sample(ROWS, len(ROWS))
        copies = [json.loads(json.dumps(row).replace("Tell me of", "TELL  me\\tOF")) for row in rng.sample(ROWS, 9)]
        rows = [*copies, *rows] if seed % 2 else [*rows, *copies]
        other, sides = chosen(write(tmp_path / f"{seed}.jsonl", rows, b"\xff\n[]\n"), tmp_path / "kept")
        assert [len(side) for side in sides] == [20, 8]
        asked = [[asked_hash(c) for c in one.train] for one in (found, other)]
        assert asked[0] == asked[1]
        assert other.stats.dropped["asks the same as another row"] == 9
    # of rows that ask the same the one with the lowest id stays, wherever it stands
    pair = [ROWS[0], {"instruction": "tell me of oak and OAK.", "output": "other"}]
    one, two = (chosen(write(tmp_path / f"p{i}.jsonl", rows), tmp_path)[1] for i, rows in enumerate((pair, pair[::-1])))
    assert one == two and sum(map(len, one)) == 1


def test_a_rows_side_depends_on_no_other_row(tmp_path):
    _, (_, heldout) = chosen(write(tmp_path / "all.jsonl", ROWS), tmp_path, num_train=99, num_heldout=99)
    for index in range(0, 64, 9):
        _, (_, alone) = chosen(write(tmp_path / f"{index}.jsonl", ROWS[index : index + 1]), tmp_path)
        assert set(alone) <= set(heldout) and bool(alone) == any(i in heldout for i in alone)
    _, sides = chosen(write(tmp_path / "half.jsonl", ROWS[::2]), tmp_path, num_train=99, num_heldout=99)
    assert set(sides[1]) < set(heldout) and not set(sides[0]) & set(heldout)


def test_a_bigger_number_takes_the_same_rows_and_more_and_another_seed_others(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS)
    _, (ten, _) = chosen(path, tmp_path, num_train=10)
    _, (twenty, _) = chosen(path, tmp_path, num_train=20)
    assert twenty[:10] == ten and len(twenty) == 20
    monkeypatch.setattr(selection_module, "read_source", lambda *_: pytest.fail("the source was read again"))
    assert chosen(path, tmp_path, num_train=15)[1][0] == twenty
    monkeypatch.undo()
    _, (other, _) = chosen(path, tmp_path, seed=1)
    assert set(other) != set(twenty)


def test_rows_that_ask_the_same_are_on_one_side(tmp_path):
    """However they are spelled: \u00b2 is a 2 for one who looks for equal questions, so it must be for the side as well."""

    spelled = [("x\u00b2 %s", "x2 %s"), ("Stra\u00dfe %s", "STRASSE %s"), ("\uff21 %s", "a %s"), ("\u2460 %s", "1 %s")]
    for one, two in spelled:
        rows = [{"instruction": text % name, "output": "y"} for name in THINGS for text in (one, two)]
        path = write(tmp_path / "pairs.jsonl", rows)
        found, (train, heldout) = chosen(path, tmp_path, share=0.5)
        assert len(train) + len(heldout) == len(THINGS) and train and heldout
        assert found.stats.dropped["asks the same as another row"] == len(THINGS)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda kept: b"\x00" * 20 + kept[20:], "Error: "),
        (lambda kept: b"", "JSONDecodeError: "),
        (lambda kept: b"{}" + kept[kept.index(b"\n") :], "KeyError: "),
        (lambda kept: kept.replace(b'{"id"', b'{"i\xff"', 1), "Error: "),
        (lambda kept: kept[: kept.index(b"\n") + 1], "0 rows, wanted 28"),
        (lambda kept: kept[: kept.rindex(b'{"id"')], "27 rows, wanted 28"),
    ],
)
def test_a_damaged_selection_is_named_and_made_again(tmp_path, damage, fault, caplog):
    source = write(tmp_path / "rows.jsonl", ROWS)
    _, sides = chosen(source, tmp_path / "kept")
    (path,) = (tmp_path / "kept").glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert chosen(source, tmp_path / "kept")[1] == sides and path.read_bytes() == whole
    assert f"the selection {path} is damaged (" in caplog.text and fault in caplog.text


def test_a_changed_file_is_read_again_and_a_broken_reading_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS[:40])
    kept = tmp_path / "kept"
    assert len(chosen(path, kept, num_train=99)[1][0]) < 40
    write(path, ROWS)
    assert len(chosen(path, kept, num_train=99)[1][0]) > 40

    def breaks_off(source, domain, stats):
        yield from islice(read_source(source, domain, stats), 7)
        raise ValueError("gone")

    before = sorted(kept.glob("*.jsonl"))
    write(path, ROWS[:50])
    monkeypatch.setattr(selection_module, "read_source", breaks_off)
    with pytest.raises(ValueError, match="gone"):
        chosen(path, kept)
    assert sorted(kept.glob("*.jsonl")) == before and not list(kept.glob("*.partial"))


def corpus(tmp_path, stage1, stage2=(), stage=1, **changed) -> StreamedCorpus:
    fields = dict(stage=stage, stage1=stage1, stage2=stage2, validation=4, responses="original", temperature=0.0, top_p=1.0)
    fields |= dict(max_new_tokens=8, max_length=64, decontaminate=False, benchmarks_path=None, seed=0, heldout=0.25)
    return StreamedCorpus(**(fields | dict(directory=tmp_path / "kept") | changed))


def test_a_second_source_fills_the_stage_with_rows_the_first_stage_did_not_see(tmp_path):
    chat, code = write(tmp_path / "chat.jsonl", ROWS), tmp_path / "code.jsonl"
    write(code, [{"instruction": f"code {a} for {b}", "output": "x"} for a in THINGS for b in "xy"] + ROWS[:3])
    stages = dict(
        stage1=[{"source": str(chat), "domain": "chat", "count": 20}],
        stage2=[
            {"source": str(code), "domain": "code", "count": 500},
            {"source": str(chat), "domain": "chat", "skip": 20, "count": 14},
        ],
    )
    first, second = corpus(tmp_path, **stages), corpus(tmp_path, stage=2, **stages)
    alone = len(corpus(tmp_path, stages["stage1"], stages["stage2"][:1], stage=2).train())
    one, two = first.train(), second.train()
    twice = second.row_stats[1].dropped["asks the same as another row"]  # rows of both sources, which nothing replaces
    assert len(one) == 20 and 0 < twice < 4 and len(two) == alone + 14 - twice
    assert not {asked_hash(c) for c in one} & {asked_hash(c) for c in two if c.domain == "chat"}
    assert two != sorted(two, key=lambda c: c.domain)  # sources are mixed
    assert two == corpus(tmp_path, stage=2, **stages).train()
    for stats, source in zip(second.row_stats, (code, chat), strict=True):
        assert stats.source == str(source) and stats.read == stats.taken + stats.dropped.total()
    assert sum(stats.taken for stats in second.row_stats) == len(two)
    held = {asked_hash(c) for made in (first, second) for c in made.validation_conversations()}
    assert held and not held & {asked_hash(c) for c in [*one, *two]}


def test_the_hub_is_streamed_once_for_both_stages(tmp_path, monkeypatch):
    opened = []

    def load_dataset(name, **_):
        opened.append(name)
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    hub = "zhaode/EagleChat"
    stages = dict(stage1=[{"source": hub, "count": 20}], stage2=[{"source": hub, "skip": 20, "count": 10}])
    for stage in (1, 2):
        made = corpus(tmp_path, stage=stage, **stages)
        assert len(made.train()) == (20, 10)[stage - 1] and len(made.validation_conversations()) == 4
    assert opened == [hub]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"heldout": 0.0}, r"no held-out row at corpus\.heldout=0\.0, .*: raise it"),
        ({"skip": 90}, r"none of them behind skip=90: give a smaller skip"),
        ({"stage1": 48}, r"corpus\.stage1 must be a mixture as in conf/corpus, .* got 48"),
        ({"stage2": {"chat": 5}}, r"corpus\.stage2 has an entry 'chat'; wanted source and count"),
        ({"count": 0}, r"count of .* must be a positive integer, got 0"),
        ({"fill_to": 5}, r"wanted source and count, with skip"),
        ({"weight": 1}, r"an entry with count, domain, source, weight"),
        ({"responses": "server:"}, r"corpus\.responses must be target or original or server:NAME, got 'server:'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changed, sentence):
    entry = {"source": str(write(tmp_path / "rows.jsonl", ROWS)), "domain": "chat", "count": 5}
    entry |= {name: value for name, value in changed.items() if name in ("skip", "count", "fill_to", "weight")}
    changed = {name: value for name, value in changed.items() if name not in entry}
    with pytest.raises(ValueError, match=sentence):
        made = corpus(tmp_path, changed.pop("stage1", [entry]), **changed)
        made.train()
        made.validation_conversations()


def test_a_source_without_a_training_row_says_why_with_its_columns(tmp_path):
    unknown = write(tmp_path / "unknown.jsonl", [{"text": "x", "label": 1}] * 3)
    made = corpus(tmp_path, [{"source": str(unknown), "domain": "chat", "count": 5}])
    sentence = r"no training row among 3 \(3 no known fields: .*\): it has the columns text, label, wanted one of messages, "
    with pytest.raises(ValueError, match=sentence):
        made.train()
