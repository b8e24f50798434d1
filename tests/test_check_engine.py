"""python -m src.check_engine: what agrees passes, every kind of wrong state does not, and every capture starts with a check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hyperdflash.checks.engine_states import Comparison, check_engine, compare
from hyperdflash.identity import train_run_dir
from hyperdflash.preparing.dataset import capture_states
from hyperdflash.preparing.job import StatesJob
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess
from tests.targets.engine_server import SGLangServer, VLLMServer


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture
def config(compose_config, mini_target):
    def make(kind: str, *servers, more=()):
        urls = ",".join(server.url for server in servers)
        return compose_config(
            "check_engine",
            [
                f"target.path={mini_target}",
                f"target.engine={kind}",
                f"target.servers=[{urls}]",
                "target.attempts=1",
                "prompts=4",
                "max_length=24",
                *more,
            ],
        )

    return make


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_sound_engine_passes_and_prints_its_numbers(kind, target, config, tmp_path, capsys):
    make = (lambda: SGLangServer(target)) if kind == "sglang" else (lambda: VLLMServer(target, folder=tmp_path))
    with make() as first, make() as second:
        check_engine(config(kind, first, second))
    printed = capsys.readouterr().out
    for server in (first, second):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{server.url} agrees: tokens ")]
        assert "next_token 1.0, " in line and line.endswith("relative_error 0.0, argmax 1.0")
        cosines = re.search(r"cosine \((.*?)\)", line)[1].split(", ")
        assert [float(cosine) for cosine in cosines] == pytest.approx([1.0] * 4)


def collapsed(target):
    heads = target.heads
    return lambda states: heads.collapse(states[None])[0][:, None].expand(-1, 4, -1)


WRONG = {
    "paths in another order": (lambda target: lambda states: states[:, [1, 0, 2, 3]], "path [01] points elsewhere"),
    "the mean of the paths": (lambda target: lambda states: states.mean(1, keepdim=True).expand(-1, 4, -1), "points elsewhere"),
    "the normed state": (collapsed, "points elsewhere"),
    "a position late": (lambda target: lambda states: states.roll(1, dims=0), "points elsewhere"),
    "another scale": (lambda target: lambda states: states * 2, "off by 100% of their size"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_kind_of_wrong_state_is_detected(wrong, target):
    spoil, sentence = WRONG[wrong]
    prompts = [torch.arange(8, 30), torch.arange(40, 55)]
    own = [InProcess(target).states([prompt])[None] for prompt in prompts]
    heads = target.heads
    said = [int(heads.logits(heads.collapse(states[None, -1:]))[0, 0].argmax()) for states in own]
    sound = compare(torch.cat(own), torch.cat(own), [22, 15], said, heads)
    assert sound.complaint is None and sound.tokens == 37
    found = torch.cat([spoil(target)(states) for states in own])
    assert re.search(sentence, compare(found, torch.cat(own), [22, 15], said, heads).complaint)
    alone = compare(found, None, [22, 15], [token + 1 for token in said], heads)
    assert "our heads read" in alone.complaint and alone.cosine is None


def test_a_failed_check_names_the_server_and_ends_every_capture(target, config, mini_overrides, compose_config):
    with SGLangServer(target) as server, SGLangServer(target) as sound:
        server.spoil = lambda states: states.roll(1, dims=0)
        with pytest.raises(ValueError, match="points elsewhere") as caught:
            check_engine(config("sglang", sound, server))
        assert server.url in str(caught.value) and "\n" not in str(caught.value)
        through = ["target.engine=sglang", f"target.servers=[{server.url}]"]
        with pytest.raises(ValueError, match=rf"at {server.url} .* our heads read .*: compare it with the target by"):
            StatesJob(compose_config("train", [*mini_overrides, *through])).producer()


def test_the_heads_alone_detect_wrong_states(target, config, monkeypatch, capsys):
    from hyperdflash.checks import engine_states as engine_check

    monkeypatch.setattr(engine_check, "instantiate", lambda _: pytest.fail("the target was loaded"))
    with SGLangServer(target) as server:
        check_engine(config("sglang", server, more=["reference=heads"]))
        assert f"{server.url} agrees: tokens " in (printed := capsys.readouterr().out) and "cosine" not in printed
        server.spoil = lambda states: states.mean(1, keepdim=True).expand(-1, 4, -1)
        with pytest.raises(ValueError, match="our heads read the engine's own next token"):
            check_engine(config("sglang", server, more=["reference=heads"]))


def test_captured_states_are_those_of_the_target(target, config, compose_config, mini_overrides, tmp_path):
    from safetensors.torch import load_file

    shared = [*mini_overrides, "corpus.responses=original", "cache.documents_per_shard=1", "cache.dtype=fp32"]
    shared += [f"cache.directory={tmp_path}/elsewhere/cache", "corpus.max_length=24"]
    with SGLangServer(target) as server:
        check_engine(config("sglang", server))
        server.faults = ["500", None, "nan"]
        capture_states(compose_config("train", [*shared, "target.engine=sglang", f"target.servers=[{server.url}]"]))
        asked = len(server.bodies)
    folder = tmp_path / "elsewhere" / "cache"
    assert [path.name.endswith("-sglang") for path in folder.iterdir()] == [True]  # they never mix with those of the target
    found = {Path(*p.relative_to(folder).parts[1:]): load_file(p) for p in folder.rglob("*.safetensors")}
    assert asked > len(found) / 2 > 5
    shared[-2] = f"cache.directory={tmp_path}/own"
    capture_states(compose_config("train", shared))
    own = {Path(*p.relative_to(tmp_path / "own").parts[1:]): load_file(p) for p in (tmp_path / "own").rglob("*.safetensors")}
    assert found.keys() == own.keys()
    for name, tensors in own.items():
        for key in tensors.keys() - {"checksums"}:  # they cover the name of the cache
            assert torch.equal(found[name][key], tensors[key]), (name, key)


def test_a_capture_whose_server_dies_goes_on_with_the_next_one(target, compose_config, mini_overrides, tmp_path):
    given = [*mini_overrides, "corpus.responses=original", "cache.documents_per_shard=4", "corpus.max_length=24"]
    given += [f"cache.directory={tmp_path}/cache", "target.engine=vllm", "target.attempts=2", "target.backoff_s=0.01"]

    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.residual.safetensors")}

    with VLLMServer(target, folder=tmp_path) as first:

        def die_later(states):
            if len(shards()) > 1:
                first.http.server_close()  # new requests are refused; this one gets no answer
                first.http.shutdown()
                raise ConnectionError
            return states

        first.spoil = die_later
        with pytest.raises(ValueError, match=r"cannot be reached .*repair the server and run the same command again$"):
            capture_states(compose_config("train", [*given, f"target.servers=[{first.url}]"]))
    kept = shards()
    assert len(kept) > 1 and not list((tmp_path / "cache").rglob("leases/*"))
    with VLLMServer(target, folder=tmp_path) as server:
        capture_states(compose_config("train", [*given, f"target.servers=[{server.url}]"]))
    assert kept.items() < shards().items()  # what was there is not captured again


def test_limits_decide(target):
    good = Comparison(9, 1.0, (0.99, 0.99), 0.1, 0.95)
    assert good.complaint is None
    for field, value, sentence in [
        ("cosine", (0.99, 0.5), "path 1 points elsewhere"),
        ("cosine", (float("nan"), 0.99), "path 0 points elsewhere"),
        ("relative_error", 0.3, "off by 30%"),
        ("argmax", 0.5, "50% of the tokens"),
        ("next_token", 0.5, "on 50% of the prompts"),
    ]:
        assert sentence in Comparison(**{**good.__dict__, field: value}).complaint


def test_a_training_reads_the_states_of_its_capture_process(target, config, compose_config, mini_overrides, tmp_path, capfd):
    """Runs the layout of 4 serving and 4 training GPUs: a server, and one command for the training and its captures."""
    from hyperdflash.training.job import train

    given = [*mini_overrides, "corpus.max_length=32", "corpus.max_new_tokens=8", "optim.batch_size=8", "trainer.max_epochs=1"]
    capture_states(compose_config("train", given))  # the answers, which both processes then find
    given += ["cache=stream", f"cache.directory={tmp_path}/stream", "cache.wait_s=120", "cache.captures=1"]
    with SGLangServer(target) as server:
        check_engine(config("sglang", server))
        checked = len(server.bodies)
        given += ["target.engine=sglang", f"target.servers=[{server.url}]"]
        capfd.readouterr()
        run = compose_config("train", given)
        record = train(run)
        assert record["steps"] == 3 and record["val_tau"] >= 1
        assert len(server.bodies) - checked >= 24 + 6  # every document's states came from the server
    (log,) = (train_run_dir(run) / "captures").glob("*.log")
    for text in (capfd.readouterr().out, log.read_text()):
        assert "loading the target" not in text
    assert not list((tmp_path / "stream").rglob("producers/*")) and not list((tmp_path / "stream").rglob("leases/*"))
    (folder,) = (tmp_path / "stream").iterdir()
    assert folder.name.endswith("-sglang")
    offline = [*given[:-6], "cache=offline", f"cache.directory={tmp_path}/stream", "seed=1"]
    with pytest.raises(ValueError, match=r"has states of target\.engine=sglang.*target\.engine=null: to train on them give"):
        train(compose_config("train", offline))
