"""A real engine from end to end, on a CPU: `make engine`, or python -m benchmarks.engine.run [tokens=N]

1. target      a thin DeepSeek-V4 of the shapes that vLLM is written for, pretrained for minutes; vLLM's copy in official names
2. capture     the states of vLLM's server against the target's in this process, then training data through the same server
3. train       an hc_gate drafter on these states; exported to=dflash
4. serve       greedy texts of 50 prompts by vLLM, plain and with the drafter, one and four at a time
5. compare     every draft of the engine with this project's Drafter on the same states, and acceptance with replay's

Every check prints what it measured and its bar. runs/engine/record.json and record.md hold them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.engine.target import write_for_vllm
from hyperdflash.checks.engine_states import check_prompts
from hyperdflash.contracts import TargetStates
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.generation.api import load_drafter
from hyperdflash.report.tables import Table, markdown
from hyperdflash.targets.load import load_heads

HERE = Path(__file__).parent
ENGINE = Path(".venv-engine/bin/python").absolute()
PORT, NUM_PROMPTS, MAX_TOKENS, LONG = 8731, 50, 24, 280
CORPUS = [
    "corpus.stage1={chat: 32, code: 16, math: 16}", "corpus.validation=4", "corpus.max_new_tokens=48", "corpus.max_length=320",
]  # fmt: skip
TRAIN = ["trainer.max_epochs=12", "optim.batch_size=8", "blocks.num_anchors=32", "trainer.threads=1", "logger=csv"]


class Record:
    """The checks of one run, in order."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def check(self, name: str, measured: str, bar: str, passed: bool) -> None:
        self.rows.append({"check": name, "measured": measured, "bar": bar, "passed": bool(passed)})
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {measured} (bar: {bar})", flush=True)


def main(tokens: str = "286720") -> int:
    if not torch.cpu._is_avx512_bf16_supported():
        print("this CPU lacks AVX-512 with bf16: plain torch (v4_kernels.py) takes the place of vLLM's kernels for V4")
    runs, record, started = Path(os.environ.get("HYPERDFLASH_RUNS", "runs")).absolute() / "engine", Record(), time.monotonic()
    os.environ["HYPERDFLASH_RUNS"] = str(runs)
    target = runs / "targets" / "engine"
    if not (target / "config.json").exists():
        small = ["settings.bf16=false", "settings.compile=false", "settings.context=512", "settings.loop_share=0", "threads=2"]
        command("src.pretrain", "recipe=engine", f"recipe.tokens={tokens}", *small)
    served = write_for_vllm(target, runs / "vllm")
    folder = runs / "exported"
    if not folder.exists():
        capture_and_train(target, served, folder, record)
    prompts = fifty_prompts(target)
    plain, drafted = generate(runs, served, None, prompts), generate(runs, served, folder, prompts)
    check_texts(prompts, plain, drafted, record)
    check_drafts(target, folder, prompts, drafted, record)
    write(runs, record, time.monotonic() - started)
    return sum(not row["passed"] for row in record.rows)


