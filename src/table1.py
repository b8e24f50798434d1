"""Print the paper's Table 1 from real modules."""

from __future__ import annotations

from hyperdflash.drafting.table1 import main

if __name__ == "__main__":
    main()
