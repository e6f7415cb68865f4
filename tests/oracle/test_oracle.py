"""loralab's Runner gives what transformers and PEFT alone compute, before training and after it."""

import families
import plain
import pytest
from lab import QUANTIZERS, STEPS, Watch, run, same_gradients, same_scores, same_texts

QUICK = {
    ("causal_lm", "llama", "dense"),
    ("causal_lm", "llama", "nf4"),
    ("seq2seq_lm", "t5", "dense"),
    ("sequence_classification", "llama", "dense"),
    ("pairs", "bert", "dense"),
    ("regression", "llama", "dense"),
}


def cases():
    every = [
        (task, family, scheme)
        for task, table in families.TABLE.items()
        for family in table
        for scheme in QUANTIZERS
        if family not in families.READ_PADDING
    ]
    return [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in every]


@pytest.mark.parametrize(("task", "family", "scheme"), cases())
def test_losses_texts_and_gradients_are_those_of_transformers_and_peft(lab, task, family, scheme):
    case = lab(task, family, scheme)
    validation, train = case.rows["validation"], case.rows["train"]
    (record,) = run(case.spec("start", 0, 1))
    model = case.oracle()
    expected = plain.score(model, validation, task)
    same_scores(record, expected, validation)
    assert [one[0][0] for one in case.losses] == pytest.approx([nll for nll, _, _ in expected], rel=1e-4)
    same_texts(case.texts, model, case.tokenizer)
    for batch, seeds in ((4, (1, 2)), (1, (0,))):
        del case.losses[:], case.texts[:]
        watch = Watch()
        specs = [case.spec(f"b{batch}s{s}", STEPS, batch, s, callbacks={"w": lambda w=watch: w}) for s in seeds]
        records = run(*specs)
        for spec, record in zip(specs, records, strict=True):
            model = case.oracle(spec.folder / "adapter")
            same_scores(record, plain.score(model, validation, task), validation)
            if len(specs) == 1:
                same_texts(case.texts, model, case.tokenizer)
            for step in (0, STEPS - 1):
                chosen, values, grads = watch.seen[spec.id, step]
                plain.put(model, case.folder, values)
                same_gradients(grads, plain.gradients(model, [train[i] for i in chosen], task))
