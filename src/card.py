"""Measure a target: model_card.md and model_card.json beside its weights, and the bars on the terminal.

python -m src.card
python -m src.card target=deep
python -m src.card benchmarks.per_domain=10 text_bytes=20000 out=runs/quick-card
"""

from __future__ import annotations

from tiny_target.commands import card as main

if __name__ == "__main__":
    main()
