"""Shows a text as the loop writes it: accepted drafts green, rejected ones red and struck through, the target's own plain.

Without color (NO_COLOR, or no terminal) signs replace it: [accepted] and {-rejected-}.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hyperdflash.decoding.loop import FirstToken, Generation, Round


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


class RoundPrinter:
    """Writes events of ``speculate`` to a console, round by round."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, show_rejected: bool = True):
        self.stream, self.console, self.show_rejected = TextStream(tokenizer), console, show_rejected
        self.styled = console.is_terminal and not os.environ.get("NO_COLOR")

    def show(self, event: FirstToken | Round) -> None:
        if isinstance(event, FirstToken):
            self._write(self.stream.push([event.token_id]), "plain")
            return
        self._write(self.stream.push(event.emitted[: event.accepted]), "accepted")
        rejected = event.drafted[event.accepted :]
        if self.show_rejected and rejected and len(event.emitted) > event.accepted:
            tokens = self.stream.tokenizer.decode(rejected, skip_special_tokens=False)
            self._write(tokens.replace("\n", "⏎"), "rejected")
        self._write(self.stream.push(event.emitted[event.accepted :]), "plain")

    def end(self) -> None:
        self._write(self.stream.push([], last=True), "plain")
        self.console.print()

    def _write(self, text: str, kind: str) -> None:
        if not text:
            return
        if self.styled:
            shown = Text(text, style={"plain": "", "accepted": "green", "rejected": "red strike"}[kind])
        else:
            before, after = {"plain": ("", ""), "accepted": ("[", "]"), "rejected": ("{-", "-}")}[kind]
            shown = Text(before + text + after)
        self.console.print(shown, end="", soft_wrap=True, highlight=False)


def summary_line(generation: Generation) -> str:
    """Returns tau, rounds, speed and the parts of a round's time, on one line."""
    count = len(generation.rounds)
    parts = [f"{len(generation.token_ids)} tokens, ended by {'a stop token' if generation.ended_by == 'stop' else 'the limit'}"]
    if count:
        seconds = generation.seconds
        draft, verify, rest = (1e3 * s / count for s in (seconds.draft, seconds.verify, seconds.rest))
        parts += [
            f"tau {generation.tau:.2f} over {count} rounds",
            f"{generation.tokens_per_second:.1f} tokens/s",
            f"per round: draft {draft:.1f} + verify {verify:.1f} + rest {rest:.2f} ms",
        ]
    parts.append(f"first token after {1e3 * generation.first.seconds.total:.0f} ms")
    return " · ".join(parts)
