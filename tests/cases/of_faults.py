"""Faults from outside: the sentence names the file and the cure; and checks that cost nothing come first."""

import ctypes
import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import wandb
from safetensors.torch import load_file, save_file

from tests.cases.harness import CAPTURED, STAGE1, Case, cut, edit, remove, rows, write

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n"
GENERATE = "generate prompt=Hi target.path=target threads=1 max_new_tokens=2"
WINDOW_2_GIB = bytes.fromhex("28b52ffd 00 a8 010000")  # a zstd frame: magic, descriptor, window, an empty last block
SAVING = "trainer.checkpoint_every_steps=1"
SAVED = "train $mini " + SAVING
BEST = "runs/train/*/checkpoints/best.ckpt"
NO_STATES = ["runs/cache/*/??"]
TWO_ROWS = [{"conversations": [{"role": "user", "content": f"Ask {i}."}, {"role": "assistant", "content": "Yes."}]} for i in range(2)]


def not_a_number(name: str, value: float = float("nan")) -> Callable[[Path], None]:
    """Plants a NaN, or another ``value``, in one tensor of the target."""

    def change(here: Path) -> None:
        file = here / "target" / "model.safetensors"
        tensors = load_file(file)
        tensors[name].view(-1)[3] = value
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def replaced(pattern: str, content: str) -> Callable[[Path], None]:
    """Writes other content into each file of ``pattern``."""
    return lambda here: [path.write_text(content) for path in here.glob(pattern)]


def read_only(name: str) -> Callable[[Path], None]:
    """Makes a folder that nobody may write."""
    return lambda here: (here / name).mkdir(parents=True, exist_ok=True) or (here / name).chmod(0o555)


@contextmanager
def as_any_user() -> Iterator[None]:
    """Lays down the two capabilities by which root passes over the permissions of files."""
    libc, header, before = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(before[0] & ~0b110, *before[1:])  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    yield
    assert libc.capset(header, before) == 0


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Lets no file grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_locks() -> AbstractContextManager:
    """Refuses locks as NFS without its daemon does."""
    return patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))


def forget_wandb(here: Path) -> None:
    """Ends W&B's process, which keeps the environment of its start."""
    wandb.teardown()


def without(name: str) -> Callable[[Path], None]:
    """Leaves one tensor out of the target."""

    def change(here: Path) -> None:
        file = here / "target" / "model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, metadata={"format": "pt"})

    return change


