"""Replaces a corpus's answers by the target's own; a training with the same options finds them (docs/data.md)."""

from hyperdflash.commands import regenerate as main

if __name__ == "__main__":
    main()
