"""table.tex: the table of results.csv's means, escaped, and up to date wherever it is."""

import re

import pandas as pd
import pytest
from grids import write_grid

from loralab.cli import main
from loralab.reporting.report import report

ESCAPED = {"\\&": "&", "\\%": "%", "\\$": "$", "\\#": "#", "\\_": "_", "\\{": "{", "\\}": "}"}
AXES = {"adapter.r": [2, 8], "adapter.lora_alpha": [4, 16, 64]}


def cells(text):
    """The rows of the tabulars, head first, what was escaped put back."""
    lines = [line for line in text.splitlines() if line.endswith(r"\\") and not line.startswith("%")]
    rows = [re.split(r" (?<!\\)& ", line.removesuffix(r"\\")) for line in lines]
    found = []
    for row in rows:
        texts = [cell.strip().replace("$-$", "-").replace(r"$\pm$", "+-") for cell in row]
        texts = [text.replace(r"\textbackslash ", "\\").replace(r"\textasciitilde ", "~") for text in texts]
        for escaped, plain in ESCAPED.items():
            texts = [text.replace(escaped, plain) for text in texts]
        found.append(texts)
    return found


def test_the_cells_are_the_means_of_results_csv_and_those_of_report_md(tmp_path, synthetic):
    root = write_grid(tmp_path / "s", synthetic, AXES)
    done = report(root, tex=True)
    text = done.files["table.tex"].read_text()
    head, *rows = cells(text)
    means = pd.read_csv(done.files["results.csv"]).groupby(["adapter.r", "adapter.lora_alpha"])["val/loss"]
    for row in rows:
        key = (int(row[head.index("r")]), int(row[head.index("lora_alpha")]))
        told = f"{means.mean()[key]:.4f} +- {means.std()[key]:.4f}"
        assert row[head.index("val/loss")] == told
    assert len(rows) == 6
    table = [line for line in done.files["report.md"].read_text().splitlines() if line.startswith("| ")]
    assert [head, *rows] == [line.strip("| ").split(" | ") for line in table if "---" not in line]
    for word in ("toprule", "midrule", "bottomrule", r"begin{tabular}{llr"):
        assert word in text
    assert not re.search(r"[^$\d\w.-]-\d", text.partition("midrule")[2].partition("bottomrule")[0])


def test_names_are_escaped_and_comments_end_no_table(tmp_path, synthetic):
    evil = r"*50%_a&b$x#{y}~\end{tabular}"
    root = write_grid(tmp_path / "s", synthetic, {"adapter.target_modules": [evil, "v_proj"]})
    text = report(root, tex=True).files["table.tex"].read_text()
    assert cells(text)[1][0] == "{}" + evil  # a star behind the end of a row would be its own
    assert [line for line in text.splitlines() if "end{tabular}" in line and not line.startswith("%")] == [
        r"\end{tabular}"
    ]


def test_it_is_written_on_request_and_kept_up_to_date(tmp_path, synthetic, capsys):
    root = write_grid(tmp_path / "s", synthetic, AXES)
    path = root / "report" / "table.tex"
    assert main.run(["report", str(root)]) == 0
    assert not path.exists()
    assert main.run(["report", "--latex", str(root)]) == 0
    before = path.read_text()
    path.write_text("old")
    report(root)
    assert path.read_text() == before


@pytest.mark.parametrize("words", [["--latex", "--watch", "a"], ["--latex", "a", "b"]])
def test_it_goes_with_one_report_that_is_written_once(words, capsys):
    assert main.run(["report", *words]) == 2
    assert "--latex" in capsys.readouterr().err
