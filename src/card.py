"""Measure a target: model_card.md and model_card.json in runs/card/<target>, and its thresholds on the terminal.

python -m src.card
python -m src.card target=deep
python -m src.card benchmarks.per_domain=10 text_bytes=20000 out=runs/quick-card
python -m src.card out=assets/tiny                          writes over the card that ships beside the weights
"""

from __future__ import annotations

from tiny_target.commands import card as main

if __name__ == "__main__":
    main()
