"""Requests the target's answers from servers (vLLM, SGLang), many conversations at a time, and stores them for trainings.

1. GET /models          every server must serve the model under the configured name, and texts of ``max_length`` tokens
2. POST /completions    sends token ids of our own encoding, which no chat template changes, and requests ids in return
3. check                an answer is requested again if its prompt or number of prompt tokens differs from the request's, if it
                        has no end, ids outside the vocabulary, or fewer tokens than the server counted
4. store                each conversation as it arrives (answer_file): a killed job repeats only its open requests

The file's name has the server's name of the model and the fingerprint of ``target.path``; the user vouches that both have the
same weights. An answer depends only on its own conversation, so a larger corpus requests only its new conversations.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.answers.exchange import AnswerSettings, Exchange
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.prompts import named
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.engines.servers import BadAnswer, Refused, ServerPool, Servers, Unavailable, request_json, served_models
from hyperdflash.leases import exclusive
from hyperdflash.stable_hash import content_hash

_IN_A_ROW = 8  # so many failures without an answer in between end the job


class WrongServer(ValueError):
    """None of the server's answers can be used."""


@dataclass(frozen=True, kw_only=True)
class AnswerServers(Servers):
    """Servers (http://host:port/v1) that all serve ``model``; ``concurrency`` counts conversations per server."""

    model: str
    wanted: ClassVar[str] = "server must be http://host:port/v1, or a list of such addresses"

    def check(self, max_length: int) -> None:
        """Raises ValueError where a server is not reachable, serves no ``model``, or takes fewer than ``max_length`` tokens."""
        for server in self.servers:
            try:
                models = served_models(server, self.timeout_s)
            except (Refused, Unavailable) as error:
                raise ValueError(f"{error}: start the server first, and give its address up to /v1") from None
            if self.model not in models:
                raise ValueError(
                    f"{server} serves {', '.join(models) or 'no model'}, not {self.model}: start it with that model, or give "
                    "the name that it serves by corpus.responses=server:NAME"
                )
            if (longest := models[self.model].get("max_model_len") or max_length) < max_length:
                raise ValueError(
                    f"{server} takes {longest} tokens and corpus.max_length is {max_length}: start it with a larger context, "
                    "or lower corpus.max_length"
                )


def served_path(
    directory: Path, fingerprint: str, model: str, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings
) -> Path:
    """Returns the path of a server's answers: ``<fingerprint>-server-<model>-<hash of settings and tokenizer>.jsonl``."""
    deciding = {name: value for name, value in asdict(settings).items() if name not in ("dtype", "batch_rows")}
    key = hashlib.sha256(json.dumps([fingerprint, model, deciding, tokenizer.backend_tokenizer.to_str()]).encode())
    readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in model)
    return directory / f"{fingerprint}-server-{readable}-{key.hexdigest()[:16]}.jsonl"


def ask_servers(
    conversations: Sequence[Conversation],
    servers: AnswerServers,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    path: Path,
) -> None:
    """Requests every conversation that ``path`` has no answer to, and appends the answers as they arrive. ValueError names the
    failed conversations at the end, or as soon as several fail in a row."""
    title = f"answers of {servers.model}"
    busy = f"another process is filling {path}: wait for it, or end it"
    failed: dict[str, Exception] = {}
    with exclusive(path.parent, f"leases/{path.stem}", wait_s=0, busy=busy):
        answers = AnswerFile(path)
        todo = answers.missing(conversations)
        print(f"{title}: {len(conversations) - len(todo):,} of {len(conversations):,} are in {path}", flush=True)
        if not todo:
            return
        servers.check(settings.max_length)
        client = AnswerClient(servers, tokenizer, settings)
        total = in_a_row = 0
        with (
            tqdm(total=len(todo), desc=title, unit="doc") as bar,
            # a thread that waits for a stalled server does not delay the end of the process
            ThreadPool(min(len(todo), servers.concurrency * len(servers.servers))) as threads,
        ):
            for conversation, found in threads.imap_unordered(client.answer, todo):
                bar.update()
                if isinstance(found, WrongServer):
                    raise found
                if isinstance(found, Exception):
                    failed[conversation.id] = found
                    in_a_row += 1
                    if in_a_row == min(_IN_A_ROW, len(todo)):
                        break
                    continue
                answers.append(found)
                if tokens := sum(int(document.loss_mask.sum()) for document in found):  # else no server received the prompt
                    total, in_a_row = total + tokens, 0
                    bar.set_postfix_str(f"{total / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(todo)} conversations have no answer, the same command requests them again "
            f"({named(list(failed))}); the last one's error: {list(failed.values())[-1]}"
        )


