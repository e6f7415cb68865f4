"""The soak in a short form: twenty trials, killed every few seconds."""

import json

import pytest
import soak


@pytest.mark.slow
def test_trials_that_are_killed_again_and_again_lose_nothing(tmp_path, tiny_arguments):
    dropped = ("trainer.max_steps", "adapter.r", "logger", "trainer=", "callbacks", "plan", "data.batch_size")
    small = [word for word in tiny_arguments if not word.startswith(dropped)]
    report = soak.run(tmp_path, 20, 0, (4, 14), minutes=6, steps=120, every=10, more=small)
    assert report["wrong"] == [], json.dumps(report)
    assert report["completed"] == report["trials"] == 20
    assert report["kills"] >= 2
    assert report["steps"] == 20 * 120
