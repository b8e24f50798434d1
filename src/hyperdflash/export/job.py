"""Exports a finished run: checks, weights, files, the comparison of what was read again, and only then the folder."""

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from hyperdflash.contracts import TargetStates
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.evaluation.methods import method_of_run
from hyperdflash.export.card import model_card
from hyperdflash.export.folder import build_drafter, named_target, read_folder, same_logits, write_folder
from hyperdflash.export.formats import GROUPS, check_servable, config_of, served_by
from hyperdflash.files import portable
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import load_heads
from hyperdflash.training.run_index import finished_run

NUM_TOKENS = 24  # of the random text on which the drafter from the folder is compared with the run's


def export(config: DictConfig) -> Path:
    """Writes the run's best weights as ``config.to``; returns the folder. ValueError where no engine serves it."""
    out = Path(config.out)
    run = finished_run(config.run)
    path = config.target or named_target(run.directory)
    method, training = method_of_run(run.directory, path)
    decided = run.record["decided_by"]
    groups = {name: decided[name] for name in GROUPS}
    target = {**method.parts.target_config.to_dict(), "name": config.name or portable(path)}
    check_servable(config.to, groups, target["hidden_size"])

    heads = load_heads(path)
    module = method.drafter(training, heads)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}
    description = {
        "format": config.to,
        "groups": groups,
        "mask_token_id": special_ids(load_tokenizer(path), training.target.mask_token_id).mask,
        "states": training.cache.dtype,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "target": {"fingerprint": run.record["target"], "name": target["name"]},
    }
    served = served_by(config.to, groups)
    card = model_card(run, OmegaConf.to_container(training), description, served, config.license, config.evaluation)
    check = partial(check_folder, module=module, state=state, heads=heads, target=training.target)
    write_folder(out, config.to, config_of(config.to, description, target), state, card, check)
    print(f"{out}: {sum(t.numel() for t in state.values()):,} parameters, read again and equal. {served}")
    return out


def check_folder(folder: Path, *, module: nn.Module, state: dict[str, Tensor], heads: TargetHeads, target: DictConfig) -> None:
    """Raises RuntimeError unless the folder gives the same tensors, and a drafter with the same logits as ``module``."""
    described, found = read_folder(folder)
    both = state.keys() & found.keys()
    if wrong := state.keys() ^ found.keys() | {name for name in both if not torch.equal(state[name], found[name])}:
        raise RuntimeError(f"{folder} does not hold what was written: {min(wrong)} differs")
    if not same_logits(module, build_drafter(described, found, heads, target), heads, random_states(module, heads)):
        raise RuntimeError(f"the drafter of {folder} gives other logits than the run's")


def random_states(module: nn.Module, heads: TargetHeads) -> TargetStates:
    """Returns a random text with random states, of the layers that ``module`` reads."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, NUM_TOKENS, heads.num_paths, heads.hidden_size)
    ids = torch.randint(heads.config.vocab_size, shape[:2], generator=draw)
    layers = torch.randn(1, NUM_TOKENS, len(module.layer_ids), *shape[2:], generator=draw)
    residual = torch.randn(shape, generator=draw)
    loss_mask, lengths = torch.ones_like(ids, dtype=torch.bool), torch.tensor([NUM_TOKENS])
    return TargetStates(("text",), ("chat",), ids, loss_mask, lengths, residual, layers, tuple(module.layer_ids))


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Uploads an exported folder with its card as one commit to the model ``repo_id`` of the Hub; returns the commit's address.
    ValueError for a folder that is cut or foreign; needs the extra ``hub``."""
    described, _ = read_folder(folder)
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    hub.create_repo(repo_id, private=private, exist_ok=True)
    message = f"Upload a drafter for the target {described['target']['fingerprint']}"
    return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url
