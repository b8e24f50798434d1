"""Generation from Python and from the command line's configuration, on a random target."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import torch
from hydra.errors import CompactHydraException
from rich.console import Console

from hyperdflash import commands
from hyperdflash.commands import quoted
from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_prompt
from hyperdflash.decoding.loop import FirstToken, Round, Seconds
from hyperdflash.drafting.mtp_proposer import MTPProposer
from hyperdflash.drafting.proposer import BlockProposer
from hyperdflash.generation import job as module
from hyperdflash.generation.api import TextStream, generate, generate_stream, load_drafter, tokenizer_of
from hyperdflash.generation.job import RoundPrinter, answer_prompt, chat
from hyperdflash.identity import decided_by
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.load import Target, load_target

HI = ["prompt=Hi", "threads=1"]


@pytest.fixture(scope="module")
def target(mini_target) -> Target:
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


def test_every_drafter_gives_the_same_greedy_answer(target):
    prompt = [0, 2, *range(40, 70)]
    plain = generate(target, load_drafter("ar", target), prompt, max_new_tokens=10)
    drafted = generate(target, load_drafter("mtp", target, num_slots=3), prompt, max_new_tokens=10)
    assert drafted.text == plain.text and drafted.generation.token_ids == plain.generation.token_ids
    assert len(plain.generation.rounds) == 9 and plain.generation.ended_by == "length"
    assert {len(r.drafted) for r in drafted.generation.rounds[:-3]} == {3}


def test_a_stream_is_the_answer_in_pieces(target):
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    drafter = load_drafter("mtp", target)
    pieces = list(generate_stream(target, drafter, "Say it.", **settings))
    answer = generate(target, drafter, "Say it.", **settings)
    assert isinstance(pieces[0].event, FirstToken) and len(pieces) == 1 + len(answer.generation.rounds)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert answer.text == tokenizer_of(target.path).decode(answer.generation.token_ids, skip_special_tokens=True)
    other = generate(target, drafter, "Say it.", **{**settings, "seed": 4})
    assert other.generation.token_ids != answer.generation.token_ids


def test_a_prompt_is_a_string_a_conversation_or_ids(target):
    drafter = load_drafter("ar", target)
    conversation = Conversation("prompt", "chat", (Turn("user", "Count."),))
    ids = encode_prompt(conversation, tokenizer_of(target.path))
    texts = {generate(target, drafter, prompt, max_new_tokens=8).text for prompt in ("Count.", conversation, ids)}
    assert len(texts) == 1
    assert len(generate(target, drafter, [5], max_new_tokens=3).generation.token_ids) <= 3


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [(["drafter.num_layers=1"], BlockProposer), (["drafter=mtp", "drafter.num_slots=2", "kl=off"], MTPProposer)],
)
def test_a_finished_run_drafts(overrides, kind, target, compose_config, mini_overrides, tmp_path):
    from hyperdflash.identity import train_run_dir
    from hyperdflash.training.job import train
    from hyperdflash.training.run_index import finished_run

    small = ["trainer.max_epochs=1", "corpus.max_new_tokens=12", "blocks.num_anchors=2"]
    training = compose_config("train", [*mini_overrides, *small, *overrides])
    train(training)
    run = train_run_dir(training)
    drafter = load_drafter(run, target)
    assert isinstance(drafter, kind) and drafter.codec is CODECS["bf16"]
    weights = torch.load(finished_run(run).best_checkpoint, weights_only=True)["state_dict"]
    held = drafter.block if kind is MTPProposer else drafter.drafter
    prefix = "drafter.block." if kind is MTPProposer else "drafter."
    assert all(torch.equal(value, weights[prefix + name]) for name, value in held.state_dict().items())
    assert generate(target, drafter, "Say it.", max_new_tokens=8).text
    if kind is BlockProposer:
        config = compose_config(
            "generate", [f"target.path={target.path}", "prompt=Hi", "drafted_by=hyperdflash", "max_new_tokens=4"]
        )
        shown = io.StringIO()
        answer_prompt(config, Console(file=shown))
        assert str(run) in shown.getvalue()


def test_the_newest_run_is_the_papers_method_and_no_variant_of_it(target, compose_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    variants = {"own": [], "mean": ["reducer=mean"], "random": ["reducer.init=random"], "mtp": ["method=mtp_finetuned"]}
    variants["layers"] = ["conditioning=layers", "conditioning.layer_ids=[0,2]", "reducer=fc"]
    variants |= {"head": ["head=correction"], "lead": ["lead=mtp"], "inputs": ["inputs=pairs"], "best": ["method=best"]}
    for number, (name, overrides) in enumerate(variants.items()):
        result = tmp_path / "train" / name / "result.json"
        result.parent.mkdir(parents=True)
        decided = decided_by(compose_config("train", [f"target.path={target.path}", *overrides]))
        result.write_text(json.dumps({"target": target.fingerprint, "decided_by": decided}))
        os.utime(result, (number, number))
    for method, name in {"hyperdflash": "own", "best": "best", "mtp_finetuned": "mtp"}.items():
        assert module.newest_run(target, method).name == name
        assert f"method={method}: takes {tmp_path / 'train' / name}, the newest " in capsys.readouterr().out
        (tmp_path / "train" / name / "result.json").unlink()
        with pytest.raises(ValueError, match="no finished run on this target"):
            module.newest_run(target, method)


def test_a_prompt_of_ids_fits_the_context_with_its_answer(target):
    with pytest.raises(ValueError, match=r"2,045 tokens and max_new_tokens=4 .* give max_new_tokens=3"):
        generate(target, load_drafter("ar", target), [9] * 2045, max_new_tokens=4)


def test_an_unfinished_run_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="is not a finished run"):
        load_drafter(tmp_path, target)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["drafted_by=dflash"], r"method=dflash has no finished run on this target .* run `python -m src\.train method=dflash"),
        (["drafted_by=nobody"], "'nobody' is neither a run's directory nor a method; methods are best, dflash, "),
        (["drafted_by=ar", "run=x"], "run=x brings its own drafter"),
        (["drafted_by=hyperdflash"], "no finished run on this target"),
        (["max_new_tokens=0"], "max_new_tokens must be a positive integer"),
        (["temperature=-1"], "temperature must be 0"),
        (["max_new_tokens=2046"], r"exceed the target's context of 2,048: give max_new_tokens=20\d\d"),
        ([f"prompt={'many words ' * 4000}"], "exceed the target's context of 2,048: give a shorter prompt"),
        (["prompt='\udcff'"], r"user turn .* is not UTF-8"),
        (["mode=loud"], "chat mode must be non_think or think_high"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(overrides, sentence, target, compose_config):
    config = compose_config("generate", [*HI, f"target.path={target.path}", *overrides])
    with pytest.raises(CompactHydraException, match=sentence):
        commands.answer(config)


def test_a_command_without_a_prompt_asks_for_one(compose_config, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(CompactHydraException, match=r"^error: there is no prompt: give one, as in prompt='"):
        commands.answer(compose_config("generate", []))


def test_the_command_prints_the_answer_and_the_summary(target, compose_config):
    config = compose_config("generate", [*HI, f"target.path={target.path}", "max_new_tokens=8", "show_rejected=false"])
    shown = io.StringIO()
    answer = answer_prompt(config, Console(file=shown, width=40))
    first, legend, *body, last = shown.getvalue().rstrip("\n").split("\n")
    assert first == f"target {target.path}, drafter mtp, temperature 0"
    assert legend.split("  ")[:3] == ["[accepted draft]", "{-rejected draft-}", "the target's own"]
    assert "\n".join(body).replace("[", "").replace("]", "") == answer.text.replace("[", "").replace("]", "")
    assert last.startswith("8 tokens, ended by the limit · tau ") and last.endswith(" ms")
    seconds = answer.generation.seconds
    speedup = answer.generation.tau * seconds.verify / (seconds.draft + seconds.verify + seconds.rest)
    assert f" {speedup:.2f} times as fast as" in last


def test_a_chat_remembers_its_turns_changes_the_drafter_and_survives_mistakes(target, compose_config, tmp_path):
    lines = ["Hi", "", "/drafter ar", "And then?", f"/drafter {tmp_path}/none", "/what", "word " * 3000]
    asked, shown = [], io.StringIO()

    def ask(prompt: str) -> str:
        asked.append(prompt)
        if not lines:
            raise EOFError
        return lines.pop(0)

    config = compose_config("generate", [f"target.path={target.path}", "threads=1", "max_new_tokens=8"])
    turns = chat(config, Console(file=shown, width=200), ask)
    first = generate(target, load_drafter("mtp", target), "Hi", max_new_tokens=8)
    asked_then = (Turn("user", "Hi"), Turn("assistant", first.text), Turn("user", "And then?"))
    second = generate(target, load_drafter("ar", target), Conversation("c", "chat", asked_then), max_new_tokens=8)
    assert turns == [*asked_then, Turn("assistant", second.text)]
    rounds = first.generation.rounds + second.generation.rounds
    assert asked[0] == "> " and asked[-1] == f"tau {sum(len(one.emitted) for one in rounds) / len(rounds):.2f} > "
    text = shown.getvalue()
    assert text.count("accepted draft") == 1 and "drafter ar, temperature 0" in text
    assert [line.split(":")[0] for line in text.splitlines() if "error" in line or "no command" in line] == [
        "error",
        "/what is no command",
        "error",
    ]


def test_a_chat_forgets_and_ends(target, compose_config):
    lines = iter(["Hi", "/new", "/quit", "never asked"])
    config = compose_config("generate", [f"target.path={target.path}", "threads=1", "max_new_tokens=4", "system=Be brief."])
    assert chat(config, Console(file=io.StringIO()), lambda _: next(lines)) == [Turn("system", "Be brief.")]
    assert next(lines) == "never asked"


PROMPTS = [
    "plain words",
    "commas, (brackets) [1, 2] {a: b}: and = signs",
    "it's \"quoted\" and 'so' on",
    "a back\\slash, two \\\\ and before a quote \\' and last \\",
    "${not.an.interpolation} $5",
    "two\nlines, it has",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_reaches_the_command_as_it_was_typed(prompt, monkeypatch, compose_config):
    seen = []
    monkeypatch.setattr(sys, "argv", ["generate", f"prompt={prompt}", "seed=1", "method=ar"])
    monkeypatch.setattr(commands, "answer", lambda: seen.extend(sys.argv[1:]))
    commands.generate()
    config = compose_config("generate", seen)
    assert config.prompt == prompt and config.seed == 1 and config.drafted_by == "ar"


def test_quoted_text_stays_as_it_is():
    for argument in ("prompt='a, b'", 'prompt="a"', "seed=1", "system=null", "--help"):
        assert quoted(argument) == argument


ROUND = Round(4, (20, 21, 22), 1, (20, 30), Seconds())


class Letters:
    """A tokenizer of letters: id i is the i-th one."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + i - 20) for i in ids)


@pytest.mark.parametrize(
    ("color", "no_color", "expected"),
    [
        (False, "", "a[a]{-bc-}k\n"),
        (True, "1", "a[a]{-bc-}k\n"),
        (True, "", "a\x1b[32ma\x1b[0m‹\x1b[9;31mbc\x1b[0m›k\n"),
    ],
)
def test_rounds_are_shown_in_color_or_in_signs(color, no_color, expected, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=color, color_system="standard" if color else None)
    printer = RoundPrinter(Letters(), console)
    printer.show(FirstToken(20, Seconds()))
    printer.show(ROUND)
    printer.end()
    assert shown.getvalue() == expected


def test_half_a_character_waits_for_the_other_half(target):
    tokenizer = tokenizer_of(target.path)
    ids = tokenizer.encode("naïve – 日本", add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push([index]) for index in ids]
    assert "".join(pieces) == "naïve – 日本" and "" in pieces and not any("�" in piece for piece in pieces)
    cut = TextStream(tokenizer)
    assert cut.push(ids[:-1]) == "" and cut.push([], last=True).endswith("�")