INFINITY = float("inf")
WANDB = {"WANDB_MODE": None, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # nobody listens there
EVALUATE = "evaluate target.path=target threads=1 methods=[mtp] temperature=[0] benchmarks=paper benchmarks.names=[mbpp] benchmarks.max_new_tokens=4"
NORM = "model.layers.2.input_layernorm.weight"

CASES = [
    Case("a damaged dataset", "train $mini", 1, ["dataset.json is damaged"], after=[CAPTURED], make=[cut("runs/datasets/*/dataset.json")], absent=["runs/train/*/checkpoints"]),
    Case("runs is a file", "train $mini", 1, ["error: runs", "a file stands", "HYPERDFLASH_RUNS"], make=[write("runs", "")]),
    Case("runs is read-only", "train $mini", 1, ["error: runs/", "let this user write there"], make=[read_only("runs")], within=as_any_user, absent=["runs/*"]),
    Case("a run's folder is read-only", "train $mini", 1, ["error: runs/train/", "let this user write there"], after=[CAPTURED], make=[read_only("runs/train")], within=as_any_user, absent=["runs/train/*"]),
    Case("rows that this user may not read", "capture $mini", 1, ["rows.jsonl", "let this user read"], make=[lambda here: (here / "rows.jsonl").chmod(0)], within=as_any_user),
    Case("runs below a file", "train $mini", 1, ["error: rows.jsonl/runs", "a file stands"], environment={"HYPERDFLASH_RUNS": "rows.jsonl/runs"}),
    Case("no space for states", "capture $mini", 1, ["no space left for runs/cache/", "free some"], within=lambda: disk_of(40_000), absent=["runs/cache/*/??/*"]),
    Case("no space for a checkpoint", "train $mini", 1, ["error: runs/train/", "checkpoints/", "free some space"], after=[CAPTURED], within=lambda: disk_of(100_000), absent=["runs/train/*/checkpoints/step*", "runs/train/*/result.json"]),
    Case("locks that are refused", "train $mini", 1, ["a file system without file locks"], after=[CAPTURED], within=without_locks, absent=["runs/train/*/result.json"]),
    Case("a W&B key that is malformed", "train $mini logger.wandb=auto", 1, ["W&B: AuthenticationError", "this run logs offline", "no file at rows.jsonl"], make=[remove("rows.jsonl")], environment={**WANDB, "WANDB_API_KEY": "malformed"}, check=forget_wandb),
    Case("a W&B key without a network", "train $mini logger.wandb=auto", 0, ["W&B: URLError", "this run logs offline"], after=[CAPTURED], exist=["runs/train/*/wandb/offline-run-*", "runs/train/*/result.json"], environment={**WANDB, "WANDB_API_KEY": "0" * 40}, check=forget_wandb),
    Case("a prompt beyond the context", "generate target.path=target prompt=$long", 1, ["exceed the target's context of 2,048"]),
    Case("benchmarks beyond the context", f"{EVALUATE} benchmarks.path=b", 1, ["none of the 1 prompts of mbpp fits the target's context of 2,048"], make=[rows("b/mbpp.jsonl", {"turns": ["Add one. " * 900]})]),
    Case("a layer with a NaN", "capture $mini", 1, ["code/", "layer 2", "NaN"], make=[not_a_number(NORM)], absent=NO_STATES),
    *[Case(f"a layer with {value} in {dtype}", f"capture $mini cache.dtype={dtype} conditioning=layers reducer=fc conditioning.layer_ids=[2]", 1, ["code/", "layer 2", "NaN or infinity"], make=[not_a_number(NORM, value)], absent=NO_STATES) for dtype, value in {"fp32": INFINITY, "fp8": -INFINITY, "bf16": 3e38}.items()],
    Case("a layer with a NaN and cache=stream", "train $mini cache=stream", 1, ["code/", "layer 2", "NaN"], make=[not_a_number(NORM)], absent=["runs/stream/*/??", "runs/train/*/checkpoints"]),
    Case("a layer with a NaN in a prompt", GENERATE, 1, ["the prompt", "layer 2", "NaN"], make=[not_a_number(NORM)]),
    *[Case(f"a NaN in {name}", command, 1, ["target has NaN", name], make=[not_a_number(f"{where}{name}")], absent=NO_STATES) for command, where, name in (("capture $mini", "", "lm_head.weight"), ("train $mini", "model.", "norm.weight"), ("train $mini cache=off", "model.", "hc_head.hc_base"), (GENERATE, "mtp.0.", "e_proj.weight"))],
    Case("a step whose loss is no number", "train $mini optim.lr=1e30", 1, ["is not finite", "code/", "lower optim.lr"], after=[CAPTURED], absent=["runs/train/*/result.json"]),
    Case("a layer that has changed", "train $mini", 1, ["was trained on the target"], after=[STAGE1], make=[not_a_number(NORM)]),
    Case("weights that are a pointer", "train $mini", 1, ["model.safetensors", "git lfs pull"], make=[write("target/model.safetensors", POINTER)], absent=["runs/cache"]),
    Case("weights that are cut", "train $mini", 1, ["target/model.safetensors is damaged"], make=[cut("target/model.safetensors")], absent=["runs/cache"]),
    Case("weights that lack a layer", "capture $mini", 1, ["lacks 1 tensors, first " + NORM], make=[without(NORM)], absent=NO_STATES),
    Case("a config that is cut", "train $mini", 1, ["target/config.json is damaged"], make=[cut("target/config.json")], absent=["runs/cache"]),
    Case("a config with a wrong type", "train $mini", 1, ["target/config.json"], make=[edit("target/config.json", '"hidden_size": 32', '"hidden_size": "wide"')], absent=["runs/cache"]),
    Case("a tokenizer that is a pointer", "train $mini", 1, ["tokenizer.json", "git lfs pull"], make=[write("target/tokenizer.json", POINTER)], absent=["runs/cache"]),
    Case("a tokenizer's settings that are cut", "train $mini", 1, ["tokenizer_config.json is damaged"], make=[cut("target/tokenizer_config.json")], absent=["runs/cache"]),
    Case("a best checkpoint that is missing", GENERATE + " run=$run", 1, ["best.ckpt is missing"], after=[STAGE1], make=[remove(BEST)]),
    Case("a best checkpoint that is a pointer", GENERATE + " run=$run", 1, ["best.ckpt", "git lfs pull"], after=[STAGE1], make=[replaced(BEST, POINTER)]),
    Case("a best checkpoint that is empty", GENERATE + " run=$run", 1, ["best.ckpt is empty"], after=[STAGE1], make=[replaced(BEST, "")]),
    Case("a best checkpoint that is cut", GENERATE + " run=$run", 1, ["best.ckpt is damaged"], after=[STAGE1], make=[cut(BEST)]),
    Case("a record of another version", GENERATE + " run=$run", 1, ["another version"], after=[STAGE1], make=[edit("runs/train/*/result.json", '"decided_by"', '"decides"')]),
    Case("a record that is a list", GENERATE + " run=$run", 1, ["result.json"], after=[STAGE1], make=[replaced("runs/train/*/result.json", "[]")]),
    Case("a record that lacks its checkpoint", GENERATE + " run=$run", 1, ["result.json is damaged", "best_checkpoint"], after=[STAGE1], make=[edit("runs/train/*/result.json", '"best_checkpoint"', '"best"')]),
    Case("a record that lacks its data", "train $mini", 1, ["result.json is damaged", "dataset"], after=[STAGE1], make=[edit("runs/train/*/result.json", '"dataset": {', '"rows": {')]),
    Case("a run's options that lack a group", GENERATE + " run=$run", 1, ["blocks"], after=[STAGE1], make=[edit("runs/train/*/config.yaml", "blocks:", "blocs:")]),
    Case("counts that lack their prompts", "report $mini kl=paper,off", 1, ["validation.json is damaged", "prompts"], after=[STAGE1], make=[replaced("runs/train/*/validation.json", "{}")]),
    Case("metrics that are another table", "train $mini " + SAVING, 1, ["metrics.csv is no table"], after=[SAVED], make=[remove("runs/train/*/result.json"), replaced("runs/train/*/metrics.csv", "a,b\n1,2\n")]),
    Case("a checkpoint of something else", "train $mini " + SAVING, 1, ["step00000006.ckpt is damaged"], after=[SAVED], make=[remove("runs/train/*/result.json"), lambda here: [torch.save({}, path) for path in here.glob("runs/train/*/checkpoints/step*")]]),
    Case("rows of an evaluation that are a list", f"{EVALUATE} by=decoding out=o", 1, ["o/rows.jsonl is damaged"], make=[rows("b/mbpp.jsonl", {"turns": ["Add one."]}), write("o/rows.jsonl", "[]\n")], environment={"HYPERDFLASH_BENCHMARKS": "b"}),
    Case("a benchmark without a prompt", f"{EVALUATE} benchmarks.path=b", 1, ["mbpp has no prompt"], make=[write("b/mbpp.jsonl", "")]),
    Case("rows that are a pointer", "capture $mini source:p.jsonl", 1, ["p.jsonl is a pointer", "git lfs pull"], make=[write("p.jsonl", POINTER)], absent=["runs/corpus/*.jsonl"]),
    Case("weights that are cut at their end", GENERATE, 1, ["target/model.safetensors is damaged"], make=[cut("target/model.safetensors", 0.99)]),
    Case("runs is a link to itself", "train $mini", 1, ["error: runs", "HYPERDFLASH_RUNS"], make=[lambda here: (here / "runs").symlink_to("runs")]),
    Case("a prompt that is no text", "generate prompt=\udcff target.path=target", 1, ["user turn", "UTF-8"]),
    Case("a window of 2 GiB", "capture $mini source:long.jsonl.zst", 1, ["window above 128 MiB"], make=[write("long.jsonl.zst", WINDOW_2_GIB)], absent=NO_STATES),
    Case("no CUDA device", "train $mini trainer.accelerator=gpu", 1, ["finds 0 here"], absent=["runs/datasets"]),
    Case("an accelerator that is none", "train $mini trainer.accelerator=7", 1, ["trainer.accelerator must be cpu"], absent=["runs/datasets"]),
    Case("threads that are no number", "train $mini trainer.threads=few", 1, ["trainer.threads must be a positive integer"], absent=["runs/datasets"]),
    Case("devices that are no indices", "train $mini trainer.devices=[a]", 1, ["trainer.devices must be"], absent=["runs/datasets"]),
    Case("no held-out row", "capture $mini corpus.responses=target source:two.jsonl corpus.heldout=0.0001", 1, ["no held-out row"], make=[rows("two.jsonl", *TWO_ROWS)], absent=["runs/responses/*.jsonl"]),
]
