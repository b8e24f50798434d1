"""Requests the target's answers from OpenAI-compatible servers (vLLM, SGLang, ...) and checks each answer.

1. GET /models          every server must serve the model under the configured name
2. POST /completions    sends token ids of our own encoding, which no chat template changes, and requests ids in return
3. ids                  an answer is requested again if its prompt or number of prompt tokens differs from the request's, if it
                        has no end, ids outside the vocabulary, or fewer tokens than the server counted
4. text                 the text of a server without ``return_token_ids`` is encoded; a conversation whose ids do not decode to
                        the same text is left out and named
5. refusals             a prompt with HTTP 400, 413 or 422 (usually longer than max_model_len) goes to every other server; one
                        that all refuse is left out once the servers answer another one (served_answers)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.exchange import AnswerSettings, Exchange
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode_answer
from hyperdflash.data.tokenizer import special_ids
from hyperdflash.engines.servers import BadAnswer, Refused, ServerPool, Servers, Unavailable, request_json, served_models
from hyperdflash.stable_hash import content_hash

_ABOUT_THE_PROMPT = (400, 413, 422)  # HTTP statuses; every other status concerns the server


class WrongServer(ValueError):
    """The server answers as another model, so none of its answers can be used."""


class _NotTheSameText(Exception):
    """The message is the reason to leave a conversation out."""


@dataclass(frozen=True, kw_only=True)
class AnswerServers(Servers):
    """Servers (http://host:port/v1) that all serve ``model``; ``concurrency`` counts conversations per server."""

    model: str
    wanted: ClassVar[str] = "server must be http://host:port/v1, or a list of such addresses"

    def check(self) -> None:
        """Raises ValueError where a server cannot be reached or does not serve ``model``."""
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


@dataclass(frozen=True)
class Finished:
    """A worker's result: documents, or the reason why there are none.

    ``error`` alone: the conversation failed and the next run requests it again. ``left_out`` alone: it is left out for good.
    Both: every server refused it, and it is left out for good if they answer other conversations. Of ``tokens`` in all answers,
    ``from_text`` answers came as text.
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
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
        without = [Document(conversation.id, conversation.domain, *nothing)]
        try:
            exchange = Exchange(conversation, self.tokenizer, settings)
            while (prompt := exchange.prompt()) is not None:
                options = {
                    "max_tokens": min(settings.max_new_tokens, settings.max_length - len(prompt)),
                    "seed": int(content_hash(f"{settings.seed}\x00{conversation.id}\x00{turn}"), 16) % 2**31,
                }
                ids, is_text = self._pool.ask(lambda server, ids, o=options: self._complete(server, ids, **o), prompt)
                exchange.add(ids)
                from_text, tokens, turn = from_text + is_text, tokens + len(ids), turn + 1
        except _NotTheSameText as error:
            return Finished(conversation, without, left_out=str(error))
        except Refused as error:
            reason = f"refused by the server with HTTP {error.status}" if error.status in _ABOUT_THE_PROMPT else None
            return Finished(conversation, without, left_out=reason, error=error)
        except Exception as error:  # the main thread reports it
            return Finished(conversation, error=error)
        return Finished(conversation, exchange.documents(), from_text, tokens)

    def _complete(self, server: str, prompt: list[int], max_tokens: int, seed: int) -> tuple[list[int], bool]:
        """Returns the ids of an answer, with the end token if it ended, and whether they were encoded from text."""
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
        if choice.get("token_ids") is None:
            ids, is_text = self._encoded(choice.get("text")), True
        else:
            ids, is_text = self._returned(choice, usage.get("completion_tokens")), False
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        elif choice["finish_reason"] == "stop":
            ids = [*ids, self.eos_id]
        if is_text and len(ids) > max_tokens + 1:
            raise _NotTheSameText("their text encodes to more tokens than the request allows")
        if not ids or len(ids) > max_tokens + 1:
            raise BadAnswer(f"it returned {len(ids)} tokens where the request allows 1 to {max_tokens}")
        return ids, is_text

    def _returned(self, choice: dict, counted: object) -> list[int]:
        """Checks the ids of an answer, also against the number of tokens that the server counted."""
        ids = choice["token_ids"]
        if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < self._vocabulary for i in ids)):
            raise BadAnswer(f"its token ids are not ids of a vocabulary of {self._vocabulary}")
        # A server can count an end token that it does not return.
        unreturned = int(choice["finish_reason"] == "stop" and self.eos_id not in ids)
        if isinstance(counted, int) and not 0 <= counted - len(ids) <= unreturned:
            raise BadAnswer(f"it returned {len(ids)} tokens and counted {counted}")
        return ids

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