def command(module: str, *words: str) -> str:
    """Runs a command of this project and returns what it prints; SystemExit with its end where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{module} failed: {done.stdout[-2000:]}")
    return done.stdout


def environment(runs: Path) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own |= {"HYPERDFLASH_PRE_HC_HEAD": "1", "VLLM_CACHE_ROOT": str(runs / "cache"), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own


@contextmanager
def server(runs: Path, served: Path):
    """A vLLM server that writes states, until the block ends; yields its process."""
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    speculative["draft_model_config"] = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4]}}
    transfer = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"}
    transfer["kv_connector_extra_config"] = {"shared_storage_path": str(runs / "states")}
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(served), "--port", str(PORT), "--host", "127.0.0.1"]
    words += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    words += ["--max-num-batched-tokens", "4096", "--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
    words += ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]
    with open(runs / "server.log", "w") as log:
        process = subprocess.Popen(
            [ENGINE, *words], stdout=log, stderr=log, env=environment(runs), start_new_session=True, cwd=runs
        )
    try:
        wait_for(process, f"http://127.0.0.1:{PORT}/v1/models", runs / "server.log")
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen, url: str, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server did not start: {log} ends with {log.read_text()[-1000:]}")


def capture_and_train(target: Path, served: Path, folder: Path, record: Record) -> None:
    runs = folder.parent
    engine = [f"target.path={target}", "target.engine=vllm", f"target.servers=[http://127.0.0.1:{PORT}]"]
    with server(runs, served):
        words = [sys.executable, "-m", "src.check_engine", *engine, "reference=target", "prompts=12"]
        done = subprocess.run(words, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("http")), done.stderr[-300:])
        numbers = line.partition(": ")[2]
        bar = "cosine 0.98 per path, error 20%, next token 90%"
        record.check("states of the server against the target in process", numbers, bar, done.returncode == 0)
        command("src.train", *engine, *CORPUS, *TRAIN)
    run = next(path.parent for path in sorted((runs / "train").glob("*/result.json")))
    command("src.export", f"run={run}", "to=dflash", f"out={folder}")


def fifty_prompts(target: Path) -> list[list[int]]:
    """Returns held-out prompts; every fifth has several texts, so that it is longer than two windows of the target."""
    prompts = [prompt.tolist() for prompt in check_prompts(load_tokenizer(target), "non_think", NUM_PROMPTS, 400)]
    for i in range(0, len(prompts), 5):
        while len(prompts[i]) < LONG:
            prompts[i] = prompts[i] + prompts[(i + len(prompts[i])) % len(prompts)][1:]
    return [prompt[:600] for prompt in prompts]


def generate(runs: Path, served: Path, draft: Path | None, prompts: list[list[int]]) -> dict:
    out = runs / f"{'drafted' if draft else 'plain'}.pt"
    job = {"model": str(served), "draft": draft and str(draft), "prompts": prompts, "max_tokens": MAX_TOKENS, "num_slots": 6}
    (runs / "job.json").write_text(json.dumps(job | {"temperature": 0, "out": str(out)}))
    with open(runs / "worker.log", "w") as log:
        words = [ENGINE, HERE / "worker.py", runs / "job.json"]
        if subprocess.run(words, stdout=log, stderr=log, env=environment(runs), cwd=runs).returncode:
            raise SystemExit(f"vLLM failed: {(runs / 'worker.log').read_text()[-2000:]}")
    return torch.load(out)


def check_texts(prompts: list, plain: dict, drafted: dict, record: Record) -> None:
    for kind, name in (("alone", "one at a time"), ("batched", "four at a time")):
        same = sum(a == b for a, b in zip(plain[kind], drafted[kind], strict=True))
        measured = f"{same} of {len(prompts)} equal to plain decoding"
        record.check(f"greedy texts with the drafter, {name}", measured, "all", same == len(prompts))


@torch.no_grad()
def check_drafts(target: Path, folder: Path, prompts: list[list[int]], drafted: dict, record: Record) -> None:
    """Compares slot by slot, and the accepted tokens of the engine's rounds with those of a replay of the same texts."""
    heads = load_heads(target, "fp32")
    drafter = load_drafter(folder).drafter
    slots = equal = long_slots = long_equal = 0
    engine, replay, gaps, first = [0, 0], [0, 0], [], None  # accepted, rounds
    for number, prompt in enumerate(prompts):
        text = prompt + drafted["alone"][number]
        states = torch.zeros(1, len(text), heads.num_paths, heads.hidden_size, dtype=torch.bfloat16)
        anchors, drafts = [], []
        for one in drafted["rounds"][number]:
            kept = one["positions"] < len(text)
            states[0, one["positions"][kept]] = one["states"][kept].unflatten(-1, (heads.num_paths, -1))
            anchors.append(next_anchor(anchors, drafts, text) if anchors else len(prompt))
            drafts = one["drafts"]
        inside = [i for i, anchor in enumerate(anchors) if anchor < len(text) - 1]
        logits = own_logits(drafter, heads, text, states, range(len(prompt), len(text) - 1))  # [A, S, V]
        own = logits.argmax(-1)
        for i in inside:
            row = anchors[i] - len(prompt)
            theirs = torch.tensor(drafted["rounds"][number][i]["drafts"])
            assert text[anchors[i]] == drafted["rounds"][number][i]["anchor_id"]
            same = own[row] == theirs
            slots, equal = slots + len(same), equal + int(same.sum())
            first = bool(same.all()) if first is None else first
            if len(prompt) > 256:
                long_slots, long_equal = long_slots + len(same), long_equal + int(same.sum())
            gaps += (logits[row].max(-1).values - logits[row].gather(1, theirs[:, None])[:, 0])[~same].tolist()
            engine[0] += accepted(theirs.tolist(), text, anchors[i])
            engine[1] += 1
        anchor = len(prompt)
        while anchor < len(text) - 1:
            count = accepted(own[anchor - len(prompt)].tolist(), text, anchor)
            replay, anchor = [replay[0] + count, replay[1] + 1], anchor + count + 1
    record.check("drafts equal to our Drafter's on the same states", share(equal, slots), "98%", equal >= 0.98 * slots)
    record.check("the same beyond 256 tokens", share(long_equal, long_slots), "98%", long_equal >= 0.98 * long_slots)
    record.check("drafts of the first round of the first generation", "equal" if first else "different", "equal", first)
    gap = max(gaps, default=0)
    record.check("our logits' gap where drafts differ", f"at most {gap:.3f}", "0.5", gap <= 0.5)
    tau, predicted = (1 + count / rounds for count, rounds in (engine, replay))
    measured = f"tau {tau:.4f} in {engine[1]} rounds, replay {predicted:.4f}; vLLM's counters: {drafted['counters']}"
    record.check("accepted length against replay's", measured, "2%", abs(tau / predicted - 1) <= 0.02)


