"""Lightning's loggers: one for each trial, with the values of metrics.jsonl; none of them can hurt a run."""

import json
import logging
import time

import pandas as pd
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from loralab.config.loggers import logger
from loralab.errors import ConfigError
from loralab.records.loggers import LightningLogger, Loggers
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint

BOTH = Loggers((LightningLogger(TensorBoardLogger, {}), LightningLogger(CSVLogger, {})))


def truth(folder):
    """{key: {step: value}} of metrics.jsonl."""
    found = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        step = row.pop("step")
        for key, value in row.items():
            found.setdefault(key, {})[step] = value
    return found


def event_file(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "hp_metric"]
    assert all(len({one.step for one in events.Scalars(tag)}) == len(events.Scalars(tag)) for tag in tags)
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in tags}


def table(folder):
    frame = pd.read_csv(folder / "csv" / "metrics.csv").set_index("step")
    return {key: frame[key].dropna().to_dict() for key in frame}


def agree(folder):
    expected = truth(folder)
    assert "val/loss" in expected
    for read, tolerance in ((event_file, 1e-6), (table, 1e-12)):  # an event holds float32
        found = read(folder)
        assert set(found) == set(expected)
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, rel=tolerance)


def test_tensorboard_and_csv_hold_what_metrics_jsonl_holds_in_packs_too(make_spec):
    specs = [
        make_spec(f"t{i}", seed=i, logger=BOTH, val_check_interval=2, callbacks={"rate": LearningRateMonitor})
        for i in range(2)
    ]
    records = Runner().run(specs)
    assert [record["status"] for record in records] == ["completed"] * 2
    for spec in specs:
        agree(spec.folder)
        assert "lr-AdamW" in truth(spec.folder)
    assert truth(specs[0].folder)["train/loss"] != truth(specs[1].folder)["train/loss"]


def test_a_run_that_goes_on_has_one_history(make_spec, break_off):
    spec = make_spec(
        max_steps=6, val_check_interval=2, logger=BOTH, callbacks={"checkpoint": lambda: Checkpoint(None, 2)}
    )
    break_off([spec], step=3)
    (done,) = Runner().run([spec])
    assert done["resumed_from"] == 2
    agree(spec.folder)
    assert list(truth(spec.folder)["train/loss"]) == [1, 2, 3, 4, 5, 6]


class Broken(DummyLogger):
    def log_metrics(self, *_, **__):
        raise OSError("no such server")


class Slow(DummyLogger):
    def log_metrics(self, *_, **__):
        time.sleep(0.4)


@pytest.mark.parametrize("kind", [Broken, Slow])
def test_a_logger_that_fails_or_is_slow_does_not_hurt_a_run(make_spec, curve, caplog, monkeypatch, kind):
    monkeypatch.setattr("loralab.records.loggers.PATIENCE_SECONDS", 0.1)
    spec = make_spec(logger=LightningLogger(kind, {}, "logger.mine"))
    with caplog.at_level(logging.WARNING):
        (record,) = Runner().run([spec])
    assert record["status"] == "completed"
    assert len(curve(spec.folder)) == 4
    assert ("logger.mine stopped: no such server" if kind is Broken else "logger.mine is slow") in caplog.text


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "lightning.pytorch.loggers.CSVLogger", "nam": "x"}, "logger.nam is not an option of CSVLogger"),
        ({"_target_": "lightning.pytorch.callbacks.Timer"}, "Timer' is no logger"),
        ({"a": {"_target_": "loralab.records.wandb.Wandb", "mod": "x"}}, "logger.a.mod is not an option"),
        ({"a": "wandb"}, "logger.a"),
        ({"a": 3}, "logger.a must be a mapping with a _target_, got 3"),
        ("wandb", "logger: 'wandb' is a text.*- override /logger: OPTION' with an option of conf/logger/"),
        (3, "logger must be one of the options of conf/logger/, got 3"),
    ],
)  # fmt: skip
def test_wrong_loggers_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        logger(node)


def test_one_more_logger_stands_beside_the_first():
    made = logger(
        {
            "_target_": "loralab.records.wandb.Wandb",
            "mode": "disabled",
            "table": {"_target_": "lightning.pytorch.loggers.CSVLogger"},
        }
    )
    assert [type(one).__name__ for one in made.specs] == ["Wandb", "LightningLogger"]
