"""What the methods accept and how fast they are: by exact replay, or by decoding with them.

python -m src.evaluate                                          held-out prompts, by replay
python -m src.evaluate benchmarks=paper mode=[non_think,think_high] temperature=[0,1]    Tables 2 and 3, by decoding
"""

from __future__ import annotations

from omegaconf import DictConfig

from src.entry import entry_point


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    from omegaconf import OmegaConf

    from src.settings import one_of

    one_of("by", config.by, ("replay", "decoding", None))
    if not OmegaConf.is_list(config.temperature):
        raise ValueError(f"temperature must be a list such as [0,1], got {config.temperature!r}")
    if config.by == "decoding" or (config.by is None and config.benchmarks._target_.endswith("PaperBenchmarks")):
        from src.lit.decoding import evaluate_by_decoding

        evaluate_by_decoding(config)
    else:
        from src.lit.evaluation import evaluate_by_replay

        evaluate_by_replay(config)


if __name__ == "__main__":
    main()
