"""A spike is told from growth, from noise and from a new level, and put down to the length of its batch or not."""

import pytest

from loralab.memory.spikes import HISTORY, MAX_RECORDED, MIB, Spikes, row

GIB = 1024 * MIB


def fed(detector, peaks, tokens=100, start=1):
    return [detector.see(start + i, "backward", peak, 2, tokens) for i, peak in enumerate(peaks)]


def test_a_peak_far_above_the_median_is_a_spike_with_its_excess():
    detector = Spikes()
    assert not any(fed(detector, [4 * GIB] * 10))
    spike = detector.see(11, "forward", 6 * GIB, 8, 400, retries=3)
    assert (spike.step, spike.phase, spike.excess_bytes, spike.rows, spike.tokens) == (11, "forward", 2 * GIB, 8, 400)
    assert (spike.cause, spike.median_tokens, spike.allocator_retries) == ("length", 100, 3)
    assert row(spike) == {
        **{"memory/spike_peak_gib": 6.0, "memory/spike_excess_gib": 2.0},
        **{"memory/spike_tokens": 400, "memory/spike_by_length": 1.0},
    }


@pytest.mark.parametrize(("usual", "peak", "stands_out"), [
    (4 * GIB, 5 * GIB, False),  # exactly the factor
    (4 * GIB, 5 * GIB + 1, True),
    (100 * MIB, 356 * MIB, False),  # three and a half times as much, and yet within the floor
    (100 * MIB, 357 * MIB, True),
])  # fmt: skip
def test_factor_and_floor_must_both_be_passed(usual, peak, stands_out):
    detector = Spikes()
    fed(detector, [usual] * 10)
    assert bool(detector.see(11, "backward", peak, 1, 1)) is stands_out


def test_nothing_stands_out_before_there_is_a_history():
    detector = Spikes()
    assert not any(fed(detector, [GIB, 9 * GIB, GIB, 30 * GIB][: HISTORY - 1]))


def test_spikes_do_not_raise_the_median_they_are_measured_against():
    detector = Spikes(window=10)
    fed(detector, [4 * GIB] * 10)
    excess = [detector.see(i, "backward", 8 * GIB if i % 2 else 4 * GIB, 1, 1) for i in range(40)]
    assert {spike.excess_bytes for spike in excess if spike} == {4 * GIB}
    assert sum(map(bool, excess)) == 20


def test_a_level_that_stays_is_the_new_ordinary_one():
    detector = Spikes(window=8)
    fed(detector, [GIB] * 8)
    assert sum(map(bool, fed(detector, [4 * GIB] * 40))) == 8
    assert detector.see(99, "backward", 9 * GIB, 1, 1).excess_bytes == 5 * GIB


def test_retries_are_those_since_the_step_before():
    detector = Spikes()
    for step in range(10):
        detector.see(step, "backward", GIB, 1, 1, retries=5)
    assert detector.see(11, "backward", 9 * GIB, 1, 1, retries=7).allocator_retries == 2


def test_tokens_as_usual_leave_the_cause_open():
    detector = Spikes()
    fed(detector, [GIB] * 10, tokens=100)
    assert detector.see(11, "backward", 9 * GIB, 1, 120).cause == "other"
    assert detector.see(12, "backward", 9 * GIB, 1, 121).cause == "length"


def test_the_optimizers_time_is_held_against_ordinary_steps():
    detector = Spikes()
    for spike in fed(detector, [GIB] * 10):
        detector.time(spike, 0.1)
    spike = detector.see(11, "backward", 9 * GIB, 1, 1)
    detector.time(spike, 0.4)
    assert spike.optimizer_time_ratio == pytest.approx(4.0)


def test_the_record_keeps_the_last_spikes_and_counts_all():
    detector = Spikes(window=10)
    fed(detector, [GIB] * 10)
    for step in range(2 * MAX_RECORDED + 2):
        detector.see(step, "backward", 9 * GIB if step % 2 else GIB, 1, 1)
    assert (len(detector.found), detector.count) == (MAX_RECORDED, MAX_RECORDED + 1)
