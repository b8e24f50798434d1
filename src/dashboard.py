"""Makes the W&B workspace over a project's trainings (docs/training.md)."""

from hyperdflash.commands import dashboard as main

if __name__ == "__main__":
    main()
