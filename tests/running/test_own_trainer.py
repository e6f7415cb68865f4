"""The module and the data in a user's own Trainer: the steps of a run, under Lightning's callbacks and loggers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from loralab.adapters.lora import LoRA
from loralab.errors import ConfigError, DivergedError
from loralab.optim.optimizers import AdamW, Schedule
from loralab.quantization.four_bit import FourBit
from loralab.running.own_trainer import module_and_data
from loralab.running.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Logged(Callback):
    """The losses that Lightning's own loggers are given, step by step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **changes):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        given = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, "default_root_dir": tmp_path}
        return Trainer(callbacks=list(callbacks), **{**given, **changes})

    return make


@pytest.fixture
def spec(make_spec):
    """Dropout, accumulation, a schedule, and a base that keeps its dense weights."""
    return make_spec(
        adapter=LoRA(r=4, lora_dropout=0.2),
        quantization=FourBit(dequantize="resident"),
        schedule=Schedule(kind="linear", warmup_steps=2),
        max_steps=6,
        accumulate_grad_batches=2,
    )


def same(left, right):
    return [abs(a - b) <= 1e-6 * abs(b) for a, b in zip(left, right, strict=True)]  # Lightning logs float32


def test_a_users_trainer_makes_the_steps_of_a_run(spec, make_trainer, curve, tmp_path):
    (record,) = Runner().run([spec])
    module, data = module_and_data(spec)
    logged, csv = Logged(), CSVLogger(tmp_path / "csv")
    trainer = make_trainer(
        logged, LearningRateMonitor(), max_steps=6, accumulate_grad_batches=2, logger=csv, log_every_n_steps=1
    )
    trainer.fit(module, data)  # begins with Lightning's own trial validation, in inference mode
    assert all(same(logged.losses, curve(spec.folder)))
    (found,) = trainer.validate(module, data, verbose=False)
    assert set(found) == {key for key in record["metrics"] if key.startswith("val/")}
    assert all(same(found.values(), [record["metrics"][key] for key in found]))
    module.save_adapter(tmp_path / "mine")
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "mine", spec.folder / "adapter")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "lr-AdamW" in (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text()


def test_a_fit_that_was_broken_off_within_a_step_leaves_nothing_to_the_next(make_spec, make_trainer):
    class Breaks(Callback):
        def on_before_backward(self, *_):
            raise RuntimeError("broken off")

    module, data = module_and_data(make_spec())
    with pytest.raises(RuntimeError, match="broken off"):
        make_trainer(Breaks(), max_steps=2).fit(module, data)
    again, anew = Logged(), Logged()
    make_trainer(again, max_steps=2).fit(module, data)
    make_trainer(anew, max_steps=2).fit(*module_and_data(make_spec()))
    assert again.losses == anew.losses


@pytest.mark.parametrize("family", ["t5", "roberta"])
def test_every_task_has_the_scores_of_a_run(family, make_spec, make_trainer, curve):
    spec = make_spec(family=family, max_steps=2)
    (record,) = Runner().run([spec])
    module, data = module_and_data(spec)
    logged = Logged()
    trainer = make_trainer(logged, max_steps=2)
    trainer.fit(module, data)
    assert all(same(logged.losses, curve(spec.folder)))
    (found,) = trainer.validate(module, data, verbose=False)
    assert all(same(found.values(), [record["metrics"][key] for key in found]))


def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_in_the_middle_of_an_epoch(spec, make_trainer, tmp_path):
    module, data = module_and_data(spec)
    logged, kept = Logged(), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    steps = {"max_steps": 6, "accumulate_grad_batches": 2}
    make_trainer(logged, kept, enable_checkpointing=True, **steps).fit(module, data)
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert set(stored) == set(module.trial.adapter.state_dict())
    again, data = module_and_data(spec)
    rest = Logged()
    rest.losses = logged.losses[:4]
    make_trainer(rest, **steps).fit(again, data, ckpt_path=path)
    assert rest.losses == logged.losses
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(dict(itertools.islice(stored.items(), 1)))


def test_epochs_validation_and_lightnings_own_callbacks(make_spec, make_trainer, tmp_path):
    """20 rows by 2 are 10 steps an epoch; callbacks watch val/loss, and a flat one ends the fit."""
    module, data = module_and_data(make_spec(optimizer=AdamW(lr=1e-12)))
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", filename="best")
    stopping = EarlyStopping("val/loss", patience=1, min_delta=0.5)
    trainer = make_trainer(best, stopping, max_epochs=5, enable_checkpointing=True)
    trainer.fit(module, data)
    assert trainer.global_step == 20
    assert (tmp_path / "best" / "best.ckpt").is_file()
    assert float(best.best_model_score) == pytest.approx(float(trainer.callback_metrics["val/loss"]), abs=1e-4)


def test_an_epoch_takes_every_row_at_least_once(make_spec, make_trainer):
    class Seen(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rows += [row for _, row in batch[0]["chosen"]]

    module, data = module_and_data(make_spec())
    seen = Seen()
    make_trainer(seen, max_epochs=2, accumulate_grad_batches=3).fit(module, data)
    assert len(seen.rows) == 48  # two epochs of four steps of three times two rows
    assert set(seen.rows[:24]) == set(range(20))


def test_the_test_split_is_scored_where_there_is_one(make_spec, make_data, make_trainer, rows):
    spec = make_spec(data=make_data(test=str(rows["pairs", "validation"])))
    module, data = module_and_data(spec)
    trainer = make_trainer()
    (tested,), (validated,) = trainer.test(module, data, verbose=False), trainer.validate(module, data, verbose=False)
    assert tested == {key.replace("val/", "test/"): value for key, value in validated.items()}
    module, data = module_and_data(make_spec())
    with pytest.raises(ConfigError, match=r"no test split; valid: Trainer\.validate"):
        make_trainer().test(module, data)


def test_what_goes_wrong_is_an_error_of_loralabs(make_spec, make_trainer):
    module, data = module_and_data(make_spec(optimizer=AdamW(lr=1e30)))
    with pytest.raises(DivergedError, match="lr 1e\\+30"):
        make_trainer(max_steps=9).fit(module, data)
    module.trainer = SimpleNamespace(world_size=2, gradient_clip_algorithm=None)
    with pytest.raises(ConfigError, match="2 processes would each train on all rows"):
        module.setup("fit")
    with pytest.raises(ConfigError, match="clipped by their norm"):
        make_trainer(max_steps=1, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(
            *module_and_data(make_spec())
        )


def test_the_trainers_clipping_counts_where_it_has_one(make_spec, make_trainer):
    norms = {}
    for clip in (None, 1e-3):
        module, data = module_and_data(make_spec(gradient_clip_val=0.5))
        make_trainer(max_steps=1, gradient_clip_val=clip).fit(module, data)
        norms[clip] = module.trial.spec.trainer.gradient_clip_val
    assert norms == {None: 0.5, 1e-3: 1e-3}
