"""Options: each has an effect or is refused, wherever the error arises."""

import csv
import json
import os
from pathlib import Path

from tests.cases.harness import CAPTURED, Case


def statuses(*wanted: str):
    """The jobs of the one sweep ended so."""

    def check(here: Path) -> None:
        found = sorted((json.loads(path.read_text()) for path in here.glob("runs/sweeps/*/*.json")), key=lambda job: job["job"])
        assert [job["status"] for job in found] == list(wanted)

    return check


def three_steps(here: Path) -> None:
    """Warmed up, at the peak, half-way down: the schedule is that of three steps."""
    rows = list(csv.DictReader(next(here.glob("runs/train/*/metrics.csv")).open()))
    rates = [float(row["train/lr"]) for row in rows if row["train/lr"]]
    assert [round(rate / rates[0], 6) for rate in rates] == [1, 1, 0.5] and rows[-1]["val/tau"]


CASES = [
    Case("an unknown reducer", "train $mini reducer=nope", 1, ["reducer=nope is no option"], absent=["runs/train/*"]),
    Case("too many layers", "train $mini conditioning=layers drafter.num_layers=7", 1, ["got 7"], absent=["runs/train/*"]),
    Case("an unknown key", "train $mini kl.alfa=1", 1, ["did you mean kl.alpha"], absent=["runs/train/*"]),
    Case("a group that is null", "train $mini ~trainer", 1, ["trainer"], absent=["runs/train/*"]),
    Case("an interpolation to nowhere", "evaluate out=${nope}", 1, ["nope"]),
    Case("a job that cannot be composed", "train -m $mini reducer=nope,fc kl.alpha=2", 1, ["2 jobs: 0 finished, 2 not", "reducer=nope is no option", "kl.alpha must be"], absent=["runs/unnamed"], check=statuses("failed", "failed")),
    Case("a failing job of a first batch", "train -m $mini kl.alpha=2,3 hydra.sweeper.max_batch_size=1", 1, ["got 2", "got 3"], check=statuses("failed", "failed")),
    Case("three steps", "train $mini trainer.max_steps=3 trainer.log_every_n_steps=1", 0, [" 3 steps"], after=[CAPTURED], check=three_steps),
    Case("more steps than epochs have", "train $mini trainer.max_steps=7", 1, ["behind the 6 steps"], after=[CAPTURED]),
    Case("a limit of batches", "train $mini +trainer.limit_train_batches=2", 1, ["did you mean trainer.max_steps"], absent=["runs/train/*"]),
    Case("a misspelled key with a plus", "train $mini +trainer.max_stepss=2", 1, ["did you mean trainer.max_steps"], absent=["runs/train/*"]),
    Case("a key at the top", "train $mini +foo=1", 1, ["foo is no option"], absent=["runs/train/*"]),
    Case("a group in another place", "train $mini +reducer@x=fc", 1, ["x is no option"], absent=["runs/train/*"]),
    Case("a key of Hydra's own", "train $mini +hydra.verbos=1", 1, ["did you mean hydra.verbose"], absent=["runs/train/*"]),
    Case("a key within Hydra's own", "evaluate +hydra.job.nam=x", 1, ["did you mean hydra.job.name"]),
    Case("a key that Hydra leaves free", "train $mini +hydra.job.env_set.FOO=1 kl.alpha=2", 1, ["kl.alpha must be"]),
    Case("a key of a logger", "train $mini +logger.tags=1", 1, ["logger.tags is no option: logger takes artifacts"]),
    Case("a key of a group with a class", "train $mini +target.foo=1", 1, ["target.foo is no option"], absent=["runs/train/*"]),
    Case("a key of another command", "evaluate +trainer.max_steps=1", 1, ["trainer is no option"]),
    Case("a key within a term", "train $mini +objective.terms.kl.beta=1", 1, ["objective.terms.kl names no term"], absent=["runs/train/*"]),
    Case("a key of a group without an option", "train $mini +lead.steps=3", 1, ["names no class", "lead=NAME"], absent=["runs/train/*"]),
    Case("option files that are not there", "train $mini hydra.searchpath=[file://nowhere]", 1, ["nowhere"], absent=["runs/train/*"]),
    Case("a sweep that is not there", "report sweep=klx", 1, ["sweep=klx is no option (did you mean sweep=kl?)"]),
    Case("a misspelled word of a report", "report swep=kl", 1, ["swep is no option (did you mean sweep?)"]),
    Case("a report of one job", "report kl=off", 1, ["nothing is swept by 'kl=off'"]),
    Case("a key of a report", "report $mini kl=off,paper +foo=1", 1, ["foo is no option"]),
    Case("a temperature that is text", "generate target.path=target prompt=Hi temperature=hot", 1, ["temperature must be 0 (greedy) or positive, got 'hot'"]),
    *[Case(f"a rule of the loop {where}", f"evaluate target.path=target {words}", 1, ["add by=decoding"]) for where, words in {"by replay": "stop=[0,0.3]", "as a number": "stop=0.3", "in an engine": "engine=vllm engine.servers={AR:http://localhost:9} stop=[0.3]"}.items()],
    Case("no temperature", "evaluate target.path=target temperature=[]", 1, ["temperature must be a list"]),
    Case("no method", "evaluate target.path=target methods=[]", 1, ["methods=[] names nothing"]),
    Case("temperatures that are text", "evaluate target.path=target methods=[mtp] temperature=[hot]", 1, ["temperature must be", "'hot'"], absent=["runs/responses"]),
    Case("more slots than the context has tokens", "train $mini drafter.block_size=4001", 1, ["4000 slots", "context of 2,048"], absent=["runs/train/*"]),
    Case("more resamples than memory holds", "evaluate target.path=target methods=[mtp] num_resamples=2000000000", 1, ["num_resamples must be at most"], absent=["runs/responses"]),
    Case("a seed beyond 64 bits", "train $mini seed=99999999999999999999", 1, ["seed must be at most"], absent=["runs/train/*"]),
    Case("an infinite temperature", "generate target.path=target prompt=Hi temperature=inf", 1, ["temperature must be 0 (greedy) or positive, got inf"]),
    Case("no resamples", "evaluate target.path=target methods=[mtp] num_resamples=0", 1, ["num_resamples must be a positive integer"], absent=["runs/responses"]),
    Case("a job whose name cannot be resolved", "train -m $mini conditioning=layers reducer=fc drafter.num_layers=7,1", 1, ["2 jobs: 1 finished, 1 not", "got 7"], after=[CAPTURED], exist=["runs/train/*/result.json"], check=statuses("failed", "finished")),
    Case("tasks of Slurm left over", "train $mini kl.alpha=2", 1, ["ignoring SLURM_PROCID, SLURM_NTASKS", "got 2"], environment={"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}),
    Case("more tasks of srun than devices", "train $mini", 1, ["2 rank(s) were started"], environment={"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0", "SLURM_TASK_PID": str(os.getpid())}, absent=["runs/datasets"]),
    Case("tasks of srun that are not per node", "train $mini", 1, ["--ntasks-per-node=2"], environment={"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_TASK_PID": str(os.getpid())}, absent=["runs/datasets"]),
    Case("a rank left over", "train $mini", 0, ["ignoring RANK"], after=[CAPTURED], environment={"RANK": "1"}, exist=["runs/train/*/metrics.csv", "runs/train/*/corpus.json"], apart=True),
    Case("ranks left over", "train $mini kl.alpha=2 trainer=ddp_cpu", 1, ["neither torchrun nor srun", "got 2"], environment={"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}),
    Case("an empty folder of runs", "train $mini", 1, ["HYPERDFLASH_RUNS='' names no folder"], environment={"HYPERDFLASH_RUNS": ""}, absent=["train", "cache", "sweeps"]),
    Case("a folder of runs at home", "train $mini kl.alpha=2", 1, ["got 2"], environment={"HYPERDFLASH_RUNS": "~/r", "HOME": "home"}, exist=["home/r"], absent=["~"]),
]
