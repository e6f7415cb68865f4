import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.batches import Stream, collate, permutation
from loralab.data.encoding import Example

SHORT = Example([5, 6], [-100, 6], 1)
LONG = Example([7, 8, 9, 1], [-100, -100, 9, 1], 2)


def test_padding_is_on_the_right_and_out_of_the_loss():
    batch = collate([SHORT, LONG], "causal_lm", pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 9, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_source_and_target_are_padded_each_to_its_own_length():
    batch = collate([Example([5, 6, 7], [8], 1), Example([5], [8, 9], 2)], "seq2seq_lm", pad_token_id=0)
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].tolist() == [[8, -100], [8, 9]]


def test_class_labels_have_one_number_a_row():
    batch = collate([Example([5, 6], [2], 1), Example([5], [0], 1)], "sequence_classification", pad_token_id=0)
    assert batch["labels"].tolist() == [2, 0]


@given(n=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_sample_once(n, seed, epoch):
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_the_order_is_the_same_on_every_platform_and_numpy():
    assert permutation(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, seed=0, epoch=1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


@given(n=st.integers(1, 20), cut=st.integers(0, 60), rest=st.integers(0, 60))
def test_a_stream_restarted_anywhere_continues_the_same(n, cut, rest):
    whole = Stream(n, seed=3).take(cut + rest)
    first = Stream(n, seed=3)
    head = first.take(cut)
    assert head + Stream(n, seed=3, position=first.position).take(rest) == whole
    assert first.position == cut


def test_how_the_samples_are_taken_does_not_matter():
    one, other = Stream(7, seed=1), Stream(7, seed=1)
    assert [i for _ in range(10) for i in one.take(3)] == other.take(30)


def test_seeds_and_epochs_differ():
    stream = Stream(100, seed=0)
    first, second = stream.take(100), stream.take(100)
    assert first != second
    assert first != Stream(100, seed=1).take(100)
    assert stream.position == 200
