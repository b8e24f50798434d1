"""What a training will cost, before anyone pays for it: cache, memory, steps, rates, hours, GPUs to serve and to train.

python -m src.plan target=deepseek_v4_flash corpus=paper drafter=paper blocks=paper optim=adamw trainer=ddp8
python -m src.plan target=deepseek_v4_flash corpus=paper drafter=paper blocks=paper trainer=ddp8 cache=stream mean_tokens=2048

Takes every option of src.train. Reads no weight: parameters and FLOPs are counted on the meta device.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from src.entry import CONF, class_name, entry_point
from src.settings import natural_int, positive_int, positive_number

if TYPE_CHECKING:
    from transformers import DeepseekV4Config

    from src.report.plan import Plan
    from src.report.v4_sizes import V4Sizes

FLASH = "assets/deepseek_v4_flash"  # the released config.json, for a plan before the download


def target_config(config: DictConfig) -> DeepseekV4Config:
    """Of the checkpoint; DeepSeek-V4-Flash's released one while that is not there yet."""
    from src.target.load import read_config

    flash = OmegaConf.load(Path(CONF) / "target" / "deepseek_v4_flash.yaml").path
    if config.target.path == flash and not (Path(flash) / "config.json").exists():
        print(f"{flash} is not there yet: planning with {FLASH}/config.json")
        return read_config(FLASH)
    return read_config(config.target.path)


def v4_sizes(model: DeepseekV4Config) -> V4Sizes:
    """transformers' spelling of a configuration as the official one."""
    from dataclasses import fields

    from src.report.v4_sizes import V4Sizes

    ratios = [model.compress_rates.get(kind, 0) for kind in model.layer_types]
    ratios += [0] * (model.num_hidden_layers + 1 - len(ratios))  # the MTP block's
    own = {"compress_ratios": ratios, "num_hash_layers": model.mlp_layer_types.count("hash_moe")}
    return V4Sizes(**{f.name: own.get(f.name) if f.name in own else getattr(model, f.name) for f in fields(V4Sizes)})


def num_examples(mixture: dict | list) -> int:
    """Of one stage: {domain: count}, or entries with a ``count``, or with the ``fill_to`` that they bring it to."""
    if isinstance(mixture, dict):
        return sum(mixture.values())
    total = 0
    for entry in mixture:
        total = max(total, entry["fill_to"]) if "fill_to" in entry else total + entry["count"]
    return total


