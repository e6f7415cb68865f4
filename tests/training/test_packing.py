"""Rows that share sequences: which rows a batch holds, a pack is its trials alone, a run goes on, what is refused."""

from dataclasses import dataclass, replace

import pytest
import torch

from loralab.adapters.base import Adapter
from loralab.adapters.lora import LoRA, LoRADelta
from loralab.cli import main
from loralab.data.batches import permutation
from loralab.data.encoding import IGNORE, Example, encode
from loralab.data.passes import BatchShape, Feed, Pass, Rows, Weighing, fullest, heaviest
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.optim.optimizers import AdamW
from loralab.planning import trace
from loralab.planning.plan import predict_step
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner
from loralab.training.checkpoint import Checkpoint
from loralab.training.cursor import DataCursor
from loralab.training.module import FineTuner
from loralab.training.trial import Trial


@pytest.fixture
def trials(make_spec, make_data):
    """Two unlike trials over ragged rows, packed into sequences of 64 tokens; six steps are several epochs."""

    def make(prefix, **changes):
        return [
            make_spec(
                f"{prefix}{index}",
                seed=index,
                adapter=LoRA(r=2 + 2 * index, lora_dropout=0.1 * index),
                optimizer=AdamW(lr=1e-2),
                data=make_data("ragged", batch_size=1 + index, packing=True),
                **{"accumulate_grad_batches": 2, "max_steps": 6, **changes},
            )
            for index in range(2)
        ]

    return make


def assert_same(ours, theirs, weights):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.folder / "metrics.jsonl").read_text() == (other.folder / "metrics.jsonl").read_text()
        left, right = weights(one.folder), weights(other.folder)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_packed_rows_in_a_pack_of_trials_are_bit_identical_to_the_trials_alone(trials, weights):
    together, alone = trials("together"), trials("alone")
    records = [*Runner().run(together), *(Runner().run([spec])[0] for spec in alone)]
    assert [record["error"] for record in records] == [None] * 4
    assert records[0]["pack"]["size"] == 2
    assert_same(together, alone, weights)
    assert [one["metrics"] for one in records[:2]] == [one["metrics"] for one in records[2:]]


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_broke_off_within_an_epoch_goes_on_bit_for_bit(trials, weights, monkeypatch, step):
    whole, again = trials("whole"), trials("again", callbacks={"c": lambda: Checkpoint(None, every_n_steps=1)})
    Runner().run(whole)
    real, left = FineTuner.training_step, [RuntimeError("gone")]

    def broken(self, batches, index):
        if left and self.trials[0].step == step:
            raise left.pop()
        return real(self, batches, index)

    monkeypatch.setattr(FineTuner, "training_step", broken)
    assert {record["status"] for record in Runner().run(again)} == {"failed"}
    records = Runner().run(again)
    assert [record.get("resumed_from") for record in records] == [step, step]
    assert_same(again, whole, weights)


def test_the_record_says_rows_sequences_and_how_full_they_are(trials):
    _, spec = trials("recorded")
    (record,) = Runner().run([spec])
    encoded = encode(spec.data.splits(), spec.model.load_tokenizer(), "causal_lm", 64)
    sequences, tokens = 1, 0
    lengths = [len(encoded.train[i].input_ids) for i in permutation(len(encoded.train), spec.seed, 0)]
    for length in lengths:
        sequences += tokens + length > 64
        tokens = length if tokens + length > 64 else tokens + length
    fill = round(sum(lengths) / (64 * sequences), 4)
    assert record["data"]["packing"] == {"rows": len(lengths), "sequences": sequences, "fill": fill}
    assert fill > 0.75
    assert record["data"]["rows"]["train"] == len(lengths)
    epochs = record["time"]["tokens"] / sum(lengths)  # 6 steps of 2 x 2 sequences
    assert epochs == pytest.approx(24 / sequences, rel=0.1)


def test_the_heaviest_pass_is_the_one_with_the_most_tokens(trials):
    specs = trials("heavy", max_steps=9)
    data = encode(specs[0].data.splits(), specs[0].model.load_tokenizer(), "causal_lm", 64)
    tokens = {}
    for spec in specs:
        cursor = DataCursor(data, "causal_lm", 0, spec.seed, spec.data.batch_size, 2, 64)
        for step in range(9):
            for batch in cursor.step_batches():
                key = (step + 1, batch["micro"])
                tokens[key] = tokens.get(key, 0) + batch["tokens"]
    passes = heaviest([Feed.of(spec, data.train) for spec in specs], Weighing(flat=True))
    step, _ = max(tokens, key=tokens.get)
    assert [shape.step for shape in passes] == [step, step]
    assert [shape.tokens for shape in passes] == [tokens[step, 0], tokens[step, 1]]
    most = fullest(Rows.of(data.train), 2, 64)
    assert max(cursor.peek(step)["tokens"] for step in range(9)) <= sum(most.inputs) <= 2 * 64


