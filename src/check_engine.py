"""Compares the states of a serving engine with the target's; captures through it need a passing check (docs/targets.md)."""

from hyperdflash.commands import check_engine as main

if __name__ == "__main__":
    main()
