"""Train a tiny DeepSeek-V4 target on the embedded corpus.

    python -m src.pretrain                      the shipped one anew, into runs/targets/tiny (out=assets/tiny writes over it)
    python -m src.pretrain recipe=deep          another one by the same recipe, into runs/targets/deep (then: target=deep)

A killed run goes on where its last checkpoint was. `python -m src.card` measures what came out.
"""

from __future__ import annotations

from tiny_target.commands import pretrain as main

if __name__ == "__main__":
    main()
