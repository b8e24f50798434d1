"""Checks that training, replay and decoding give a drafter the same logits and tau; exit code 1 if not (docs/measuring.md)."""

from hyperdflash.commands import parity as main

if __name__ == "__main__":
    main()
