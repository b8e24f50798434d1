"""Writes the model card of an exported drafter: method, target, data, tau with intervals, engine, license."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperdflash.files import read_json
from hyperdflash.report.bootstrap import Estimate, pooled_ratio, resample_prompts
from hyperdflash.report.sweep_runs import flat, read_run
from hyperdflash.report.tables import Table, estimate_text, markdown
from hyperdflash.training.run_index import FinishedRun

HEADER = ("", "temperature", "tau", "prompts")


def model_card(
    run: FinishedRun,
    training: Mapping[str, Any],
    described: Mapping[str, Any],
    served: str,
    license: str,
    evaluation: str | None,
) -> str:
    """Returns README.md; ``training`` is the run's configuration, ``evaluation`` a folder with metrics.json or None."""
    method = training.get("method") or {}
    groups = {name: group for name, group in described["groups"].items() if group}
    settings = "; ".join(
        f"{name}={group['option']} ({', '.join(f'{k} {v}' for k, v in flat(group).items() if k != 'option' and v is not None)})"
        for name, group in groups.items()
    ).replace(" ()", "")
    rows = json.loads((run.directory / "corpus.json").read_text())["train"]
    data = f"{rows['documents']:,} documents, {rows['supervised_tokens']:,} supervised tokens"
    title, trained = method.get("title", run.directory.name), run.record
    facts = {
        "Method": f"{title}; source: {method.get('source', 'this project')}",
        "Differs from its source": method.get("differs", "not stated"),
        "Settings": settings,
        "Target": f"{described['target']['name']}, fingerprint {described['target']['fingerprint']}",
        "Data": f"{trained['dataset']['name']} (digest {trained['dataset']['digest']}): {data}",
        "Training": f"stage {training['stage']}, {trained['steps']:,} steps, seed {training['seed']}: `{trained['command']}`",
        "Served by": served,
    }
    source, measured = _evaluated(run, evaluation) if evaluation else _validated(run)
    header = f"---\nlicense: {license}\nlibrary_name: hyperdflash\ntags: [speculative-decoding, hyperdflash]\n---"
    blocks = [
        header,
        f"# {title}, a drafter for {described['target']['name']}",
        "It drafts tokens, and the target verifies them. With other weights of the target it accepts next to nothing.",
        "\n".join(f"- **{name}:** {value}" for name, value in facts.items()),
        "## Accepted length",
        f"Tokens per round, the target's own included, {source}; 95% bootstrap intervals over prompts.",
        Table(HEADER, measured),
        "## Use",
        '```python\nimport hyperdflash\n\ntarget = hyperdflash.load_target("TARGET")\n'
        'drafter = hyperdflash.load_drafter("THIS FOLDER", target)\n'
        'print(hyperdflash.generate(target, drafter, "What is a closure?").text)\n```',
    ]
    return markdown(blocks)


def _validated(run: FinishedRun) -> tuple[str, list[list[str]]]:
    trained = read_run(run.directory)
    found = pooled_ratio(trained.counts.emitted, trained.counts.rounds, resample_prompts(trained.domains)).estimates()
    counts = {group: trained.domains.count(group) or len(trained.domains) for group in found}
    rows = [[group, "0", estimate_text(estimate), str(counts[group])] for group, estimate in found.items()]
    return "by exact replay of the validation prompts that chose the checkpoint", rows


def _evaluated(run: FinishedRun, folder: str) -> tuple[str, list[list[str]]]:
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise ValueError(f"evaluation={folder} has no metrics.json: run `python -m src.evaluate out={folder}` first")
    metrics = read_json(path, "run `python -m src.evaluate` again", "runs", "rows")
    methods = [name for name, its in metrics["runs"].items() if its == run.directory.name]
    rows = [row for row in metrics["rows"] if row["method"] in methods and (row["metric"], row["over"]) == ("tau", "prompts")]
    if not rows:
        raise ValueError(f"evaluation={folder} measured {', '.join(metrics['runs'].values())}, not {run.directory.name}")
    numbers = [Estimate(*(math.nan if row[k] is None else row[k] for k in ("value", "low", "high"))) for row in rows]
    texts = [[r["group"], f"{r['temperature']:g}", estimate_text(e), str(r["n"])] for r, e in zip(rows, numbers, strict=True)]
    return "of the evaluation's prompts, which the training never saw", texts
