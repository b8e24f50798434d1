"""Prepares a dataset once and captures its states, for `python -m src.capture` and for a training whose dataset is missing.

1. rows         conversations of the corpus, per split                             (hyperdflash.data)
2. answers      the corpus's own, the target's or a server's, as token ids         (hyperdflash.answers)
3. documents    those with two supervised tokens in a row, and counts of the rest
4. dataset      one process writes the index of the documents                      (states/dataset.py)
5. states       any number of processes capture shards                             (states/capture.py, states/stream.py)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from omegaconf import DictConfig

from hyperdflash.answers.served_answers import served_documents
from hyperdflash.contracts import Document
from hyperdflash.data.chat import encode
from hyperdflash.drafting.anchors import eligible_anchors
from hyperdflash.identity import dataset_dir
from hyperdflash.leases import exclusive
from hyperdflash.preparing.job import PrepareJob
from hyperdflash.states.dataset import (
    Dataset,
    check_files,
    check_sources,
    is_complete,
    open_dataset,
    record_files,
    write_dataset,
)
from hyperdflash.states.store import make_shards
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target, load_heads
from hyperdflash.training.components import make_parts


def prepare(job: PrepareJob, heads: TargetHeads, target: Callable[[], Target] | None = None) -> Dataset:
    """Opens the dataset of ``job``, and writes it first when it is missing. One process writes it and the others wait.
    ValueError when a local file of the corpus was edited since the dataset was prepared, or while it is."""
    key = job.key(heads)
    directory = dataset_dir(job.name, key.target)
    with exclusive(directory.parent / "leases", directory.name):
        if is_complete(directory):
            check_sources(directory, job.capture_command, job.target["path"])
        else:
            source_files = record_files(job.corpus.source_files())
            documents, rows = dataset_documents(job, key.target, target)
            shards = {name: make_shards(found, job.cache.documents_per_shard) for name, found in documents.items()}
            record = {
                "mask_token_id": job.mask_token_id,
                "documents_per_shard": job.cache.documents_per_shard,
                "decided_by": job.decided_by,
                "answers": {name: asdict(job.answer_settings(corpus)) for name, (corpus, _) in job.splits().items()},
                "rows": rows,
                "source_files": source_files,
            }
            check_files(source_files, "run the command again")
            write_dataset(directory, shards, key, record)
    return open_dataset(directory)


def capture_states(config: DictConfig, *, stay: bool = False) -> None:
    """Writes the dataset and the states of a training. With cache=stream, captures what running trainings need until
    the last of them ends or, with ``stay``, until somebody ends this process."""
    job = PrepareJob(config, make_parts(config).layer_ids)
    job.cache = job.cache.for_capture()
    if job.threads:
        torch.set_num_threads(job.threads)
    heads = load_heads(job.target["path"], job.target["dtype"])
    dataset = prepare(job, heads)
    print("\n".join(dataset.summary()), flush=True)
    store = job.cache.open(dataset.key)
    shards = [shard for found in dataset.shards.values() for shard in found]
    job.cache.fill(shards, store, job.producer, job.layer_ids, stay=stay)
    print(f"the dataset is {dataset.directory}, its states are in {store.directory}")


def dataset_documents(
    job: PrepareJob, target_fingerprint: str, target: Callable[[], Target] | None = None
) -> tuple[dict[str, list[Document]], dict]:
    """Returns the documents of each split and the row statistics; prints the latter. The target answers what has no answer. Per
    split: conversations ``without_document``, and documents ``at_max_length``, most of them cut."""
    documents, rows = {}, {}
    splits = [(name, corpus, conversations()) for name, (corpus, conversations) in job.splits().items()]  # before any answer
    for name, corpus, found in splits:
        settings = job.answer_settings(corpus)
        if corpus.responses == "original":
            encoded = [encode(c, job.tokenizer, job.mode, corpus.max_length) for c in found]
        elif corpus.server_model is None:
            encoded = job.target_answers(found, target_fingerprint, settings, target)
        else:
            path = job.served_file(corpus, target_fingerprint)
            encoded = served_documents(found, path, job.tokenizer, settings, job.regenerate_command)
        documents[name] = own = with_supervised_pair(encoded)
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
