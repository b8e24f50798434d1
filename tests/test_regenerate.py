"""Answers from a server that fails, stalls, cuts and reorders are the answers of one that does not, each asked for once."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from types import SimpleNamespace

import pytest

from hyperdflash.answers import responses
from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.answers.responses import answer_conversations
from hyperdflash.answers.served_answers import AnswerServers, ask_servers, served_documents, served_path
from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_rounds
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.stable_hash import content_hash
from tests.answering_server import FAULTS, AnsweringServer

SETTINGS = AnswerSettings(max_new_tokens=12, max_length=150)


def conversations(count: int) -> list[Conversation]:
    made = []
    for n in range(count):
        asked = [f"adds {n} rows", f"joins {n} names", "and then?"][: 1 + n % 3]
        made.append(Conversation(f"chat/{n:02d}", "chat", tuple(Turn("user", text) for text in asked)))
    return made


@pytest.fixture(scope="module")
def tokenizer(mini_target):
    return load_tokenizer(mini_target)


@pytest.fixture
def model(tokenizer):
    """Prompt ids -> answer ids with the end token (some too long to have one): a function of the prompt alone."""
    ids = special_ids(tokenizer)
    plain = tokenizer.encode("It adds 3 rows and joins names. It sorts files, then returns.", add_special_tokens=False)

    def answer(prompt):
        rng = random.Random(content_hash(repr(list(prompt))))
        said = rng.choices(plain, k=rng.choice([2, 4, 7, 20]))
        closed = [ids.think_end] if prompt[-1] == ids.think else []
        return [*said[:1], *closed, *said[1:], ids.eos]

    return answer


@pytest.fixture
def server(model):
    made = AnsweringServer(model)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def ask(server, tokenizer, tmp_path):
    def run(todo, settings=SETTINGS, **changed):
        options = {"concurrency": 8, "timeout_s": 20, "attempts": 4, "backoff_s": 0.01}
        servers = AnswerServers(servers=(server.url,), model="m", **(options | changed))
        ask_servers(todo, servers, tokenizer, settings, run.path)
        return served_documents(todo, run.path, tokenizer, settings, "python -m src.regenerate")

    run.path = served_path(tmp_path, "f", "m", tokenizer, SETTINGS)
    return run


def plain(documents):
    return [(d.id, d.domain, d.input_ids.tolist(), d.loss_mask.tolist()) for d in documents]


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
def test_the_same_documents_as_in_process(mode, ask, server, model, tokenizer, tmp_path, monkeypatch):
    def generate_batch(_, prompts, *, max_new_tokens, **__):
        yield from enumerate(model(prompt)[:max_new_tokens] for prompt in prompts)

    monkeypatch.setattr(responses, "generate_batch", generate_batch)
    target = SimpleNamespace(model=SimpleNamespace(device="cpu"), fingerprint="f")
    settings = AnswerSettings(max_new_tokens=12, max_length=70, mode=mode)
    todo = conversations(12)
    own = answer_conversations(todo, lambda: target, "f", tokenizer, settings, tmp_path / "own")
    assert plain(ask(todo, settings)) == plain(own) and len(own) >= 12
    firsts = {tuple(encode_rounds(c, tokenizer, mode)[0]) for c in todo}
    assert firsts <= set(server.asked)  # ids of our own encoding, no text
    assert server.bodies[0]["return_token_ids"] and server.bodies[0]["temperature"] == 0.0


def test_faults_on_purpose_change_nothing(ask, server, tmp_path):
    todo = conversations(24)
    server.delay_s = 0.1
    wanted = plain(ask(todo))
    assert 1 < server.most_busy <= 8  # at a time: many, but bounded
    undisturbed = dict(server.asked)
    ask.path = tmp_path / "again.jsonl"
    server.asked.clear()
    server.fault = lambda prompt, attempt: FAULTS[len(server.asked) % len(FAULTS)] if attempt == 1 else None
    assert plain(ask(todo, timeout_s=1, attempts=6)) == wanted
    assert set(FAULTS) <= set(server.faults) and server.asked.keys() == undisturbed.keys()
    written = [json.loads(line)["id"] for line in ask.path.read_text().splitlines()]
    assert sorted(written) == [c.id for c in todo] != written  # each once, in another order


def test_killed_and_resumed_by_id(ask, server, tokenizer):
    todo = conversations(16)
    server.delay_s = 0.2
    process = multiprocessing.get_context("fork").Process(target=ask, args=(todo,), kwargs={"concurrency": 2})
    process.start()
    while not ask.path.exists() or ask.path.read_text().count("\n") < 3:
        time.sleep(0.01)
    process.kill()
    process.join()
    with ask.path.open("a") as file:
        file.write('{"id": "chat/15", "domain": "ch')  # a line cut by the kill
    kept = set(AnswerFile(ask.path).documents)
    assert 3 <= len(kept) < 16
    server.asked.clear()
    server.delay_s = 0.0
    documents = ask(todo)
    assert [d.id for d in documents] == [c.id for c in todo]
    asked_again = {c.id for c in todo if tuple(encode_rounds(c, tokenizer)[0]) in server.asked}
    assert asked_again == {c.id for c in todo} - kept
    server.asked.clear()
    assert plain(ask(todo)) == plain(documents) and not server.asked
    bigger = ask(conversations(18))  # a bigger corpus asks for what is new
    assert plain(bigger)[:16] == plain(documents) and 2 <= len(server.asked) <= 6


def test_one_that_fails_for_good_is_named_and_the_others_are_kept(ask, server, tokenizer):
    todo = conversations(8)
    bad = tuple(encode_rounds(todo[5], tokenizer)[0])
    server.fault = lambda prompt, attempt: "404" if prompt == bad else None
    with pytest.raises(ValueError, match=r"1 of 8 conversations have no answer.*\(chat/05\).*HTTP 404") as caught:
        ask(todo)
    assert "\n" not in str(caught.value)
    assert server.asked[bad] == 1  # a refusal is not asked again
    assert len(AnswerFile(ask.path).documents) == 7
    with pytest.raises(ValueError, match=r"1 of 8 answers are not in .*: run `python -m src\.regenerate` first"):
        served_documents(todo, ask.path, tokenizer, SETTINGS, "python -m src.regenerate")
    server.fault = lambda prompt, attempt: None
    assert len(ask(todo)) == 8


def test_a_server_of_shorter_texts_is_refused_before_it_is_asked(ask, server):
    server.max_model_len = 149
    with pytest.raises(ValueError, match=r"/v1 takes 149 tokens and corpus\.max_length is 150: start it with a larger context"):
        ask(conversations(3))
    assert not server.asked
    server.max_model_len = 150
    assert len(ask(conversations(3))) == 3


def test_a_server_without_token_ids_is_refused_in_one_sentence(ask, server):
    server.gives_ids = False
    with pytest.raises(ValueError, match="returns text without token ids: use a vLLM or SGLang that knows return_token_ids"):
        ask(conversations(3))
    assert not AnswerFile(ask.path).documents


def test_what_one_server_refuses_another_is_asked(server, model, tokenizer, tmp_path):
    roomy = AnsweringServer(model)
    server.fault = lambda prompt, attempt: "400"
    servers = AnswerServers(servers=(server.url, roomy.url), model="m", concurrency=2, timeout_s=20)
    todo = conversations(6)
    ask_servers(todo, servers, tokenizer, SETTINGS, tmp_path / "a.jsonl")
    roomy.shutdown()
    roomy.server_close()
    kept = AnswerFile(tmp_path / "a.jsonl")
    assert len(kept.documents) == 6 and server.asked


def test_a_server_that_only_fails_ends_the_job_soon(ask, server):
    server.fault = lambda prompt, attempt: "500"
    with pytest.raises(ValueError, match=r"8 of 60 conversations have no answer.*HTTP 500"):
        ask(conversations(60), attempts=2, concurrency=1)
    assert len(server.asked) <= 10


def test_another_model_is_refused_in_one_sentence(ask, server):
    server.model = "other"
    with pytest.raises(ValueError, match=r"/v1 serves other, not m: start it with that model, or give .*server:NAME"):
        ask(conversations(3))
    assert not server.asked
    server.model, server.says_model = "m", "swapped"
    with pytest.raises(ValueError, match="answered as model 'swapped', the request named 'm'"):
        ask(conversations(3))
    assert not AnswerFile(ask.path).documents


def test_a_server_that_adds_tokens_is_not_believed(ask, server):
    server.adds_tokens = 1
    with pytest.raises(ValueError, match=r"it read \d+ prompt tokens where \d+ were sent: it must add none"):
        ask(conversations(1), attempts=2)


def test_nobody_there(tokenizer, tmp_path):
    servers = AnswerServers(servers=("http://127.0.0.1:9/v1",), model="m", timeout_s=1)
    with pytest.raises(ValueError, match=r"cannot be reached .*: start the server first"):
        ask_servers(conversations(1), servers, tokenizer, SETTINGS, tmp_path / "a.jsonl")


def test_a_training_with_the_same_options_finds_them(compose_config, mini_overrides, server, capsys, monkeypatch):
    from hyperdflash.preparing.dataset import prepare
    from hyperdflash.preparing.job import PrepareJob
    from hyperdflash.preparing.regeneration import regenerate
    from hyperdflash.targets.load import load_heads

    options = [*mini_overrides, "experiment=stage1", "corpus.responses=server:m", "corpus.temperature=1"]
    training = compose_config("train", options)
    job, heads = PrepareJob(training), load_heads(training.target.path)

    def no_target():
        pytest.fail("the target was loaded")

    with pytest.raises(ValueError, match=r"24 of 24 answers are not in .*-server-m-.*: run `python -m src\.regenerate"):
        prepare(job, heads, no_target)
    capsys.readouterr()
    regenerate(compose_config("regenerate", [*options, f"server={server.url}", "concurrency=4"]))
    printed = capsys.readouterr().out
    assert {body["temperature"] for body in server.bodies} == {0.0, 1.0}  # validation is greedy
    assert "60 rows read, 24 taken" in printed and "train: 24 documents" in printed
    asked = len(server.bodies)
    dataset = prepare(job, heads, no_target)
    lengths = {name: [length for shard in shards for length in shard.lengths] for name, shards in dataset.shards.items()}
    assert (len(lengths["train"]), len(lengths["validation"]), len(server.bodies)) == (24, 6, asked)
    assert dataset.rows["sources"][0]["dropped"]["beyond the number wanted"] > 0
    assert dataset.rows["train"]["tokens"] == sum(lengths["train"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["corpus.responses=original"], "keeps the corpus's answers"),
        (["corpus.responses=server:m"], "need server=http"),
        (["server=http://x/v1"], "got server=http://x/v1 and corpus.responses=target"),
        (["corpus.responses=server:m", "server=localhost"], "server must be http://host:port/v1"),
        (["corpus.responses=server:m", "server=http://x/v1", "attempts=0"], "attempts must be a positive integer"),
    ],
)
def test_mistakes_are_one_sentence(overrides, sentence, compose_config, mini_overrides):
    from hyperdflash.preparing.regeneration import regenerate

    with pytest.raises(ValueError) as caught:
        regenerate(compose_config("regenerate", [*mini_overrides, *overrides]))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
