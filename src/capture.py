"""Fill the cache with the states that a training would need, and train nothing.

python -m src.capture experiment=stage1
python -m src.capture experiment=stage2 method=dflash
python -m src.capture cache=stream cache.budget_gb=50 experiment=stage1       beside trainings: what they need, as they need it
                                      (`python -m src.train cache=stream cache.captures=N` starts N of these itself)

Several of them, on one host or on many, share the work of one cache directory. A killed one is resumed by the same command,
or by those beside it.
"""

from __future__ import annotations

from hyperdflash.commands import capture as main

if __name__ == "__main__":
    main()
