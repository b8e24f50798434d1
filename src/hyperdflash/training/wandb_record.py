"""Records in W&B what a training has beside its scalars. Every use of W&B's internals stands in this file.

start        configuration, git revision and diff, cache key; stage 2: the stage-1 checkpoint as input artifact
validation   a table of drafted and accepted text
end          best tau per domain as summary; acceptance by drafted position as rows; the best checkpoint as output artifact
"""

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
from hyperdflash.training.curves import KINDS, acceptance_metric, acceptance_rows
from hyperdflash.training.loggers import harmless, wandb_axes
from hyperdflash.training.run_index import finished_run

COLUMNS = ["domain", "prompt id", "prompt", "colored", "[accepted] {-rejected-}", "rounds", "tau"]
PROMPTS_SHOWN = 3  # per validation, of different domains as far as possible


class WandbRecord(L.Callback):
    """``run`` is the directory of this training; ``parent``, the one of the run whose weights it starts from."""

    def __init__(
        self, config: DictConfig, run: Path, *, parent: Path | None, cache_key: CacheKey, tokenizer: PreTrainedTokenizerBase
    ):
        self.config, self.run, self.parent, self.cache_key, self.tokenizer = config, run, parent, cache_key, tokenizer
        self._shown: dict[str, list] = {}

    @harmless()
    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (wandb_run := _wandb_run(trainer)) is None:
            return
        start = read_starts(self.run)[-1]
        own = {
            "run_directory": self.run.name,
            "cache_key": str(self.cache_key),
            "target_fingerprint": self.cache_key.target,
            "git_revision": start["git_revision"],
            "packages": start["packages"],
            "stage1_run": self.parent.name if self.parent else None,
        }
        given = OmegaConf.to_container(self.config, resolve=True)
        wandb_run.config.update({**given, **wandb_axes(self.config), **own}, allow_val_change=True)
        shutil.copy(self.run / STARTS, wandb_run.dir)  # holds the diff; W&B uploads the folder
        offline = f"offline, to upload: wandb sync {Path(wandb_run.dir).parent}"
        print(f"W&B: {offline if wandb_run.offline else wandb_run.url}", flush=True)
        if self.parent is not None and self.config.logger.artifacts:
            if wandb_run.offline:  # `use_artifact` refuses; this is the call that it makes, recorded for `wandb sync`
                wandb_run._log_artifact(_artifact(self.parent), is_user_created=True, use_after_commit=True)
            else:
                wandb_run.use_artifact(_artifact(self.parent))

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._shown = {}

    @harmless()
    def on_validation_batch_end(self, trainer, module, outputs: dict, batch: TargetStates, batch_idx, dataloader_idx=0) -> None:
        """Takes the first document per domain, of rank 0's own documents."""
        if _wandb_run(trainer) is None:
            return
        for row, domain in enumerate(batch.domains):
            if domain not in self._shown and len(self._shown) < PROMPTS_SHOWN:
                rounds = drafted_rounds(module.drafter, batch, module.target_heads, outputs["rounds"], row)
                start, count = int(batch.loss_mask[row].nonzero()[0]), len(rounds)
                prompt = self.tokenizer.decode(batch.input_ids[row, : start + 1])
                tau = sum(len(one.emitted) for one in rounds) / count if count else None
                colored = wandb.Html(drafts_html(rounds, self.tokenizer), inject=False)
                self._shown[domain] = [batch.ids[row], prompt, colored, drafts_text(rounds, self.tokenizer), count, tau]

    @harmless()
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (wandb_run := _wandb_run(trainer)) is None:
            return
        table = wandb.Table(columns=COLUMNS, data=[[domain, *row] for domain, row in self._shown.items()])
        step = trainer.global_step - 1
        wandb_run.log({"val/drafts": table, "trainer/global_step": step}, step=step)

    @harmless()
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (wandb_run := _wandb_run(trainer)) is None:
            return
        record = json.loads((self.run / "validation.json").read_text())
        wandb_run.summary.update(best_summary(record))
        for row in acceptance_rows(record):  # W&B overlays the rows of many runs, with the position on the x axis
            wandb_run.log(row, step=trainer.global_step - 1 + row["position"])
        if self.config.logger.artifacts:
            wandb_run.log_artifact(_artifact(self.run), aliases=["best", f"stage{self.config.stage}"])

    @harmless()
    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Ends the W&B run: the next job of a sweep in this process gets a run of its own."""
        if _wandb_run(trainer) is not None:
            wandb.finish()

    @harmless()
    def on_exception(self, trainer, module, exception) -> None:
        if wandb.run is not None and trainer.is_global_zero:
            wandb.finish(exit_code=1)


def best_summary(record: dict) -> dict[str, float]:
    """Returns best/tau of all rounds, best/tau_<domain>, their plain mean, best/survival_k and best/conditional_k per slot."""
    by_domain: dict[str, list[dict]] = {}
    for prompt in record["prompts"]:
        by_domain.setdefault(prompt["domain"], []).append(prompt)
    sums = {name: [sum(row[field] for row in rows) for field in ("emitted", "rounds")] for name, rows in by_domain.items()}
    taus = {name: emitted / rounds for name, (emitted, rounds) in sums.items() if rounds}
    summary = {"best/tau": record["tau"], "best/step": record["step"], "best/tau_mean": sum(taus.values()) / len(taus)}
    summary |= {f"best/tau_{name}": tau for name, tau in taus.items()}
    for row in acceptance_rows(record):
        kinds = {kind: row.get(acceptance_metric(kind)) for kind in KINDS}
        summary |= {f"best/{kind}_{row['position']}": rate for kind, rate in kinds.items() if rate is not None}
    return summary


def _artifact(run: Path) -> wandb.Artifact:
    """Returns the best checkpoint of a run with its configuration; W&B gives the same content the same version."""
    artifact = wandb.Artifact(f"drafter-{run.name}", type="drafter", metadata={"run_directory": run.name})
    checkpoint = finished_run(run).best_checkpoint if (run / "result.json").exists() else run / "checkpoints" / "best.ckpt"
    artifact.add_file(str(checkpoint), name="best.ckpt", policy="immutable")
    artifact.add_file(str(run / "config.yaml"), name="config.yaml", policy="immutable")
    return artifact


def _wandb_run(trainer: L.Trainer) -> wandb.Run | None:
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


def workspace_json(workspace: object) -> str:
    """Returns the view that ``workspace.save()`` would send."""
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)
