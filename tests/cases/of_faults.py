"""Faults from outside: the sentence names the file and the cure; and checks that cost nothing come first."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.cases.harness import CAPTURED, STAGE1, Case, cut, edit, remove, rows, write

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1\n"
GENERATE = "generate prompt=Hi target.path=target threads=1 max_new_tokens=2"
WINDOW_2_GIB = bytes.fromhex("28b52ffd 00 a8 010000")  # a zstd frame: magic, descriptor, window, an empty last block
BEST = "runs/train/*/checkpoints/best.ckpt"
NO_STATES = ["runs/cache/*/??"]
TWO_ROWS = [{"conversations": [{"role": "user", "content": f"Ask {i}."}, {"role": "assistant", "content": "Yes."}]} for i in range(2)]


def not_a_number(name: str) -> Callable[[Path], None]:
    """Plants a NaN in one tensor of the target."""

    def change(here: Path) -> None:
        file = here / "target" / "model.safetensors"
        tensors = load_file(file)
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def replaced(pattern: str, content: str) -> Callable[[Path], None]:
    """Writes other content into each file of ``pattern``."""
    return lambda here: [path.write_text(content) for path in here.glob(pattern)]


def without(name: str) -> Callable[[Path], None]:
    """Leaves one tensor out of the target."""

    def change(here: Path) -> None:
        file = here / "target" / "model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, metadata={"format": "pt"})

    return change


NORM = "model.layers.2.input_layernorm.weight"

CASES = [
    Case("a damaged dataset", "train $mini", 1, ["dataset.json is damaged"], after=[CAPTURED], make=[cut("runs/datasets/*/dataset.json")], absent=["runs/train/*/checkpoints"]),
    Case("runs is a file", "train $mini", 1, ["error: runs", "a file stands", "HYPERDFLASH_RUNS"], make=[write("runs", "")]),
    Case("a layer with a NaN", "capture $mini", 1, ["code/", "layer 2", "NaN"], make=[not_a_number(NORM)], absent=NO_STATES),
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
    Case("a prompt that is no text", "generate prompt=\udcff target.path=target", 1, ["user turn", "UTF-8"]),
    Case("a window of 2 GiB", "capture $mini source:long.jsonl.zst", 1, ["window above 128 MiB"], make=[write("long.jsonl.zst", WINDOW_2_GIB)], absent=NO_STATES),
    Case("no CUDA device", "train $mini trainer.accelerator=gpu", 1, ["finds 0 here"], absent=["runs/datasets"]),
    Case("an accelerator that is none", "train $mini trainer.accelerator=7", 1, ["trainer.accelerator must be cpu"], absent=["runs/datasets"]),
    Case("threads that are no number", "train $mini trainer.threads=few", 1, ["trainer.threads must be a positive integer"], absent=["runs/datasets"]),
    Case("devices that are no indices", "train $mini trainer.devices=[a]", 1, ["trainer.devices must be"], absent=["runs/datasets"]),
    Case("no held-out row", "capture $mini corpus.responses=target source:two.jsonl corpus.heldout=0.0001", 1, ["no held-out row"], make=[rows("two.jsonl", *TWO_ROWS)], absent=["runs/responses/*.jsonl"]),
]
