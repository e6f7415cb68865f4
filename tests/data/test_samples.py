"""Text sampled from the base: seeded, as long as asked, and best predicted by the base itself."""

import math

import pytest
import torch

from loralab.data.samples import Samples
from loralab.errors import ConfigError, DataError
from loralab.forward.metrics import target_logits


@pytest.fixture(scope="module")
def base(load_base):
    return load_base("llama")


def sample(base, **changes):
    spec = Samples(**{"rows": 3, "tokens": 12, **changes})
    return spec.sample(base.model, base.tokenizer, "causal_lm", 64)


def test_the_same_seed_gives_the_same_rows_and_leaves_the_global_generator_alone(base):
    state = torch.get_rng_state()
    one, same, other = sample(base), sample(base), sample(base, draw=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.splits.fingerprint == same.splits.fingerprint != other.splits.fingerprint
    assert [row.input_ids for row in one.validation] == [row.input_ids for row in same.validation]


def test_rows_are_as_long_as_asked_and_every_token_but_the_first_is_a_target(base):
    encoded = sample(base, rows=4, train_rows=2, tokens=9)
    assert (len(encoded.validation), len(encoded.train), len(encoded.test)) == (4, 2, 0)
    for row in [*encoded.validation, *encoded.train]:
        assert len(row.input_ids) == 10
        assert row.labels[1:] == row.input_ids[1:]
        assert row.target_tokens == 9
    assert encoded.tokens["validation"]["target_tokens"] == 36


def test_limit_cuts_every_split(base):
    encoded = sample(base, rows=5, train_rows=5, limit=2)
    assert (len(encoded.validation), len(encoded.train)) == (2, 2)


def test_the_mean_nll_of_many_samples_is_the_entropy_of_the_base(base):
    """Of the base's own samples, -log p averages to the entropy of p, computed here from every distribution."""
    encoded = sample(base, rows=64, tokens=40)
    ids = torch.tensor([row.input_ids for row in encoded.validation])
    labels = torch.tensor([row.labels for row in encoded.validation])
    with torch.no_grad():
        logits, targets = target_logits(base.model(ids).logits, labels, "causal_lm")
    logs = logits.log_softmax(-1)
    nll, entropy = -logs[torch.arange(len(targets)), targets], -(logs.exp() * logs).sum(-1)
    gap = (nll - entropy).mean()
    error = (nll - entropy).std() / math.sqrt(len(targets))
    assert abs(gap) < 4 * error


def test_the_model_is_left_in_the_mode_it_was_in(base):
    base.model.train()
    sample(base)
    assert base.model.training


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rows": 0}, "data.rows must be at least 1"),
        ({"train_rows": -1}, "data.train_rows must be at least 0"),
        ({"tokens": 0}, "data.tokens must be at least 1"),
        ({"temperature": 0.0}, "data.temperature must be a positive number"),
        ({"temperature": float("nan")}, "data.temperature must be a positive number"),
    ],
)
def test_keys_out_of_range_are_refused(keys, says):
    with pytest.raises(ConfigError, match=says):
        Samples(**keys)


def test_rows_longer_than_the_window_and_other_tasks_are_refused(base):
    with pytest.raises(ConfigError, match=r"data\.tokens=64 and a first token exceed model\.max_length=64"):
        sample(base, tokens=64)
    with pytest.raises(DataError, match="model.task=seq2seq_lm"):
        Samples().sample(base.model, base.tokenizer, "seq2seq_lm", 512)
