"""``loralab train --from RUN``: the same bits again, from any folder, or a refusal that names what has changed."""

import json
import shlex
import shutil

import pytest

from loralab.analysis.results import read_results
from loralab.cli import main
from loralab.config.build import trial_id
from loralab.config.compose import compose
from loralab.records import record


@pytest.fixture(scope="module")
def there(tmp_path_factory, tiny_words, rows):
    """The folder where a run and a sweep were made, of files with relative names: ``run``, ``sweep``, ``diverged``."""
    folder = tmp_path_factory.mktemp("there")
    for split in ("train", "validation"):
        shutil.copy(rows["pairs", split], folder / f"{split}.jsonl")
    own = [*tiny_words, *(f"data.{split}={split}.jsonl" for split in ("train", "validation"))]
    own += ["adapter.lora_dropout=0.1", "seed=3", "quantization=nf4", "trainer.max_steps=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.run(["train", *own, "trainer.val_check_interval=2", "hydra.run.dir=run"]) == 0
        assert main.run(["train", "-m", *own, "adapter.r=2,3", "hydra.sweep.dir=sweep"]) == 0
        assert (
            main.run(["train", *own, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "hydra.run.dir=diverged"])
            == 5
        )
    return folder


@pytest.fixture
def again(there, tmp_path, monkeypatch, capfd):
    """Calls ``train --from`` from another folder: (exit code, what it said, the folder it wrote or None)."""
    monkeypatch.chdir(tmp_path)

    def call(source, *words):
        code = main.run(["train", "--from", str(source), *words])
        said = capfd.readouterr().err
        found = record.find(tmp_path / "runs") if (tmp_path / "runs").exists() else []
        return code, said, found[-1] if found else None

    return call


@pytest.fixture
def edited(there, tmp_path):
    """A copy of the run, with what ``change`` does to the content of its result.json."""

    def edit(change):
        folder = shutil.copytree(there / "run", tmp_path / "edited")
        path = folder / record.RESULT
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(stored))
        return folder

    return edit


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_rerun_from_another_folder_has_the_same_bits_and_says_so(there, again):
    code, said, folder = again(there / "run")
    assert code == 0
    assert folder.parent.name == "train"
    assert adapter(folder) == adapter(there / "run")
    assert losses(folder) == losses(there / "run")
    before, now = record.read(there / "run"), record.read(folder)
    for key in ("trial", "config", "overrides", "choices", "seed", "metrics", "cwd", "flags"):
        assert now[key] == before[key], key
    assert f"all {len(before['metrics'])} metrics are equal to those of {there / 'run'}" in said
    assert "so are the adapter's bytes" in said
    assert (folder / "train.log").read_text().count("metrics are equal") == 1


def test_a_trial_of_a_sweep_is_run_alone_with_the_same_bits(there, again):
    trial = record.find(there / "sweep")[0]
    code, said, folder = again(trial, "hydra.run.dir=runs/alone")
    assert code == 0
    assert folder.name == "alone"
    assert adapter(folder) == adapter(trial)
    assert "metrics are equal" in said


def test_a_diverged_run_diverges_again(there, again):
    code, said, folder = again(there / "diverged")
    assert code == 5
    before, now = record.read(there / "diverged"), record.read(folder)
    assert (now["status"], now["error"]) == (before["status"], before["error"])
    assert "has no metrics to compare with" in said


def test_words_make_it_another_trial_and_it_is_said_to_be_one(there, again):
    code, said, folder = again(there / "run", "trainer.max_steps=2", "logger=none")
    assert code == 0
    stored = record.read(there / "run")
    assert record.read(folder)["trial"] != stored["trial"]
    assert f"is another trial than {stored['trial']}: trainer.max_steps 3 -> 2\n" in said
    assert "val/loss" in said.partition("beside")[2]


def set_version(stored):
    stored["environment"]["versions"]["torch"] = "1.0"


def set_base(stored):
    stored["base"]["fingerprint"] = "0" * 64


def set_data(stored):
    stored["data"]["source"] = "0" * 64


def set_metric(stored):
    stored["metrics"]["val/loss"] += 0.25


@pytest.mark.parametrize(
    ("change", "text"),
    [(set_version, "torch was 1.0 and is 2."), (set_base, "the weights of model=random"), (set_data, "the data files")],
    ids=["version", "base", "data"],
)
def test_what_has_changed_is_refused_by_its_name(edited, again, change, text):
    code, said, folder = again(edited(change))
    assert (code, folder) == (4, None)
    assert text in said
    assert "--allow-changes" in said
    assert "Traceback" not in said


