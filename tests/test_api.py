"""What ``import loralab`` gives: the command line's runs, records as frames, a run's model ready for use."""

import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from xml.etree import ElementTree

import altair as alt
import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import AutoModelForCausalLM

import loralab
from loralab.errors import ArtifactError, ConfigError, DataError, LoralabError
from loralab.records.record import blank
from loralab.records.shown import TrialRecord, TrialRecords
from loralab.training.module import FineTuner

RANKS = ["adapter.r=2,4", "seed=0,1", "sweep.tune=null"]  # the shipped file tunes; these tests are of plain rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a sweep of two ranks and two seeds, made once."""
    return tmp_path_factory.mktemp("api") / "rank"


@pytest.fixture
def swept(runs, tiny_arguments):
    words = [word for word in tiny_arguments if not word.startswith("adapter.r=")]
    if not runs.exists():
        loralab.sweep("rank", [*words, *RANKS, f"hydra.sweep.dir={runs}"])
    return runs


def test_importing_it_imports_nothing_heavy_and_its_names_are_there():
    """No other library is imported by it: it takes under 0.1 s wherever Python itself starts."""
    script = """
import sys, time
before, begun = set(sys.modules), time.process_time()
import loralab
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)), time.process_time() - begun < 0.1, dir(loralab))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("['loralab'] True ")
    assert all(name in out for name in loralab.__all__)
    assert not hasattr(loralab, "nothing")


def test_train_returns_the_record_and_leaves_the_process_as_it_was(tiny_arguments, tmp_path):
    before = sys.argv, logging.getLogger().level, logging.getLogger().handlers[:]
    record = loralab.train([*tiny_arguments, f"hydra.run.dir={tmp_path / 'run'}"])
    assert (sys.argv, logging.getLogger().level, logging.getLogger().handlers[:]) == before
    assert record["status"] == record.status == "completed"
    assert record.folder == tmp_path / "run"
    assert record == json.loads(json.dumps(record))  # a dict
    assert record["metrics"] == record.metrics == json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    pid = record["pid"]
    assert loralab.train([*tiny_arguments, f"hydra.run.dir={tmp_path / 'run'}"])["pid"] == pid


def test_a_sweep_as_frames(swept):
    frame = loralab.results(swept)
    assert list(frame["adapter.r"]) == [2, 2, 4, 4]
    assert set(frame["status"]) == {"completed"}
    stored = {path.parent.name: json.loads(path.read_text()) for path in swept.glob("*/result.json")}
    assert dict(zip(frame["trial"], frame["val/loss"], strict=True)) == {
        trial: record["metrics"]["val/loss"] for trial, record in stored.items()
    }
    table = loralab.summary(swept)
    means = frame.groupby("adapter.r")["val/loss"].mean()
    assert list(table["mean"]) == pytest.approx([means[2], means[4]])
    assert list(table["n"]) == [2, 2]
    assert table["difference_mean"][1] == pytest.approx(means[4] - means[2])
    lines = loralab.curves(swept)
    assert set(lines["trial"]) == set(frame["trial"])
    assert lines["train/loss"].notna().sum() == 4 * 2


def test_charts_are_the_pages_figures_and_are_drawn_in_a_notebook(swept):
    figures = loralab.charts(swept)
    shown = figures["metric"].to_dict()
    assert shown["title"] == "val/loss against r"
    drawn = {row["x"]: row["value"] for row in shown["datasets"]["means"]}
    table = loralab.summary(swept)
    assert drawn == dict(zip(map(float, table["adapter.r"]), table["mean"], strict=True))
    html = figures["metric"]._repr_mimebundle_()["text/html"]
    assert "val/loss against r" in html
    assert "<script src" not in html  # nothing is fetched (tests/reporting/test_browser.py)
    with alt.renderers.enable("svg"):  # the user's own choice
        assert figures["metric"]._repr_mimebundle_()["image/svg+xml"].startswith("<svg")


def cells(html):
    """The rows of an HTML table."""
    head, *rows = ([cell.text or "" for cell in row] for row in ElementTree.fromstring(html).iter("tr"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_records_and_plans_are_tables_in_a_notebook(swept, tiny_arguments):
    words = [word for word in tiny_arguments if not word.startswith("adapter.r=")]
    records = loralab.sweep("rank", [*words, *RANKS, f"hydra.sweep.dir={swept}"])  # read again
    assert [record.folder for record in records] == [swept / record["trial"] for record in records]
    shown = cells(records._repr_html_())
    assert [row["name"] for row in shown] == ["r=2 seed=0", "r=2 seed=1", "r=4 seed=0", "r=4 seed=1"]
    for row, record in zip(shown, records, strict=True):
        assert float(row["val/loss"]) == pytest.approx(record["metrics"]["val/loss"], rel=1e-4)
        assert row["trainable parameters"] == f"{record['adapter']['trainable_parameters']:,}"
        assert "training of its pack, s" in row
    assert '<td style="text-align: left">r=2 seed=0</td>' in records._repr_html_()
    assert records[0]["trial"] in records[0]._repr_html_()
    planned = loralab.plan([*tiny_arguments, "plan.device=cpu"])
    rows = {row["memory"]: row["GiB"] for row in cells(planned._repr_html_())}
    assert float(rows["predicted peak, cpu"]) == pytest.approx(planned.predicted_peak_bytes / 2**30, abs=5e-4)


def test_what_a_cell_holds_is_text(tmp_path):
    record = TrialRecord(blank("<b>", overrides=["a=<i>"]), tmp_path)
    record.update(status="failed", error="no <room>")
    html = TrialRecords([record])._repr_html_()
    assert "&lt;b&gt;" in html
    assert "no &lt;room&gt;" in html
    assert "<i>" not in html
    assert TrialRecords()._repr_html_().startswith("<table>")


def test_the_module_and_the_data_make_the_steps_of_train(tiny_arguments, tmp_path, curve):
    words = [*tiny_arguments, "schedule=cosine", "adapter.lora_dropout=0.1"]
    record = loralab.train([*words, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'run'}"])
    module, data = loralab.lightning(words)
    options = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=4, accelerator="cpu", logger=False, **options)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(curve(record.folder)[-1], rel=1e-6)
    (scores,) = trainer.validate(module, data, verbose=False)
    assert scores["val/loss"] == pytest.approx(record.metrics["val/loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_loaded_run_computes_and_writes_what_peft_does(tiny_arguments, base, tmp_path, method):
    words = [word for word in tiny_arguments if not word.startswith(("model", "+model", "adapter.r"))]
    words += ["model=hf", f"model.name_or_path={base}", "model.max_length=64", f"adapter={method}", "optimizer.lr=0.05"]
    loralab.train([*words, f"hydra.run.dir={tmp_path / 'run'}"])
    model, tokenizer = loralab.load(tmp_path / "run")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter").eval()
    given = tokenizer(["alpha beta", "gamma zetas"], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        for rows in (slice(0, 1), slice(0, 2)):
            some = {key: value[rows] for key, value in given.items()}
            assert (model(**some).logits - plain(**some).logits).abs().max() < 1e-5
    prompt = tokenizer("alpha ", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    ours = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    expected = prompt
    for _ in range(6):  # PEFT's own generate fails with a prefix under transformers 5
        with torch.no_grad():
            following = plain(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], 1)
    assert ours.tolist() == expected.tolist()


def test_a_copy_of_a_loaded_model_has_the_adapter_and_writing_the_base_alone_is_refused(tiny_arguments, tmp_path):
    loralab.train([*tiny_arguments, "optimizer.lr=0.05", f"hydra.run.dir={tmp_path / 'run'}"])
    model, _ = loralab.load(tmp_path / "run")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()  # of the base; the copies have bases of their own
        assert torch.equal(copied(input_ids=ids).logits, expected)
        assert torch.equal(pickled(input_ids=ids).logits, expected)
        adapter = copied.loralab_hooks.slices[0].owner
        adapter.detach()
        assert not torch.allclose(copied(input_ids=ids).logits, expected, atol=1e-3)
    for one in (model, copied, pickled):
        with pytest.raises(ArtifactError, match=f"the base alone, without the adapter.*merge {tmp_path / 'run'} --out"):
            one.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_calls_of_two_threads_follow_each_other(tiny_arguments, tmp_path):
    """Hydra reads sys.argv, which they share: a call never gets the other's run."""
    words = [word for word in tiny_arguments if not word.startswith("adapter.r=")]
    found = {}

    def train(r):
        found[r] = loralab.train([*words, f"adapter.r={r}", f"hydra.run.dir={tmp_path / str(r)}"])

    threads = [threading.Thread(target=train, args=(r,)) for r in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r: (one["config"]["adapter"]["r"], one.folder.name) for r, one in found.items()} == {
        r: (r, str(r)) for r in (2, 3, 4)
    }