def own_logits(drafter, heads, text: list[int], states: torch.Tensor, anchors: range) -> torch.Tensor:
    """Returns our Drafter's logits [A, S, V] at every anchor, from the states that the engine gave its own."""
    ids, at = torch.tensor([text]), torch.tensor([list(anchors)])
    loss_mask, lengths = torch.ones_like(ids, dtype=torch.bool), torch.tensor([len(text)])
    document = TargetStates(("text",), ("chat",), ids, loss_mask, lengths, states)
    return drafter.head.logits(drafter.slots(document, heads, at, at > 0), heads)[0].dense()


def next_anchor(anchors: list[int], drafts: list[int], text: list[int]) -> int:
    """Returns the anchor of the round after the one that proposed ``drafts``."""
    return anchors[-1] + accepted(drafts, text, anchors[-1]) + 1


def accepted(drafts: list[int], text: list[int], anchor: int) -> int:
    """Counts the drafts that the text goes on with."""
    count = 0
    while count < len(drafts) and anchor + 1 + count < len(text) and drafts[count] == text[anchor + 1 + count]:
        count += 1
    return count


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.2%})"


def write(runs: Path, record: Record, seconds: float) -> None:
    kernels = "vLLM's own" if torch.cpu._is_avx512_bf16_supported() else "benchmarks/engine/v4_kernels.py"
    facts = {"command": "make engine", "engine": "vllm-cpu 0.32.0", "kernels of V4": kernels, "seconds": round(seconds)}
    (runs / "record.json").write_text(json.dumps(facts | {"checks": record.rows}, indent=1) + "\n")
    rows = [[row["check"], row["measured"], row["bar"], "yes" if row["passed"] else "NO"] for row in record.rows]
    told = "; ".join(f"{name}: {value}" for name, value in facts.items())
    blocks = ["# A real engine, end to end", f"{told}.", Table(["check", "measured", "bar", "met"], rows)]
    (runs / "record.md").write_text(markdown(blocks))


if __name__ == "__main__":
    sys.exit(main(**dict(word.split("=", 1) for word in sys.argv[1:])))
