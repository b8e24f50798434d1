"""Says what a training takes in time, disk and memory, and what does not fit (docs/deepseek_v4_flash.md)."""

from hyperdflash.commands import plan as main

if __name__ == "__main__":
    main()
