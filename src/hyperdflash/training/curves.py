"""The curves of one run: acceptance by drafted position at the best checkpoint."""

import re

KINDS = ("survival", "conditional")


def acceptance_metric(kind: str, domain: str | None = None) -> str:
    """Returns the name of a rate of KINDS, over all prompts or those of ``domain``: acceptance/survival_math."""
    return "_".join([f"acceptance/{kind}", *([re.sub(r"\W", "_", domain)] if domain else [])])


def acceptance_rows(record: dict) -> list[dict[str, float]]:
    """Returns a row per drafted position of validation.json: ``position``, and every ``acceptance_metric``; a rate without a
    round is left out."""
    prompts = record["prompts"]
    rows: list[dict[str, float]] = [{"position": k + 1} for k in range(len(prompts[0]["survived"]))]
    for domain in (None, *sorted({prompt["domain"] for prompt in prompts})):
        own = [prompt for prompt in prompts if domain in (None, prompt["domain"])]
        for k, row in enumerate(rows):
            survived, reached = (sum(prompt[field][k] for prompt in own) for field in ("survived", "reached"))
            counts = zip(KINDS, (sum(prompt["rounds"] for prompt in own), reached), strict=True)
            row |= {acceptance_metric(kind, domain): survived / count for kind, count in counts if count}
    return rows
