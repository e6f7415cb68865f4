"""What is finished: the same trial on the same base, tokenizer and data; anything else is stale and runs again."""

import ast
import contextlib
import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loralab.cli import main
from loralab.config import staleness
from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.errors import Interrupted
from loralab.quantization.none import NoQuantization
from loralab.records import record
from loralab.records.fingerprints import of_pretrained
from loralab.reporting.listing import listing
from loralab.training import checkpoint
from loralab.training.module import FineTuner

FAST = ["data.limit=6", "trainer.max_steps=1", "data.batch_size=2"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, make_model):
    """The folder of a small base and its tokenizer."""
    folder, spec = tmp_path_factory.mktemp("drawn"), make_model()
    spec.weights(spec.prepared_config(None), NoQuantization(), "auto", "cpu").save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(drawn, tmp_path):
    """A copy of that base."""
    shutil.copytree(drawn, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def words(base, tiny_arguments):
    """Of a run on that base."""
    own = [word for word in tiny_arguments if not word.lstrip("+").startswith("model")]
    return [*own, "model=hf", f"model.name_or_path={base}", "model.max_length=64", *FAST]


@pytest.fixture
def sweep(words, tmp_path, capsys, monkeypatch):
    """Runs ``train -m`` in this process; returns (exit code, what it said)."""
    monkeypatch.chdir(tmp_path)

    def run(*more, flags=()):
        sweep_words = ["hydra/launcher=packed", f"hydra.sweep.dir={tmp_path / 's'}"]
        code = main.run(["train", "-m", *flags, *words, *sweep_words, *more])
        return code, capsys.readouterr().err

    return run


def change(path):
    """The lowest bit of one weight."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def records(folder):
    return {place.name: record.read(place) for place in record.find(folder)}


def states(folder):
    """How many are finished, as sweep.json, ``ls`` and the records have it."""
    listed = [one["status"] for one in record.read_sweep(folder)["trials"]]
    (entry,) = listing(folder.parent)
    return (
        listed.count("completed"),
        entry["completed"],
        [one["status"] for one in records(folder).values()].count("completed"),
    )


def test_changed_weights_make_a_trial_stale_in_one_line_and_keep_its_record(sweep, base, tmp_path):
    assert sweep("seed=0,1")[0] == 0
    before = records(tmp_path / "s")
    assert sweep("seed=0,1")[1].count("finished before") == 2
    change(base / "model.safetensors")
    code, message = sweep("seed=0,1")
    assert code == 0
    (line,) = [line for line in message.splitlines() if "stale" in line]
    assert f"the weights of {base} have changed since" in line
    assert all(trial in line for trial in before)
    assert "finished before" not in message
    after = records(tmp_path / "s")
    assert after.keys() == before.keys()
    for trial, old in before.items():
        assert json.loads((tmp_path / "s" / trial / "result.stale.json").read_text())["metrics"] == old["metrics"]
        assert (tmp_path / "s" / trial / "adapter.stale" / "adapter_model.safetensors").is_file()
        assert after[trial]["base"]["fingerprint"] == of_pretrained(str(base)) != old["base"]["fingerprint"]
    assert sweep("seed=0,1")[1].count("finished before") == 2


def test_a_new_arm_is_never_compared_with_trials_on_the_base_as_it_was(sweep, base, tmp_path):
    sweep("adapter.r=2")
    change(base / "model.safetensors")
    sweep("adapter.r=2,4")
    assert len({one["base"]["fingerprint"] for one in records(tmp_path / "s").values()}) == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_tokenizer_makes_a_trial_stale(sweep, base, file):
    sweep("seed=0")
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text())))  # as text it differs
    assert f"the tokenizer {base} has changed since" in sweep("seed=0")[1]


def test_weights_and_data_that_are_gone_have_not_changed(sweep, base, tmp_path):
    sweep("seed=0")
    shutil.move(base, tmp_path / "moved")
    assert "finished before" in sweep("seed=0")[1]


def test_an_interruption_in_between_leaves_every_view_agreed(sweep, base, tmp_path, monkeypatch):
    sweep("seed=0,1,2", "hydra.launcher.pack=off")
    assert states(tmp_path / "s") == (3, 3, 3)
    change(base / "model.safetensors")
    real, left = FineTuner.training_step, [1]

    def stopped(self, *given):
        if not left:
            raise Interrupted(signal.SIGTERM)
        left.pop()
        return real(self, *given)

    monkeypatch.setattr(FineTuner, "training_step", stopped)
    assert sweep("seed=0,1,2", "hydra.launcher.pack=off")[0] == 143
    assert states(tmp_path / "s") == (1, 1, 1)
    monkeypatch.setattr(FineTuner, "training_step", real)
    code = main.run(["sweep", "--resume", str(tmp_path / "s")])
    assert (code, states(tmp_path / "s")) == (0, (3, 3, 3))


def test_a_single_run_is_stale_as_well_and_fresh_keeps_nothing(words, base, tmp_path, capsys):
    run = ["train", *words, f"hydra.run.dir={tmp_path / 'run'}"]
    assert main.run(run) == 0
    change(base / "model.safetensors")
    assert main.run(run) == 0
    message = capsys.readouterr().err
    assert "is stale and runs again, its record stays as result.stale.json: the weights of" in message
    assert record.read(tmp_path / "run")["base"]["fingerprint"] == of_pretrained(str(base))
    (tmp_path / "run" / "result.stale.json").unlink()
    assert main.run([*run, "--fresh"]) == 0
    assert not (tmp_path / "run" / "result.stale.json").exists()


def test_a_checkpoint_made_on_other_weights_is_not_taken_up(words, base, tmp_path, monkeypatch, capsys):
    run = ["train", *words, "trainer.max_steps=4", "callbacks=default", f"hydra.run.dir={tmp_path / 'run'}"]
    run += ["callbacks.checkpoint.every_n_steps=1"]
    real = FineTuner.training_step

    def breaks(self, *given):
        if self.trials[0].step == 2:
            raise RuntimeError("gone")
        return real(self, *given)

    monkeypatch.setattr(FineTuner, "training_step", breaks)
    assert main.run(run) == 1
    monkeypatch.setattr(FineTuner, "training_step", real)
    kept = checkpoint.path(tmp_path / "run")
    content = kept.read_bytes()
    assert main.run(run) == 0
    assert record.read(tmp_path / "run")["resumed_from"] == 2
    (tmp_path / "run" / record.RESULT).unlink()
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(content)
    change(base / "model.safetensors")
    assert main.run(run) == 0
    assert "resumed_from" not in record.read(tmp_path / "run")
    assert "base weights: the trial begins anew" in capsys.readouterr().err


def test_asked_for_the_test_split_a_finished_trial_is_scored_by_its_adapter_and_not_trained_anew(sweep, rows, tmp_path):
    tested = (f"data.test={rows['pairs', 'train']}", "data.generate_rows=2")
    sweep("seed=0", *tested)
    (before,) = records(tmp_path / "s").values()
    (adapter,) = (tmp_path / "s").glob("*/adapter/adapter_model.safetensors")
    written = adapter.stat().st_mtime_ns
    code, message = sweep("seed=0", "trainer.test=true", *tested)
    assert (code, "they are of its adapter" in message, "finished before" in message) == (0, True, True)
    (scored,) = records(tmp_path / "s").values()
    assert adapter.stat().st_mtime_ns == written
    assert {**scored, "metrics": before["metrics"]} == before
    assert scored["metrics"].items() >= before["metrics"].items()
    predictions = (adapter.parents[1] / "predictions.jsonl").read_text().splitlines()
    generated = [json.loads(line)["split"] for line in predictions]
    assert generated == ["validation"] * 2 + ["test"] * 2
    assert "they are of its adapter" not in sweep("seed=0", "trainer.test=true", *tested)[1]
    assert sweep("seed=0", "trainer.test=true", *tested, flags=["--fresh"])[0] == 0
    (trained,) = records(tmp_path / "s").values()
    assert trained["metrics"] == scored["metrics"]


def test_without_its_adapter_a_trial_runs_again_for_its_test_scores(sweep, rows, tmp_path):
    tested = f"data.test={rows['pairs', 'train']}"
    sweep("seed=0", tested)
    (adapter,) = (tmp_path / "s").glob("*/adapter")
    shutil.rmtree(adapter)
    code, message = sweep("seed=0", "trainer.test=true", tested)
    assert (code, "runs again, for its test scores" in message) == (0, True)
    (one,) = records(tmp_path / "s").values()
    assert "test/loss" in one["metrics"]


def test_two_values_that_are_one_trial_run_once_and_are_listed_once(sweep, tmp_path):
    code, message = sweep("adapter.lora_alpha=16,16.0,8")
    assert code == 0
    assert "1 of 3 settings mean a trial named before, which runs once: adapter.lora_alpha=16.0 (" in message
    assert len(record.find(tmp_path / "s")) == len(record.read_sweep(tmp_path / "s")["trials"]) == 2
    assert "[1/2]" in message
    assert "[2/2]" in message
    assert sweep("adapter.lora_alpha=16.0,8")[1].count("finished before") == 2


def as_of_schema_1(folder):
    """The sweep as an earlier version would have left it: other ids, other folders."""
    listed = record.read_sweep(folder)
    for entry in listed["trials"]:
        other = f"{(int(entry['trial'][0], 16) + 1) % 16:x}{entry['trial'][1:]}"
        stored = {**record.read(folder / entry["folder"]), "schema": 1, "trial": other}
        shutil.move(folder / entry["folder"], folder / stored["trial"])
        record.replace(folder / stored["trial"] / record.RESULT, stored)
        entry.update(trial=stored["trial"], folder=stored["trial"])
    record.replace(folder / record.SWEEP, {**listed, "schema": 1})


def test_a_sweep_of_an_earlier_version_is_listed_and_reported_and_runs_anew_when_resumed(sweep, tmp_path, capsys):
    sweep("seed=0,1")
    folder = tmp_path / "s"
    as_of_schema_1(folder)
    assert [entry["completed"] for entry in listing(tmp_path)] == [2]
    assert main.run(["report", str(folder)]) == 0
    capsys.readouterr()
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    message = capsys.readouterr().err
    (line,) = [line for line in message.splitlines() if "earlier version" in line]
    assert "2 trials in" in line
    assert "2 run anew" in line
    assert "finished before" not in message
    assert [one["status"] for one in record.read_sweep(folder)["trials"]] == ["completed"] * 2  # no seed twice
    assert len(record.find(folder)) == 4  # nothing is lost
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    message = capsys.readouterr().err
    assert message.count("finished before") == 2
    assert "earlier version" not in message


def test_a_run_folder_of_an_earlier_version_is_not_overwritten(words, tmp_path, capsys):
    run = ["train", *words, f"hydra.run.dir={tmp_path / 'run'}"]
    assert main.run(run) == 0
    stored = {**record.read(tmp_path / "run"), "schema": 1, "trial": "0123456789"}
    record.replace(tmp_path / "run" / record.RESULT, stored)
    assert main.run(run) == 4
    assert "of an earlier version of loralab; valid: another hydra.run.dir" in capsys.readouterr().err


def test_a_finished_sweep_is_skipped_without_torch(sweep, words, tmp_path):
    sweep("seed=0,1")
    sweep_words = ["train", "-m", *words, "hydra/launcher=packed", f"hydra.sweep.dir={tmp_path / 's'}", "seed=0,1"]
    script = (
        "import sys; from loralab.cli import main as cli; code = cli.run(sys.argv[1:]); "
        "print('imported', {'torch', 'transformers', 'lightning'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *sweep_words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished before") == 2
    assert "imported set()" in done.stdout


def test_a_finished_trial_is_known_by_its_id_where_its_settings_are_spelled_otherwise(sweep):
    sweep("adapter.target_modules=[q_proj,v_proj]")
    assert "finished before" in sweep("adapter.target_modules=[v_proj,q_proj]")[1]


def test_the_torch_free_look_at_a_base_is_the_specs_own(base):
    for model in (["model=hf", f"model.name_or_path={base}"], ["model=tiny"], ["model=random", "model.draw=3"]):
        node = plain(compose(model))["model"]
        assert staleness._base(node) == build(node, "model").fingerprint()
        assert staleness._tokenizer(node) == build(node, "model").tokenizer_fingerprint()


ASIDE = {"result.json": "result.stale{}.json", "metrics.jsonl": "metrics.stale{}.jsonl", "adapter": "adapter.stale{}"}


def left_by_a_run(folder, number):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text(str(number))
    for name in ("result.json", "metrics.jsonl"):
        (folder / name).write_text(str(number))


def kept(folder):
    """{name in ASIDE: what is set aside of it, the oldest first}."""
    found = {}
    for name, pattern in ASIDE.items():
        older = sorted(folder.glob(pattern.format(".[0-9]*")), key=lambda path: path.name)
        paths = [*older, *folder.glob(pattern.format(""))]
        found[name] = [(path / "weights" if path.is_dir() else path).read_text() for path in paths]
    return found


@pytest.mark.parametrize("stop", range(7))
def test_all_that_was_ever_set_aside_is_kept_also_at_a_kill_in_between(tmp_path, monkeypatch, stop):
    for number in (1, 2):
        left_by_a_run(tmp_path, number)
        staleness.set_aside(tmp_path)
    left_by_a_run(tmp_path, 3)
    real, done = Path.rename, []

    def killed(self, target):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with contextlib.suppress(KeyboardInterrupt):
        staleness.set_aside(tmp_path)
    monkeypatch.setattr(Path, "rename", real)
    staleness.set_aside(tmp_path)
    assert kept(tmp_path) == {name: ["1", "2", "3"] for name in ASIDE}
    assert (tmp_path / "result.stale.json").read_text() == "3"
    assert len(list(tmp_path.iterdir())) == 9


OWN = """
from dataclasses import dataclass
from loralab.adapters.base import Adapter
from loralab.adapters.lora import LoRA

@dataclass(frozen=True)
class Own(LoRA):
    makes = Adapter
    packable = tokenwise = layerwise = True
"""


@pytest.fixture
def own_class(tmp_path, monkeypatch):
    """Writes the source of a module and returns its name; what was imported of it is forgotten, as by a new process."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return name

    yield write
    sys.modules.pop(name, None)


def test_an_edited_class_of_the_users_own_makes_its_trials_stale(sweep, own_class, tmp_path):
    name = own_class(OWN)
    words = [f"adapter._target_={name}.Own", "seed=0,1"]
    assert sweep(*words)[0] == 0
    stored = records(tmp_path / "s")
    assert all(list(one["code"]["sources"]) == [name] for one in stored.values())
    own_class(OWN)
    assert sweep(*words)[1].count("finished before") == 2
    own_class(OWN + "    # edited\n")
    code, message = sweep(*words)
    assert (code, "finished before" in message) == (0, False)
    assert f"{name}.py has changed since" in message
    assert sweep(*words)[1].count("finished before") == 2


def test_a_class_counts_as_it_was_imported_with_those_it_derives_from_and_without_torch(tmp_path, own_class):
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "low.py").write_text("class Low: pass\n")
    (folder / "high.py").write_text("from pack.low import Low\nclass High(Low): pass\n")
    script = (
        "import sys, pathlib; from loralab.records import sources; sources.importable(); from pack.high import High;"
        "print(sources.of([High])); pathlib.Path('pack/low.py').write_text('class Low: y = 1');"
        "print(list(sources.changed(sources.of([High]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert second == "[] False"  # what runs here is what was imported
    stored = ast.literal_eval(first)
    assert list(stored) == ["pack.high", "pack.low"]
    again = (
        f"import sys; from loralab.records import sources; print(sources.changed({stored}), 'pack.low' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", again], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['pack/low.py'] False", done.stderr


@pytest.mark.parametrize("broken", ["newer", "damaged", "without metrics", "newer, --fresh"])
def test_a_record_that_cannot_be_read_is_kept_aside_and_never_overwritten(sweep, tmp_path, broken):
    sweep("seed=0")
    ((trial, stored),) = records(tmp_path / "s").items()
    path = tmp_path / "s" / trial / "result.json"
    if broken == "damaged":
        path.write_text('{"schema": ')
    else:
        path.write_text(
            json.dumps({**stored, "schema": 99} if broken.startswith("newer") else {**stored, "metrics": None})
        )
    before = path.read_bytes()
    assert main.run(["sweep", "--resume", str(tmp_path / "s"), *(["--fresh"] if "--fresh" in broken else [])]) == 0
    assert (path.parent / "result.stale.json").read_bytes() == before
    assert record.read(path.parent)["metrics"].keys() == stored["metrics"].keys()
