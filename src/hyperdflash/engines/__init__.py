"""Target states and baselines through serving engines, for a target that outgrows this process.

    sglang.py vllm.py   clients: how to start, request and read each server
    client.py           what they share: options, checks of every answer
    servers.py          JSON over HTTP, several servers, retries with growing waits
    producer.py         target.engine=... -> the client that fills a cache
    serving.py          timed answers with the engine's own acceptance counters

The commands stand in docs/deepseek_v4_flash.md.
"""
