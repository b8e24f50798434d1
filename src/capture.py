"""Writes the dataset and the target states that a training reads, and trains nothing (docs/data.md)."""

from hyperdflash.commands import capture as main

if __name__ == "__main__":
    main()