@pytest.fixture
def losses(load_base, trials):
    """The summed loss of the next batch of a packed trial over ``examples``, and the batch."""
    base = load_base()

    def of(examples):
        spec = trials("losses")[1]
        data = encode(spec.data.splits(), base.tokenizer, "causal_lm", 64)
        data = replace(data, train=examples)
        trial = Trial(spec, LoRA(r=2).attach(base.model), data, base.tokenizer.pad_token_id, {})
        batch = trial.next_batch()
        ((loss, _, targets),) = FineTuner(base.model, [trial]).losses({0: batch}, training=False).values()
        trial.adapter.detach()
        return float(loss.detach()), len(targets), batch

    return of


def test_a_row_without_targets_adds_nothing(losses):
    rows = [Example([5 + i, 6, 7, 8], [IGNORE, IGNORE, 7, 8], 2) for i in range(3)]
    loss, targets, _ = losses(rows)
    with_empty, same, batch = losses([*rows, Example([9, 10, 11], [9, IGNORE, IGNORE], 0)])
    assert batch["rows"] >= 4
    expected = loss * same / targets if same != targets else loss
    assert (same, with_empty) == (targets, pytest.approx(expected, rel=1e-6))


def test_rows_longer_than_a_sequence_are_cut_as_without_packing(make_spec, make_model, make_data):
    records = []
    for packing in (False, True):
        data = make_data("pairs", packing=packing)
        spec = make_spec(f"cut{packing}", model=make_model(max_length=12), data=data)
        records += Runner().run([spec])
    assert [record["error"] for record in records] == [None, None]
    assert records[0]["data"]["truncated"] == records[1]["data"]["truncated"] > 0
    assert records[1]["data"]["packing"]["sequences"] == records[1]["data"]["packing"]["rows"]
    assert records[0]["metrics"] == records[1]["metrics"]  # a sequence is a row then


@pytest.mark.parametrize(
    ("size", "micros"), [(1, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_prediction_and_measurement_agree(trials, size, micros):
    changes = {"callbacks": {"memory": PhaseMemory}, "accumulate_grad_batches": micros, "max_steps": 3}
    specs = [replace(spec, plan=PlanSpec()) for spec in trials("planned", **changes)[:size]]
    for record in Runner().run(specs):
        assert record["error"] is None
        memory = record["memory"]
        assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)
        if size == 1:
            assert memory["alone_peak_bytes"] >= 0.99 * memory["measured_peak_bytes"]


@pytest.mark.parametrize("scheme", [NoQuantization(), FourBit()])
def test_a_trace_of_fewer_rows_finds_the_same_bytes(trials, monkeypatch, scheme):
    spec = replace(trials("traced")[0], quantization=scheme)
    lengths = tuple(3 + (7 * i) % 11 for i in range(32))
    geometry = trace.Geometry((Pass(1, (BatchShape(lengths, lengths, 90),)),), cuda=False)
    fewer = predict_step([spec], geometry)
    assert fewer.rows == 32
    monkeypatch.setattr(trace, "PACKED_ROWS", 1000)
    every = predict_step([spec], geometry)
    assert (fewer.predicted_peak_bytes, fewer.by_phase) == (every.predicted_peak_bytes, every.by_phase)


class Looking(LoRADelta):
    """Reads the token before, which may be another row's."""

    def forward(self, x, y, key):
        return super().forward(torch.roll(x, 1, dims=-2), y, key)


@dataclass(frozen=True)
class Untrue(LoRA):
    """Says that it acts token by token, and does not."""

    tokenwise = True
    makes = Adapter

    def delta(self, name, layer, device):
        return Looking(layer.in_features, layer.out_features, self.r, 1.0)


def test_an_adapter_through_which_rows_see_each_other_is_refused_at_the_first_batch(trials):
    (record,) = Runner().run([replace(trials("untrue")[0], adapter=Untrue(r=2))])
    assert record["status"] == "failed"
    assert "with this adapter, does not compute each as it is alone" in record["error"]


REFUSED = {
    "a classifier": (["model.task=sequence_classification"], "model.task=sequence_classification has no sequences"),
    "virtual tokens": (["adapter=prefix"], "adapter=prefix needs rows of their own"),
    "plain text": (["data=python_source"], "plain text is cut into full sequences already"),
    "spikes": (["memory.spiky_every=2"], "memory.spiky_every pads rows"),
    "eager attention": (["model.attn_implementation=eager"], "attn_implementation=eager"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_is_exit_2_in_one_sentence(tiny_arguments, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[case]
    kept = [word for word in tiny_arguments if not word.startswith("adapter.r") or case != "virtual tokens"]
    if case == "plain text":
        kept = [word for word in kept if not word.startswith("data")]
    for command in ("train", "plan"):
        assert main.run([command, *kept, *words, "data.packing=true"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
