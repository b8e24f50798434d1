"""Requests the target's answers from OpenAI-compatible servers (vLLM, SGLang, ...) and checks each answer.

1. GET /models          every server must serve the model under the configured name
2. POST /completions    sends the token ids of our own encoding, so that no chat template and no begin token of the server
                        changes the prompt; ``return_token_ids`` requests ids in return
3. ids                  an answer is requested again if its prompt or number of prompt tokens differs from the request's, if it
                        has no end, ids outside the vocabulary, or fewer tokens than the server counted
4. text                 the text of a server without ``return_token_ids`` is encoded; a conversation whose ids do not decode to
                        the same text is left out and named
5. refusals             a prompt with HTTP 400, 413 or 422 (usually longer than max_model_len) goes to every other server; one
                        that all refuse is left out once the servers answer another one (served_answers)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.exchange import Exchange
from hyperdflash.answers.responses import AnswerSettings
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode_answer
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.engines.answers import BadAnswer
from hyperdflash.engines.http import Refused, Unavailable, get_json, post_json
from hyperdflash.engines.pool import ServerPool
from hyperdflash.settings import positive_int, positive_number
from hyperdflash.stable_hash import content_hash

_ABOUT_THE_PROMPT = (400, 413, 422)  # HTTP statuses; every other status concerns the server


class WrongServer(ValueError):
    """The server answers as another model, so none of its answers can be used."""


@dataclass(frozen=True, kw_only=True)
class AnswerServers:
    """``servers`` are base URLs (http://host:port/v1) that all serve ``model``, with ``concurrency`` conversations per server.

    ``timeout_s`` is the longest silence, ``attempts`` the tries per request, ``backoff_s`` the wait after the first failure,
    which doubles with each further one.
    """

    servers: tuple[str, ...]
    model: str
    concurrency: int = 64
    timeout_s: float = 600.0
    attempts: int = 8
    backoff_s: float = 1.0

    def __post_init__(self):
        if not self.servers or not all(
            isinstance(url, str) and url.startswith(("http://", "https://")) for url in self.servers
        ):
            raise ValueError(f"server must be http://host:port/v1, or a list of such addresses, got {list(self.servers)}")
        for name in ("concurrency", "attempts"):
            positive_int(name, getattr(self, name))
        for name in ("timeout_s", "backoff_s"):
            positive_number(name, getattr(self, name))

    def check(self) -> None:
        """Raises ValueError where a server cannot be reached or does not serve ``model``."""
        for server in self.servers:
            try:
                rows = get_json(f"{server}/models", self.timeout_s).get("data")
            except (Refused, Unavailable) as error:
                raise ValueError(f"{error}: start the server first, and give its address up to /v1") from None
            models = [str(row.get("id")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            if self.model not in models:
                raise ValueError(
                    f"{server} serves {', '.join(models) or 'no model'}, not {self.model}: start it with that model, or give "
                    "the name that it serves by corpus.responses=server:NAME"
                )


@dataclass(frozen=True)
class _Request:
    prompt: list[int]
    max_tokens: int
    seed: int

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class _Given:
    """``ids`` of an answer, with the end token if the answer ended; ``from_text``: the server sent text, encoded here."""

    ids: list[int]
    from_text: bool


@dataclass(frozen=True)
class Finished:
    """A worker's result: documents, or the reason why there are none.

    ``error`` alone: the conversation failed and the next run requests it again. ``left_out`` alone: it is left out for good.
    Both: every server refused it, and it is left out for good if they answer other conversations.
    """

    conversation: Conversation
    documents: Sequence[Document] = ()
    from_text: int = 0
    tokens: int = 0
    left_out: str | None = None
    error: Exception | None = None


class AnswerClient:
    """Requests whole conversations; several threads can share it."""

    def __init__(self, servers: AnswerServers, tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings):
        self.servers, self.tokenizer, self.settings = servers, tokenizer, settings
        self.eos_id = special_ids(tokenizer, mask_id=0).eos
        self._vocabulary = len(tokenizer)
        self._pool = ServerPool(servers)

    def answer(self, conversation: Conversation) -> Finished:
        """Answers all turns of one conversation; never raises."""
        settings, from_text, tokens, turn = self.settings, 0, 0, 0
        try:
            exchange = Exchange(conversation, self.tokenizer, settings.mode, settings.max_length)
            while (prompt := exchange.prompt()) is not None:
                room = min(settings.max_new_tokens, settings.max_length - len(prompt))
                seed = int(content_hash(f"{settings.seed}\x00{conversation.id}\x00{turn}"), 16) % 2**31
                given = self._ask(_Request(prompt, room, seed))
                exchange.add(given.ids)
                from_text, tokens, turn = from_text + given.from_text, tokens + len(given.ids), turn + 1
        except _NotTheSameText as error:
            return Finished(conversation, _empty(conversation), left_out=str(error))
        except Refused as error:
            reason = f"refused by the server with HTTP {error.status}" if error.status in _ABOUT_THE_PROMPT else None
            return Finished(conversation, _empty(conversation), left_out=reason, error=error)
        except Exception as error:  # the main thread reports it
            return Finished(conversation, error=error)
        return Finished(conversation, exchange.documents(), from_text, tokens)

    def _ask(self, request: _Request) -> _Given:
        """Requests one answer; sends a refused prompt to every other server, which can have a larger max_model_len."""
        asked: list[str] = []

        def complete(server: str, request: _Request) -> _Given:
            asked.append(server)
            return self._complete(server, request)

        try:
            return self._pool.ask(complete, request)
        except Refused:
            for server in self.servers.servers:
                if server != asked[-1]:
                    with suppress(Refused):
                        return self._complete(server, request)
            raise

    def _complete(self, server: str, request: _Request) -> _Given:
        body = {
            "model": self.servers.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": request.seed,
            "stop_token_ids": [self.eos_id],
            "skip_special_tokens": False,  # </think> is a special token
            "return_token_ids": True,
        }
        found = post_json(f"{server}/completions", body, self.servers.timeout_s)
        if found.get("model", self.servers.model) != self.servers.model:
            raise WrongServer(f"{server} answered as model {found['model']!r}, the request named {self.servers.model!r}")
        return self._checked(found, request)

    def _checked(self, found: dict, request: _Request) -> _Given:
        choices, usage = found.get("choices"), found.get("usage")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise BadAnswer("it returned no choices")
        choice, usage = choices[0], usage if isinstance(usage, dict) else {}
        if choice.get("prompt_token_ids") not in (None, request.prompt):
            raise BadAnswer("it answered another prompt than the request's")
        if usage.get("prompt_tokens") not in (None, len(request.prompt)):
            raise BadAnswer(
                f"it read {usage['prompt_tokens']} prompt tokens where {len(request.prompt)} were sent: it must add none"
            )
        ended = choice.get("finish_reason")
        if ended not in ("stop", "length"):
            raise BadAnswer(f"it ended for the reason {ended!r}, wanted stop or length")
        ids = choice.get("token_ids")
        from_text = ids is None
        if from_text:
            ids = self._encoded(choice.get("text"))
        if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < self._vocabulary for i in ids)):
            raise BadAnswer(f"its token ids are not ids of a vocabulary of {self._vocabulary}")
        counted = usage.get("completion_tokens")
        unreturned = int(
            ended == "stop" and self.eos_id not in ids
        )  # 1: an end token that the server counts and does not return
        if not from_text and isinstance(counted, int) and not 0 <= counted - len(ids) <= unreturned:
            raise BadAnswer(f"it returned {len(ids)} tokens and counted {counted}")
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        elif ended == "stop":
            ids = [*ids, self.eos_id]
        if from_text and len(ids) > request.max_tokens + 1:
            raise _NotTheSameText("their text encodes to more tokens than the request allows")
        if not ids or len(ids) > request.max_tokens + 1:
            raise BadAnswer(f"it returned {len(ids)} tokens where the request allows 1 to {request.max_tokens}")
        return _Given(ids, from_text)

    def _encoded(self, text: object) -> list[int]:
        """Encodes an answer's text; the ids must decode to the same text."""
        if not isinstance(text, str):
            raise BadAnswer("it returned neither token ids nor text")
        if "\ufffd" in text or any("\ud800" <= c <= "\udfff" for c in text):  # these characters are lost
            raise _NotTheSameText("their text has characters cut in half")
        text = text.removesuffix(self.tokenizer.convert_ids_to_tokens(self.eos_id))
        ids = encode_answer(text, self.tokenizer, self.settings.mode)
        if self.tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise _NotTheSameText("their text does not encode back to itself")
        return ids


class _NotTheSameText(Exception):
    """The message is the reason to leave a conversation out."""


def _empty(conversation: Conversation) -> list[Document]:
    ids, mask = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    return [Document(conversation.id, conversation.domain, ids, mask)]
