"""The parity notebook runs to its end, takes a checkpoint, and is kept without outputs."""

import json
import pathlib

import nbformat
from nbclient import NotebookClient
from optional import torch, torch_flair

from flair_jax import convert
from flair_jax.configs import variants

PATH = pathlib.Path(convert.__file__).parent / "parity.ipynb"
SMALL = dict(
    embed_dim=32,
    vision=dict(image_size=32, patch_size=16, width=64, depth=1, heads=1),
    text=dict(context_length=8, vocab_size=64, width=64, depth=1, heads=1),
    pooling=dict(heads=8),
)


def execute(notebook, folder):
    """Runs all cells in a kernel of their own; returns what they printed and whether they drew."""
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, any("image/png" in output.get("data", {}) for output in outputs)


def test_no_outputs_are_kept():
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_runs_to_the_end_and_finds_parity(tmp_path, monkeypatch):
    monkeypatch.delenv("FLAIR_CHECKPOINT", raising=False)
    printed, drawn = execute(nbformat.read(PATH, as_version=4), tmp_path)
    assert "there and back equal bit for bit" in printed
    assert "equal: 11 outputs and 73 gradients, each within" in printed
    assert "CLIP equal: 4 outputs and" in printed and "GRAIN equal: 6 outputs" in printed
    assert drawn


def test_takes_a_checkpoint(tmp_path, monkeypatch):
    """Only the cells that load: what follows is the same."""
    weights = torch_flair.TorchFLAIR(SMALL).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "a.pt")
    (tmp_path / "model.json").write_text(json.dumps({**variants.flair().to_dict(), **SMALL}))
    monkeypatch.setenv("FLAIR_CHECKPOINT", "a.pt")
    monkeypatch.setenv("FLAIR_MODEL_CONFIG", "model.json")
    notebook = nbformat.read(PATH, as_version=4)
    stop = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Images"))
    notebook.cells = notebook.cells[:stop]
    count = sum(tensor.numel() for tensor in weights.values())
    assert f"{len(weights)} tensors, {count:,} parameters" in execute(notebook, tmp_path)[0]
