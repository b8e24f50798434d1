"""One training run from a configuration: parts, data, drafter, trainer, record.

1. parts        all cheap parts are made and checked, with the drafter's shapes on the meta device: a mistake fails here
2. directory    a finished run is reported and left alone; an unfinished one continues from its last undamaged checkpoint
3. ranks        with several devices, one process each; every rank runs steps 4 to 7
4. dataset      opened; when it is missing, rank 0 prepares it first, which alone reads text
5. states       read from the cache; the target is loaded only when a state is missing
6. fit          the best checkpoint is that of the highest validation tau
7. record       result.json is written last: a directory that has it is finished
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import command_of, quiet_libraries
from hyperdflash.contracts import Blocks, Document
from hyperdflash.identity import decided_by, run_name, train_run_dir, within_runs
from hyperdflash.launch.launcher import Ranks, check_devices, cluster_environment, is_rank, launch_ranks, must_launch, num_ranks
from hyperdflash.leases import exclusive
from hyperdflash.options import instantiate
from hyperdflash.record import STARTS, add_start, write_json
from hyperdflash.targets.load import fingerprint, load_heads
from hyperdflash.training.checkpoints import BEST, AtomicCheckpoints, Checkpoints, newest_checkpoint, step_of
from hyperdflash.training.components import Parts, make_parts
from hyperdflash.training.curves import draw_curves
from hyperdflash.training.datamodule import TargetStatesData
from hyperdflash.training.dataset import check_dataset, check_trained_on, training_data
from hyperdflash.training.epoch_plan import TrainingOrder
from hyperdflash.training.loggers import MetricsCSV, StepBar, check_wandb, make_loggers, wandb_labels
from hyperdflash.training.module import DraftingModule
from hyperdflash.training.run_index import PARENT, check_target, data_of, finished_run, load_drafter_weights, parent_of

LOCK_S = 5.0  # the ranks of a killed run end a moment after its starter


def train(config: DictConfig) -> dict:
    """Runs or resumes one training; returns the content of result.json."""
    quiet_libraries()  # Lightning's import has set the levels of its loggers
    parts = make_parts(config)
    run = train_run_dir(config)
    if (run / "result.json").exists():
        record = finished_run(run, "dataset", "val_tau").record
        check_target(record["target"], fingerprint(load_heads(config.target.path, config.target.dtype)), run)
        check_trained_on(record, run, config.target.path)
        print(f"{run} is finished (validation tau {record['val_tau']:.3f}): nothing to do")
        return record
    check_devices(config.trainer)
    check_wandb(config.logger)
    check_dataset(config)
    if must_launch(config.trainer, config.cache.get("captures", 0)):
        parent_of(config, run)
        with exclusive_run(run):
            launch_ranks(config, run)
        return finished_run(run).record
    patience_s = instantiate(config.cache).patience_s
    alone = nullcontext() if is_rank() else exclusive_run(run)  # the process that started a rank has the run
    with alone, Ranks(num_ranks(config.trainer), config.trainer.accelerator, patience_s) as ranks:
        with ranks.rank_zero_first():
            init_from = parent_of(config, run)
        return fit(config, parts, run, init_from, ranks)


@contextmanager
def exclusive_run(run: Path) -> Iterator[None]:
    """Raises ValueError when another process trains the same run; a training that never began leaves no folder."""
    busy = f"{run} is being trained by another process: wait for it, or stop it first"
    try:
        with exclusive(run, "lock", wait_s=LOCK_S, busy=busy):
            try:
                yield
            finally:
                if not (run / STARTS).exists():
                    (run / PARENT).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # it holds something
            run.rmdir()


def fit(config: DictConfig, parts: Parts, run: Path, init_from: Path | None, ranks: Ranks) -> dict:
    """Runs steps 4 to 7 in every rank; returns the content of result.json."""
    name, command, options = run_name(config), command_of("src.train"), config.trainer
    if options.threads:
        torch.set_num_threads(options.threads)
    # Losses and replay multiply in the heads' dtype: fp32, but under autocast, whose products are in bf16 anyway.
    heads = load_heads(config.target.path, config.target.dtype if options.precision == "bf16-mixed" else "fp32")
    with ranks.rank_zero_first():
        checkpoint = newest_checkpoint(run / "checkpoints")
        if starts := init_from is not None and checkpoint is None:  # a checkpoint holds all that the parent gave
            check_target(finished_run(init_from).record["target"], fingerprint(heads), init_from)
        dataset, store, data = training_data(config, heads, parts.layer_ids)
    first_step = step_of(checkpoint) if checkpoint else 0

    drafter = parts.build(heads, config.target, config.seed, dataset.mask_token_id)
    if starts:
        load_drafter_weights(drafter, init_from, store.key.target)
    trainable = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    data_module = make_data(config, parts, data, drafter.num_slots, ranks.world_size, first_step)
    steps = len(data_module.order)
    meta = {"target": store.key.target, "engine": store.key.engine, "data": dataset.digest, "steps": steps, "name": name}
    kept = {"clip": options.gradient_clip_val, "meta": meta, "last_checkpoint": checkpoint}
    module = DraftingModule(drafter, heads, parts.objective, parts.optim, **kept)
    if options.precision == "64-true":
        module.double()  # Lightning would do so after it has read a checkpoint's weights, into fp32
    loggers = make_loggers(config.logger, run, name, **wandb_labels(config))
    if ranks.rank == 0:
        print(f"{name}: {trainable:,} trainable parameters, {steps:,} steps", flush=True)
        OmegaConf.save(config, run / "config.yaml", resolve=True)
        write_json(run / "corpus.json", dataset.rows)
        add_start(run, command)
        for logger in loggers:
            if isinstance(logger, MetricsCSV):
                logger.restart_at(first_step)
        if checkpoint:
            print(f"resuming from {checkpoint}", flush=True)
    saver = Checkpoints(run, every_steps=options.checkpoint_every_steps, every_s=options.checkpoint_every_s, command=command)
    callbacks = [saver, StepBar()]
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        from hyperdflash.data.tokenizer import load_tokenizer  # shows texts
        from hyperdflash.training.wandb_record import WandbRecord  # imports wandb

        tokenizer = load_tokenizer(config.target.path)
        callbacks.append(WandbRecord(config, run, parent=init_from, cache_key=store.key, tokenizer=tokenizer))
    trainer = make_trainer(options, run, loggers, callbacks, steps, data_module.order.steps_per_epoch)
    started = time.monotonic()
    trainer.fit(module, data_module, ckpt_path=checkpoint, weights_only=True)
    record = {
        "name": name,
        "val_tau": saver.best_tau,
        "best_checkpoint": f"checkpoints/{BEST}",
        "steps": trainer.global_step,
        "seconds": {"fit": time.monotonic() - started, "validation": saver.validation_s},  # since the last resume
        "trainable_parameters": trainable,
        "target": store.key.target,
        "dataset": {"name": dataset.directory.name, "digest": dataset.digest},
        "data": data_of(run, dataset.digest),
        "sources": {"files": dataset.record["source_files"], "tokenizer": dataset.key.tokenizer},
        "init_from": within_runs(init_from) if init_from else None,
        "command": command,
        "decided_by": decided_by(config),
    }
    if ranks.rank == 0:
        if config.logger.curves:
            draw_curves(run)
        write_json(run / "result.json", record)
        print(f"{run}: best validation tau {record['val_tau']:.3f}")
    return record


def make_data(
    config: DictConfig, parts: Parts, data: dict, num_slots: int, world_size: int, first_step: int = 0
) -> TargetStatesData:
    """Returns the loaders of ``data``, the states of each split, with the training order and blocks of a configuration."""
    accumulate = config.trainer.accumulate_grad_batches
    batch_size = parts.optim.batch_size * world_size * accumulate
    length = {"epochs": config.trainer.max_epochs, "max_steps": config.trainer.max_steps}
    order = TrainingOrder(data["train"].lengths, batch_size=batch_size, seed=config.seed, **length)

    def draw(document: Document, generator: torch.Generator) -> Blocks:
        length = torch.tensor([len(document.input_ids)])
        return parts.blocks.sample(document.input_ids[None], document.loss_mask[None], length, num_slots + 1, generator)

    options = {"seed": config.seed, "accumulate": accumulate, "first_step": first_step}
    return TargetStatesData(data["train"], data["validation"], order, draw, parts.objective.counts, **options)


def make_trainer(
    trainer: DictConfig, run: Path, loggers: list[Logger], callbacks: list[L.Callback], steps: int, steps_per_epoch: int
) -> L.Trainer:
    """Makes a trainer of one epoch of ``steps`` steps, so that a run is always resumed in the middle of that epoch."""
    interval, double = trainer.val_check_interval, trainer.precision == "64-true"
    if isinstance(interval, float):  # a share of an epoch
        interval = max(1, round(steps_per_epoch * interval))
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy_of(trainer),
        precision=None if double else trainer.precision,
        plugins=[AtomicCheckpoints(), cluster_environment(), *([Double()] if double else [])],
        max_epochs=1,
        val_check_interval=min(interval, steps),
        log_every_n_steps=trainer.log_every_n_steps,
        default_root_dir=run,
        logger=loggers,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def strategy_of(trainer: DictConfig) -> str | Strategy:
    """Returns DDP without an exchange of buffers per forward: the heads are frozen, and ranks may validate unequal numbers."""
    if num_ranks(trainer) == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


class Double(DoublePrecision):
    """Computes in fp64; states stay in the cache's dtype until the drafter converts them."""

    def convert_input(self, data: object) -> object:
        return data
