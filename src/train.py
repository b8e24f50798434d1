"""Trains a drafter: `python -m src.train experiment=stage1` (docs/training.md)."""

from hyperdflash.commands import train as main

if __name__ == "__main__":
    main()
