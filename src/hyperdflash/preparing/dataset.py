"""Prepares a dataset once and captures its states, for `python -m src.capture` and for a training whose dataset is missing.

1. documents    conversations, answers, token ids                     (preparing/documents.py)
2. dataset      one process writes the index of the documents         (states/dataset.py)
3. states       any number of processes capture shards                (states/capture.py, states/stream.py)
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from omegaconf import DictConfig

from hyperdflash.identity import dataset_dir
from hyperdflash.leases import exclusive
from hyperdflash.preparing.documents import dataset_documents
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

    ValueError when a local file of the corpus was edited since the dataset was prepared, or while it is.
    """
    key = job.key(heads)
    directory = dataset_dir(job.name, key.target)
    with exclusive(directory.parent / "leases", directory.name):
        if is_complete(directory):
            check_sources(directory, job.capture_command)
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