@pytest.mark.parametrize("own_handler", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_run_says_so_and_goes_on(tiny_arguments, tmp_path, monkeypatch, own_handler):
    """As a notebook's stop button does it; ``own_handler``: the caller's raises KeyboardInterrupt, to which Lightning
    answers with exit(1)."""

    def handler(number, frame):
        signal.default_int_handler(number, frame)

    chosen = handler if own_handler else signal.default_int_handler
    before = signal.signal(signal.SIGINT, chosen)
    words = [word for word in tiny_arguments if not word.startswith(("callbacks", "trainer.max_steps"))]
    words = [*words, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'run'}"]
    step = FineTuner.training_step

    def stopped(self, *given):
        if self.trials[0].step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(FineTuner, "training_step", stopped)
            with pytest.raises(KeyboardInterrupt, match="stopped by signal 2"):
                loralab.train(words)
        assert signal.getsignal(signal.SIGINT) is chosen
        stored = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (stored["status"], stored["exit_code"]) == ("interrupted", 130)
        whole = loralab.train([*words, f"hydra.run.dir={tmp_path / 'whole'}"])
        assert loralab.train(words).metrics == whole.metrics
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def base(tmp_path, make_model):
    from loralab.models import loading
    from loralab.quantization.none import NoQuantization

    spec = make_model()
    made = loading.load(spec, NoQuantization(), spec.load_tokenizer())
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_plan_is_the_commands(tiny_arguments):
    planned = loralab.plan([*tiny_arguments, "plan.device=cpu"])
    assert planned.device == "cpu"
    assert sum(planned.by_kind.values()) == planned.predicted_peak_bytes > 0


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda _: loralab.train(["adapter.r=0"]), ConfigError, "adapter.r must be at least 1, got 0"),
        (lambda _: loralab.train(["adapter.rr=2"]), ConfigError, "adapter.rr"),
        (lambda _: loralab.train("adapter.r=2"), ConfigError, "is one text; valid: a list"),
        (lambda _: loralab.train({"adapter.r": 2}), ConfigError, "valid: a list of texts"),
        (lambda _: loralab.sweep("rank", [("adapter.r", 2)]), ConfigError, "valid: a list of texts"),
        (lambda _: loralab.plan([8]), ConfigError, "valid: a list of texts"),
        (lambda _: loralab.lightning(["adapter.rr=2"]), ConfigError, "adapter.rr"),
        (lambda f: loralab.curves(f), ArtifactError, "nothing to report"),
        (lambda f: loralab.charts(f), ArtifactError, "nothing to report"),
        (lambda _: loralab.train(["rank"]), ConfigError, "'rank' is not understood"),
        (lambda _: loralab.sweep("rnak"), ConfigError, "there is no sweep 'rnak'; did you mean rank"),
        (lambda f: loralab.results(f / "no"), ArtifactError, "no: no such folder"),
        (lambda f: loralab.results(f), ArtifactError, "nothing to report"),
        (lambda f: loralab.summary(f), ArtifactError, "nothing to report"),
        (lambda f: loralab.load(f), ArtifactError, "result.json"),
        (lambda f: loralab.train(["data=files", f"data.train={f}/none.jsonl", "data.text='{a}'"]), DataError, "none"),
    ],
)
def test_errors_are_typed_and_say_what_the_command_line_says(call, kind, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=text):
        call(tmp_path)


def test_a_run_that_failed_raises_its_error(tiny_arguments, tmp_path):
    words = [*tiny_arguments, "optimizer.lr=1e30", "trainer.max_steps=9", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(LoralabError) as raised:
        loralab.train(words)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (raised.value.exit_code, str(raised.value)) == (stored["exit_code"], stored["error"])
