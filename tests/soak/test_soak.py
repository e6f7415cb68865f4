"""The soak in a short form: twenty trials, killed every few seconds."""

import json

import pytest
import soak


@pytest.mark.slow
def test_trials_that_are_killed_again_and_again_lose_nothing(tmp_path):
    report = soak.run(tmp_path, 20, 0, (5, 20), minutes=8, steps=300)
    assert report["wrong"] == [], json.dumps(report)
    assert report["completed"] == report["trials"] == 20
    assert report["kills"] >= 2
    assert report["steps"] == 20 * 300
