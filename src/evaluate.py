"""Accepted lengths of the methods by exact replay: a table, metrics.json and Figure 1's picture.

python -m src.evaluate
python -m src.evaluate benchmarks.per_domain=300 temperature=[0,1] out=runs/evaluate-large
"""

from __future__ import annotations

from omegaconf import DictConfig

from src.entry import entry_point


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    from src.lit.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    main()
