"""One training run from a configuration: parts, data, drafter, trainer, record.

1. parts        everything that is cheap, checked with the drafter's shapes on the meta device: a mistake fails here
2. directory    a finished run is reported and left alone; a broken one goes on from its last checkpoint
3. documents    conversations -> the target's own answers (kept on disk)
4. states       captured where the cache misses them; the target is loaded only if something is missing
5. fit          best checkpoint by validation tau
6. record       result.json last: a directory that has it is finished
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from src.entry import command_of, decided_by, run_name, train_run_dir
from src.lit.data import TargetStatesData
from src.lit.lineage import check_target, load_drafter_weights, parent_of, read_record
from src.lit.loggers import make_loggers
from src.lit.module import DraftingModule
from src.lit.parts import make_parts
from src.lit.progress import StepBar
from src.lit.record import environment_record, write_json
from src.lit.states import cached_data, open_store
from src.target.load import fingerprint, load_heads


def train(config: DictConfig) -> dict:
    """Run or resume one training; returns the record in result.json."""
    parts = make_parts(config)
    run = train_run_dir(config)
    result = run / "result.json"
    if result.exists():
        record = read_record(run)
        check_target(record["target"], fingerprint(load_heads(config.target.path)), run)
        print(f"{run} is finished (validation tau {record['val_tau']:.3f}): nothing to do")
        return record
    init_from = parent_of(config, run)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)

    heads = load_heads(config.target.path)
    if init_from is not None:
        check_target(read_record(init_from)["target"], fingerprint(heads), init_from)
    store = open_store(config, heads)
    data = cached_data(config, parts, heads, store)

    drafter = parts.build(heads, config.target, config.seed)
    if init_from is not None:
        load_drafter_weights(drafter, init_from, store.key.target)
    trainable = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    print(f"{run_name(config)}: {trainable:,} trainable parameters", flush=True)
    module = DraftingModule(
        drafter=drafter,
        heads=heads,
        blocks=parts.blocks,
        weights=parts.loss,
        kl=parts.kl,
        optim=parts.optim,
        seed=config.seed,
        meta={"target": store.key.target, "name": run_name(config)},
    )
    run.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run / "config.yaml", resolve=True)
    write_json(run / "environment.json", environment_record(command_of("src.train")))
    directory = run / "checkpoints"
    shared = {"dirpath": directory, "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/tau", mode="max", **shared)
    latest = ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **shared)
    trainer = L.Trainer(
        **{k: v for k, v in config.trainer.items() if k != "threads"},
        default_root_dir=run,
        logger=make_loggers(config.logger, run, run_name(config)),
        callbacks=[best, latest, StepBar()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    last = directory / "last.ckpt"
    if last.exists():
        print(f"resuming from {last}")
    data_module = TargetStatesData(data["train"], data["validation"], batch_size=parts.optim.batch_size, seed=config.seed)
    trainer.fit(module, data_module, ckpt_path=last if last.exists() else None, weights_only=True)
    record = {
        "name": run_name(config),
        "val_tau": float(best.best_model_score),
        "best_checkpoint": str(Path(best.best_model_path).relative_to(run.resolve())),
        "steps": trainer.global_step,
        "trainable_parameters": trainable,
        "target": store.key.target,
        "init_from": str(init_from) if init_from else None,
        "command": command_of("src.train"),
        "decided_by": decided_by(config),
    }
    if not trainer.is_global_zero:
        return record
    write_json(result, record)
    print(f"{run}: best validation tau {record['val_tau']:.3f}")
    return record
