"""What a run trains on, told at its start and kept beside it in ``corpus.json``: rows by source, drops by reason, tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.row_stats import RowStats
from hyperdflash.identity import train_run_dir
from hyperdflash.record import write_json


def count_documents(conversations: Sequence[Conversation], documents: Sequence[Document], max_length: int) -> dict[str, int]:
    """``without_document``: conversations that gave none; ``at_max_length``: documents as long as allowed, most of them cut."""
    given = {document.id.partition("#")[0] for document in documents}
    return {
        "conversations": len(conversations),
        "documents": len(documents),
        "tokens": sum(len(d.input_ids) for d in documents),
        "supervised_tokens": sum(int(d.loss_mask.sum()) for d in documents),
        "at_max_length": sum(len(d.input_ids) >= max_length for d in documents),
        "without_document": sum(c.id not in given for c in conversations),
    }


def tell_corpus(config: DictConfig, row_stats: Sequence[RowStats], counts: Mapping[str, dict[str, int]]) -> None:
    """Print both, and write them where the run lies (rank 0 alone)."""
    for stats in row_stats:
        print("\n".join(stats.lines()))
    for name, count in counts.items():
        more = [
            f"{count[key]:,} {words}"
            for key, words in (("at_max_length", "as long as max_length"), ("without_document", "conversations without one"))
            if count[key]
        ]
        print(
            f"{name}: {count['documents']:,} documents, {count['tokens']:,} tokens, {count['supervised_tokens']:,} supervised"
            + (f" ({', '.join(more)})" if more else ""),
            flush=True,
        )
    if os.environ.get("RANK", "0") == "0":
        record = {"sources": [stats.as_record() for stats in row_stats], **counts}
        write_json(train_run_dir(config) / "corpus.json", record)
