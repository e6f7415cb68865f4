"""16-mixed by a stand-in, since it needs a GPU: float32, and torch's own loss scaler on the CPU."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from loralab.errors import ConfigError
from loralab.optim.optimizers import AdamW
from loralab.records.jsonl import rows
from loralab.running.runner import Runner, check_pack
from loralab.training.module import FineTuner

OPTIMIZERS = [AdamW(lr=1e-3), AdamW("adamw_32bit", lr=1e-3), AdamW(lr=1e-3, flat=True)]


@pytest.fixture
def scaled(monkeypatch):
    """bf16-mixed computes in float32 then, with a scaler of the scale that is asked for."""
    made = []

    def begin(scale, backoff=2.0**-120):
        real = MixedPrecision.__init__

        def with_scaler(self, *given, **named):
            real(self, *given, **named)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
            made.append(self.scaler)

        monkeypatch.setattr(MixedPrecision, "__init__", with_scaler)
        monkeypatch.setattr(
            MixedPrecision, "autocast_context_manager", lambda self: torch.autocast("cpu", enabled=False)
        )
        return made

    return begin


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["torch", "bitsandbytes", "flat"])
def test_an_overflow_skips_its_update_and_ends_nothing(make_spec, scaled, optimizer):
    spec = make_spec(precision="bf16-mixed", optimizer=optimizer, max_steps=4)
    made = scaled(2.0**127)  # the first loss overflows, and is scaled by 2^7 from then on
    (done,) = Runner().run([spec])
    assert (done["status"], done["time"]["steps"]) == ("completed", 4), done["error"]
    first, *others = [row for row in rows(spec.folder / "metrics.jsonl") if "train/loss" in row[1]]
    assert first[1]["train/skipped_update"] == 1.0
    assert "train/grad_norm" not in first[1]
    assert all(0 < row["train/grad_norm"] < float("inf") and "train/skipped_update" not in row for _, row in others)
    assert made[0].get_scale() == 2.0**7


def test_flat_buffers_are_stepped_as_their_members_are(make_spec, scaled, curve):
    """Also where an update is skipped and where a step has several passes."""
    flat, apart = (
        make_spec(
            f"flat={on}",
            precision="bf16-mixed",
            optimizer=AdamW(lr=1e-2, flat=on),
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
        )
        for on in (True, False)
    )
    for spec in (flat, apart):
        scaled(2.0**127)
        (done,) = Runner().run([spec])
        assert done["status"] == "completed", done["error"]
    assert curve(flat.folder) == curve(apart.folder)
    assert curve(flat.folder, "train/grad_norm") == curve(apart.folder, "train/grad_norm")
    assert curve(flat.folder, "train/skipped_update") == [1.0]


def test_a_gradient_that_no_scale_makes_finite_is_a_divergence(make_spec, scaled, monkeypatch):
    real = FineTuner.training_step

    def broken(self, batches, index):
        loss = real(self, batches, index)
        return loss * float("nan")

    monkeypatch.setattr(FineTuner, "training_step", broken)
    scaled(4.0, 0.5)
    (done,) = Runner().run([make_spec(precision="bf16-mixed", optimizer=OPTIMIZERS[0], max_steps=6)])
    assert (done["status"], done["exit_code"]) == ("diverged", 5), done["error"]
    assert "the gradient is not finite at step 3" in done["error"]  # scales of 4, 2 and 1


def test_without_a_scaler_it_is_one_at_once(make_spec, monkeypatch):
    real = FineTuner.training_step
    monkeypatch.setattr(FineTuner, "training_step", lambda *given: real(*given) * float("nan"))
    (done,) = Runner().run([make_spec(max_steps=6)])
    assert "the gradient is not finite at step 1" in done["error"]


def test_a_scaler_is_not_shared_by_the_trials_of_a_pass(make_spec):
    specs = [make_spec(name, precision="16-mixed") for name in ("one", "two")]
    assert "one loss scaler" in specs[0].why_alone
    with pytest.raises(ConfigError, match="trainer.precision=16-mixed has one loss scaler"):
        check_pack(specs)
    assert make_spec("three", precision="bf16-mixed").why_alone == ""
