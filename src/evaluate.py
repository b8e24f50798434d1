"""Measure methods: acceptance by exact replay, or acceptance and speed by decoding.

python -m src.evaluate                                          held-out prompts, by replay
python -m src.evaluate benchmarks=paper mode=[non_think,think_high] temperature=[0,1]    Tables 2 and 3, by decoding
python -m src.evaluate engine=vllm 'engine.servers={AR:http://localhost:8000,MTP3:http://localhost:8001}'    in running servers
"""

from __future__ import annotations

from hyperdflash.commands import evaluate as main

if __name__ == "__main__":
    main()
