"""The page in headless Chromium: it opens without an error or a request, and filters, hovers, zooms."""

import json
import shutil
import time

import browser
import pytest
from grids import write_grid
from test_page import write_sweep

import loralab
from loralab.reporting import between
from loralab.reporting.report import report
from loralab.reporting.wandb_report import pages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PATH is None, reason="no Chromium is installed"),
]
DRAWN = "document.querySelector('figure[data-figure={}]').dataset.drawn"
VIEW = "document.querySelector('figure[data-figure={}]').view"
LARGEST_OPEN_S = 3


@pytest.fixture
def opened(tmp_path):
    """A browser at the page of a report; what it complains of fails the test at its end."""
    made = []

    def build(index, width=1280, dark=False):
        tab = browser.Browser(tmp_path / f"profile{len(made)}", width=width, dark=dark)
        made.append(tab)
        tab.seconds = tab.open(index.as_uri())
        return tab

    yield build
    for tab in made:
        tab.close()
    for tab in made:
        assert tab.errors == []
        assert all(address.startswith(("file:", "data:", "blob:", "about:")) for address in tab.requests)


def shown(tab, name, turn=1):
    tab.run(f"document.querySelector('figure[data-figure={name}]').scrollIntoView()")
    tab.wait(f"Number({DRAWN.format(name)} ?? 0) >= {turn}")


def rows(tab, name, data):
    return json.loads(tab.run(f"JSON.stringify({VIEW.format(name)}.data('{data}'))"))


def press(tab, name, selector, index=0):
    return tab.run(f"document.querySelectorAll('figure[data-figure={name}] {selector}')[{index}].click()")


def test_a_legend_filters_and_controls_change_what_is_drawn(tmp_path, synthetic, opened):
    tab = opened(report(write_sweep(tmp_path / "s", synthetic, 24)).index)
    shown(tab, "curve_train_loss")
    assert len({row["group"] for row in rows(tab, "curve_train_loss", "lines")}) == 3
    press(tab, "curve_train_loss", ".legend button")
    shown(tab, "curve_train_loss", 2)
    left = {row["group"] for row in rows(tab, "curve_train_loss", "lines")}
    assert left == {"int8_absmax", "nf4_double"}
    press(tab, "curve_train_loss", "input[type=checkbox]")  # means and ranges
    shown(tab, "curve_train_loss", 3)
    assert len({row["line"] for row in rows(tab, "curve_train_loss", "lines")}) == 4
    assert all(row["low"] <= row["high"] for row in rows(tab, "curve_train_loss", "bands"))
    press(tab, "curve_train_loss", "input[type=checkbox]", 1)  # logarithmic
    shown(tab, "curve_train_loss", 4)
    assert tab.run(f"{VIEW.format('curve_train_loss')}.scale('y').type") == "log"


def test_several_figures_of_one_notebook_are_drawn_and_fetch_nothing(tmp_path, synthetic):
    figures = loralab.charts(write_sweep(tmp_path / "s", synthetic, 24))
    outputs = [figure._repr_mimebundle_()["text/html"] for figure in figures.values()]
    cells = tmp_path / "cells.html"
    cells.write_text("".join(f"<div class=cell>{output}</div>" for output in outputs), "utf-8")
    assert len(outputs) > 2
    tab = browser.Browser(tmp_path / "profile")
    try:
        tab.open(cells.as_uri())
        tab.wait(f"document.querySelectorAll('.cell canvas, .cell svg.marks').length === {len(outputs)}")
        tab.picture(tmp_path / "cells.png")
        assert {address for address in tab.requests if not address.startswith("data:")} == {cells.as_uri()}
        assert [error for error in tab.errors if "WARN" not in error] == []  # Vega-Lite tells of legends that it merges
    finally:
        tab.close()


def test_the_wheel_zooms_with_ctrl_and_pointing_tells_a_value(tmp_path, synthetic, opened):
    tab = opened(report(write_sweep(tmp_path / "s", synthetic, 24)).index)
    shown(tab, "metric")
    box = json.loads(
        tab.run(
            "JSON.stringify(document.querySelector('figure[data-figure=metric] .plot svg').getBoundingClientRect())"
        )
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    domain = f"JSON.stringify({VIEW.format('metric')}.scale('y').domain())"
    before = json.loads(tab.run(domain))
    tab.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240, modifiers=2)
    tab.wait(f"{domain} !== '{json.dumps(before, separators=(',', ':'))}'")
    after = json.loads(tab.run(domain))
    assert before[0] < after[0] < after[1] < before[1]
    tab.run("scrollTo(0, 0)")
    shown(tab, "differences")
    mark = "document.querySelector('figure[data-figure=differences] .plot svg .mark-symbol path')"
    visible = "document.querySelector('#vg-tooltip-element.visible') !== null"
    for aside in range(30):  # what is drawn above it meanwhile moves it
        place = json.loads(tab.run(f"JSON.stringify({mark}.getBoundingClientRect())"))
        tab.mouse("mouseMoved", place["x"] + place["width"] / 2, place["y"] + place["height"] / 2 + aside % 2)
        if tab.run(visible):
            break
        time.sleep(0.1)
    assert "paired difference" in tab.run("document.querySelector('#vg-tooltip-element').textContent")


def test_any_quantity_against_any_other_of_rows_or_trials(tmp_path, synthetic, opened):
    tab = opened(report(write_sweep(tmp_path / "s", synthetic, 24)).index)
    shown(tab, "explorer")
    assert len(rows(tab, "explorer", "points")) == 6
    assert rows(tab, "explorer", "front")
    tab.run(
        "(() => { const choice = document.querySelector('figure[data-figure=explorer] select');"
        "choice.value = 'time.train_s'; choice.dispatchEvent(new Event('change')); })()"
    )
    shown(tab, "explorer", 2)
    press(tab, "explorer", "input[type=checkbox]")  # each trial
    shown(tab, "explorer", 3)
    drawn = rows(tab, "explorer", "points")
    assert len(drawn) == 24
    assert all(10 <= row["x"] <= 11 for row in drawn)


