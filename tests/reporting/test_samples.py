"""Generated samples on the page: prompt, target and what each arm made of it, as predictions.jsonl has them."""

import json
import re
from html import unescape

import pandas as pd
import pytest
from grids import write_grid

from loralab.forward.texts import exact_match
from loralab.reporting.report import report

AXES = {"adapter.r": [2, 8]}
MADE = {2: ["four", " five ", "wrong"], 8: ["4", "five", "six"]}
TARGETS = ["four", "five", "six"]


def write_predictions(folder, made, split="validation", targets=TARGETS, prompt="How much is it, {}?"):
    rows = [
        {"row": at, "prompt": prompt.format(at), "target": target, "prediction": text, "split": split}
        for at, (target, text) in enumerate(zip(targets, made, strict=True))
    ]
    with (folder / "predictions.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def samples(page):
    """[(title, {term: text}, names of the exact ones)] of each sample that the page shows."""
    found = []
    for article in re.findall(r'<article class="sample">(.*?)</article>', page, re.S):
        title = re.search(r"<h3>(.*?)</h3>", article)[1]
        pairs = re.findall(r"<dt>(.*?)</dt><dd(.*?)>(.*?)</dd>", article, re.S)
        texts = {
            unescape(term): unescape(re.sub(r'<span class="pill">.*?</span>|<.*?>', "", text))
            for term, _, text in pairs
        }
        found.append(
            (title, texts, [unescape(term) for term, kind, text in pairs if "exact" in kind and ">exact<" in text])
        )
    return found


def test_rows_arms_and_exact_matches_are_those_of_the_files(tmp_path, synthetic):
    root = write_grid(tmp_path / "s", synthetic, AXES)
    for r, made in MADE.items():
        for seed in (0, 1):  # the second seed is not shown
            write_predictions(root / f"adapter.r={r},seed={seed}", made if seed == 0 else ["x"] * 3)
    shown = samples(report(root).index.read_text())
    frames = {
        r: pd.read_json(root / f"adapter.r={r},seed=0" / "predictions.jsonl", lines=True, dtype=False) for r in MADE
    }
    assert [title for title, _, _ in shown] == [f"Row {at} of the validation split" for at in range(3)]
    for at, (_, texts, exact) in enumerate(shown):
        assert texts["prompt"].strip() == f"How much is it, {at}?"
        assert texts["target"].strip() == TARGETS[at]
        for r, frame in frames.items():
            text = str(frame["prediction"][at])
            assert texts[f"r = {r}"].strip() == text.strip()
            assert (f"r = {r}" in exact) == bool(exact_match([text], [TARGETS[at]]))


def test_a_tuned_sweep_shows_the_chosen_trial_on_the_test_split(tmp_path, synthetic):
    axes = {"adapter.r": [2, 8], "optimizer.lr": [1e-3, 1e-2, 1e-1]}
    root = write_grid(tmp_path / "s", synthetic, axes, tune=["optimizer.lr"])
    for folder in root.glob("adapter*"):
        write_predictions(folder, ["v"], targets=["t"])
        write_predictions(folder, [folder.name], "test", targets=["t"])
    done = report(root)
    frame = pd.read_csv(done.files["results.csv"])
    means = frame.groupby(["adapter.r", "optimizer.lr"])["val/loss"].mean().groupby("adapter.r")
    ((title, texts, _),) = samples(done.index.read_text())
    assert title == "Row 0 of the test split"
    for r, (_, rate) in means.idxmin().items():
        assert texts[f"r = {r}"].strip() == f"adapter.r={r},optimizer.lr={rate},seed=0"


def test_at_most_five_rows_and_twelve_arms_and_long_texts_are_folded(tmp_path, synthetic):
    root = write_grid(tmp_path / "s", synthetic, {"adapter.r": list(range(1, 15))}, seeds=(0,))
    long = "word " * 1000
    for folder in root.glob("adapter*"):
        write_predictions(folder, [long] * 7, targets=["t"] * 7)
    page = report(root).index.read_text()
    shown = samples(page)
    assert (len(shown), len(shown[0][1])) == (5, 14)
    assert "The first 12 of 14 rows of the table" in page
    summary, rest = re.search(r'<details class="long"><summary>(.*?)</summary><pre>(.*?)</pre>', page, re.S).groups()
    assert (summary, rest.partition("\n[")[0]) == (long[:240] + "...", long[:4000])
    assert "[1,000 more characters: see predictions.jsonl]" in rest


def test_texts_are_escaped_and_torn_lines_are_left_out(tmp_path, synthetic):
    root = write_grid(tmp_path / "s", synthetic, AXES)
    folder = root / "adapter.r=2,seed=0"
    evil = "</pre><script>alert(1)</script>{{ 7 * 7 }}"
    write_predictions(folder, [evil], targets=[evil], prompt="<i>{}</i>")
    with (folder / "predictions.jsonl").open("a") as file:
        file.write('[1]\n{"row": 1}\n{"row": 1, "predic')
    page = report(root).index.read_text()
    assert "<script>alert" not in page
    ((_, texts, exact),) = samples(page)
    assert [texts[term].strip() for term in ("prompt", "target", "r = 2")] == ["<i>0</i>", evil, evil]
    assert exact == ["r = 2"]


@pytest.mark.parametrize("content", [None, "", "torn"])
def test_without_generated_rows_there_is_no_such_section(tmp_path, synthetic, content):
    root = write_grid(tmp_path / "s", synthetic, AXES)
    if content is not None:
        (root / "adapter.r=2,seed=0" / "predictions.jsonl").write_text(content)
    assert "Generated samples" not in report(root).index.read_text()