def test_changes_that_are_allowed_are_said_and_so_are_metrics_that_differ(edited, again):
    def change(stored):
        set_version(stored)
        set_metric(stored)

    code, said, _ = again(edited(change), "--allow-changes")
    assert code == 0
    assert "not as it was recorded: torch was 1.0" in said
    assert "1 of 3 metrics differ" in said
    assert "(-0.25)" in said


def test_a_changed_data_file_is_noticed(there, again, edited):
    source = edited(lambda stored: None)
    path = there / "train.jsonl"
    before = path.read_text()
    path.write_text(before + before.splitlines()[0] + "\n")
    try:
        code, said, _ = again(source)
    finally:
        path.write_text(before)
    assert code == 4
    assert "the data files have changed since" in said


def hide(stored):
    stored["config"]["callbacks"] = {"mine": {"_target_": "mine.Talks", "api_key": "***"}}


def other_settings(stored):
    stored["config"]["adapter"]["r"] = 7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda stored: stored.update(schema=99), "is newer than this loralab"),
        (lambda stored: stored.update(schema=1), "of an earlier loralab"),
        (lambda stored: stored.update(config={}), "damaged: it has no whole configuration"),
        (lambda stored: stored.update(metrics=7), "an object was expected"),
        (hide, "hides a secret in callbacks.mine.api_key; valid: the value as a word, as in callbacks.mine.api_key="),
        (other_settings, "changed by hand"),
    ],
    ids=["newer", "older", "no configuration", "damaged", "secret", "edited"],
)
def test_a_record_that_cannot_be_run_is_one_paragraph(edited, again, change, text):
    code, said, folder = again(edited(change))
    assert (code, folder) == (4, None)
    assert text in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words", "code", "text"),
    [
        ("nowhere", [], 4, "no such file"),
        ("sweep", [], 4, "is a sweep of several trials"),
        ("run", ["hydra.run.dir={there}/run"], 4, "holds the record that is to be run again"),
        ("run", ["-m"], 2, "does not go with -m"),
        ("run", ["--preview"], 2, "does not go with --preview"),
        ("run", ["seed=0,1"], 2, "means several"),
        ("run", ["adapter.rr=2"], 2, "adapter.r"),
    ],
)
def test_what_makes_no_rerun_is_refused(there, again, name, words, code, text):
    got, said, folder = again(there / name, *(word.format(there=there) for word in words))
    assert (got, folder) == (code, None)
    assert text in said


def test_a_setting_written_as_an_interpolation_keeps_its_value_in_reruns_and_when_the_sweep_grows(
    tiny_arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny_arguments if not word.startswith("adapter.r=")]
    alpha = "adapter.lora_alpha='${loralab.mul:2,${adapter.r}}'"
    assert main.run(["train", "-m", *words, "adapter.r=2,4", alpha, "seed=0,1", "hydra.sweep.dir=sweep"]) == 0
    trials = read_results(tmp_path / "sweep").trials
    for trial in trials:
        stored = trial.record["config"]["adapter"]
        assert stored["lora_alpha"] == 2 * stored["r"]
        assert f"adapter.lora_alpha={stored['lora_alpha']}" in trial.record["overrides"]
        assert trial_id(compose(main.parse(shlex.split(trial.rerun)[1:]).overrides())) == trial.record["trial"]
    assert alpha in record.read_sweep(tmp_path / "sweep")["overrides"]
    assert main.run(["sweep", "--resume", "sweep", "seed=2"]) == 0
    grown = [trial.record["config"] for trial in read_results(tmp_path / "sweep").trials]
    assert sorted((one["seed"], one["adapter"]["r"], one["adapter"]["lora_alpha"]) for one in grown) == [
        (seed, r, 2 * r) for seed in (0, 1, 2) for r in (2, 4)
    ]


def test_allowing_changes_needs_a_record(capsys):
    assert main.run(["train", "--allow-changes"]) == 2
    assert "--from RUN" in capsys.readouterr().err


def test_a_record_of_another_precision_is_told_apart(again, edited):
    """trainer.precision=auto is another one on a card."""
    source = edited(lambda stored: stored["base"].update(precision="bf16-mixed"))
    code, said, made = again(source)
    assert code == 0
    assert "the record was computed in bf16-mixed, this is in 32-true" in said
    assert "trainer.precision=bf16-mixed beside --from" in said
    assert record.read(made)["base"]["precision"] == "32-true"
