"""Computes a card's thresholds and renders its Markdown from model_card.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hyperdflash.report.tables import markdown_table

KL = ("KL(g, m)", "KL(m, g)", "argmax differs")
MAX_PARAMETERS = 3_700_000
MAX_FILE_BYTES = 8_000_000
MAX_MINUTES = 90
MIN_CONTEXT = 2048


@dataclass(frozen=True)
class Threshold:
    """The condition ``measured`` ``relation`` ``asked``; ``digits`` and ``percent`` set their format."""

    name: str
    relation: Literal["<", "<=", ">", ">="]
    asked: float | None
    measured: float | None
    percent: bool = False
    digits: int = 3

    @property
    def met(self) -> bool:
        if self.asked is None or self.measured is None:
            return False
        if self.relation == "<":
            return self.measured < self.asked
        if self.relation == "<=":
            return self.measured <= self.asked
        return self.measured > self.asked if self.relation == ">" else self.measured >= self.asked

    def written(self, value: float | None) -> str:
        if value is None:
            return "n/a"
        return f"{value:.1%}" if self.percent else f"{value:,.{self.digits}f}"


def thresholds(card: dict) -> list[Threshold]:
    """Returns every threshold of a target from a card's numbers; a figure without a measurement (None) misses its threshold."""
    text, answers, mtp, target = card["text"], card["answers"], card["mtp"], card["target"]
    found = [Threshold("parameters with MTP", "<=", MAX_PARAMETERS, target["parameters"], digits=0)]
    found.append(Threshold("file, bytes", "<=", MAX_FILE_BYTES, target["file_bytes"], digits=0))
    found.append(Threshold("context, tokens", ">=", MIN_CONTEXT, target["context"], digits=0))
    if card["training"]:
        found.append(Threshold("training, minutes", "<=", MAX_MINUTES, card["training"]["minutes"], digits=0))
    for baseline, name in (("xz", "xz"), ("ngram", "the 5-gram")):
        for group, row in text.items():
            found.append(Threshold(f"bits per byte below {name}, {group}", "<", row[baseline], row["target"]))
    found.append(Threshold("code answers that parse", ">=", 0.6, answers["code"]["parses"], percent=True))
    for group, row in answers.items():
        found.append(Threshold(f"answers that end, {group}", ">=", 0.9, row["ended"], percent=True))
    for group, row in answers.items():
        found.append(Threshold(f"answers that end in a loop, {group}", "<=", 0.1, row["looped"], percent=True))
    found.append(Threshold("arithmetic right, seen templates", ">=", 0.5, answers["math seen"]["right"], percent=True))
    # A loop is easy to draft, so the figures without loops stand beside.
    for group in ("code", "code, no loops"):
        found.append(Threshold(f"MTP first slot, {group}", ">", 0.8, mtp[group]["conditional"][0]))
    # The paper does not specify which of the two its Figure 1 shows.
    for kind, group in (("survival", "code"), ("conditional", "code"), ("conditional", "code, no loops")):
        rise = largest_rise(mtp[group][kind])
        found.append(Threshold(f"MTP {kind} falls from slot to slot (largest step), {group}", "<", 0.0, rise))
    return found


def largest_rise(values: list[float | None]) -> float | None:
    """Returns the largest step from one position to the next, below 0 where all fall; None where a value is absent."""
    if len(values) < 2 or None in values:
        return None
    return max(after - before for before, after in pairwise(values))


def markdown(card: dict) -> str:
    """Renders model_card.md."""
    target, made, training, settings = card["target"], card["made_by"], card["training"], card["settings"]
    revision = f"{made['git_revision'] or 'unknown'}{' with uncommitted changes' if made['git_dirty'] else ''}"
    held = [one.met for one in thresholds(card)]
    parts = [
        f"# {target['name']}: a DeepSeek-V4 of {target['parameters'] / 1e6:.2f}M parameters",
        "",
        f"The frozen target of this project's studies. {sum(held)} of {len(held)} thresholds are met (section 1).",
        "",
        f"Made by `{made['command']}` at git revision {revision}; target fingerprint `{target['fingerprint']}`.",
        "",
        *markdown_table(["", "figure"], description_rows(target, training)),
        "",
        "## 1. Thresholds",
        "",
        *markdown_table(["threshold", "asked", "measured", "met"], threshold_rows(card)),
        "",
        "## 2. Held-out text, bits per byte",
        "",
        *markdown_table(
            ["text", "documents", "bytes", "tokens", "nats per token", "target", "xz", f"{settings['ngram_order']}-gram"],
            text_rows(card),
        ),
        "",
        "Nats of all tokens but a document's first, over the UTF-8 bytes of all turns. xz: preset 9 | EXTREME, primed "
        f"with up to {settings['prime_bytes'] / 1e6:g} MB of training text, the domain's own last; what it adds for "
        f"the held-out text. {settings['ngram_order']}-gram: interpolated modified Kneser-Ney over the same tokens, "
        f"trained on the whole train split ({card['ngram_train_tokens']:,} tokens).",
        "",
        "## 3. Greedy answers to the committed prompts",
        "",
        *markdown_table(["prompts", "n", "end", "loop", "tokens", "parse", "parse, of ended", "right"], answer_rows(card)),
        "",
        f"At most {settings['max_new_tokens']} tokens per answer. Loop: the answer's tail repeats with a period of at "
        "most 16 tokens. Parse: `ast.parse` finds at least one statement. Right: the final number is the template's.",
        "",
        "## 4. The native MTP block as shipped, T = 0",
        "",
        *mtp_table(card),
        "",
        "Replay on the greedy answers. Survival: share of all rounds that accepted slots 1..k; conditional: share that "
        "accepted slot k among rounds that accepted the earlier ones and had a slot k.",
        "",
        "## 5. Hyper-connections",
        "",
        *markdown_table(["answers", "tokens", "mean cosine", "gate means", "gate variances", "distance", *KL], path_rows(card)),
        "",
        "Over the tokens of held-out answers. Mean cosine: plain mean over pairs of paths of the final residual. "
        "Distance: mean over tokens of ‖mean-pooled - gated‖ / ‖gated‖ after the final norm. KL in nats between the "
        "two teachers' next-token distributions, g: hc_head, m: mean_pool.",
        "",
        "Cosines of the paths, all answers (norms of the paths: "
        + ", ".join(f"{norm:.1f}" for norm in card["paths"]["all"]["path_norms"])
        + "):",
        "",
        *markdown_table(["path", *map(str, range(len(card["paths"]["all"]["cosines"])))], cosine_rows(card)),
        "",
        "## 6. Samples",
        "",
        *(line for group, found in card["samples"].items() for line in sample_lines(group, found)),
        "Seconds each part took: "
        + ", ".join(f"{name} {value:.0f}" for name, value in card["seconds"].items())
        + f" ({settings['threads']} threads).",
        "",
    ]
    return "\n".join(parts)


