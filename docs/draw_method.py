"""Draw the picture of the method that the README shows: ``python docs/draw_method.py`` writes docs/method.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GRAY = "#22303c", "#5f6d79"
FROZEN, TRAINED, TOKEN, STATE, GOOD, BAD = "#e4ebf1", "#ffe7c2", "#ffffff", "#a9c9e8", "#cdebd8", "#f7d3cb"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 9) -> None:
    """A rounded box with its lower left corner at (x, y) and ``text`` in its middle."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=0.9)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.1, "color": INK}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2, **style))


def note(axes: Axes, x: float, y: float, text: str, *, side: str = "center", bold: bool = False) -> None:
    axes.text(x, y, text, ha=side, va="center", size=8, color=INK if bold else GRAY, weight="bold" if bold else "normal")


def draw(axes: Axes) -> None:
    """Left: the target and the tap. Middle: gate and block drafter. Right: verification."""
    note(axes, 1.75, 5.75, "frozen target", bold=True)
    words = ("How", "many", "days", "?")
    for i, word in enumerate(words):
        box(axes, 0.15 + 0.8 * i, 0.15, 0.7, 0.42, word, TOKEN, 8)
    arrow(axes, (1.75, 0.6), (1.75, 1.0))
    box(axes, 0.15, 1.0, 3.2, 1.0, "layers with hyper-connections\n(4 residual paths)", FROZEN)
    arrow(axes, (1.75, 2.0), (1.75, 2.3))
    for path in range(4):
        for i in range(4):
            box(axes, 0.22 + 0.8 * i, 2.32 + 0.2 * path, 0.58, 0.15, "", STATE)
    arrow(axes, (1.75, 3.15), (1.75, 3.5))
    box(axes, 0.15, 3.5, 3.2, 0.55, "hc_head: paths collapse by its gate", FROZEN)
    arrow(axes, (1.75, 4.05), (1.75, 4.4))
    box(axes, 0.15, 4.4, 3.2, 0.5, "norm, LM head", FROZEN)
    arrow(axes, (1.75, 4.9), (1.75, 5.15))
    box(axes, 1.3, 5.15, 0.9, 0.4, "3", TOKEN, 8)

    note(axes, 5.0, 2.05, "the residual before\nhc_head, every path")
    arrow(axes, (3.45, 2.72), (4.15, 2.72))
    box(axes, 4.15, 2.4, 1.7, 0.65, "inherited gate\n(Eq. 1)", TRAINED)
    arrow(axes, (3.35, 3.78), (5.0, 3.05), -0.25)
    note(axes, 4.85, 3.85, "first weights")
    arrow(axes, (5.85, 2.72), (6.6, 2.72))
    note(axes, 6.2, 2.45, "context")

    note(axes, 8.75, 5.75, "trained drafter, one pass", bold=True)
    block = ("3", "mask", "mask", "mask", "mask", "mask", "mask")
    for i, word in enumerate(block):
        box(axes, 6.62 + 0.61 * i, 0.95, 0.54, 0.42, word, TOKEN if i == 0 else FROZEN, 7.5)
    note(axes, 6.9, 0.72, "anchor")
    arrow(axes, (8.75, 1.4), (8.75, 1.75))
    box(axes, 6.6, 1.75, 4.25, 1.85, "draft layers\nattention to context and own block, SwiGLU", TRAINED)
    arrow(axes, (8.75, 3.6), (8.75, 3.9))
    box(axes, 6.6, 3.9, 4.25, 0.5, "draft head (the target's LM head)", FROZEN)
    arrow(axes, (8.75, 4.4), (8.75, 4.7))
    drafts = ("weeks", "are", "21", "days", "and", "so")
    for i, word in enumerate(drafts):
        box(axes, 7.23 + 0.61 * i, 4.7, 0.54, 0.42, word, TOKEN, 7.5)
    note(axes, 8.75, 0.35, "loss: cross-entropy by position, and KL to the target on the first slots")

    note(axes, 13.1, 5.75, "verification by the target, one pass", bold=True)
    arrow(axes, (10.95, 4.91), (11.5, 4.91))
    for i, word in enumerate(drafts):
        box(axes, 11.55 + 0.61 * i, 4.7, 0.54, 0.42, word, GOOD if i < 4 else BAD, 7.5)
    note(axes, 12.7, 4.45, "accepted")
    note(axes, 14.55, 4.45, "rejected")
    box(axes, 13.99, 3.6, 0.6, 0.42, ".", GOOD, 9)
    note(axes, 13.85, 3.81, "the target's own token:", side="right")
    arrow(axes, (14.29, 4.35), (14.29, 4.02))
    note(axes, 13.3, 3.0, "tau = 5 tokens in this round;\nthe text is the target's own, whatever is drafted")
    box(axes, 12.2, 1.55, 0.4, 0.28, "", FROZEN)
    note(axes, 12.75, 1.69, "frozen", side="left")
    box(axes, 12.2, 1.1, 0.4, 0.28, "", TRAINED)
    note(axes, 12.75, 1.24, "trained", side="left")


def main() -> None:
    figure, axes = plt.subplots(figsize=(15.4, 6.0))
    axes.set_xlim(0, 15.4)
    axes.set_ylim(0, 6.0)
    axes.axis("off")
    draw(axes)
    figure.savefig(Path(__file__).with_name("method.png"), dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
