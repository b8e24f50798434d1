"""The interface of a corpus: the conversations of a training stage, and how their answers come about.

Options: hyperdflash.data.streamed (hub data sets and files) and whatever a configuration names by ``_target_``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperdflash.contracts import Conversation
from hyperdflash.data.row_stats import RowStats
from hyperdflash.settings import one_of, positive_int

SERVER = "server:"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source of conversations, as ``corpus=...`` names one; a subclass reads it.

    ``stage`` 1 or 2 chooses the mixture ``stage1`` or ``stage2``; ``responses`` are written by the target or taken as they
    are; ``temperature``, ``top_p``, ``max_new_tokens`` (per turn) say how the target answers, ``max_length`` cuts a document.
    ``responses: server:NAME`` are the target's, made by a server that has it as model NAME (python -m src.regenerate).
    ``row_stats`` says after ``train()`` what became of each source's rows.
    """

    stage: int
    validation: int
    responses: str
    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int
    row_stats: list[RowStats] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.server_model is None:
            one_of("corpus.responses", self.responses, ("target", "original", SERVER + "NAME"))
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage!r}: use experiment=stage1 or experiment=stage2")
        for name in ("validation", "max_new_tokens", "max_length"):
            positive_int(f"corpus.{name}", getattr(self, name))

    @property
    def server_model(self) -> str | None:
        """NAME of ``responses: server:NAME``."""
        name = self.responses.removeprefix(SERVER) if isinstance(self.responses, str) else ""
        return name if name and name != self.responses else None

    def train(self) -> list[Conversation]:
        """The conversations of this stage, in the order of a fixed function of the corpus's settings."""
        raise NotImplementedError

    def validation_conversations(self) -> list[Conversation]:
        """Held-out conversations of this stage, none of them in ``train()`` of either stage."""
        raise NotImplementedError
