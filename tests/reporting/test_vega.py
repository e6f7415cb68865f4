"""Figures as files, the library that a page carries, and what neither may cost those who draw nothing."""

import subprocess
import sys

import pytest

from loralab.analysis.arms import comparisons
from loralab.analysis.results import read_results
from loralab.reporting import vega
from loralab.reporting.figures import figures


@pytest.mark.parametrize(("kind", "head"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_figure_becomes_a_file_of_each_kind(synthetic_sweep, kind, head):
    figure = figures(comparisons(read_results(synthetic_sweep))[0])[0]
    content = vega.drawn(figure.spec, kind)
    assert content.startswith(head)
    if kind == "svg":
        assert b"val/loss" in content
        assert b"nf4_double" in content


def test_the_bundle_ends_no_script_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    text = vega.bundle()
    assert "</script" not in text
    assert "window.vegaEmbed" in text
    (kept,) = tmp_path.glob("vega-*.js")
    kept.write_text("torn")
    assert vega.bundle() == text == kept.read_text()


def test_nothing_of_it_is_imported_before_a_figure_is_drawn():
    code = "import sys, loralab.reporting.report, loralab.cli.main; print({'altair', 'vl_convert'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
