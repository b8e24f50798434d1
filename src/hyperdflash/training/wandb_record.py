"""Records in W&B what a training has beside its scalars; does nothing if the run has no W&B logger.

start        configuration, git revision and diff, cache key; stage 2: the stage-1 checkpoint as input artifact
validation   acceptance per position as one line-series chart; a few prompts, drafted against accepted
end          best tau and acceptance per domain as summary; the best checkpoint as output artifact
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import wandb
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.drafted import drafted_rounds, drafts_html, drafts_text
from hyperdflash.record import STARTS, read_starts
from hyperdflash.states.manifest import CacheKey
from hyperdflash.training.loggers import wandb_axes
from hyperdflash.training.run_index import finished_run

COLUMNS = ["domain", "prompt id", "prompt", "colored", "[accepted] {-rejected-}", "rounds", "tau"]
PROMPTS_SHOWN = 3  # a validation, of different domains as long as there are


class WandbRecord(L.Callback):
    """``run`` the directory of this training, ``parent`` of the one whose weights it starts from."""

    def __init__(
        self, config: DictConfig, run: Path, *, parent: Path | None, cache_key: CacheKey, tokenizer: PreTrainedTokenizerBase
    ):
        self.config, self.run, self.parent, self.cache_key, self.tokenizer = config, Path(run), parent, cache_key, tokenizer
        self._shown: dict[str, list] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        wandb_run = _wandb_run(trainer)
        if wandb_run is None:
            return
        environment = read_starts(self.run)[-1]
        wandb_run.config.update(
            {
                **OmegaConf.to_container(self.config, resolve=True),
                **wandb_axes(self.config),
                "run_directory": self.run.name,
                "cache_key": str(self.cache_key),
                "target_fingerprint": self.cache_key.target,
                "git_revision": environment["git_revision"],
                "packages": environment["packages"],
                "stage1_run": self.parent.name if self.parent else None,
            },
            allow_val_change=True,
        )
        wandb_run.define_metric("val/tau", step_metric="trainer/global_step", summary="max")
        shutil.copy(self.run / STARTS, wandb_run.dir)  # holds the diff; W&B uploads the folder
        print(_where(wandb_run), flush=True)
        if self.parent is not None and self.config.logger.artifacts:
            _use(wandb_run, _artifact(self.parent))

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._shown = {}

    def on_validation_batch_end(self, trainer, module, outputs: dict, batch: TargetStates, batch_idx, dataloader_idx=0) -> None:
        """The first document of each domain; rank 0's own documents."""
        if _wandb_run(trainer) is None:
            return
        for row, domain in enumerate(batch.domains):
            if domain not in self._shown and len(self._shown) < PROMPTS_SHOWN:
                rounds = drafted_rounds(module.drafter, batch, module.target_heads, outputs["rounds"], row)
                start = int(batch.loss_mask[row].nonzero()[0])
                prompt = self.tokenizer.decode(batch.input_ids[row, : start + 1])
                emitted, count = sum(len(one.emitted) for one in rounds), len(rounds)
                tau = emitted / count if count else None
                colored = wandb.Html(drafts_html(rounds, self.tokenizer), inject=False)
                signed = drafts_text(rounds, self.tokenizer)
                self._shown[domain] = [batch.ids[row], prompt, colored, signed, count, tau]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        wandb_run = _wandb_run(trainer)
        if wandb_run is None:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        slots = range(1, module.drafter.num_slots + 1)
        lines = [[metrics.get(f"val/{kind}_{k}") for k in slots] for kind in ("survival", "conditional")]
        table = wandb.Table(columns=COLUMNS)
        for domain, row in self._shown.items():
            table.add_data(domain, *row)
        chart = wandb.plot.line_series(
            xs=list(slots),
            ys=lines,
            keys=["survival", "conditional"],
            title="Acceptance per drafted position",
            xname="drafted position",
        )
        step = trainer.global_step - 1
        wandb_run.log({"val/acceptance": chart, "val/drafts": table, "trainer/global_step": step}, step=step)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        wandb_run = _wandb_run(trainer)
        if wandb_run is None:
            return
        record = json.loads((self.run / "validation.json").read_text())
        wandb_run.summary.update(best_summary(record))
        if self.config.logger.artifacts:
            wandb_run.log_artifact(_artifact(self.run), aliases=["best", f"stage{self.config.stage}"])

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """The next job of a sweep in this process must get a run of its own."""
        if _wandb_run(trainer) is not None:
            wandb.finish()

    def on_exception(self, trainer, module, exception) -> None:
        if wandb.run is not None and trainer.is_global_zero:
            wandb.finish(exit_code=1)


def best_summary(record: dict) -> dict[str, float]:
    """validation.json -> best/tau of all rounds, best/tau_<domain>, their plain mean, best/survival_k, best/conditional_k."""
    prompts = record["prompts"]
    domains = {}
    for row in prompts:
        sums = domains.setdefault(row["domain"], [0, 0])
        sums[0] += row["emitted"]
        sums[1] += row["rounds"]
    taus = {name: emitted / rounds for name, (emitted, rounds) in domains.items() if rounds}
    summary = {"best/tau": record["tau"], "best/step": record["step"]}
    summary |= {f"best/tau_{name}": tau for name, tau in taus.items()}
    summary["best/tau_mean"] = sum(taus.values()) / len(taus)
    rounds = sum(row["rounds"] for row in prompts)
    for k in range(len(prompts[0]["survived"])):
        survived, reached = (sum(row[name][k] for row in prompts) for name in ("survived", "reached"))
        summary[f"best/survival_{k + 1}"] = survived / rounds
        if reached:
            summary[f"best/conditional_{k + 1}"] = survived / reached
    return summary


def _where(wandb_run: wandb.Run) -> str:
    """The one line that a run prints about W&B: its address, or the command that uploads it."""
    return f"W&B: offline, to upload: wandb sync {Path(wandb_run.dir).parent}" if wandb_run.offline else f"W&B: {wandb_run.url}"


def _artifact(run: Path) -> wandb.Artifact:
    """The best checkpoint of a run with what it was made from; the same content is the same version wherever it is logged."""
    artifact = wandb.Artifact(f"drafter-{run.name}", type="drafter", metadata={"run_directory": run.name})
    checkpoint = finished_run(run).best_checkpoint if (run / "result.json").exists() else run / "checkpoints" / "best.ckpt"
    artifact.add_file(str(checkpoint), name="best.ckpt", policy="immutable")
    artifact.add_file(str(run / "config.yaml"), name="config.yaml", policy="immutable")
    return artifact


def _use(wandb_run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Declares an input. Offline, ``use_artifact`` refuses; this is the call it makes itself, kept for `wandb sync`."""
    if wandb_run.offline:
        wandb_run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        wandb_run.use_artifact(artifact)


def _wandb_run(trainer: L.Trainer) -> wandb.Run | None:
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
