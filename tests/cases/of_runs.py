"""Finished and broken runs: their data, their place, and the files beside them."""

from tests.cases.harness import CAPTURED, STAGE1, STAGE2, Case, copy, edit, last_run, move, remove, write, write_in

SAVING = "trainer.checkpoint_every_steps=1"
SAVED = "train $mini " + SAVING
BROKEN = remove("runs/train/stage2-*/result.json", "runs/train/stage2-*/checkpoints/step00000004.ckpt")  # before step 4
TRAINING = remove("rows.jsonl", "runs/cache", "runs/corpus", "runs/datasets", "runs/responses")  # what only trainings need
NOTES = "step00000003_backup.ckpt", "step00000003 (copy).ckpt"
ASK = "generate target.path=target prompt=Hi threads=1 max_new_tokens=4"
FEW = "benchmarks.per_domain=1 benchmarks.max_new_tokens=4 threads=1 target.path=target"

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
    Case("notes in the folders of a cache", "train $mini", 0, ["best validation tau"], ["runs/cache/*/ab/notes.partial", "runs/cache/*/leases/mine.json"], after=[CAPTURED], make=[remove("runs/cache/*/??/*.residual.safetensors"), *(write_in("runs/cache/*", name) for name in ("ab/notes.partial", "leases/mine.json"))]),
]
