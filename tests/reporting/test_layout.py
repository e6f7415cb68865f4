"""Tables in plain text: equal columns, no escape codes, whatever the terminal says of itself."""

import pytest
from markdown_it import MarkdownIt

from loralab.reporting.html import breakable
from loralab.reporting.labels import in_lines
from loralab.reporting.layout import aligned, markdown_text, natural_width, terminal_width, wrapped

ROWS = [["a", "1.5", "[b] :smile:"], ["long name", "-10.25", "x"]]


@pytest.mark.parametrize("force", ["", "1"])
def test_columns_are_aligned_and_hold_no_markup_and_no_escape_codes(monkeypatch, force):
    monkeypatch.setenv("FORCE_COLOR", force)
    head, rule, *lines = aligned(["name", "value", "note"], ROWS, right=range(1, 2))
    assert head.split() == ["name", "value", "note"]
    assert set(rule) == {"-"}
    assert [line.rstrip() for line in lines] == ["a             1.5  [b] :smile:", "long name  -10.25  x"]
    assert max(map(len, (head, rule, *lines))) == natural_width(["name", "value", "note"], ROWS) == len(rule)


def test_a_cell_with_a_line_break_stays_on_its_line():
    assert len(aligned(["a"], [["one\ntwo\x1b[31m"]])) == 3


def test_the_width_is_the_terminals_up_to_a_bound(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "300")
    assert (terminal_width(), terminal_width(120)) == (100, 120)


def test_long_text_is_wrapped_below_an_indent():
    lines = wrapped("word " * 30, 40, "  ")
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith("  word") for line in lines[1:])


def test_a_name_may_be_broken_and_is_escaped():
    assert breakable("last_layer,<b>", "key") == "last_<wbr>layer,<wbr>&lt;b&gt;"
    assert breakable("0.001", "key") == "0.001"
    assert breakable("lab.Scaled", "key") == "lab.<wbr>Scaled"
    assert breakable("1.5 s (pack of 4)", "") == "1.5 s <wbr>(pack of 4)"


@pytest.mark.parametrize(
    "name", ["r_8 *and* _16_", "<b>x</b> & y", "a|b [c](d) `e` ~f~", "# 1. \\\\ back", "two\nlines", "plain_name-1.2!"]
)
def test_a_text_in_markdown_is_read_letter_by_letter(name):
    (heading,) = [token for token in MarkdownIt().parse(f"# {markdown_text(name)}") if token.type == "inline"]
    assert {token.type for token in heading.children} <= {"text", "text_special"}
    assert "".join(token.content for token in heading.children) == " ".join(name.split())


MODULES = ["q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"]


def test_labels_of_rows_are_whole_and_break_between_settings():
    names = [f"nf4_double, r = {r}, {modules}, lr = {lr}" for r in (2, 8) for modules in MODULES for lr in (1e-3, 3e-4)]
    labels = [in_lines(name) for name in names]
    assert [label.replace(",\n", ", ").replace(", ", ",") for label in labels] == [n.replace(", ", ",") for n in names]
    assert max(len(line) for label in labels for line in label.split("\n")) <= 30
    assert in_lines("nf4_double, r = 2, q_proj,v_proj") == "nf4_double, r = 2,\nq_proj,v_proj"
    assert in_lines("nf4, r = 2") == "nf4, r = 2"
    cut = [in_lines(f"{'m' * 40}{end}") for end in ("first", "second")]
    assert len({*cut}) == 2
    assert all(len(label) <= 30 for label in cut)