class AnswerClient:
    """Requests whole conversations; several threads can share it."""

    def __init__(self, servers: AnswerServers, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings):
        self.servers, self.tokenizer, self.settings = servers, tokenizer, settings
        self.eos_id = special_ids(tokenizer, mask_id=0).eos
        self._vocabulary = len(tokenizer)
        self._pool = ServerPool(servers)

    def answer(self, conversation: Conversation) -> tuple[Conversation, list[Document] | Exception]:
        """Answers all turns of one conversation; returns its documents, or the error of a turn without an answer."""
        settings, turn = self.settings, 0
        try:
            exchange = Exchange(conversation, self.tokenizer, settings)
            while (prompt := exchange.prompt()) is not None:
                options = {
                    "max_tokens": min(settings.max_new_tokens, settings.max_length - len(prompt)),
                    "seed": int(content_hash(f"{settings.seed}\x00{conversation.id}\x00{turn}"), 16) % 2**31,
                }
                exchange.add(self._pool.ask(lambda server, ids, o=options: self._complete(server, ids, **o), prompt))
                turn += 1
            return conversation, exchange.documents()
        except Exception as error:  # the main thread reports it
            return conversation, error

    def _complete(self, server: str, prompt: list[int], max_tokens: int, seed: int) -> list[int]:
        """Returns the ids of an answer, with the end token if it ended."""
        body = {
            "model": self.servers.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": seed,
            "stop_token_ids": [self.eos_id],
            "skip_special_tokens": False,  # </think> is a special token
            "return_token_ids": True,
        }
        found = request_json(f"{server}/completions", self.servers.timeout_s, body)
        if found.get("model", self.servers.model) != self.servers.model:
            raise WrongServer(f"{server} answered as model {found['model']!r}, the request named {self.servers.model!r}")
        choices, usage = found.get("choices"), found.get("usage")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise BadAnswer("it returned no choices")
        choice, usage = choices[0], usage if isinstance(usage, dict) else {}
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise BadAnswer("it answered another prompt than the request's")
        if usage.get("prompt_tokens") not in (None, len(prompt)):
            raise BadAnswer(f"it read {usage['prompt_tokens']} prompt tokens where {len(prompt)} were sent: it must add none")
        if choice.get("finish_reason") not in ("stop", "length"):
            raise BadAnswer(f"it ended for the reason {choice.get('finish_reason')!r}, wanted stop or length")
        if (ids := choice.get("token_ids")) is None:
            raise WrongServer(f"{server} returns text without token ids: use a vLLM or SGLang that knows return_token_ids")
        if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < self._vocabulary for i in ids)):
            raise BadAnswer(f"its token ids are not ids of a vocabulary of {self._vocabulary}")
        counted, stopped = usage.get("completion_tokens"), choice["finish_reason"] == "stop"
        # a server can count an end token that it does not return
        if isinstance(counted, int) and not 0 <= counted - len(ids) <= int(stopped and self.eos_id not in ids):
            raise BadAnswer(f"it returned {len(ids)} tokens and counted {counted}")
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        elif stopped:
            ids = [*ids, self.eos_id]
        if not ids or len(ids) > max_tokens + 1:
            raise BadAnswer(f"it returned {len(ids)} tokens where the request allows 1 to {max_tokens}")
        return ids


def served_documents(
    conversations: Sequence[Conversation],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
    command: str,
) -> list[Document]:
    """Returns the stored documents in the order of ``conversations``; ValueError with ``command`` where one is absent."""
    answers = AnswerFile(path)
    if missing := answers.missing(conversations):
        raise ValueError(f"{len(missing):,} of {len(conversations):,} answers are not in {path}: run `{command}` first")
    return answers.ordered(conversations, settings, tokenizer)
