"""Table 1 of the paper, counted from real modules of DeepSeek-V4-Flash's sizes on the meta device, without their memory."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from hyperdflash.drafting.conditioning import PreHcHead
from hyperdflash.drafting.reducers.fc import Fc
from hyperdflash.drafting.reducers.hc_gate import HcGate
from hyperdflash.drafting.reducers.reducer import ReducerConfig
from hyperdflash.files import resource
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import read_config

FLASH = resource("assets") / "deepseek_v4_flash"  # its config.json alone


def num_parameters(reducer: ReducerConfig) -> int:
    with torch.device("meta"):
        heads = TargetHeads(read_config(FLASH))
        module = reducer.build(PreHcHead(), heads, heads.hidden_size)
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def table1() -> Table:
    fc, gate = num_parameters(Fc()), num_parameters(HcGate(path_norm=False))
    path_norm = num_parameters(HcGate(path_norm=True)) - gate
    config = read_config(FLASH)
    table = Table(title=f"Table 1: reducers at m = {config.hc_mult} paths, d = {config.hidden_size}")
    table.add_column("")
    table.add_column("reducer=fc", justify="right")
    table.add_column("reducer=hc_gate", justify="right")
    table.add_row("Collapse mechanism", "dense linear projection", "gated path-wise aggregation")
    table.add_row("Trainable parameters", f"{fc:,}", f"{gate:,}")
    table.add_row("  + per-path norm", "-", f"{path_norm:,}")
    table.add_row("Weight initialization", "random", "inherited from the target's hc_head")
    table.add_row("Target alignment", "learned from scratch", "inherent")
    return table


def main() -> None:
    argparse.ArgumentParser(description="Prints the paper's Table 1 from real modules; it has no options.").parse_args()
    Console().print(table1())
