"""Fill the cache with the states that a training would need, and train nothing.

python -m src.capture experiment=stage1
python -m src.capture experiment=stage2 conditioning=layers reducer=fc
"""

from __future__ import annotations

from omegaconf import DictConfig

from src.entry import entry_point


@entry_point("train")
def main(config: DictConfig) -> None:
    from src.lit.states import capture_states

    capture_states(config)


if __name__ == "__main__":
    main()
