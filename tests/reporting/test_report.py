"""``report`` writes four files from records alone; the page is one file and fetches nothing."""

import csv
import json
import re
import shutil
import statistics
from html import unescape
from html.parser import HTMLParser

import pytest
from scipy import stats
from stored import bare, trials_of

from loralab.errors import ArtifactError, DiskError
from loralab.records import record
from loralab.reporting.report import report


@pytest.fixture(scope="module")
def reported(synthetic_sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "synthetic"
    shutil.copytree(synthetic_sweep, folder)
    return report(folder)


class Balance(HTMLParser):
    """Collects tags that are closed without having been opened, or the other way round."""

    void = frozenset({"meta", "br", "wbr"})

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_four_files_are_written(reported):
    assert sorted(reported.files) == ["index.html", "report.md", "results.csv", "results.json"]
    assert all(path.stat().st_size > 300 for path in reported.files.values())
    assert reported.index == reported.files["index.html"]


def test_the_page_fetches_nothing(reported):
    whole = reported.index.read_text()
    text = bare(whole).replace("http://www.w3.org/2000/svg", "")  # a namespace, which nothing asks for
    assert not re.search(r"(?i)\b(src|srcset|action)\s*=|<link|[\s:(]url\(|@import|fetch\(|https?:", text)
    assert whole.count('<script id="vega">') == 1
    assert whole.count("window.vegaEmbed") == 1
    links = re.findall(r'href="(.*?)"', text)
    assert links == ["results.csv", "results.json", "report.md"]


def test_the_page_is_balanced_html(reported):
    parser = Balance()
    parser.feed(reported.index.read_text())
    assert parser.wrong == []
    assert parser.open == []


def test_the_page_has_every_section_and_what_it_must_say(reported):
    text = bare(reported.index.read_text())
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Results", "Figures", "Not completed", "Provenance"]
    for wanted in (
        "SYNTHETIC: what do quantization and rank cost?",
        "lora_alpha = 16 while r moves",
        "11 of 12",
        "Synthetic CPU, 2 cores",
        "torch 2.13.0",
        "abc1234",
        "loralab train quantization=int8_absmax adapter.r=8 seed=1",
        "95% for all 7 paired differences together",
        "d" * 64,
        "f" * 64,
    ):
        assert wanted in text, wanted


def test_every_figure_says_over_how_many_seeds_or_runs(reported):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", reported.index.read_text())
    assert len(captions) == 6
    assert all(re.search(r"n = \d|\d+ of \d+ runs|its completed seeds", caption) for caption in captions)


def test_a_column_of_numbers_is_sorted_by_all_their_digits(reported):
    cells = re.findall(r'<td class="breaks" data-sort="(.*?)">(.*?)</td>', reported.index.read_text())
    numbers = [(sort, text) for sort, text in cells if re.match(r"[\d+-]", text) and text != "-"]
    assert len(numbers) > 30
    assert all(isinstance(float(sort), float) for sort, _ in numbers)
    assert ("4.127", "4.127") in numbers


def test_texts_from_records_are_escaped(reported):
    text = reported.index.read_text()
    assert "&lt;on cpu&gt;" in text
    assert "<on cpu>" not in text


def test_a_hostile_record_cannot_put_markup_on_the_page(tmp_path, synthetic, write):
    evil = '"><script>alert(1)</script>'
    stored_trial = synthetic("none", 2, 0)
    stored_trial["config"]["adapter"]["target_modules"] = evil
    stored_trial["config"]["metric"] = evil
    stored_trial.update(status="failed", error=evil, overrides=[f"x={evil}"], choices={"quantization": evil})
    stored_trial["environment"]["cpu"] = evil
    write(tmp_path / "a", stored_trial)
    sweep = {"name": evil, "question": evil, "fixed": [evil], "command": evil, "axes": {evil: [evil]}}
    record.write_sweep(tmp_path, {**sweep, "trials": [{"trial": "a", "folder": "a"}]})
    assert "<script>alert" not in report(tmp_path).index.read_text()


def test_results_csv_has_one_line_per_trial(reported):
    lines = list(csv.DictReader(reported.files["results.csv"].read_text().splitlines()))
    assert len(lines) == 12
    assert {line["status"] for line in lines} == {"completed", "out_of_memory"}
    failed = next(line for line in lines if line["status"] != "completed")
    assert failed["error"].startswith("backward: no room")
    assert failed["val/loss"] == ""


def test_results_json_holds_rows_and_trials(reported):
    result = json.loads(reported.files["results.json"].read_text(), parse_constant=pytest.fail)
    assert len(result["arms"]) == 6
    assert len(result["trials"]) == 12
    assert result["claims"] == []
    for row in result["arms"]:
        assert row["n"] == len(row["scores"])
        assert row["mean"] == pytest.approx(sum(row["scores"]) / row["n"])


def test_reporting_twice_gives_the_same_files(reported):
    before = {name: path.read_bytes() for name, path in reported.files.items()}
    again = report(reported.index.parent.parent)
    assert {name: path.read_bytes() for name, path in again.files.items()} == before


def test_a_single_run_can_be_reported(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep / "none,r=2,seed=0", tmp_path / "run")
    done = report(tmp_path / "run")
    assert "1 of 1" in done.index.read_text()
    assert "1 ok" in done.table


def test_a_sweep_that_has_only_begun_can_be_reported(tmp_path):
    trials = [{"trial": "a", "folder": "a", "status": "running", "overrides": ["adapter.r=2"]}]
    record.write_sweep(tmp_path, {"name": "t", "axes": {"adapter.r": [2]}, "trials": trials})
    done = report(tmp_path)
    assert "1 missing" in done.table
    assert "0 of 1" in done.index.read_text()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_records_says_what_was_looked_for(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "nothing"
    with pytest.raises(ArtifactError, match="looked for sweep.json" if exists else "no such folder"):
        report(folder)


@pytest.mark.parametrize(
    "text", ['{"schema": 1,', "", '{"schema": 99, "trial": "a", "status": "failed"}', '{"schema": 1, "trial": NaN}']
)
def test_a_damaged_record_is_one_trial_not_completed_and_the_others_are_shown(synthetic_sweep, tmp_path, text):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    (tmp_path / "s" / "none,r=2,seed=0" / "result.json").write_text(text)
    trials = record.read_sweep(tmp_path / "s")["trials"]
    trials[0]["overrides"] = ["quantization=none", "adapter.r=2", "seed=0"]
    record.write_sweep(tmp_path / "s", {**record.read_sweep(tmp_path / "s"), "trials": trials})
    done = report(tmp_path / "s")
    assert "damaged: quantization=none r=2 seed=0: " in done.table
    assert "10 of 12" in done.index.read_text()
    rows = json.loads(done.files["results.json"].read_text())["arms"]
    assert [row["statuses"] for row in rows if row["values"] == {"quantization": "none", "adapter.r": "2"}] == [
        ["damaged", "completed"]
    ]


def test_a_damaged_run_alone_names_its_file(tmp_path):
    (tmp_path / "result.json").write_text('{"schema": 1,')
    with pytest.raises(ArtifactError, match=r"result\.json: damaged"):
        report(tmp_path)


def test_every_trial_has_its_command_and_links_to_its_files(reported):
    trials = trials_of(reported.index.read_text())
    assert len(set(trials["rerun"])) == 12
    assert "loralab train quantization=nf4_double adapter.r=8 seed=1" in trials["rerun"]
    for path, folder, files in zip(trials["path"], trials["folder"], trials["files"], strict=True):
        assert "result.json" in files
        assert all((reported.index.parent / (path or f"../{folder}") / name).is_file() for name in files)


def test_the_page_names_the_baseline_the_method_and_what_was_cut(tmp_path, synthetic, write):
    for r in (2, 8):
        for seed in (0, 1):
            stored_trial = synthetic("none", r, seed)
            stored_trial["data"]["truncated"] = 50
            stored_trial["memory"]["measured_peak_bytes"] = None
            stored_trial["config"]["data"]["prompt"] = "{a}\n"
            write(tmp_path / f"{r}-{seed}", stored_trial)
    text = unescape(report(tmp_path).index.read_text())
    for wanted in (
        "vs baseline (r = 2)",
        "Student's t",
        "50 of 4,300 rows were cut",
        "not a benchmark",
        "lora_alpha = 16",
    ):
        assert wanted in text, wanted
    assert 'data.prompt = "{a}\\n"' in text
    assert "Peak memory" not in text


def test_a_single_runs_page_is_its_own_and_shows_every_metric(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep / "none,r=2,seed=0", tmp_path / "run")
    text = report(tmp_path / "run").index.read_text()
    assert 'class="kicker">loralab run<' in text
    assert "<h1>run</h1>" in text
    assert ">val/perplexity</button>" in text
    for unwanted in ("best", "standard deviation over n", "baseline", "no single best"):
        assert unwanted not in text.partition("<body>")[2].partition("<footer>")[0], unwanted


def test_trials_of_other_data_or_metrics_stand_in_tables_of_their_own(tmp_path, synthetic, write):
    for index, (fingerprint, metric) in enumerate([("a", "val/loss"), ("b", "val/loss"), ("a", "val/perplexity")]):
        for r in (2, 8):
            for seed in (0, 1):
                stored_trial = synthetic("none", r, seed)
                stored_trial["trial"] += str(index)
                stored_trial["data"]["fingerprint"] = fingerprint * 16
                stored_trial["config"]["metric"] = metric
                write(tmp_path / f"{index}-{r}-{seed}", stored_trial)
    done = report(tmp_path)
    assert len(re.findall(r"<h2>Results: ", done.index.read_text())) == 3
    assert "cannot be compared" in done.table
    assert "best arm" not in done.index.read_text()
    rows = json.loads(done.files["results.json"].read_text())["arms"]
    base = f"base {'f' * 64}"
    assert [row["set"] for row in rows if row["baseline"]] == [
        f"docstrings {'a' * 16}, {base}: val/loss",
        f"docstrings {'b' * 16}, {base}: val/loss",
        f"docstrings {'a' * 16}, {base}: val/perplexity",
    ]


def test_a_torn_metrics_line_is_left_out(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep / "none,r=2,seed=0", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "train/lo')
    assert "train/loss by step" in report(tmp_path / "run").index.read_text()


def test_a_report_that_cannot_be_written_is_a_disk_error(synthetic_sweep, tmp_path):
    shutil.copytree(synthetic_sweep, tmp_path / "s")
    (tmp_path / "s" / "report").write_text("in the way")
    with pytest.raises(DiskError, match="report"):
        report(tmp_path / "s")


def test_the_strip_shows_the_whole_paired_interval_and_every_seed_at_its_value(tmp_path, synthetic, write):
    """No edge may cut the bar, which is of the paired difference; the baseline has none."""
    losses = {2: [1.0, 3.0], 8: [1.5, 4.0]}
    for r, values in losses.items():
        for seed, loss in enumerate(values):
            write(tmp_path / f"{r}-{seed}", {**synthetic("none", r, seed), "metrics": {"val/loss": loss}})
    strips = re.findall(r'<svg class="strip".*?</svg>', report(tmp_path).index.read_text())
    gaps = [other - first for first, other in zip(*losses.values(), strict=True)]
    interval = stats.t.interval(0.95, 1, loc=statistics.fmean(losses[8]), scale=stats.sem(gaps))
    ends = [*interval, *losses[2], *losses[8]]
    low, high = min(ends), max(ends)
    for strip, values, span in zip(strips, losses.values(), ((), interval), strict=True):
        at = [6 + (value - low) / (high - low) * 108 for value in (*span, *values)]
        bar = [float(x) for line in re.findall(r'class="bar" x1="(.*?)" x2="(.*?)"', strip) for x in line]
        seeds = [float(x) for x in re.findall(r'class="seed" cx="(.*?)"', strip)]
        assert [*bar, *seeds] == pytest.approx(at, abs=0.051)
