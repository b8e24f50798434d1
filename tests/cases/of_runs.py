"""Finished and broken runs: their data, their place, and the files beside them."""

import os

from tests.cases.harness import CAPTURED, STAGE1, STAGE2, Case, copy, cut, edit, last_run, move, remove, write, write_in

SAVING = "trainer.checkpoint_every_steps=1"
SAVED = "train $mini " + SAVING
BROKEN = remove("runs/train/stage2-*/result.json", "runs/train/stage2-*/checkpoints/step00000004.ckpt")  # before step 4
TRAINING = remove("rows.jsonl", "runs/cache", "runs/corpus", "runs/datasets", "runs/responses")  # what only trainings need
NOTES = "step00000003_backup.ckpt", "step00000003 (copy).ckpt"
ASK = "generate target.path=target prompt=Hi threads=1 max_new_tokens=4"
FEW = "benchmarks.per_domain=1 benchmarks.max_new_tokens=4 threads=1 target.path=target"

CHECKPOINTS = "runs/train/*/checkpoints"
FOREIGN = ("best (1).ckpt", "step00000009.ckpt~", "._step00000009.ckpt", ".DS_Store", "step00000009.ckpt.part", "step9.ckpt", "last.ckpt")
CACHED = ("ab/abcd.residual.safetensors", "my/abcd.residual.safetensors.7.partial", "ab/.DS_Store", "ab/shard.safetensors.part", "leases/notes.json", "leases/._ab.json", "leases/folder.json/x")
PROMPTS = "_target_: hyperdflash.data.prompts.HeldoutPrompts\nper_domain: 1\nmax_new_tokens: 5000\nmax_length: 5000\n"
SWEEP = write("my/sweep/mine.yaml", "# @package _global_\nsweep: {name: mine, baseline: [kl=off]}\nhydra: {mode: MULTIRUN, sweeper: {params: {kl: 'paper,off'}}}\n")
MINE = "$mini sweep=mine hydra.searchpath=[file://my]"


def starts_from_the_original(here):
    assert "copy" not in (last_run(here) / "parent.json").read_text()


