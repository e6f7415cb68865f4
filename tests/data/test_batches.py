from itertools import chain, pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.batches import Order, collate, filled, permutation
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


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)


def batches(order, first, count, size):
    rows, starts = order.take(first, count, size)
    return [part.tolist() for part in np.split(rows, starts[1:])]


def one_by_one(lengths, seed, room, count):
    """The first ``count`` sequences, filled row by row."""
    sequences = []
    for epoch in range(count):
        sequence = []
        for row in permutation(len(lengths), seed, epoch).tolist():
            if sequence and (room is None or sum(lengths[i] for i in [*sequence, row]) > room):
                sequences.append(sequence)
                sequence = []
            sequence.append(row)
        sequences.append(sequence)
    return sequences[:count]


@given(lengths=LENGTHS, room=st.none() | st.integers(4, 30), cut=st.integers(0, 40), rest=st.integers(1, 40))
def test_sequences_taken_from_anywhere_are_those_of_a_plain_loop(lengths, room, cut, rest):
    """Also rows that are longer than a sequence, and the ends of epochs."""
    expected = one_by_one(lengths, 3, room, cut + rest)
    assert batches(Order(np.array(lengths), 3, room), cut, rest, 1) == expected[cut:]
    one_after_the_other = Order(np.array(lengths), 3, room)
    assert [batches(one_after_the_other, i, 1, 1)[0] for i in range(cut + rest)] == expected


@given(lengths=LENGTHS, room=st.none() | st.integers(4, 30), size=st.integers(1, 5))
def test_a_batch_is_so_many_sequences(lengths, room, size):
    sequences = one_by_one(lengths, 1, room, 6 * size)
    joined = [list(chain.from_iterable(sequences[i * size : (i + 1) * size])) for i in range(6)]
    assert batches(Order(np.array(lengths), 1, room), 2 * size, 4, size) == joined[2:]


@given(lengths=LENGTHS, room=st.integers(1, 30))
def test_bounds_are_those_of_full_sequences(lengths, room):
    bounds = filled(np.array(lengths), room).tolist()
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    for start, stop in pairwise(bounds):
        assert sum(lengths[start:stop]) <= room or stop == start + 1
        assert stop == len(lengths) or sum(lengths[start : stop + 1]) > room


def test_seeds_and_epochs_differ():
    order, other = (Order(np.ones(100, np.int64), seed) for seed in (0, 1))
    first, second = (order.take(start, 100, 1)[0].tolist() for start in (0, 100))
    assert first != second
    assert first != other.take(0, 100, 1)[0].tolist()
    assert (order.count(), Order(np.ones(100, np.int64), 0, 30).count()) == (100, 4)
