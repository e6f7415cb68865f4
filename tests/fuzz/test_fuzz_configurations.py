"""Random settings: an exit code of the contract, one paragraph, no traceback, no hang."""

import os

import pytest
from cases import words
from driven import fault, shortened
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FOUND = [  # what was once answered otherwise
    ("train", ["memory=default", "memory.slo=\nv\x18Ü"]),
    ("train", ["++model.drawn_on=\n\\\x82"]),
    ("plan", ["adapter.modules_to_save="]),
    ("train", ["metric={}"]),
    ("train", ["metric=88"]),
    ("train", ["=" + "9" * 5000]),
]
QUICK, MANY = 20, 3000
COMMANDS = st.sampled_from(["train"] * 6 + ["train --cfg job", "count", "plan", "quantize"])


@pytest.fixture
def refuse(tiny_arguments, tmp_path, monkeypatch):
    """``fault`` of a command with ``words`` in place of those of the smallest run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shortened(monkeypatch)

    def run(command, drawn):
        given = {word.lstrip("+~").partition("=")[0] for word in drawn}
        groups = tuple(f"{name}." for name in given if "." not in name)
        bare = {word: word.lstrip("+").partition("=")[0] for word in tiny_arguments}
        kept = [word for word, name in bare.items() if name not in given and not (groups and name.startswith(groups))]
        return fault([*command.split(), *kept, *drawn, "hydra.run.dir=run"])

    return run


def faults_of(refuse, count, number):
    """[(command, words, what is wrong)] of so many cases."""
    found = []

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(COMMANDS, words())
    def search(command, drawn):
        if wrong := refuse(command, drawn):
            found.append((command, drawn, wrong))

    search()
    return found


@pytest.mark.parametrize(("command", "drawn"), FOUND, ids=str)
def test_what_was_once_found_is_answered(refuse, command, drawn):
    assert refuse(command, drawn) == ""


def test_random_settings_are_answered_in_one_paragraph(refuse):
    assert faults_of(refuse, QUICK, 0) == []


@pytest.mark.slow
def test_thousands_of_random_settings_are_answered_in_one_paragraph(refuse):
    found = faults_of(refuse, int(os.environ.get("FUZZ_CASES", MANY)), int(os.environ.get("FUZZ_SEED", 1)))
    assert found == [], "\n".join(f"{command} {drawn!r}\n    {wrong}" for command, drawn, wrong in found)
