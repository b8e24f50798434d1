"""Are the states that a serving engine returns the target's? Captures through an engine need a passing check.

python -m src.check_engine target.engine=sglang target.servers=[http://localhost:30000]
python -m src.check_engine target.engine=vllm target.servers=[http://localhost:8000] target.states_dir=/dev/shm/hidden_states
python -m src.check_engine target=deepseek_v4_flash target.engine=sglang target.servers=[...] reference=heads
"""

from __future__ import annotations

from hyperdflash.commands import check_engine as main

if __name__ == "__main__":
    main()
