"""The mirror in trackio, which is no dependency: what it is given, and the message where it is not installed."""

import sys
from types import ModuleType

import pytest

from loralab.config.build import build
from loralab.config.loggers import logger
from loralab.errors import ConfigError
from loralab.records.metric_logger import Labels
from loralab.records.trackio import Trackio


@pytest.fixture
def runs(monkeypatch):
    """Stands in for trackio: {name: [options, rows, finished]}."""
    kept = {}

    class Run:
        def __init__(self, name, options):
            self.rows = kept.setdefault(name, [options, []])[1]
            self.name = name

        def log(self, metrics, step):
            self.rows.append({"step": step, **metrics})

        def finish(self):
            kept[self.name].append("finished")

    module, run = ModuleType("trackio"), ModuleType("trackio.run")
    module.init = lambda name, **options: Run(name, options)
    module.run = run
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "trackio.run", run)
    return kept


def test_each_trial_is_a_run_with_its_rows(runs, tmp_path):
    mirrors = {}
    for trial, r in (("aa", 2), ("bb", 4)):
        labels = Labels(f"r={r}", "rank", config={"trial": trial, "adapter": {"r": r}})
        mirrors[r] = Trackio(project="p").start(tmp_path, labels, resumed=r == 4, left_out=["memory/x_gib"])
    for step in (1, 2):
        for r, mirror in mirrors.items():
            mirror.log(step, {"train/loss": r / step, "memory/x_gib": 1.0, "text": "left out"})
    for mirror in mirrors.values():
        mirror.finish(0)
    assert {name: (rows, end) for name, (_, rows, end) in runs.items()} == {
        f"r={r} {trial}": ([{"step": step, "train/loss": r / step} for step in (1, 2)], "finished")
        for trial, r in (("aa", 2), ("bb", 4))
    }
    options = runs["r=4 bb"][0]
    assert (options["project"], options["group"], options["resume"]) == ("p", "rank", "allow")
    assert runs["r=2 aa"][0]["resume"] == "never"
    assert options["config"]["adapter"] == {"r": 4}


def test_a_library_that_is_missing_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr("loralab.config.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackio is not installed: pip install -e '\.\[trackio\]'"):
        logger({"_target_": "loralab.records.trackio.Trackio"})


def test_a_key_that_it_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"logger\.projct is not an option of Trackio"):
        build({"_target_": "loralab.records.trackio.Trackio", "projct": "p"}, "logger")
