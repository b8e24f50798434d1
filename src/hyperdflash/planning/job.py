"""Says what a training costs before anyone pays for it: cache, memory, steps, rates, hours, GPUs to serve and to train.

python -m src.plan target=deepseek_v4_flash corpus=paper drafter=paper blocks=paper optim=adamw trainer=ddp8
python -m src.plan target=deepseek_v4_flash corpus=paper drafter=paper blocks=paper trainer=ddp8 cache=stream mean_tokens=2048

Takes every option of src.train. Reads no weights: counts parameters and FLOPs on the meta device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import entry_point
from hyperdflash.identity import CONF, class_name, config_folder
from hyperdflash.settings import natural_int, positive_int, positive_number

if TYPE_CHECKING:
    from hyperdflash.planning.plan import Plan
    from hyperdflash.targets.adapter import TargetConfig

JSON_BYTES = 20 + 20 + 8 + 24 + 4  # per number: received, as text, its place in a list, a Python float, fp32
TURNS = {"mt-bench": 2}  # user turns of a benchmark's prompts; the others have one


def num_examples(mixture: dict | list) -> int:
    """Counts one stage's examples: {domain: count}, or entries with a ``count`` or a total to ``fill_to``."""
    if isinstance(mixture, dict):
        return sum(mixture.values())
    total = 0
    for entry in mixture:
        total = max(total, entry["fill_to"]) if "fill_to" in entry else total + entry["count"]
    return total


def measuring_tokens(config: DictConfig) -> dict[str, float]:
    """Returns ``Plan.measuring`` as check_engine, parity and evaluate (of the paper's benchmarks) default to it."""
    from hyperdflash.contracts import DOMAINS
    from hyperdflash.data.benchmark_rows import BENCHMARKS

    check, parity, evaluate, benchmarks = (
        OmegaConf.load(Path(CONF) / f"{name}.yaml") for name in ("check_engine", "parity", "evaluate", "benchmarks/paper")
    )
    defined = [OmegaConf.load(Path(CONF) / "method" / f"{name}.yaml").method for name in evaluate.methods]
    most = math.inf if config.per_benchmark is None else positive_int("per_benchmark", config.per_benchmark)
    answers = sum(min(BENCHMARKS[name].rows, most) * TURNS.get(name, 1) for name in benchmarks.names)
    num_modes = 1 if isinstance(config.modes, str) else len(config.modes)
    turn = positive_number("evaluate_tokens", config.evaluate_tokens)
    return {
        "check_tokens": check.prompts * check.max_length,
        "methods": sum(len(method.get("native_steps", [None])) for method in defined),
        "parity_tokens": parity.benchmarks.per_domain * len(DOMAINS) * parity.benchmarks.max_new_tokens,
        "tokens": answers * turn * num_modes * len(evaluate.temperature),
    }


def client_bytes(config: DictConfig, model: TargetConfig) -> float:
    """Returns the host memory of one process that asks an engine for states of the mean length: embedding and head, the shard
    at hand and the one it writes, and SGLang's answers on their way."""
    document = config.mean_tokens * model.hc_mult * model.hidden_size
    held = 2 * model.vocab_size * model.hidden_size + 2 * config.cache.documents_per_shard * document
    answers = config.target.concurrency * max(1, len(config.target.servers)) * document
    in_json = JSON_BYTES * answers if config.target.engine == "sglang" else 0
    return held * (2 if config.target.dtype == "bf16" else 4) + in_json


