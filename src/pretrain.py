"""Trains a tiny DeepSeek-V4 target on the embedded corpus: `python -m src.pretrain recipe=deep` (docs/targets.md)."""

from tiny_target.commands import pretrain as main

if __name__ == "__main__":
    main()
