"""Epochs as numbers of steps, and what is checked over them."""

from dataclasses import replace

import pytest

from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.data.encoding import encode
from loralab.errors import ConfigError
from loralab.optim.schedulers import schedule_of
from loralab.training.epochs import settled


@pytest.mark.parametrize(
    ("decisive", "settings", "steps"),
    [
        ({"max_epochs": 2}, {}, 20),  # 20 rows in batches of 2
        ({"max_epochs": 2}, {"max_steps": 3}, 3),
        ({"max_epochs": 3}, {"accumulate_grad_batches": 4}, 8),  # 60 rows, 8 a step
        ({"max_epochs": 2, "limit_train_batches": 0.5}, {}, 10),
        ({"fast_dev_run": 1}, {}, 1),
    ],
)
def test_epochs_are_steps_over_the_trials_rows(make_spec, make_base_data, decisive, settings, steps):
    spec = make_spec(decisive=decisive, **{"max_steps": 2**31 - 1, **settings})
    done = settled(spec, make_base_data(spec))
    assert done.trainer.max_steps == steps
    assert settled(done, make_base_data(spec)) == done


def below_at_15(step):
    """A schedule that has no rate at step 15."""
    return -1.0 if step == 15 else 1.0


def test_a_schedule_is_checked_over_the_steps_that_epochs_have(tmp_path, make_spec, make_base_data):
    """Once the rows are known, not over the 2^31 steps that stand in for them; 20 rows in batches of 2."""
    words = [f"schedule._target_={__name__}.below_at_15", "trainer.max_epochs=1"]
    assert trial_spec(compose(words), tmp_path).schedule == schedule_of(below_at_15, {})
    spec = make_spec(decisive={"max_epochs": 1}, max_steps=2**31 - 1)
    spec = replace(spec, schedule=schedule_of(below_at_15, {}))
    data = make_base_data(spec)
    assert settled(spec, data).trainer.max_steps == 10
    longer = replace(spec, trainer=replace(spec.trainer, decisive={"max_epochs": 2}))
    with pytest.raises(ConfigError, match="gives lr times -1 at step 15"):
        settled(longer, data)


@pytest.fixture
def make_base_data(load_base):
    return lambda spec: encode(spec.data.splits(), spec.model.load_tokenizer(), "causal_lm", spec.model.length)
