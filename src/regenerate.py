"""Replace a corpus's answers by the target's own, and do nothing else; a training with the same options finds them.

python -m src.regenerate experiment=stage1                                             the target in this process
python -m src.regenerate experiment=stage1 mode=think_high corpus.temperature=1
python -m src.regenerate corpus=paper target=deepseek_v4_flash \\
    corpus.responses=server:deepseek-v4-flash server=http://localhost:8000/v1          an OpenAI-compatible server

Stopped and run again, it asks for what is missing.
"""

from __future__ import annotations

from hyperdflash.commands import regenerate as main

if __name__ == "__main__":
    main()
