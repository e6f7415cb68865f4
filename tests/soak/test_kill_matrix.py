"""kill -9 of the real command at every kind of moment: the same command goes on, and ends as if nothing had happened.

Adapter, optimizer state and rows are compared with those of one uninterrupted process, bit for bit. Each place is of
one process; the next one goes on from what that has left, so that a chain is also many kills in a row.
"""

import random

import pytest
from processes import WATCHED, call, check_equal, check_repeated, record_of, rows

STEPS, EVERY = 12, 2
MOMENTS = [
    "batch:1.0",  # before anything was trained
    "batch:2.1",  # inside accumulation, before the first checkpoint
    "update:2",
    "torn:1",  # the first checkpoint file of all
    "after:2",
    "batch:3.1",
    "validation:3",  # of a step without a checkpoint
    "between:1",  # two files are there, and neither has its name
    "written:5",  # the end of an epoch
    "batch:6.0",
    "batch:6.1",  # twice, without a checkpoint in between
    "validation:6",  # of a step with a checkpoint
    "torn:2",
    "written:10",  # the end of the second epoch
    "update:12",  # the last step
    "written:12",
    "final",
    "record",
]
SOME = ["after:2", "between:1", "batch:6.1", "written:10", "written:12", "final"]


@pytest.fixture
def words(tiny_arguments):
    kept = [word for word in tiny_arguments if not word.startswith(("trainer.max_steps", "adapter.r"))]
    more = [f"trainer.max_steps={STEPS}", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3"]
    more += ["schedule=cosine", "schedule.warmup_steps=2", "adapter.lora_dropout=0.2"]
    return [*kept, *more, *WATCHED, f"+callbacks.checkpoint.every_n_steps={EVERY}"]


def survive(command, moments, tmp_path, **more):
    """Calls ``command`` until it ends by itself, once for each of ``moments``; how many processes were killed."""
    killed = 0
    for moment in [*moments, ""]:
        code = call(command, tmp_path, moment, output=tmp_path / "output", **more)
        said = (tmp_path / "output").read_text()
        assert code in (-9, 0), said
        assert "Traceback" not in said
        killed += code == -9
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("more", [["adapter.r=4"], ["adapter.r=4", "logger=wandb", "logger.mode=offline"]])
def test_one_trial_killed_at_every_kind_of_moment(words, tmp_path, more, history):
    command = ["train", *words, *(word for word in more if word not in words)]
    if "logger=wandb" in more:
        command.remove("logger=none")
    assert call([*command, "hydra.run.dir=whole"], tmp_path) == 0
    moments = MOMENTS if "logger=wandb" not in more else SOME
    killed = survive([*command, "hydra.run.dir=again"], moments, tmp_path)
    assert killed == len(moments)
    again, whole = tmp_path / "again", tmp_path / "whole"
    check_equal(again, whole)
    assert check_repeated(again, EVERY) == STEPS
    assert record_of(again)["time"]["tokens"] == record_of(whole)["time"]["tokens"]
    if "logger=wandb" in more:
        assert history(again) == history(whole) != []


@pytest.fixture
def history():
    """The rows that W&B has of a run, of its newest offline folder."""
    from wandb_file import read

    def rows(folder):
        found = read(folder)["history"]  # of the only run: earlier ones are within it
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]

    return rows


PACK = ["adapter.r=2,4", "seed=0,1", "hydra.launcher.token_budget=100000", "hydra/launcher=packed"]


@pytest.mark.slow
def test_a_pack_killed_at_every_kind_of_moment(words, tmp_path):
    command = ["train", "-m", *words, *PACK, "hydra.sweep.dir"]
    assert call([*command[:-1], "hydra.sweep.dir=whole"], tmp_path) == 0
    # a pack of four writes four files at a time: the seventh leaves two trials behind the others, in packs of two
    moments = [moment for moment in MOMENTS if not moment.startswith(("torn", "between"))]
    moments.insert(moments.index("validation:6") + 1, "torn:7")
    killed = survive([*command[:-1], "hydra.sweep.dir=again"], moments, tmp_path)
    assert killed == len(moments)
    trials = sorted(path.parent.name for path in tmp_path.glob("whole/*/result.json"))
    assert len(trials) == 4
    for trial in trials:
        check_equal(tmp_path / "again" / trial, tmp_path / "whole" / trial)
        assert check_repeated(tmp_path / "again" / trial, EVERY) == STEPS


@pytest.mark.slow
def test_killed_at_random_steps(words, tmp_path):
    """Twelve random places in four chains."""
    command, draw = ["train", *words, "adapter.r=4"], random.Random(0)
    assert call([*command, "hydra.run.dir=whole"], tmp_path) == 0
    for chain in range(4):
        steps = sorted(draw.randint(1, STEPS) for _ in range(3))
        places = [draw.choice(("update:{}", "batch:{}.0", "batch:{}.1")).format(step) for step in steps]
        assert survive([*command, f"hydra.run.dir=again{chain}"], places, tmp_path) == 3
        check_equal(tmp_path / f"again{chain}", tmp_path / "whole")
        assert check_repeated(tmp_path / f"again{chain}", EVERY) == STEPS


MINE = """
from lightning.pytorch import Callback


class Counts(Callback):
    \"\"\"Logs how often it was called, and changes what is trained by it.\"\"\"

    count = 0

    def on_train_batch_end(self, trainer, module, *_):
        self.count += 1
        self.log("counted", float(self.count))
        for parameter in module.adapters.parameters():
            parameter.data.mul_(1 - 1e-3 * self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
"""
OWN = [
    *("+callbacks.mine._target_=mine.Counts", "adapter.r=4", "trainer.keep_best=true", "trainer.patience=9"),
    *("+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping", "+callbacks.stop.monitor=val/loss"),
    *("+callbacks.stop.patience=9", "data.generate_rows=2", "+metrics.own._target_=torchmetrics.text.CHRFScore"),
    "optimizer=adamw_8bit",
]


@pytest.mark.slow
def test_callbacks_metrics_and_early_stopping_of_the_users_own_go_on_too(words, tmp_path):
    """With such callbacks a step's checkpoint is written once all of them have seen its end."""
    (tmp_path / "mine.py").write_text(MINE)
    command = ["train", *words, *OWN]
    assert call([*command, "hydra.run.dir=whole"], tmp_path, output=tmp_path / "output") == 0, (
        tmp_path / "output"
    ).read_text()
    moments = ["batch:2.1", "update:4", "after:4", "batch:5.1", "validation:6", "written:8", "validation:9"]
    moments += ["update:12", "validation:12", "record"]
    assert survive([*command, "hydra.run.dir=again"], moments, tmp_path) == len(moments)
    check_equal(tmp_path / "again", tmp_path / "whole")
    assert check_repeated(tmp_path / "again", EVERY) == STEPS
    assert record_of(tmp_path / "again")["best"] == record_of(tmp_path / "whole")["best"]
    assert [row["counted"] for row in rows(tmp_path / "again") if "counted" in row] == [
        float(2 * step) for step in range(1, STEPS + 1)
    ]
