"""Replaces a corpus's answers by the target's own, once, and stores them.

Training on the target's own answers makes acceptance in training predict acceptance in serving. The conversations alone decide
the batches. A batch is written as a whole, one line per document (answer_file), so that a killed run continues with the
next batch. served_answers requests the answers from a server instead.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.answers.exchange import AnswerSettings, Exchange
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode_rounds
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.targets.generate import generate_batch
from hyperdflash.targets.load import Target


def answer_conversations(
    conversations: Sequence[Conversation],
    target: Callable[[], Target],
    fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    directory: Path,
) -> list[Document]:
    """Returns documents whose assistant turns the target writes, in the order of ``conversations``. Calls ``target()`` only if
    an answer is missing; ValueError where its fingerprint differs from ``fingerprint``."""

    def cost(conversation: Conversation) -> tuple[int, int, str]:
        rounds = encode_rounds(conversation, tokenizer, settings.mode)
        return len(rounds), len(rounds[0]), conversation.id

    sized = sorted(conversations, key=cost)
    batches = [sized[i : i + settings.batch_rows] for i in range(0, len(sized), settings.batch_rows)]
    key = hashlib.sha256(json.dumps([fingerprint, asdict(settings), tokenizer.backend_tokenizer.to_str()]).encode())
    for conversation in sized:
        key.update(repr((conversation.id, conversation.turns)).encode())
    answers = AnswerFile(directory / f"{fingerprint}-{key.hexdigest()[:16]}.jsonl")
    loaded = None
    with tqdm(total=len(sized), desc="target answers", unit="doc", disable=not answers.missing(sized)) as bar:
        for number, batch in enumerate(batches):
            if answers.missing(batch):
                loaded = loaded or target()
                if loaded.fingerprint != fingerprint:
                    raise ValueError(f"the target has fingerprint {loaded.fingerprint}, these answers need {fingerprint}")
                answers.append(_answer_batch(batch, loaded, tokenizer, settings, settings.seed * 1_000_003 + number))
            bar.update(len(batch))
    return answers.ordered(conversations, settings, tokenizer)


def _answer_batch(batch, target: Target, tokenizer, settings: AnswerSettings, seed: int) -> list[Document]:
    """Answers the conversations of a batch turn by turn, all that have a turn left at a time."""
    eos_id = special_ids(tokenizer, mask_id=0).eos
    generator = torch.Generator(device=target.model.device).manual_seed(seed)
    exchanges = [Exchange(conversation, tokenizer, settings) for conversation in batch]
    sampling = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p")}
    while asked := [(exchange, prompt) for exchange in exchanges if (prompt := exchange.prompt()) is not None]:
        prompts, names = [prompt for _, prompt in asked], [exchange.conversation.id for exchange, _ in asked]
        for index, answer in generate_batch(target.model, prompts, eos_id=eos_id, generator=generator, names=names, **sampling):
            asked[index][0].add(answer)
    return [document for exchange in exchanges for document in exchange.documents()]
