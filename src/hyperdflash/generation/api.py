"""The Python interface: loads a target and a drafter, and generates losslessly (README.md has an example)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.loop import FirstToken, Generation, Round, collect, speculate
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.settings import positive_int
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets import load
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler
from hyperdflash.targets.session import TargetSession
from hyperdflash.training.run_index import check_target

tokenizer_of = lru_cache(maxsize=4)(load_tokenizer)


@dataclass(frozen=True)
class Piece:
    """An ``event`` of the loop and the ``text`` that it adds: complete characters without control tokens."""

    text: str
    event: FirstToken | Round


@dataclass(frozen=True)
class Answer:
    """``text`` without control tokens; ``generation`` its tokens, rounds and times."""

    text: str
    generation: Generation


class TextStream:
    """Decodes ids as they arrive; an incomplete character of a byte-level vocabulary waits for its last byte."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._waiting: list[int] = []

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Returns the text that ``token_ids`` complete, without control tokens; ``last`` also returns waiting bytes."""
        self._waiting += token_ids
        text = self.tokenizer.decode(self._waiting, skip_special_tokens=True)
        if text.endswith("�") and not last:
            return ""
        self._waiting = []
        return text


def load_target(
    path: str | Path, *, dtype: str = "fp32", attention: str = "windowed", experts: str = "dense", **settings
) -> Target:
    """Loads the target in ``path``, by default as conf/target/tiny.yaml does; ``settings`` as in targets.load.load_target."""
    return load.load_target(path=path, dtype=dtype, attention=attention, experts=experts, **settings)


def load_drafter(source: str | Path, target: Target | None = None, *, num_slots: int = 6) -> Proposer:
    """Loads ``"ar"``, ``"mtp"`` (the target's own block, ``num_slots`` steps), a finished training run, or an exported folder.
    Without ``target`` a run or a folder drafts with the heads of the target that it names. ValueError if a run is not finished,
    if a folder is cut, changed or of another project, and for another target's weights."""
    from hyperdflash.evaluation.methods import method_of_run
    from hyperdflash.export.folder import build_drafter, is_exported, named_target, read_folder

    if source == "ar":
        return Autoregressive()
    if source == "mtp":
        if target is None:
            raise ValueError('load_drafter("mtp") is the target\'s own block: give the target too')
        return MTPChain(target.mtp, positive_int("num_slots", num_slots)).proposer(target.heads)
    described, state = read_folder(source) if is_exported(source) else (None, {})
    path, experts = (named_target(source, described), "dense") if target is None else (target.path, target.experts)
    heads = load.load_heads(path) if target is None else target.heads
    if described is None:
        method, training = method_of_run(source, path)
        return method.loop_drafter(training, heads)
    check_target(described["target"]["fingerprint"], load.fingerprint(heads), Path(source))
    module = build_drafter(described, state, heads, {"path": str(path), "experts": experts})
    return module.proposer(heads, CODECS[described["states"]])


def ids_of_prompt(
    prompt: str | Conversation | Sequence[int], target_path: str | Path, mode: str, max_new_tokens: int
) -> list[int]:
    """Returns the token ids of a prompt; reads no weight. ValueError for ids that the target lacks, and unless the prompt fits
    its context with the answer."""
    if isinstance(prompt, str):
        prompt = Conversation("prompt", "chat", (Turn("user", prompt),))
    ids = encode_prompt(prompt, tokenizer_of(target_path), mode) if isinstance(prompt, Conversation) else list(prompt)
    config = load.read_config(target_path)
    context, last = config.max_position_embeddings, config.vocab_size - 1
    if wrong := [index for index in ids if not 0 <= index <= last]:
        raise ValueError(f"a prompt has token id {wrong[0]}, the target's are 0 to {last}: use the target's own tokenizer")
    if len(ids) + positive_int("max_new_tokens", max_new_tokens) > context:
        left = context - len(ids)
        raise ValueError(
            f"a prompt of {len(ids):,} tokens and max_new_tokens={max_new_tokens} exceed the target's context of {context:,}: "
            + (f"give max_new_tokens={left}" if left > 0 else "give a shorter prompt")
        )
    return ids


def generate_stream(
    target: Target,
    drafter: Proposer,
    prompt: str | Conversation | Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    mode: str = "non_think",
    max_new_tokens: int = 128,
    synchronize: bool = False,
) -> Iterator[Piece]:
    """Yields the answer to ``prompt``, one piece per round, until the end token or ``max_new_tokens``. A string is one user
    turn in the chat encoding of ``mode``. ``synchronize`` as in ``speculate``."""
    tokenizer, stop_ids = tokenizer_of(target.path), stop_ids_of(target)
    prompt_ids = ids_of_prompt(prompt, target.path, mode, max_new_tokens)
    sampler = Sampler(temperature, top_p, torch.Generator(target.model.device).manual_seed(seed))
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "sampler": sampler, "synchronize": synchronize}
    stream, count = TextStream(tokenizer), 0
    with TargetSession(target.model, drafter.layer_ids) as session:
        for event in speculate(session, drafter, prompt_ids, **settings):
            added = [event.token_id] if isinstance(event, FirstToken) else event.emitted
            count += len(added)
            yield Piece(stream.push(added, last=count == max_new_tokens or added[-1] in stop_ids), event)


def generate(target: Target, drafter: Proposer, prompt: str | Conversation | Sequence[int], **settings) -> Answer:
    """Returns the whole answer; ``settings`` as in ``generate_stream``."""
    return answer_of(list(generate_stream(target, drafter, prompt, **settings)), target)


def answer_of(pieces: Sequence[Piece], target: Target) -> Answer:
    """Joins all pieces of ``generate_stream`` to the whole answer."""
    generation = collect((piece.event for piece in pieces), stop_ids_of(target))
    return Answer("".join(piece.text for piece in pieces), generation)


def stop_ids_of(target: Target) -> set[int]:
    return {special_ids(tokenizer_of(target.path), mask_id=0).eos}
