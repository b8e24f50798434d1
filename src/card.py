"""Measures a tiny target and writes its model card: `python -m src.card target=deep` (docs/targets.md)."""

from tiny_target.commands import card as main

if __name__ == "__main__":
    main()
