"""Target states and baselines through serving engines, for a target that outgrows this process.

    sglang.py vllm.py   clients: how to start, request and read each server
    client.py           what they share: options, checks of every answer
    servers.py          JSON over HTTP, several servers, retries with growing waits
    producer.py         target.engine=... -> the client that fills a cache
    serving.py          timed answers with the engine's own acceptance counters

Four GPUs serve, four train:

    CUDA_VISIBLE_DEVICES=0,1,2,3 python -m sglang.launch_server --model-path $DEEPSEEK_V4_FLASH --tp 4 --port 30000 \\
        --served-model-name v4 --enable-return-hidden-states --chunked-prefill-size -1 --disable-radix-cache &
    V4="target=deepseek_v4_flash target.engine=sglang target.servers=[http://localhost:30000]"
    python -m src.check_engine $V4 reference=heads
    RUN="$V4 corpus=paper corpus.responses=server:v4"
    python -m src.regenerate $RUN server=http://localhost:30000/v1
    CUDA_VISIBLE_DEVICES=4,5,6,7 python -m src.train $RUN cache=stream cache.captures=16 trainer=ddp8 trainer.devices=4
"""