def test_trials_filter_and_sort_by_any_column(tmp_path, synthetic, opened):
    tab = opened(report(write_sweep(tmp_path / "s", synthetic, 24)).index)
    tab.run("document.querySelector('details.all-trials').open = true")
    tab.wait("document.querySelectorAll('.trials-table tbody tr').length === 24")
    tab.run(
        "(() => { const field = document.querySelector('.trials-table input[aria-label=\"filter seed\"]');"
        "field.value = '>= 2'; field.dispatchEvent(new Event('input')); })()"
    )
    assert tab.run("document.querySelectorAll('.trials-table tbody tr').length") == 12
    heads = "[...document.querySelectorAll('.trials-table thead tr:first-child th')]"
    at = tab.run(f"{heads}.findIndex((head) => head.textContent === 'val/loss')")
    tab.run(f"{heads}[{at}].querySelector('button').click()")
    found = tab.run(
        f"[...document.querySelectorAll('.trials-table tbody tr')].map((row) => row.cells[{at}].textContent)"
    )
    values = [float(text) for text in found]
    assert values == sorted(values)
    tab.run("document.querySelector('.trials-table button.open').click()")
    assert "loralab train" in tab.run("document.querySelector('tr.detail').textContent")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_hides_at_1280_pixels_and_axes_are_legible_at_390(synthetic_sweep, tmp_path, opened, dark):
    index = report(write_copy(synthetic_sweep, tmp_path / "s")).index
    wide, narrow = opened(index, 1280, dark), opened(index, 390, dark)
    for tab in (wide, narrow):
        names = tab.run("[...document.querySelectorAll('figure[data-figure]')].map((figure) => figure.dataset.figure)")
        for name in names:
            shown(tab, name)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert wide.run("[...document.querySelectorAll('.scroll')].every((box) => box.scrollWidth <= box.clientWidth + 1)")
    sizes = narrow.run(
        "[...document.querySelectorAll('.plot svg')].map((svg) => svg.clientWidth / svg.viewBox.baseVal.width * "
        "Math.min(...[...svg.querySelectorAll('text')].map((text) => parseFloat(getComputedStyle(text).fontSize))))"
    )
    assert len(sizes) >= 5
    assert min(sizes) >= 10


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_heat_map_of_a_tuned_sweep_is_drawn_in_both_themes(tmp_path, synthetic, opened, dark):
    axes = {"adapter.r": [2, 8], "optimizer.lr": [1e-3, 3e-3, 1e-2]}
    tab = opened(report(write_grid(tmp_path / "s", synthetic, axes, tune=["optimizer.lr"])).index, 390, dark)
    shown(tab, "tuning")
    shown(tab, "heat")
    assert len(rows(tab, "heat", "cells")) == 6
    numbers = "figure[data-figure=heat] .mark-text.layer_1_marks text"
    texts = tab.run(f"[...document.querySelectorAll('{numbers}')].map((one) => one.textContent)")
    assert sorted(texts) == sorted(row["text"] for row in rows(tab, "heat", "cells"))


def test_two_sweeps_are_one_page_without_an_error(tmp_path, synthetic, opened):
    axes = {"adapter.r": [2, 8]}
    sweeps = [write_grid(tmp_path / name, synthetic, axes) for name in ("one", "other")]
    tab = opened(between.report(*sweeps).index)
    shown(tab, "differences")
    assert len(rows(tab, "differences", "rows")) == 2


def test_ten_thousand_trials_open_in_time(tmp_path, synthetic, opened):
    tab = opened(report(write_sweep(tmp_path / "s", synthetic, 10_000)).index)
    assert tab.seconds < LARGEST_OPEN_S
    shown(tab, "curve_train_loss")
    tab.run("document.querySelector('details.all-trials').open = true")
    tab.wait("document.querySelectorAll('.trials-table tbody tr').length === 200")


def test_the_page_of_a_sweep_with_hostile_names_runs_none_of_them(tmp_path, synthetic, write, opened):
    evil = "</script><img src=x onerror=window.evil=1><script>window.evil=1</script>'\"&"
    for r in (2, 8):
        stored = synthetic("none", r, 0)
        stored["choices"]["quantization"] = evil + str(r)
        stored["overrides"] = [f"x={evil}"]
        write(tmp_path / "s" / str(r), stored)
    tab = opened(report(tmp_path / "s").index)
    shown(tab, "metric")
    tab.run("document.querySelector('details.all-trials').open = true")
    tab.wait("document.querySelectorAll('.trials-table tbody tr').length === 2")
    tab.run("document.querySelector('.trials-table button.open').click()")
    assert tab.run("window.evil === undefined")


def write_copy(source, target):
    shutil.copytree(source, target)
    return target


def test_a_chart_of_the_report_in_wandb_is_drawn_by_itself(tmp_path, synthetic):
    """The panel's document alone, from what it carries."""
    made = report(write_sweep(tmp_path / "s", synthetic, 24))
    panel = tmp_path / "panel.html"
    panel.write_text(pages(made.figures)["report/metric"], encoding="utf-8")
    tab = browser.Browser(tmp_path / "profile")
    try:
        tab.open(panel.as_uri())
        tab.wait("document.querySelectorAll('#chart svg').length > 0")
        assert tab.run("document.title") == next(one.title for one in made.figures if one.name == "metric")
        assert all(address.startswith(("file:", "data:", "blob:")) for address in tab.requests)
    finally:
        tab.close()
