"""Turns a corpus into documents and counts what became of every row.

1. rows           conversations of the corpus, per split                              (hyperdflash.data)
2. answers        the corpus's own, the target's or a server's, as token ids          (hyperdflash.answers)
3. documents      those with two supervised tokens in a row, and counts of the rest
"""

from collections.abc import Callable, Sequence

import torch

from hyperdflash.answers.served_answers import served_documents
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import encode
from hyperdflash.data.corpus import Corpus
from hyperdflash.drafting.anchors import eligible_anchors
from hyperdflash.preparing.job import PrepareJob
from hyperdflash.targets.load import Target


def dataset_documents(
    job: PrepareJob, target_fingerprint: str, target: Callable[[], Target] | None = None
) -> tuple[dict[str, list[Document]], dict]:
    """Returns the documents of each split and the row statistics; prints the latter. The target answers what has no answer.

    Per split: conversations ``without_document``, and documents ``at_max_length``, most of them cut.
    """
    documents, rows = {}, {}
    for name, (corpus, conversations) in job.splits().items():
        found = conversations()
        documents[name] = own = with_supervised_pair(_encoded(job, corpus, found, target_fingerprint, target))
        given = {document.id.partition("#")[0] for document in own}
        rows[name] = {
            "conversations": len(found),
            "documents": len(own),
            "tokens": sum(len(d.input_ids) for d in own),
            "supervised_tokens": sum(int(d.loss_mask.sum()) for d in own),
            "at_max_length": sum(len(d.input_ids) >= corpus.max_length for d in own),
            "without_document": sum(c.id not in given for c in found),
        }
    for stats in job.corpus.row_stats:
        print("\n".join(stats.lines()))
    return documents, {"sources": [stats.as_record() for stats in job.corpus.row_stats], **rows}


def _encoded(
    job: PrepareJob,
    corpus: Corpus,
    conversations: Sequence[Conversation],
    target_fingerprint: str,
    target: Callable[[], Target] | None,
) -> list[Document]:
    if corpus.responses == "original":
        return [encode(c, job.tokenizer, job.mode, corpus.max_length) for c in conversations]
    settings = job.answer_settings(corpus)
    if corpus.server_model is None:
        return job.target_answers(conversations, target_fingerprint, settings, target)
    path = job.served_file(corpus, target_fingerprint)
    return served_documents(conversations, path, job.tokenizer, settings, job.regenerate_command)


def with_supervised_pair(documents: Sequence[Document]) -> list[Document]:
    """Returns the documents that can hold an anchor and prints how many cannot; ValueError when none can."""
    kept = [d for d in documents if eligible_anchors(d.loss_mask[None], torch.tensor([len(d.loss_mask)])).any()]
    if not kept:
        raise ValueError(
            f"none of {len(documents)} documents has two supervised tokens in a row, so there is nothing to train on: "
            "check corpus.stage1 or corpus.stage2, corpus.max_length and the loss mask of the source"
        )
    if len(kept) < len(documents):
        print(f"{len(documents) - len(kept)} of {len(documents)} documents have no two supervised tokens in a row: dropped")
    return kept
