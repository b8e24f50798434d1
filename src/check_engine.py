"""Compares the states of a serving engine with the target's (docs/deepseek_v4_flash.md)."""

from hyperdflash.commands import check_engine as main

if __name__ == "__main__":
    main()
