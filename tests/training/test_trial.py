"""A trial's batches, keys and state follow from its seed and step alone."""

import json

import pytest
import torch

from loralab.adapters.lora import LoRA
from loralab.data.encoding import encode
from loralab.training.passes import EvaluationPasses, TrainPasses, stack_batches
from loralab.training.trial import Trial


@pytest.fixture
def make_trial(load_base, make_spec, make_data):
    base = load_base()

    def make(name="trial", kind="ragged", batch_size=3, step=0, **changes):
        data = make_data(kind, batch_size=batch_size)
        spec = make_spec(name, data=data, **changes)
        encoded = encode(data.splits(), base.tokenizer, "causal_lm", 64)
        adapter = LoRA(r=2).attach(base.model, spec.seed)
        return Trial(spec, adapter, encoded, base.tokenizer.pad_token_id, {}, step=step)

    return make


def ids(batch):
    return batch["tensors"]["input_ids"].tolist()


def test_every_micro_batch_of_a_step_knows_the_targets_of_the_whole_step(make_trial):
    trial = make_trial(accumulate_grad_batches=3)
    passes = list(trial.data_cursor.step_batches())
    assert [batch["micro"] for batch in passes] == [0, 1, 2]
    total = sum(int((batch["tensors"]["labels"][:, 1:] != -100).sum()) for batch in passes)
    assert [batch["step_targets"] for batch in passes] == [total] * 3
    assert len({batch["target_tokens"] for batch in passes}) > 1


def test_an_epoch_sees_every_row_once(make_trial):
    trial = make_trial(batch_size=5, kind="pairs")
    seen = [row for _ in range(4) for batch in trial.data_cursor.step_batches() for row in ids(batch)]
    assert sorted(seen) == sorted(list(example.input_ids) for example in trial.data.train)


def test_a_trial_put_back_at_a_step_goes_on_with_the_same_rows_and_keys(make_trial):
    whole, later = make_trial("whole", kind="pairs"), make_trial("later", kind="pairs")
    for _ in range(9):  # 27 of 20 rows: past the end of an epoch
        list(whole.data_cursor.step_batches())
        whole.tokens += 5
        whole.finish_step()
    state = whole.state_dict()
    stored = json.loads(json.dumps({key: value for key, value in state.items() if key != "adapter"}))
    later.load_state_dict(stored | {"adapter": state["adapter"]})
    assert [ids(batch) for batch in later.data_cursor.step_batches()] == [
        ids(batch) for batch in whole.data_cursor.step_batches()
    ]
    assert later.dropout_key(0) == whole.dropout_key(0) != whole.dropout_key(1)
    assert later.tokens == 45


def test_a_checkpoint_of_other_layers_is_refused(make_trial, load_base):
    state = make_trial().state_dict()
    state["adapter"].popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        make_trial("other").load_state_dict(state)


def test_a_trial_that_has_ended_is_absent_from_later_passes(make_trial):
    short, long = make_trial("short", max_steps=1), make_trial("long", max_steps=3)
    present = []
    for batches in TrainPasses([short, long]):
        present.append(sorted(batches))
        for index in batches:
            (short, long)[index].step += 1
    assert present == [[0, 1], [1], [1]]


def test_evaluation_passes_hold_each_row_once_for_each_trial(make_trial):
    trials = [make_trial("a", batch_size=2), make_trial("b", batch_size=5)]
    passes = list(EvaluationPasses(trials, "validation"))
    assert len(passes) == 4
    for index in (0, 1):
        assert sum(batches[index]["rows"] for batches in passes if index in batches) == 7


def test_stacked_batches_are_padded_on_the_right_to_the_longest(make_trial):
    trials = [make_trial("a", batch_size=2, seed=3), make_trial("b", batch_size=4, seed=4)]
    batches = {index: next(trial.data_cursor.step_batches()) for index, trial in enumerate(trials)}
    pad = trials[0].pad_token_id
    inputs, labels = stack_batches(batches, pad)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == labels.shape
    lengths = [batch["tensors"]["input_ids"].shape[1] for batch in batches.values()]
    assert inputs["input_ids"].shape == (6, max(lengths))
    first = inputs["input_ids"][:2]
    assert torch.equal(first[:, : lengths[0]], batches[0]["tensors"]["input_ids"])
    assert (first[:, lengths[0] :] == pad).all()
    assert (labels[inputs["attention_mask"] == 0] == -100).all()
