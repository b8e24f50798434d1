"""Capture -> train -> evaluate on a target made on the spot, and what must hold on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hyperdflash.evaluation.evaluation import evaluate_by_replay
from hyperdflash.identity import train_run_dir
from hyperdflash.targets.load import fingerprint
from hyperdflash.training import job as runs
from hyperdflash.training import run_index as lineage
from hyperdflash.training.job import train
from hyperdflash.training.module import DraftingModule
from hyperdflash.training.run_index import find_stage1, finished_run

VANILLA = ["method=dflash", "conditioning.layer_ids=[0,2]"]


def weights(run: Path, which: str) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / which, weights_only=True)["state_dict"]


def test_two_stages_and_an_evaluation(compose_config, mini_overrides, tmp_path, capsys, mini_target):
    target_before = {p.name: p.read_bytes() for p in mini_target.iterdir() if p.is_file()}
    for method in ([], VANILLA, ["method=mtp_finetuned"]):
        for stage in ("stage1", "stage2"):
            train(compose_config("train", [f"experiment={stage}", *mini_overrides, *method]))
    assert len(list((tmp_path / "train").glob("*/result.json"))) == 6
    assert "stage 2 continues from" in capsys.readouterr().out

    config = compose_config("train", ["experiment=stage2", *mini_overrides])
    run = train_run_dir(config)
    record = json.loads((run / "result.json").read_text())
    assert record["init_from"].startswith("train/stage1-pre_hc_head-hc_gate")
    (environment,) = json.loads((run / "run.json").read_text())["starts"]
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/tau", "val/survival_1", "val/survival_6", "train/ce", "train/kl", "train/tokens_per_s"} <= set(header)

    train(config)  # the same command again
    assert "nothing to do" in capsys.readouterr().out

    stage1 = tmp_path / record["init_from"]
    metrics = evaluate_by_replay(
        compose_config(
            "evaluate",
            [
                f"target.path={mini_target}",
                "benchmarks.per_domain=2",
                "benchmarks.max_new_tokens=16",
                "threads=1",
                "num_resamples=50",
                f"out={tmp_path}/out",
                f"methods=[mtp,mtp_finetuned,dflash,hyperdflash,{{name: first stage, run: {stage1}}}]",
            ],
        )
    )
    rows = ["MTP (3)", "MTP (6)", "MTP fine-tuned (6)", "Vanilla DFlash, paths averaged (6)", "HyperDFlash (6)", "first stage"]
    assert list(metrics["runs"]) == rows and metrics["baseline"] == rows[3]
    assert metrics["runs"]["HyperDFlash (6)"] == run.name and metrics["runs"]["first stage"] == stage1.name
    for name in ("metrics.json", "acceptance.md", "acceptance.csv", "acceptance.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert (tmp_path / "out" / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert target_before == {p.name: p.read_bytes() for p in mini_target.iterdir() if p.is_file()}


def test_the_target_is_in_no_optimizer_and_no_checkpoint(compose_config, mini_overrides, monkeypatch):
    seen = {}

    def watch(module):
        optimized = {id(p) for g in module.optimizers().optimizer.param_groups for p in g["params"]}
        seen["optimized"] = optimized == {id(p) for p in module.drafter.parameters()}
        seen["heads_train"] = any(p.requires_grad for p in module.target_heads.parameters())
        seen["heads_eval"] = not any(m.training for m in module.target_heads.modules())
        seen["heads"] = {k: v.clone() for k, v in module.target_heads.state_dict().items()}

    monkeypatch.setattr(DraftingModule, "on_train_end", watch)
    config = compose_config("train", ["experiment=stage1", *mini_overrides, "trainer.max_epochs=1"])
    train(config)
    assert seen["optimized"] and not seen["heads_train"] and seen["heads_eval"]
    untouched = runs.load_heads(config.target.path).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in seen["heads"].items())
    for which in ("step00000006.ckpt", "best.ckpt"):
        names = weights(train_run_dir(config), which)
        assert names and all(name.startswith("drafter.") for name in names)
        assert not any("embed_tokens" in name or "lm_head" in name for name in names)


def test_stage_two_without_stage_one_says_what_to_run(compose_config, mini_overrides, monkeypatch):
    monkeypatch.setattr(runs, "load_heads", lambda *_: pytest.fail("weights were read before the error"))
    with pytest.raises(ValueError, match=r"python -m src\.train experiment=stage1"):
        train(compose_config("train", ["experiment=stage2", *mini_overrides]))


def test_stage_two_takes_the_nearest_stage_one_and_prints_differences(compose_config, mini_overrides, capsys):
    for extra in (["kl.alpha=0.3"], ["kl.alpha=0.1", "kl.positions=3", "loss.gamma=2.0"]):
        train(compose_config("train", ["experiment=stage1", *mini_overrides, "trainer.max_epochs=1", *extra]))
    capsys.readouterr()
    config = compose_config("train", ["experiment=stage2", *mini_overrides, "trainer.max_epochs=1"])
    assert "kl0.3" in find_stage1(config).name
    out = capsys.readouterr().out
    assert "differs in kl.alpha: stage 1 had 0.3, this run has 0.15" in out and "gamma" not in out
    for other in (["reducer=mean"], ["seed=1"], ["drafter.num_layers=1"]):
        with pytest.raises(ValueError, match="stage 2 continues"):
            find_stage1(compose_config("train", ["experiment=stage2", *mini_overrides, *other]))


def test_a_drafter_made_on_another_target_is_refused(compose_config, mini_overrides, tmp_path, mini_target):
    config = compose_config("train", ["experiment=stage1", *mini_overrides, "trainer.max_epochs=1"])
    train(config)
    heads = runs.load_heads(mini_target)
    module = runs.make_parts(config).build(heads, config.target, 0)
    with pytest.raises(ValueError, match="was trained on the target"):
        lineage.load_drafter_weights(module, train_run_dir(config), "somebody else")
    with pytest.raises(ValueError, match="not a finished run"):
        finished_run(tmp_path)


@pytest.mark.parametrize(
    ("precision", "drafter", "dtype"),
    [("bf16-mixed", "tiny", torch.bfloat16), ("bf16-mixed", "mtp", torch.bfloat16), ("32-true", "tiny", torch.float32)],
)
def test_heads_compute_in_the_dtype_that_the_trainer_s_products_have(
    compose_config, mini_overrides, rows_file, monkeypatch, precision, drafter, dtype
):
    """Without autocast the loss stays in fp32; the tables are copied to fp32 in no case."""
    seen = []
    monkeypatch.setattr(DraftingModule, "on_train_end", lambda module: seen.append(module.target_heads))
    few = [f"corpus.stage1=[{{source: {rows_file}, domain: code, count: 12}}]", "corpus.responses=original"]
    few += ["target.dtype=bf16", f"trainer.precision={precision}", f"drafter={drafter}", "trainer.max_epochs=1"]
    config = compose_config("train", ["experiment=stage1", *mini_overrides, *few, "corpus.validation=2"])
    assert train(config)["val_tau"] >= 1
    (heads,) = seen
    assert heads.dtype == dtype and heads.lm_head.weight.dtype == heads.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in (heads.norm.weight, *heads.hc_head.parameters())} == {torch.float32}
    assert fingerprint(heads) == fingerprint(runs.load_heads(config.target.path))


def test_data_without_anything_to_learn_is_refused(compose_config, mini_overrides):
    from hyperdflash.contracts import Document
    from hyperdflash.preparing.dataset import with_supervised_pair

    ids = torch.arange(6)
    lone = Document("a", "code", ids, torch.tensor([0, 0, 1, 0, 1, 0], dtype=torch.bool))
    fine = Document("b", "code", ids, torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.bool))
    assert with_supervised_pair([lone, fine]) == [fine]
    with pytest.raises(ValueError, match="nothing to train on"):
        with_supervised_pair([lone])


def test_validation_tau_is_the_replay_of_the_same_drafter(compose_config, mini_overrides):
    """The best checkpoint, reloaded and replayed outside Lightning, has the tau that was logged."""
    from hyperdflash.decoding.metrics import AcceptanceMetrics
    from hyperdflash.decoding.replay import replay
    from hyperdflash.states.store import collate

    config = compose_config("train", ["experiment=stage1", *mini_overrides, "optim.lr=0.01", "trainer.max_epochs=6"])
    record = train(config)
    parts = runs.make_parts(config)
    heads = runs.load_heads(config.target.path)
    data = runs.training_data(config, heads, parts.layer_ids)[2]["validation"]
    drafter = parts.build(heads, config.target, seed=99).eval()
    lineage.load_drafter_weights(drafter, train_run_dir(config), record["target"])
    metrics = AcceptanceMetrics(6)
    metrics.update(replay(drafter, collate([data[i] for i in range(len(data))]), heads, 0.0))
    assert float(metrics.compute().tau) == pytest.approx(record["val_tau"], abs=1e-6)
