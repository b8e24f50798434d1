"""Training, replay and the loop agree, and an error planted in one of them alone is named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import hyperdflash.checks.parity_job as wiring
import hyperdflash.decoding.loop as loop_module
import hyperdflash.drafting.drafter as model_module
from hyperdflash.checks.parity import CHECKS, compare_views
from hyperdflash.checks.traces import View, every_block, observe_loop, observe_replay, observe_training, training_document
from hyperdflash.data.chat import encode_prompt, user_rounds
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.drafting.conditioning import Layers, PreHcHead
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.drafter import Drafter
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.drafting.proposer import BlockProposer
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.objectives.factored_logits import FactoredLogits
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.readers import computed_states
from hyperdflash.states.store import collate, make_shards
from hyperdflash.targets.load import load_target
from hyperdflash.targets.producer import InProcess

SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, block_size=7, initializer_range=0.2)
MODE = "non_think"


class Case:
    """A drafter with its correct views, and the parts to record one of them again."""

    def __init__(self, target, tokenizer, module, layer_ids=()):
        self.target, self.tokenizer, self.module = target, tokenizer, module
        prompts = [load_eval_prompts(domain)[0] for domain in ("math", "code", "chat")]
        self.conversations = [user_rounds(prompt)[0] for prompt in prompts]
        self.prompts = {c.id: encode_prompt(c, tokenizer, MODE) for c in self.conversations}
        loop = self.loop()
        answers = {name: text[len(self.prompts[name]) :] for name, text in loop.texts.items()}
        documents = [training_document(c, answers[c.id], tokenizer, MODE) for c in self.conversations]
        (shard,) = make_shards(documents, len(documents))
        self.states = collate(computed_states(InProcess(target), shard, layer_ids, CODECS["bf16"]))
        self.views = {"training": self.training(), "replay": self.replay(), "loop": loop}

    def training(self, module=None, states=None, blocks=None) -> View:
        return observe_training(module or self.module, states or self.states, self.target.heads, blocks)

    def replay(self, module=None, states=None) -> View:
        return observe_replay(module or self.module, states or self.states, self.target.heads)

    def loop(self, module=None, drafter=None) -> View:
        drafter = drafter or (module or self.module).proposer(self.target.heads)
        stop_ids = {special_ids(self.tokenizer).eos}
        return observe_loop(drafter, self.target, self.prompts, max_new_tokens=12, stop_ids=stop_ids)

    def compare(self, **views: View):
        return compare_views(list({**self.views, **views}.values()), self.target.heads, None)


@pytest.fixture(scope="module")
def target(mini_target):
    return load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")


@pytest.fixture(scope="module")
def tokenizer(mini_target):
    return load_tokenizer(mini_target)


def block_drafter(target, conditioning, reducer, **changes) -> Drafter:
    return (
        DrafterConfig(**SIZES, **changes)
        .build(
            DrafterParts(conditioning=conditioning, reducer=reducer, heads=target.heads, mask_token_id=7),
            torch.Generator().manual_seed(0),
        )
        .eval()
    )


@pytest.fixture(scope="module")
def case(target, tokenizer) -> Case:
    return Case(target, tokenizer, block_drafter(target, PreHcHead(), HcGate()))


def assert_all_agree(case: Case) -> None:
    parity = case.compare()
    assert parity.first_difference is None
    assert {check.name for check in parity.checks if check.compared} == CHECKS.keys()
    assert len(set(parity.taus.values())) == 1 and parity.taus["loop"] >= 1
    logits = {check.paths: check for check in parity.checks if check.name == "logits"}
    assert logits["training", "replay"].compared >= 6 * 3 and logits["training", "loop"].compared > 0
    assert all(check.largest < 1e-2 for check in logits.values())


def test_a_block_drafter_is_the_same_on_all_paths(case):
    assert_all_agree(case)


def test_replay_that_drafts_in_parts_is_the_same_too(case, monkeypatch):
    monkeypatch.setattr(model_module, "ANCHORS_PER_PASS", 4)
    assert case.compare(replay=case.replay()).first_difference is None


def test_layer_taps_and_a_context_window_are_the_same_too(target, tokenizer):
    drafter = block_drafter(target, Layers(layer_ids=[0, 3]), Fc(), context_window=9)
    assert_all_agree(Case(target, tokenizer, drafter, drafter.conditioning.layer_ids))


@pytest.fixture(scope="module")
def chain(target, tokenizer) -> Case:
    return Case(target, tokenizer, MTPChain(target.mtp, 3))


def test_the_mtp_chain_is_the_same_on_all_paths(chain):
    assert_all_agree(chain)


# Errors, each planted in one path


class SeesItsAnchor(Drafter):
    def draft(self, known_ids, anchors, context_kv, visible, heads, *inputs):
        later = torch.arange(visible.shape[2]) == anchors[..., None]
        return super().draft(known_ids, anchors, context_kv, visible | later, heads, *inputs)


class ReadsARowMore(BlockProposer):
    def _seen(self):
        return slice(0, self._rows + 1)


class OnePlaceOff(BlockProposer):
    def begin(self, states):
        super().begin(states)
        self._length += 1


def changed(module: Drafter, error: str) -> Drafter:
    planted = copy.deepcopy(module)
    if error == "RoPE":
        planted.config = replace(planted.config, rope_theta=500.0)
    elif error == "mask token":
        planted.mask_token_id = 8
    elif error == "modules":
        planted.reducer.path_norm = None
    elif error == "logits":
        planted.layers[1].mlp.down_proj.weight.data *= 1.1
    elif error == "context mask":
        planted.__class__ = SeesItsAnchor
    return planted


def normed(states, heads):
    return replace(states, residual=heads.norm(states.residual.float()).to(states.residual.dtype))


def plant(case: Case, error: str, path: str, patch: pytest.MonkeyPatch) -> View:
    """Records ``path`` with ``error`` planted in it."""
    heads = case.target.heads
    if error == "states" and path == "loop":
        make = loop_module._states
        patch.setattr(loop_module, "_states", lambda *arguments: normed(make(*arguments), heads))
        return case.loop()
    if error == "states":
        return getattr(case, path)(states=normed(case.states, heads))
    if error == "labels" and path == "training":
        blocks = every_block(case.states, case.module.num_slots)
        return case.training(blocks=replace(blocks, labels=blocks.labels.roll(-1, dims=-1)))
    if error == "labels":
        is_argmax = FactoredLogits.is_argmax
        patch.setattr(FactoredLogits, "is_argmax", lambda *rows: ~is_argmax(*rows))
        return case.replay()
    if error == "context mask" and path == "loop":
        return case.loop(drafter=ReadsARowMore(case.module, heads))
    return getattr(case, path)(changed(case.module, error))


PATHS = ("training", "replay", "loop")
INSIDE = ("context mask", "RoPE", "mask token", "modules", "logits")  # errors within a drafter, which its logits show
PLANTED = [(error, path) for error in (*INSIDE, "states") for path in PATHS] + [("labels", "training"), ("labels", "replay")]


@pytest.mark.parametrize(("error", "path"), PLANTED, ids=lambda value: value.replace(" ", "_"))
def test_an_error_in_one_path_is_named_with_the_path(error, path, case):
    with pytest.MonkeyPatch.context() as patch:
        view = plant(case, error, path, patch)
    parity = case.compare(**{path: view})
    found, name = parity.first_difference, "logits" if error in INSIDE else error
    assert found.startswith(f"{name}: {path} {'is wrong' if error == 'labels' else 'differs from the others'}"), found
    assert any(f"first in document {c.id} at " in found for c in case.conversations), found
    first = next(check for check in parity.checks if check.first is not None)
    assert first.name == name and path in first.paths


def test_the_details_say_what_is_wrong(case):
    with pytest.MonkeyPatch.context() as patch:
        said = {
            error: case.compare(training=plant(case, error, "training", patch)).first_difference
            for error in ("context mask", "labels")
        }
    anchor = min(case.views["training"].draftings[case.states.ids[0]])
    assert f"at {anchor}: slot 1 by " in said["context mask"]
    assert "the slots have the labels [" in said["labels"]


def test_a_loop_that_counts_its_positions_wrong_drafts_other_logits(case):
    found = case.compare(loop=case.loop(drafter=OnePlaceOff(case.module, case.target.heads))).first_difference
    assert found.startswith("logits: loop differs from the others")


def test_another_chat_encoding_is_the_first_thing_named(case):
    documents = [training_document(c, [20, 21, 22], case.tokenizer, "think_high") for c in case.conversations]
    (shard,) = make_shards(documents, len(documents))
    states = collate(computed_states(InProcess(case.target), shard, (), CODECS["bf16"]))
    found = case.compare(training=case.training(states=states)).first_difference
    assert found.startswith("chat encoding: training differs from the others")


def test_a_loop_that_is_not_lossless_is_named_by_its_text(case, monkeypatch):
    accept_all = lambda drafts, ids: (torch.tensor(drafts.shape[-1]), ids[-1])  # noqa: E731
    monkeypatch.setattr(loop_module, "verify_greedy", accept_all)
    wrong = Case(case.target, case.tokenizer, case.module)
    found = wrong.compare().first_difference
    assert found.startswith("text: training is wrong") and "the target's logits prefer" in found


def test_a_label_too_few_is_a_wrong_label(case):
    blocks = every_block(case.states, case.module.num_slots)
    shorter = replace(blocks, label_mask=blocks.label_mask & (torch.arange(6) < 5))
    assert case.compare(training=case.training(blocks=shorter)).first_difference.startswith("labels: training is wrong")


@pytest.mark.parametrize("path", ["training", "replay"])
def test_a_chain_on_other_states_is_named(path, chain):
    with pytest.MonkeyPatch.context() as patch:
        found = chain.compare(**{path: plant(chain, "states", path, patch)}).first_difference
    assert found.startswith(f"states: {path} differs from the others")


# The command


@pytest.fixture
def config(compose_config, mini_target, tmp_path):
    overrides = [
        f"target.path={mini_target}",
        "benchmarks.per_domain=1",
        "benchmarks.max_new_tokens=12",
        f"out={tmp_path}/out",
        'methods=[{name: "MTP (2)", native_steps: 2}]',
    ]
    return compose_config("parity", overrides)


def test_the_command_reports_that_all_agree(config, tmp_path, capsys):
    found = wiring.check_parity(config)
    assert found["MTP (2)"].first_difference is None
    record = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert record["prompts"] == 3 and record["methods"]["MTP (2)"]["first_difference"] is None
    taus = record["methods"]["MTP (2)"]["taus"]
    assert taus["training"] == taus["replay"] == taus["loop"] >= 1
    text = (tmp_path / "out" / "parity.md").read_text()
    assert "All agree." in text and "| labels |" in text and "| 0.0e+00 |" in text
    assert text in capsys.readouterr().out


def test_the_command_ends_with_one_sentence(config, tmp_path, monkeypatch):
    made = wiring.collate
    heads = load_target(path=config.target.path, dtype="fp32", attention="windowed", experts="dense").heads
    monkeypatch.setattr(wiring, "collate", lambda rows: normed(made(rows), heads))
    with pytest.raises(ValueError, match=r"^MTP \(2\): states: loop differs from the others, first in document .* at 0: "):
        wiring.check_parity(config)
    assert "**differs**" in (tmp_path / "out" / "parity.md").read_text()
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["methods"]["MTP (2)"]["first_difference"]


def test_a_difference_ends_the_command_with_exit_code_1(mini_target, tmp_path, run_command, monkeypatch):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    methods = 'methods=[{name: "MTP (2)", native_steps: 2}]'
    overrides = [f"target.path={mini_target}", "benchmarks.per_domain=1", "benchmarks.max_new_tokens=6"]
    done = run_command("parity", *overrides, methods, "tolerance=1.0e-30", f"out={tmp_path}/shell")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: MTP (2): ") and sentence.endswith(f"all checks are in {tmp_path}/shell/parity.md")
    assert "| MTP (2) |" in done.stdout
