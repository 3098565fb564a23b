"""The notebook runs from its first cell to its last, in a kernel of its own."""

from pathlib import Path

import pytest

from tiny_files import save_tiny_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("MODEL", str(save_tiny_model(tmp_path / "model")))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)
    assert "step 12/12" in shown  # progress, as lines: there is no terminal
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Writing model shards" not in shown  # a bar of transformers' over no shards at all
    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)  # kept without outputs
