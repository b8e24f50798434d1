"""The interface of a corpus: the conversations of a training stage, and who writes their answers.

Options: hyperdflash.data.streamed (hub data sets and files), and any class that an option file names by ``_target_``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hyperdflash.contracts import Conversation
from hyperdflash.data.row_stats import RowStats
from hyperdflash.settings import one_of, positive_int

SERVER = "server:"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source of conversations, the option ``corpus=...``; a subclass reads it.

    ``stage`` 1 or 2 chooses the mixture ``stage1`` or ``stage2``. ``responses`` is "target" (the target writes the answers),
    "original" (the source's answers stay) or "server:NAME" (a server that serves the target as model NAME writes them,
    python -m src.regenerate). ``temperature``, ``top_p`` and ``max_new_tokens`` (per turn) set how the target answers;
    ``max_length`` tokens bound a document. ``train()`` fills ``row_stats`` with the counts of each source's rows.
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
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage!r}: use experiment=stage1 or experiment=stage2")
        for name in ("validation", "max_new_tokens", "max_length"):
            positive_int(f"corpus.{name}", getattr(self, name))
        if self.server_model is None:
            one_of("corpus.responses", self.responses, ("target", "original", SERVER + "NAME"))
        for name in ("stage1", "stage2"):
            mixture = getattr(self, name, ())
            if isinstance(mixture, str) or not isinstance(mixture, Mapping | Sequence):
                raise ValueError(f"corpus.{name} must be a mixture as in conf/corpus, {{...}} or [...], got {mixture!r}")

    @property
    def server_model(self) -> str | None:
        """NAME of ``responses: server:NAME``; None for other responses."""
        name = self.responses.removeprefix(SERVER) if isinstance(self.responses, str) else ""
        return name if name and name != self.responses else None

    def source_files(self) -> list[Path]:
        """Local files whose content decides the conversations of this stage."""
        return []

    def train(self) -> list[Conversation]:
        """Returns the conversations of this stage, in an order that the corpus's settings determine."""
        raise NotImplementedError

    def validation_conversations(self) -> list[Conversation]:
        """Returns held-out conversations of this stage, none of them in ``train()`` of either stage."""
        raise NotImplementedError