def make_plan(config: DictConfig) -> Plan:
    """conf/plan.yaml and the training's own groups -> Plan; ValueError where they do not fit together."""
    from dataclasses import replace

    import torch
    from hydra.utils import instantiate

    from src.drafter.config import DrafterConfig
    from src.drafter.flops import step_flops
    from src.drafter.model import build_drafter
    from src.lit.launcher import num_ranks
    from src.report.plan import Machine, Plan, Rates, Stage, TargetSize, Training
    from src.report.step_memory import StepSizes, step_memory
    from src.report.v4_sizes import active_parameters, checkpoint_bytes
    from src.target.heads import TargetHeads

    positive_number("mean_tokens", config.mean_tokens)
    natural_int("answer_tokens", config.answer_tokens)
    conditioning, reducer, drafter, blocks, kl, optim = (
        instantiate(config[name]) for name in ("conditioning", "reducer", "drafter", "blocks", "kl", "optim")
    )
    if not isinstance(drafter, DrafterConfig):
        raise ValueError(
            "src.plan plans for a block drafter, got drafter=mtp: leave it out, its states and answers are the same"
        )
    model = target_config(config)
    sizes = v4_sizes(model)
    with torch.device("meta"):
        heads = TargetHeads(model)
    module = build_drafter(conditioning=conditioning, reducer=reducer, drafter=drafter, heads=heads, mask_token_id=0)
    trainable = sum(p.numel() for p in module.parameters())
    reducer_weights = sum(p.numel() for p in module.reducer.parameters() if p.dim() > 1)
    autocast = "mixed" in str(config.trainer.precision)
    accumulated = config.trainer.get("accumulate_grad_batches", 1)
    num_taught = kl.positions if kl.alpha > 0 else 0
    positive_int("machine.capture_processes", config.machine.capture_processes)

    sizes_of_step = StepSizes(
        documents=optim.batch_size,
        tokens=config.corpus.max_length,
        anchors=blocks.num_anchors,
        vocab_size=model.vocab_size,
        target_width=model.hidden_size,
        num_paths=model.hc_mult,
        tapped=model.hc_mult * (1 + len(conditioning.layer_ids)),
        trainable=trainable,
        num_taught=num_taught,
        optimizer_bytes=8 if optim.name == "adamw" else 4,  # Muon: one moment
        compute_bytes=2 if autocast else 4,
        state_bytes=4 if config.cache.dtype == "fp32" else 2,
        head_bytes=2 if config.target.dtype == "bf16" else 4,
    )
    saving, half = replace(drafter, gradient_checkpointing=True), max(1, optim.batch_size // 2)
    accumulate = f"trainer.batch_size={half} trainer.accumulate_grad_batches={2 * accumulated}"
    fewer = replace(sizes_of_step, documents=half)
    smaller = (
        (accumulate, step_memory(drafter, fewer).total),
        ("drafter.gradient_checkpointing=true", step_memory(saving, sizes_of_step).total),
        (f"drafter.gradient_checkpointing=true {accumulate}", step_memory(saving, fewer).total),
    )
    step = step_flops(
        drafter,
        target_width=model.hidden_size,
        vocab_size=model.vocab_size,
        num_tokens=round(config.mean_tokens),
        num_anchors=min(blocks.num_anchors, max(1, round(config.answer_tokens or config.mean_tokens))),
        num_taught=num_taught,
        reducer_weights=reducer_weights,
    )
    documents = optim.batch_size * accumulated
    stages = tuple(
        Stage(
            name=f"stage {number}",
            examples=num_examples(OmegaConf.to_container(config.corpus[f"stage{number}"], resolve=True)),
            mean_tokens=config.mean_tokens,
            answer_tokens=config.answer_tokens if config.corpus.responses != "original" else 0,
            epochs=config.trainer.max_epochs,
        )
        for number in (1, 2)
    )
    from_json = config.target.engine == "sglang"
    transport = config.machine.capture_processes * config.rates.json_tokens_per_s if from_json else None
    return Plan(
        machine=Machine(**{k: v for k, v in config.machine.items() if k != "capture_processes"}),
        rates=Rates(**{k: v for k, v in config.rates.items() if k != "json_tokens_per_s"}, transport_tokens_per_s=transport),
        target=TargetSize(
            name=str(config.target.path),
            weights_bytes=1e9 * config.target_weights_gb if config.target_weights_gb else checkpoint_bytes(sizes),
            active=active_parameters(sizes),
            num_paths=model.hc_mult,
            width=model.hidden_size,
            taps=len(conditioning.layer_ids),
        ),
        stages=stages,
        training=Training(
            ranks=num_ranks(config.trainer),
            documents=documents,
            step_flops=step.total * documents,
            memory=step_memory(drafter, sizes_of_step),
            smaller=smaller,
            codec=config.cache.dtype,
            cache=class_name(config.cache),
            stream_gb=config.cache.get("budget_gb"),
        ),
    )


@entry_point("plan")
def main(config: DictConfig) -> None:
    from src.lit.record import write_json
    from src.report.plan_tables import plan_markdown, plan_record

    plan, out = make_plan(config), Path(config.out)
    text = plan_markdown(plan)
    print(text)
    write_json(out / "plan.json", plan_record(plan))
    (out / "plan.md").write_text(text + "\n")
    print(f"\nwrote plan.md and plan.json in {out}")


if __name__ == "__main__":
    main()
