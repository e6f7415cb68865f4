"""The tutorial notebook runs from top to bottom in an empty folder, and lies in the repository without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / ".github" / "docs" / "tutorial.ipynb"


def test_the_tutorial_lies_without_outputs_and_its_cells_are_python():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 8
    for cell in code:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"}
    tables = {name for name, outputs in shown.items() if any("text/html" in one.get("data", {}) for one in outputs)}
    assert {"cell-03", "cell-05", "cell-09", "cell-11", "cell-12", "cell-13"} <= tables  # plan, records, frames
    texts = ["".join(one.get("text", "") for one in outputs) for outputs in shown.values()]
    assert any("adapter.r must be at least 1, got 0" in text for text in texts)
    (pair,) = [one["data"]["text/plain"] for one in shown["cell-17"] if one["output_type"] == "execute_result"]
    ours, trained = json.loads(pair.replace("(", "[").replace(")", "]"))
    assert ours == pytest.approx(trained, rel=1e-5)
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "rank" / "report" / "index.html").is_file()
