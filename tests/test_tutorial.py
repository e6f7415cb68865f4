"""The tutorial notebook and the README's lines of Python run from top to bottom in an empty folder."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / ".github" / "docs" / "tutorial.ipynb"


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
    assert {
        "cell-03",
        "cell-05",
        "cell-09",
        "cell-11",
        "cell-12",
        "cell-13",
        "cell-13b",
    } <= tables  # plan, records, frames, chart
    texts = ["".join(one.get("text", "") for one in outputs) for outputs in shown.values()]
    assert any("adapter.r must be at least 1, got 0" in text for text in texts)
    (pair,) = [one["data"]["text/plain"] for one in shown["cell-17"] if one["output_type"] == "execute_result"]
    ours, trained = json.loads(pair.replace("(", "[").replace(")", "]"))
    assert ours == pytest.approx(trained, rel=1e-5)
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "rank" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_the_readmes_lines_of_python_run(tmp_path, monkeypatch):
    """As they stand, but with fewer steps and rows."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (lines,) = re.findall(r"## From Python and a notebook\n\n```python\n(.*?)```", readme, re.DOTALL)
    quick = lines.replace("max_steps=60", "max_steps=2").replace('seed=0,1"', 'seed=0,1", "trainer.max_steps=2"')
    quick = re.sub(r"(?<=[( ])\[(?=\"adapter)", '["data.limit=8", "model.max_length=64", "logger=none", ', quick)
    assert quick.count("data.limit=8") == 3
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(quick, names)
    assert names["record"].status == "completed"
    assert len(names["frame"]) == len(names["records"]) == 4
    assert (
        names["model"].generate(names["tokenizer"]("a", return_tensors="pt")["input_ids"], max_new_tokens=2).shape[0]
        == 1
    )
