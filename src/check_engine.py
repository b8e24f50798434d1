"""Are the states that a serving engine returns the target's? Captures through an engine need a passing check.

python -m src.check_engine target.engine=sglang target.servers=[http://localhost:30000]
python -m src.check_engine target.engine=vllm target.servers=[http://localhost:8000] target.states_dir=/dev/shm/hidden_states
python -m src.check_engine target=deepseek_v4_flash target.engine=sglang target.servers=[...] reference=heads
"""

from __future__ import annotations

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("check_engine")
def main(config: DictConfig) -> None:
    from hyperdflash.checks.engine_states import check_engine

    check_engine(config)


if __name__ == "__main__":
    main()
