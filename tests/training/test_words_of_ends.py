"""What a trial says of its end."""

import logging
from types import SimpleNamespace

import pytest

from loralab.training.early_stopping import EarlyStopping
from loralab.training.trial import Trial


@pytest.mark.parametrize(("step", "says"), [(0, "as the adapter begins"), (3, "try a lower optimizer.lr")])
def test_a_zero_gradient_is_the_learning_rates_only_after_a_step(step, says):
    failed = []
    spec = SimpleNamespace(optimizer=SimpleNamespace(lr=0.1))
    Trial.fail_on_zero_gradient(SimpleNamespace(step=step, spec=spec, fail=failed.append))
    assert says in str(failed[0])
    assert ("optimizer.lr" in str(failed[0])) == bool(step)


def test_an_end_by_min_delta_names_it(caplog):
    """The last value may be better than the one that it is compared with."""
    rule = EarlyStopping(patience=1, min_delta=0.15)
    assert [rule.score(value, step) for step, value in ((4, 4.0717), (8, 3.9705))] == [False, True]
    with caplog.at_level(logging.INFO):
        Trial._log_end(SimpleNamespace(spec=SimpleNamespace(id="a"), step=8), rule, 3.9705)
    assert "has not been better than 4.072 by more than min_delta = 0.15 in 1 validation" in caplog.text
