"""What the methods accept and how fast they are: by exact replay, or by decoding with them.

python -m src.evaluate                                          held-out prompts, by replay
python -m src.evaluate benchmarks=paper mode=[non_think,think_high] temperature=[0,1]    Tables 2 and 3, by decoding
python -m src.evaluate engine=vllm 'engine.servers={AR:http://localhost:8000,MTP3:http://localhost:8001}'    in running servers
"""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import class_name, entry_point


@entry_point("evaluate")
def main(config: DictConfig) -> None:
    from omegaconf import OmegaConf

    from hyperdflash.settings import one_of

    one_of("by", config.by, ("replay", "decoding", None))
    if not OmegaConf.is_list(config.temperature):
        raise ValueError(f"temperature must be a list such as [0,1], got {config.temperature!r}")
    if config.engine.name is not None:
        if config.by is not None:
            raise ValueError(f"engine={config.engine.name} asks running servers: leave by={config.by} out, or engine")
        from hyperdflash.evaluation.engine_evaluation import evaluate_in_engine

        evaluate_in_engine(config)
    elif config.by == "decoding" or (config.by is None and class_name(config.benchmarks) == "paper_benchmarks"):
        from hyperdflash.evaluation.decoding import evaluate_by_decoding

        evaluate_by_decoding(config)
    else:
        from hyperdflash.evaluation.evaluation import evaluate_by_replay

        evaluate_by_replay(config)


if __name__ == "__main__":
    main()
