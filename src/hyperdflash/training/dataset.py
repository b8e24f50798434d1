"""Opens the dataset and the states of a training. Only when the dataset is missing does this process read text or answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from hyperdflash.cli import capture_command
from hyperdflash.identity import dataset_dir, dataset_name, runs_dir
from hyperdflash.options import instantiate
from hyperdflash.states.dataset import Dataset, check_files, check_sources, check_tokenizer, is_complete, open_dataset
from hyperdflash.states.modes import CacheMode
from hyperdflash.states.readers import ShardedStates
from hyperdflash.states.store import StateStore
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint
from hyperdflash.training.run_index import FinishedRun, finished_run

if TYPE_CHECKING:
    from hyperdflash.preparing.job import PrepareJob

POLL_S = 0.2


def check_dataset(config: DictConfig) -> None:
    """Raises ValueError for a wrong option of the corpus when the dataset is missing; reads no weight."""
    found = dataset_dir(dataset_name(config), "?" * 8)
    if not any(is_complete(directory) for directory in found.parent.glob(found.name)):
        from hyperdflash.preparing.job import PrepareJob

        PrepareJob(config)


def check_trained_on(record: Mapping, run: Path, target_path: str) -> None:
    """Raises ValueError when what a finished run was trained on, by its ``record``, is another now: the rows of its dataset or
    of a source file, the tokenizer, or the data of the run that it started from; accepts what is missing."""
    trained, remedy = record["dataset"], f"remove {run} and run the command again"
    directory = runs_dir() / "datasets" / trained["name"]
    if is_complete(directory):
        if check_sources(directory, capture_command(), target_path)["digest"] != trained["digest"]:
            raise ValueError(f"{run} was trained on other rows than {directory} holds: {remedy}")
    elif "sources" in record:
        check_files(record["sources"]["files"], remedy)
        check_tokenizer(target_path, record["sources"]["tokenizer"], run, remedy)
    parent = FinishedRun(run, record).parent
    before = record.get("data", "").partition(" after ")[2]
    if parent and before and (parent / "result.json").exists() and finished_run(parent).record.get("data", before) != before:
        raise ValueError(f"{run} started from {parent}, which was trained anew on other data since: {remedy}")


def training_data(
    config: DictConfig, heads: TargetHeads, layer_ids: Sequence[int]
) -> tuple[Dataset, StateStore, dict[str, ShardedStates]]:
    """Returns the dataset of a training, the store of its states, and the states of each split.

    When the dataset is missing, prepares it if this process may load the target; otherwise waits ``cache.patience_s`` seconds
    for a capture process. ValueError when none has written it, a local file of the corpus was edited since, or the target has
    another tokenizer than the one that encoded the documents. Loads the target when a state is missing.
    """

    @cache
    def job() -> PrepareJob:
        from hyperdflash.preparing.job import PrepareJob

        return PrepareJob(config, layer_ids)

    directory, command = dataset_dir(dataset_name(config), fingerprint(heads)), capture_command()
    mode: CacheMode = instantiate(config.cache)
    if not is_complete(directory) and mode.loads_target:
        from hyperdflash.preparing.dataset import prepare

        print(f"{directory} is missing: this process prepares it", flush=True)
        prepare(job(), heads)
    started = time.monotonic()
    while not is_complete(directory):
        if time.monotonic() - started >= mode.patience_s:
            raise ValueError(f"cache={mode.name} loads no target here, and the dataset {directory} is missing: run `{command}`")
        time.sleep(POLL_S)
    check_sources(directory, command, config.target.path)
    dataset = open_dataset(directory)
    print("\n".join(dataset.summary()), flush=True)
    store = mode.open(dataset.key)
    states = {
        name: mode.states(shards, store, lambda: job().producer(), layer_ids, command=command, name=name)
        for name, shards in dataset.shards.items()
    }
    return dataset, store, states
