"""Rows that share a sequence have the losses and gradients that transformers and PEFT give each row alone."""

import math

import plain
import pytest
from lab import STEPS, Watch, run

from loralab.running.runner import Runner

EXACT = 1e-6  # relative, of float32


def relative_error(ours, theirs):
    """Norm of the difference of two gradients over the norm of the second."""
    wrong = sum(float((ours[name].double() - grad.double()).square().sum()) for name, grad in theirs.items())
    return math.sqrt(wrong / sum(float(grad.double().square().sum()) for grad in theirs.values()))


QUICK = {("llama", "nf4"), ("gpt2", "dense"), ("phi", "dense")}
CASES = [(family, scheme) for family in ("llama", "gpt2", "phi") for scheme in ("dense", "nf4")]


@pytest.mark.parametrize(
    ("family", "scheme"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_losses_and_gradients_of_packed_rows_are_those_of_separate_rows(lab, curve, family, scheme):
    case, watch = lab("causal_lm", family, scheme), Watch()
    data = case.data(batch_size=2, packing=True)
    spec = case.spec("packed", STEPS, 2, data=data, callbacks={"w": lambda: watch})
    (record,) = run(spec)
    assert record["data"]["packing"]["sequences"] < record["data"]["packing"]["rows"] / 2
    adapter = spec.folder / "adapter"
    model = plain.load(case.folder / "base", "causal_lm", adapter, case.values(), attention="sdpa")
    losses = curve(spec.folder)
    for step in (0, STEPS - 1):
        chosen, values, gradients = watch.seen[spec.id, step]
        rows = [case.rows["train"][i] for i in chosen]
        assert len(rows) > 2 * 2  # of two sequences
        plain.put(model, case.folder, values)
        assert relative_error(gradients, plain.gradients(model, rows, "causal_lm")) < EXACT
        scores = plain.score(model, rows, "causal_lm")
        expected = sum(nll for nll, _, _ in scores) / sum(targets for _, _, targets in scores)
        assert losses[step] == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "bloom", "gpt_neo", "mamba"])
def test_a_base_whose_rows_would_see_each_other_is_refused(lab, family):
    """Sliding windows, ALiBi, attention of a model's own, state spaces."""
    case = lab("causal_lm", family, "dense")
    (record,) = Runner().run([case.spec("packed", 1, 2, data=case.data(batch_size=2, packing=True))])
    assert record["status"] == "failed"
    assert record["error"].startswith("data.packing=true: the rows of a sequence must not see each other, and ")
