"""Measures accepted length and speed: by exact replay, by decoding or in running servers (docs/measuring.md)."""

from hyperdflash.commands import evaluate as main

if __name__ == "__main__":
    main()
