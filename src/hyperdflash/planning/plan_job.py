"""Says what a training costs before anyone pays for it: reads the configuration, and renders the Plan. Takes every option of
src.train and reads no weights: it counts parameters and FLOPs on the meta device."""

from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf

from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.flops import step_flops
from hyperdflash.identity import class_name, config_folder
from hyperdflash.launch.launcher import num_ranks
from hyperdflash.options import instantiate
from hyperdflash.planning.plan import GIB, Plan, assumptions, bytes_text, hours_text
from hyperdflash.planning.step_memory import StepSizes, step_memory
from hyperdflash.planning.v4_sizes import active_parameters, checkpoint_bytes, read_sizes, total_parameters
from hyperdflash.report.results import write_report
from hyperdflash.report.tables import GAP, Block, Table, markdown
from hyperdflash.settings import natural_int, positive_number
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import read_config
from hyperdflash.training.checkpoints import KEEP

JSON_BYTES = 20 + 20 + 8 + 24 + 4  # per number: received, as text, its place in a list, a Python float, fp32
CODECS = ("bf16", "fp8")  # of the report


def num_examples(mixture: dict | list) -> int:
    """Counts one stage's examples: {domain: count}, or entries with a ``count``."""
    return sum(mixture.values() if isinstance(mixture, dict) else (entry["count"] for entry in mixture))


def make_plan(config: DictConfig) -> Plan:
    """Returns the plan of conf/plan.yaml with the training's own groups; ValueError where they do not fit together."""
    mean_tokens = positive_number("mean_tokens", config.mean_tokens)
    natural_int("answer_tokens", config.answer_tokens)
    machine = assumptions("machine", config.machine)
    conditioning, reducer, drafter, blocks, kl, optim = (
        instantiate(config[name]) for name in ("conditioning", "reducer", "drafter", "blocks", "kl", "optim")
    )
    if not drafter.reads_conditioning:
        raise ValueError("src.plan plans for a block drafter, got drafter=mtp: leave it out, its states and answers are equal")
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
    documents = optim.batch_size * accumulated
    num_taught = (drafter.num_slots if kl.positions is None else kl.positions) if kl.alpha > 0 else 0
    weight_bytes = 2 if target.dtype == "bf16" else 4

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
    # A process that asks an engine holds embedding and head, the shard at hand and the one it writes, and SGLang's answers.
    document, sglang = mean_tokens * model.hc_mult * model.hidden_size, target.engine == "sglang"
    held = 2 * model.vocab_size * model.hidden_size + 2 * config.cache.documents_per_shard * document
    in_json = JSON_BYTES * target.concurrency * max(1, len(target.servers)) * document if sglang else 0
    return Plan(
        machine=machine,
        rates=assumptions("rates", {**config.rates, **({} if sglang else {"json_tokens_per_s": None})}),
        stages={f"stage {n}": num_examples(OmegaConf.to_container(config.corpus[f"stage{n}"], resolve=True)) for n in (1, 2)},
        mean_tokens=mean_tokens,
        answer_tokens=config.answer_tokens if config.corpus.responses != "original" else 0,
        epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        engine=target.engine,
        processes=config.cache.get("captures") or machine.capture_processes,
        client_bytes=held * weight_bytes + in_json if target.engine else 0.0,
        weights_bytes=1e9 * config.target_weights_gb if config.target_weights_gb else checkpoint_bytes(sizes),
        loaded_bytes=total_parameters(sizes) * weight_bytes,
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


def plan_record(plan: Plan) -> dict:
    found = vars(plan) | {"machine": vars(plan.machine), "rates": vars(plan.rates)}
    found["cache_bytes"] = {codec: plan.cache_bytes(codec) for codec in CODECS}
    return found | {"commands": [command._asdict() for command in plan.commands()], "problems": plan.problems()}


def plan_markdown(plan: Plan) -> str:
    """Returns what does not fit, one row to compare with other plans, each command's cost, and what is assumed."""
    problems = plan.problems()
    blocks: list[Block] = ["**Does not fit:**", "\n".join(f"- {p}" for p in problems)] if problems else ["Everything fits."]
    header = ["states by", "mean tokens", "tokens", *(f"cache, {codec}" for codec in CODECS)]
    short = [plan.engine or "this process", f"{plan.mean_tokens:,.0f}", f"{plan.tokens:,.0f}"]
    short += [*(bytes_text(plan.cache_bytes(codec)) for codec in CODECS)]
    short += [f"{plan.read_gb_s:.1f} GB/s", hours_text(plan.capture_hours(plan.examples))]
    short += [hours_text(sum(plan.training_hours(n, overlap) for n in plan.stages.values())) for overlap in (True, False)]
    rows = []
    for command in plan.commands():
        time = GAP if command.hours is None else hours_text(command.hours) + command.note
        memory = [f"{size / GIB:.1f} GiB {of}" for size, of in ((command.gpu, "per GPU"), (command.host, "host")) if size]
        disk = bytes_text(command.disk) if command.disk else GAP
        rows.append([command.name, command.counted, time, disk, ", ".join(memory) or GAP])
    parts = {**plan.memory, f"**of {plan.machine.gpu_gib:g}**": sum(plan.memory.values())}
    assumed = {"machine": vars(plan.machine), "rates": vars(plan.rates)}
    given = ", ".join(f"{group}.{name} {value}" for group, own in assumed.items() for name, value in own.items())
    budget = f" With cache=stream never more than {plan.stream_gb:g} GB on disk." if plan.stream_gb else ""
    blocks += [
        "### In short",
        Table([*header, "reading", "states", "training", "without overlap"], [short]),
        f"A step reads {bytes_text(plan.step_read_bytes)} of states for all ranks.{budget}",
        "### Each command of docs/deepseek_v4_flash.md",
        Table(["Command", "counted", "time", "disk", "memory"], rows),
        "### GPU memory of a training rank",
        Table(["Part", "GiB"], [[name, f"{size / GIB:.2f}"] for name, size in parts.items()]),
        f"Assumed: {given}. At its share of the GPUs' peak the drafter's step takes {1e3 * plan.step_s:.0f} ms; a capture "
        "without a given rate takes 2 FLOPs per active parameter and token, in this process on one GPU at a time; states are "
        "read while the step before computes (hours without that stand beside). Counted, not assumed: tokens, bytes, steps, "
        "FLOPs, memory (planning/step_memory.py).",
    ]
    return markdown(blocks).rstrip("\n")


def write_plan(config: DictConfig) -> None:
    plan = make_plan(config)
    text = plan_markdown(plan)
    write_report(config.out, {"plan.md": text + "\n", "plan.json": plan_record(plan)})
    print(f"{text}\n\nwrote plan.md and plan.json in {config.out}")