CASES = [
    Case("a removed training file", "train $mini", 1, ["no file at rows.jsonl"], make=[remove("rows.jsonl")], absent=["runs/datasets"]),
    Case("a finished run is left alone", "train $mini", 0, ["nothing to do"], after=[STAGE1]),
    # known by its data
    Case("rows edited after the run", "train $mini", 1, ["rows.jsonl was edited"], after=[STAGE1], make=[edit("rows.jsonl", "Write", "Draft")]),
    Case("rows edited, dataset removed", "train $mini", 1, ["rows.jsonl was edited", "remove runs/train/"], after=[STAGE1], make=[edit("rows.jsonl", "Write", "Draft"), remove("runs/datasets")]),
    Case("rows edited before a resume", "train $mini " + SAVING, 1, ["rows.jsonl was edited"], after=[SAVED], make=[remove("runs/train/*/result.json"), edit("rows.jsonl", "Write", "Draft")]),
    Case("another tokenizer after the run", "train $mini", 1, ["tokenizer.json is not the tokenizer of"], after=[STAGE1], make=[edit("target/tokenizer.json", '"added_tokens"', ' "added_tokens"')]),
    Case("another tokenizer, dataset removed", "train $mini", 1, ["is not the tokenizer of runs/train/"], after=[STAGE1], make=[edit("target/tokenizer.json", '"added_tokens"', ' "added_tokens"'), remove("runs/datasets")]),
    Case("another tokenizer before a capture", "capture $mini", 1, ["tokenizer.json is not the tokenizer of"], after=[CAPTURED], make=[edit("target/tokenizer.json", '"added_tokens"', ' "added_tokens"')]),
    Case("a parent trained anew on other data", "train $mini experiment=stage2", 1, ["which was trained anew on other data"], after=[STAGE1, STAGE2], make=[edit("runs/train/stage1-*/result.json", '"data": "', '"data": "f')]),
    Case("runs of different data compared", f"evaluate 'methods=[{{name: one, run: $run}}, {{name: other, run: runs/train/other}}]' temperature=[0] {FEW}", 0, ["These runs were trained on different data"], after=[STAGE1], make=[copy("runs/train/stage1-*", "other"), edit("runs/train/other/result.json", '"data": "', '"data": "f')]),
    # used with the target alone
    Case("generate needs no training data", f"{ASK} run=$run", 0, ["tokens"], after=[STAGE1], make=[TRAINING]),
    Case("parity needs no training data", f"parity run=$run {FEW}", 0, ["All agree"], after=[STAGE1], make=[TRAINING]),
    Case("evaluate needs no training data", f"evaluate run=$run temperature=[0] {FEW}", 0, ["acceptance.md"], after=[STAGE1], make=[TRAINING]),
    Case("a run's folder moved away from all others", f"{ASK} run=elsewhere/mine", 0, ["tokens"], after=[STAGE1, STAGE2], make=[lambda here: last_run(here).rename(here / "mine"), move("mine", "elsewhere/mine"), remove("runs", "rows.jsonl")]),
    Case("a loss that is not installed here", f"{ASK} run=$run", 0, ["tokens"], after=[STAGE1], make=[edit("runs/train/*/config.yaml", "hyperdflash.objectives", "elsewhere.objectives")]),
    Case("an option of trainings that this version lacks", f"{ASK} run=$run", 0, ["tokens"], after=[STAGE1], make=[edit("runs/train/*/config.yaml", "trainer:", "trainer:\n  of_old: 1")]),
    Case("runs moved within stage 2", f"train $mini experiment=stage2 {SAVING}", 0, ["resuming from moved/train"], ["moved/train/stage2-*/result.json"], after=[SAVED, f"{SAVED} experiment=stage2"], make=[BROKEN, move("runs", "moved")], environment={"HYPERDFLASH_RUNS": "moved"}),
    Case("the parent removed within stage 2", f"train $mini experiment=stage2 {SAVING}", 0, ["resuming from"], ["runs/train/stage2-*/result.json"], after=[SAVED, f"{SAVED} experiment=stage2"], make=[BROKEN, remove("runs/train/stage1-*")]),
    Case("a sweep of one's own", f"train {MINE}", 0, ["2 jobs: 2 finished, 0 not"], ["runs/train/*-kl0-*/result.json", "runs/train/*-kl0.15-*/result.json"], make=[SWEEP]),
    Case("its report of different data", f"report {MINE}", 0, ["1 runs trained on other data or by other code"], ["runs/report/mine/sweep.md"], after=[STAGE1, "train $mini kl=off"], make=[SWEEP, edit("runs/train/*-kl0.15-*/result.json", '"data": "', '"data": "f')]),
    # own files by exact name
    *[Case(f"beside checkpoints: {name}", f"train $mini {SAVING}", 0, ["resuming from"], [f"runs/train/*/checkpoints/{name}"], after=[SAVED], make=[remove("runs/train/*/result.json", "runs/train/*/checkpoints/step00000006.ckpt"), copy("runs/train/*/checkpoints/step00000005.ckpt", name)]) for name in (*NOTES, "step00000009_backup.ckpt")],
    Case("a copied run in the index", "train $mini experiment=stage2", 0, ["stage 2 continues from"], after=[STAGE1], make=[copy("runs/train/stage1-*", "{} (copy)")], check=starts_from_the_original),
    Case("a note among runs", "train $mini experiment=stage2", 0, ["stage 2 continues from"], after=[STAGE1], make=[write("runs/train/notes/result.json", "[1, 2]")], exist=["runs/train/notes/result.json"]),
    Case("notes in the folders of a cache", "train $mini", 0, ["best validation tau"], ["runs/cache/*/ab/notes.partial", "runs/cache/*/leases/mine.json"], after=[CAPTURED], make=[remove("runs/cache/*/??/*.residual.safetensors"), write_in("runs/cache/*", "ab/notes.partial", "leases/mine.json")]),
    Case("files of others beside checkpoints", f"train $mini {SAVING}", 0, ["resuming from"], [f"{CHECKPOINTS}/{name}" for name in FOREIGN], after=[SAVED], make=[remove("runs/train/*/result.json"), write_in(CHECKPOINTS, *FOREIGN)]),
    Case("a folder with the name of a checkpoint", f"train $mini {SAVING}", 0, ["resuming from"], [f"{CHECKPOINTS}/step00000009.ckpt/mine"], after=[SAVED], make=[remove("runs/train/*/result.json"), write_in(CHECKPOINTS, "step00000009.ckpt/mine")]),
    Case("files of others in a cache", "capture $mini", 0, ["its states are in"], [f"runs/cache/*/{name}" for name in CACHED], after=[CAPTURED], make=[remove("runs/cache/*/??/*.residual.safetensors"), write_in("runs/cache/*", *CACHED)]),
    Case("an empty file among leases", "capture $mini", 0, ["its states are in"], ["runs/cache/*/leases/todo.json"], after=[CAPTURED], make=[remove("runs/cache/*/??/*.residual.safetensors"), lambda here: [(path / "leases" / "todo.json").touch() for path in here.glob("runs/cache/*")]]),
    Case("files of others in a dataset", "capture $mini", 0, ["the dataset is"], [f"runs/datasets/*/{name}" for name in ("train.safetensors~", "old.partial", "train.safetensors.old.partial")], after=[CAPTURED], make=[remove("runs/datasets/*/dataset.json"), write_in("runs/datasets/streamed*", "train.safetensors~", "old.partial", "train.safetensors.old.partial")]),
    Case("results of others among runs", "train $mini experiment=stage2", 0, ["stage 2 continues from"], ["runs/train/notes/result.json"], after=[STAGE1], make=[copy("runs/train/stage1-*", "{}.bak"), cut("runs/train/*.bak/result.json"), write_in("runs/train", "notes/result.json", "._notes/result.json", "result.json")]),
    Case("an evaluation that is a list", "export run=$run to=transformers out=ex evaluation=e", 1, ["e/metrics.json is damaged"], after=[STAGE1], make=[write("e/metrics.json", "[]")], absent=["ex"]),
    *[Case(f"an export onto {what}", "export run=$run to=transformers out=ex", 1, ["out=ex is there already"], after=[STAGE1], make=[make], check=lambda here: os.lstat(here / "ex")) for what, make in {"a file": write("ex", "mine"), "a folder with a file": write("ex/mine", ""), "a link to nowhere": lambda here: (here / "ex").symlink_to("nowhere")}.items()],
    Case("an evaluation onto rows of others", f"evaluate methods=[mtp] by=decoding out=mine {FEW}", 1, ["mine/rows.jsonl is damaged", "another out="], make=[write("mine/rows.jsonl", '{"a": 1}\n{"b": 2}')], check=lambda here: edit("mine/rows.jsonl", '{"b": 2}', "")(here)),
    Case("files of others among options", "evaluate methods=[mtp] benchmarks=mine target.path=target hydra.searchpath=[file://my]", 1, ["none of the 1 prompts of math"], make=[write("my/benchmarks/mine.yaml", PROMPTS), write_in("my", "._mine.yaml", "mine.yaml/x"), lambda here: (here / "my" / ".#mine.yaml").symlink_to("me@host.1")]),
]
