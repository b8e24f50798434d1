"""Notebooks run from start to end, import src only, and are committed with the outputs that they give."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALLOWED = {"hyperdflash", "tiny_target", "os", "pathlib", "matplotlib", "torch", "numpy", "csv", "json", "IPython"}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks, so that torch is imported once; each notebook begins without the names of the others."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        manager.start_kernel(cwd=str(ROOT), extra_arguments=["--HistoryManager.hist_file=:memory:"])
    yield manager
    manager.shutdown_kernel(now=True)


def shown(cell) -> list[str]:
    """Returns a cell's outputs as texts, with fractions left out (they depend on the processor) and pictures by name."""
    texts = [
        o.get("text") or o.data.get("text/html") or o.data["text/plain"] for o in cell.outputs if o.get("name") != "stderr"
    ]
    return [re.sub(r"\d+\.\d+|<Figure size.*>", "#", text) for text in texts]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, kernel, tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = [shown(cell) for cell in code]
    pictures = [output.data["image/png"] for cell in code for output in cell.outputs if "image/png" in output.get("data", ())]
    assert any(committed) and sum(map(len, pictures)) < 200_000, "make notebooks writes small outputs into them"
    imported = {m for cell in code for m in re.findall(r"^(?:from|import) (\w+)", cell.source, re.M)}
    assert imported <= ALLOWED, imported - ALLOWED
    called = re.findall(r"torch\.load|pickle|instantiate|(?<![.\w])(?:eval|exec)\(", "".join(cell.source for cell in code))
    assert not called, f"{called}: what a notebook reads is data, such as CSV or JSON"
    begin = f"%reset -f\nimport os\nos.chdir({str(ROOT)!r})\nos.environ['HYPERDFLASH_RUNS'] = {str(tmp_path)!r}\n%reset -f"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    NotebookClient(notebook, km=kernel, timeout=120).execute()
    assert [shown(cell) for cell in code] == committed, f"{path.name} gives other outputs: run make notebooks and look at them"
