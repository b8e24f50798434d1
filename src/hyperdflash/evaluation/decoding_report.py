"""Reports an evaluation by decoding from its rows: the paper's tables, and whether it is lossless."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from hyperdflash.decoding.loop import loop_rounds
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.evaluation.conversations import samples_of, write_evaluation, write_tables
from hyperdflash.evaluation.turn_rows import as_generation
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import Sample
from hyperdflash.report.tables import Block, Table, markdown

GENERATE = "transformers generate()"


def report(rows: Sequence[dict], config: DictConfig, run_ids: dict[str, str], fingerprint: str, eos_id: int) -> None:
    """Writes paper.md with its companions, lossless.md, evaluation.json; ``run_ids`` per method."""
    out, target = Path(config.out), f"{config.target.path} ({fingerprint})"
    written = write_tables(decoded_samples(rows, config.seed, eos_id, run_ids), config, target, list(run_ids))
    greedy = [row for row in rows if row["temperature"] == 0]
    (out / "lossless.md").write_text(lossless_markdown(greedy))
    written += [out / "lossless.md", write_evaluation(config, fingerprint, len(rows), runs=run_ids)]
    print((out / "paper.md").read_text() + "\n" + (out / "lossless.md").read_text())
    print(f"wrote {', '.join(str(path.relative_to(out)) for path in written)} in {out}")


def decoded_samples(rows: Sequence[dict], seed: int, eos_id: int, run_ids: dict[str, str]) -> list[Sample]:
    """Returns a sample per method, benchmark, mode and temperature."""

    def count(name: str, prompts: list[list[dict]]) -> tuple[PromptCounts, list[float]]:
        turns = [[as_generation(turn) for turn in own] for own in prompts]
        generations = [generation for own in turns for generation in own]
        documents = [index for index, own in enumerate(turns) for _ in own]
        num_slots = max((len(r.drafted) for generation in generations for r in generation.rounds), default=0)
        counts = document_counts(loop_rounds(generations, num_slots, documents), len(prompts))
        return PromptCounts(**counts._asdict()), [sum(g.seconds.total for g in own) for own in turns]

    return samples_of(rows, seed, eos_id, run_ids, count)


def lossless_markdown(rows: Sequence[dict]) -> str:
    """Compares greedy texts with AR's per method, lists those that differ, and compares AR with transformers' generate()."""
    if not rows:
        return "No prompts at temperature 0.\n"
    lines, differences = [], []
    for name in rows[0]["methods"]:
        turns = [(row, turn) for row in rows for turn in row["methods"][name]]
        other = [(row, turn["differs"]) for row, turn in turns if "differs" in turn]
        ties = sum(found["tie"] for _, found in other)
        tokens = sum(len(turn["ids"]) for _, turn in turns)
        skipped = sum(not turn.get("compared", True) for _, turn in turns)
        counts = (len(turns), tokens, len(turns) - len(other) - skipped, ties, len(other) - ties, skipped)
        lines.append([name, *(f"{n:,}" for n in counts)])
        for row, found in other:
            what = "tie" if found["tie"] else "**differs**"
            differences.append([name, row["id"], row["mode"], str(found["position"]), f"{found['gap']:.1e}", what])
    header = ["Method", "texts", "tokens", "same", "ties within rounding", "differ", "not compared"]
    blocks: list[Block] = ["### Temperature 0: is the text AR's?", Table(header, lines)]
    if any(line[-1] != "0" for line in lines):
        blocks.append("Not compared: turns after the first difference of a conversation, whose history is another one.")
    if differences:
        blocks.append(Table(["Method", "prompt", "mode", "first at", "gap of logits", ""], differences))
    timed = [row["generate"] for row in rows if "generate" in row]
    if timed:
        ratios = [found["seconds"] / found["own_seconds"] for found in timed]
        same = sum(found["same_text"] for found in timed)
        blocks.append(
            f"{GENERATE} on {len(timed)} of these prompts takes {np.median(ratios):.2f} times as long as AR (median of pairs; "
            f"{min(ratios):.2f} to {max(ratios):.2f}), prefill included; {same} of {len(timed)} texts are the same."
        )
    return markdown(blocks)
