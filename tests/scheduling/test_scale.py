"""What a launcher and a report do for very many trials grows with their number alone; nothing is trained."""

import pytest
import simulated
from stored import figure_of

from loralab.records import record
from loralab.reporting import report as reporting
from loralab.reporting import text
from loralab.reporting.curves import MOST_LINES
from loralab.scheduling import sweep_file

MOST_BYTES = 5_000_000


@pytest.mark.parametrize("count", [pytest.param(1000, marks=pytest.mark.slow)])
def test_reads_writes_and_the_page_are_bounded(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_file, "WRITTEN_EVERY", 1e9)
    found = simulated.launched(tmp_path / "s", simulated.axes(count))
    counts = found["counts"]
    assert (found["exit code"], found["trials run"]) == (0, count)
    assert counts["composed"] <= count + 1
    assert counts["records read"] <= 3 * count
    assert counts["sweep.json written"] == 2  # at the begin and at the end
    again = simulated.launched(tmp_path / "s", simulated.axes(count))
    assert again["trials run"] == 0
    assert again["counts"]["records read"] <= 5 * count
    assert again["counts"]["sweep.json written"] == 2
    done = reporting.report(tmp_path / "s", ("svg", "png", "pdf"))
    page = done.index.read_text()
    assert len(page.encode()) < MOST_BYTES
    store = figure_of(page, "curve_train_loss")["store"]["metrics"]["train/loss"]
    arms = count // simulated.SEEDS
    assert store["seeds"] == []
    assert len(store["means"]) <= MOST_LINES
    assert f"The first {text.MOST_ROWS} of {arms:,} rows" in " ".join(done.table.split())
    assert {path.suffix for path in (done.index.parent / "figures").iterdir()} == {".svg"}
    assert len(record.read_sweep(tmp_path / "s")["trials"]) == count
