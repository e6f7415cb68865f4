"""The command beside a trial runs that very trial: its words compose to the same id."""

import shlex
import subprocess
from pathlib import Path

import pytest

from loralab.analysis.results import read_results
from loralab.cli.main import parse
from loralab.config.build import trial_id
from loralab.config.compose import compose, plain
from loralab.config.words import quoted
from loralab.records import record

SWEPT = [
    ["+sweeps=quickstart", "quantization=nf4_double", "adapter.r=8", "seed=1"],
    ["+sweeps=paper/qlora_table2", "quantization=fp4_e3m0", "seed=0"],
    ["+sweeps=paper/lora_table6@paper", "adapter.r=4", "adapter.target_modules=[query,value]", "seed=0"],
    ["data=files", "data.train=a b.jsonl", "data.validation=v.jsonl", "data.prompt={q} ", "data.target={a}"],
    ["data=files", "data.train=a.jsonl", "data.validation=v.jsonl", "data.prompt=it's {q}\\n", "data.target={a}"],
    ["adapter.target_modules=[q_proj,v_proj]", "seed=1700000000000"],
    ["optimizer.lr=1e-3", "++trainer.max_steps=7", "+adapter.rank_pattern={q_proj:4}"],
]


@pytest.mark.parametrize("words", SWEPT, ids=lambda words: words[-1])
def test_the_shown_command_composes_to_the_trial_beside_it(tmp_path, words):
    """The shell takes its quotes, loralab parses the words: what is left is what the record was made of."""
    given = quoted(words)
    config = compose(words)
    stored_trial = record.blank(
        trial_id(config), config=plain(config), overrides=given, seed=config.seed, choices={"quantization": "x"}
    )
    record.write(tmp_path, {**stored_trial, "status": "completed", "metrics": {config.metric: 1.0}})
    (trial,) = read_results(tmp_path).trials
    command, subcommand, *rest = shlex.split(trial.rerun, comments=True)
    assert (command, subcommand) == ("loralab", "train")
    assert trial_id(compose(parse(["train", *rest]).overrides())) == stored_trial["trial"]


def test_a_hidden_secret_is_said_to_be_missing(tmp_path):
    stored_trial = record.blank("a", config={"seed": 0}, overrides=["logger.api_key=abc"], seed=0)
    record.write(Path(tmp_path), {**stored_trial, "status": "failed"})
    (trial,) = read_results(tmp_path).trials
    assert trial.rerun == "loralab train 'logger.api_key=***' seed=0  # *** hides a secret"


def test_the_command_to_run_again_is_quoted_and_seeded(tmp_path, synthetic, write):
    stored_trial = {**synthetic("none", 2, 7), "overrides": ["data.prompt={a} {b}\\n"]}
    write(tmp_path / "a", stored_trial)
    (trial,) = read_results(tmp_path).trials
    assert trial.rerun == "loralab train 'data.prompt={a} {b}\\n' seed=7"


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("data.text='{text}'", "\"data.text='{text}'\""),
        ("adapter.r=4", "adapter.r=4"),
        ("data.prompt='{q} $HOME'", None),
        ("data.prompt='a\"b\\n`c`!'", None),
    ],
)
def test_a_word_reads_well_and_the_shell_reads_the_same(word, shown):
    line = record.shell_line([word])
    assert shown in (None, line)
    assert subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, text=True).stdout == word