def make_plan(config: DictConfig) -> Plan:
    """Returns the plan of conf/plan.yaml with the training's own groups; ValueError where they do not fit together."""
    from dataclasses import replace

    import torch

    from hyperdflash.drafting.draft_model import DrafterParts
    from hyperdflash.drafting.flops import step_flops
    from hyperdflash.launch.launcher import num_ranks
    from hyperdflash.options import instantiate
    from hyperdflash.planning.plan import Plan, Stage, assumptions
    from hyperdflash.planning.step_memory import StepSizes, step_memory
    from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, read_sizes, total_parameters
    from hyperdflash.targets.heads import TargetHeads
    from hyperdflash.targets.load import read_config
    from hyperdflash.training.checkpoints import KEEP

    mean_tokens = positive_number("mean_tokens", config.mean_tokens)
    natural_int("answer_tokens", config.answer_tokens)
    machine = assumptions("machine", config.machine)
    conditioning, reducer, drafter, blocks, kl, optim = (
        instantiate(config[name]) for name in ("conditioning", "reducer", "drafter", "blocks", "kl", "optim")
    )
    if not drafter.reads_conditioning:
        raise ValueError(
            "src.plan plans for a block drafter, got drafter=mtp: leave it out, its states and answers are the same"
        )
    target, trainer, taps = config.target, config.trainer, len(conditioning.layer_ids)
    folder = config_folder(target.path)
    if folder != target.path:
        print(f"{target.path} is not there yet: planning with {folder}/config.json")
    model, sizes = read_config(folder), read_sizes(folder)
    with torch.device("meta"):
        heads = TargetHeads(model)
    module = drafter.build(DrafterParts(conditioning=conditioning, reducer=reducer, heads=heads, mask_token_id=0))
    trainable = sum(p.numel() for p in module.parameters())
    accumulated = trainer.get("accumulate_grad_batches", 1)
    documents, num_taught = optim.batch_size * accumulated, kl.positions if kl.alpha > 0 else 0

    step = StepSizes(
        documents=optim.batch_size,
        tokens=config.corpus.max_length,
        anchors=blocks.num_anchors,
        vocab_size=model.vocab_size,
        target_width=model.hidden_size,
        num_paths=model.hc_mult,
        tapped=model.hc_mult * (1 + taps),
        trainable=trainable,
        num_taught=num_taught,
        optimizer_bytes=8 if optim.name == "adamw" else 4,  # Muon: one moment
        compute_bytes=2 if "mixed" in str(trainer.precision) else 4,
        state_bytes=4 if config.cache.dtype == "fp32" else 2,
    )
    saving, half = replace(drafter, gradient_checkpointing=True), max(1, optim.batch_size // 2)
    fewer, accumulate = replace(step, documents=half), f"trainer.batch_size={half}"
    accumulate += f" trainer.accumulate_grad_batches={2 * accumulated}"
    checkpointing = "drafter.gradient_checkpointing=true"
    smaller = ((accumulate, drafter, fewer), (checkpointing, saving, step), (f"{checkpointing} {accumulate}", saving, fewer))
    flops = step_flops(
        drafter,
        target_width=model.hidden_size,
        vocab_size=model.vocab_size,
        num_tokens=round(mean_tokens),
        num_anchors=min(blocks.num_anchors, max(1, round(config.answer_tokens or mean_tokens))),
        num_taught=num_taught,
        reducer_weights=sum(p.numel() for p in module.reducer.parameters() if p.dim() > 1),
    )
    rates = dict(config.rates) | ({} if target.engine == "sglang" else {"json_tokens_per_s": None})
    return Plan(
        machine=machine,
        rates=assumptions("rates", rates),
        stages=tuple(
            Stage(
                name=f"stage {number}",
                examples=num_examples(OmegaConf.to_container(config.corpus[f"stage{number}"], resolve=True)),
                mean_tokens=mean_tokens,
                answer_tokens=config.answer_tokens if config.corpus.responses != "original" else 0,
                epochs=trainer.max_epochs,
            )
            for number in (1, 2)
        ),
        measuring=measuring_tokens(config),
        engine=target.engine,
        processes=config.cache.get("captures") or machine.capture_processes,
        client_bytes=client_bytes(config, model) if target.engine else 0.0,
        weights_bytes=1e9 * config.target_weights_gb if config.target_weights_gb else checkpoint_bytes(sizes),
        loaded_bytes=total_parameters(sizes) * (2 if target.dtype == "bf16" else 4),
        disk_bytes=checkpoint_bytes(sizes),
        active=active_parameters(sizes),
        num_paths=model.hc_mult,
        width=model.hidden_size,
        vocab_size=model.vocab_size,
        taps=taps,
        ranks=num_ranks(trainer),
        documents=documents,
        step_flops=flops.total * documents,
        memory=step_memory(drafter, step),
        smaller=tuple((name, sum(step_memory(*given).values())) for name, *given in smaller),
        codec=config.cache.dtype,
        cache=class_name(config.cache),
        stream_gb=config.cache.get("budget_gb"),
        checkpoint_bytes=trainable * (KEEP * (4 + step.optimizer_bytes) + 4),  # and the best one's weights
    )


@entry_point("plan")
def main(config: DictConfig) -> None:
    from hyperdflash.planning.plan_report import plan_markdown, plan_record
    from hyperdflash.report.results import write_report

    plan = make_plan(config)
    text = plan_markdown(plan)
    write_report(config.out, {"plan.md": text + "\n", "plan.json": plan_record(plan)})
    print(f"{text}\n\nwrote plan.md and plan.json in {config.out}")