def description_rows(target: dict, training: dict | None) -> list[list[str]]:
    rows = [
        ["parameters with MTP", f"{target['parameters']:,}"],
        ["of these MTP", f"{target['mtp_parameters']:,}"],
        ["model.safetensors", f"{target['file_bytes'] / 1e6:.2f} MB"],
        ["layers x hidden x paths", f"{target['layers']} x {target['hidden_size']} x {target['paths']}"],
        ["vocabulary", f"{target['vocab_size']:,}"],
        ["context", f"{target['context']:,}"],
    ]
    if training:
        rows.append(["training", f"{training['tokens']:,} tokens, {training['steps']:,} steps, {training['minutes']:.0f} min"])
        rows.append(["last training loss, nats per token", f"{training['loss']:.3f}, MTP {training['mtp_loss']:.3f}"])
    return rows


def threshold_rows(card: dict) -> list[list[str]]:
    signs = {"<=": "≤", ">=": "≥"}
    return [
        [
            one.name,
            f"{signs.get(one.relation, one.relation)} {one.written(one.asked)}",
            one.written(one.measured),
            "yes" if one.met else "**no**",
        ]
        for one in thresholds(card)
    ]


def text_rows(card: dict) -> list[list[str]]:
    return [
        [name, *(f"{row[key]:,}" for key in ("documents", "bytes", "tokens")), f"{row['nats'] / row['tokens']:.3f}"]
        + [f"{row[key]:.3f}" for key in ("target", "xz", "ngram")]
        for name, row in card["text"].items()
    ]


def answer_rows(card: dict) -> list[list[str]]:
    return [
        [name, str(row["prompts"]), percent(row["ended"]), percent(row["looped"]), number(row["mean_tokens"], 1)]
        + [percent(row[key]) for key in ("parses", "parses_of_ended", "right")]
        for name, row in card["answers"].items()
    ]


def mtp_table(card: dict) -> list[str]:
    slots = max(len(row["survival"]) for row in card["mtp"].values())
    rows = []
    for name, row in card["mtp"].items():
        rows.append([name, f"{row['rounds']:,}", number(row["tau"], 2), "survival", *map(percent, row["survival"])])
        rows.append(["", "", "", "conditional", *map(percent, row["conditional"])])
    return markdown_table(["answers", "rounds", "tau", "slot", *map(str, range(1, slots + 1))], rows)


def path_rows(card: dict) -> list[list[str]]:
    return [
        [
            name,
            f"{row['tokens']:,}",
            f"{row['mean_cosine']:.3f}",
            ", ".join(f"{value:.3f}" for value in row["gate_means"]),
            ", ".join(f"{value:.4f}" for value in row["gate_variances"]),
            f"{row['relative_distance']:.3f}",
            f"{row['kl_hc_head_mean_pool_nats']:.3f}",
            f"{row['kl_mean_pool_hc_head_nats']:.3f}",
            percent(row["argmax_differs"]),
        ]
        for name, row in card["paths"].items()
    ]


def cosine_rows(card: dict) -> list[list[str]]:
    return [[str(i), *(f"{value:.3f}" for value in row)] for i, row in enumerate(card["paths"]["all"]["cosines"])]


def sample_lines(group: str, samples: Sequence[dict]) -> list[str]:
    lines = [f"### {group}", ""]
    for sample in samples:
        ending = "" if sample["ended"] else " (cut at the length limit)"
        lines += ["Prompt:", "", *fenced(sample["question"]), "", f"Answer{ending}:", "", *fenced(sample["text"]), ""]
    return lines


def fenced(text: str) -> list[str]:
    """Encloses ``text`` in a fence that it cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}text", text, fence]


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
