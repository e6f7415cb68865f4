"""What a record says of a trial by itself: the same packed, alone and in any folder, and of that trial only."""

import json
from dataclasses import replace

import pytest

from loralab.adapters.full import Full
from loralab.adapters.lora import LoRA
from loralab.data.files import Files
from loralab.data.passes import BatchShape, Pass
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.optim.optimizers import AdamW
from loralab.planning import alone, kept
from loralab.planning import plan as planning
from loralab.planning.foresee import Foresight
from loralab.planning.geometry import Geometry
from loralab.planning.plan import predict_step
from loralab.quantization.four_bit import FourBit
from loralab.running.inputs import encoded_data
from loralab.running.runner import Runner
from loralab.training.trial import Trial


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Of what is kept; nothing is kept in the process either."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_known", {})
    return tmp_path / "cache" / "plans"


@pytest.fixture
def traces(monkeypatch):
    """One entry for each trace that is made."""
    made = []
    real = alone.trace
    for module in (alone, planning):
        monkeypatch.setattr(module, "trace", lambda *a, **k: made.append(a) or real(*a, **k))
    return made


@pytest.fixture
def planned(make_spec, make_model):
    """A spec of one layer that is planned, of the fields that differ; its data."""
    model = make_model(config={"num_hidden_layers": 1})

    def make(name="trial", **changes):
        spec = replace(make_spec(name, **{"model": model, **changes}), plan=PlanSpec())
        return spec, encoded_data(spec.data, spec.model, spec.model.load_tokenizer(), "cpu")

    return make


def forget(monkeypatch):
    """As a new process begins."""
    monkeypatch.setattr(kept, "_known", {})


def fed(rows, length, cuda=False):
    """A step of full rows."""
    return Geometry((Pass(0, (BatchShape((length,) * rows, (length,) * rows, rows * (length - 1)),)),), cuda)


def test_sixteen_trials_over_four_ranks_cost_two_traces_and_none_in_the_next_process(planned, traces, monkeypatch):
    trials = []
    for r in (2, 4, 8, 16):
        for lr in (1e-2, 1e-3):
            for seed in (0, 1):
                changes = {"adapter": LoRA(r=r), "optimizer": AdamW(lr=lr), "seed": seed}
                trials.append(planned(f"{r}-{lr}-{seed}", **changes))
    found = [Foresight().alone(*one) for one in trials]
    assert len(traces) == 2
    assert len(set(found)) == 4
    forget(monkeypatch)
    assert [Foresight().alone(*one) for one in trials] == found
    assert len(traces) == 2


def test_a_validation_that_is_larger_than_any_step_counts(planned, tmp_path):
    """By a whole trace of both."""
    texts = {"short": "ab", "long": "ab" * 20}
    paths = {name: tmp_path / f"{name}.jsonl" for name in texts}
    for name, text in texts.items():
        paths[name].write_text("".join(json.dumps({"q": "q", "t": f"{text}{n}"}) + "\n" for n in range(8)))

    def figure(train, validation):
        data = Files(
            train=str(paths[train]), validation=str(paths[validation]), prompt="{q}", target="{t}", batch_size=4
        )
        return Foresight().alone(*planned(data=data))

    def whole(train, validation):
        passes = [fed(4, n).passes[0] for n in (train, validation)]
        return predict_step([planned()[0]], replace(fed(4, train), evaluation=passes[1]))

    tokens = {"short": 5, "long": 43}  # a byte of prompt, the text, </s>
    assert whole(5, 43).by_phase["evaluation"] > whole(5, 43).by_phase["backward"]
    for train, validation in (("short", "long"), ("long", "short")):
        expected = whole(tokens[train], tokens[validation]).predicted_peak_bytes
        assert figure(train, validation) == expected, (train, validation)


@pytest.mark.slow
def test_what_costs_memory_is_a_figure_of_its_own(planned, traces, make_data):
    changes = [
        {},
        {"optimizer": AdamW(name="adamw_8bit")},
        {"quantization": FourBit()},
        {"adapter": LoRA(r=4, target_modules=["q_proj"])},
        {"adapter": Full()},
        {"data": make_data(batch_size=5)},
    ]
    found = [Foresight().alone(*planned(**one)) for one in changes]
    assert None not in found
    assert len(set(found)) == len(changes)


@pytest.mark.slow
def test_a_damaged_file_is_made_again(planned, folder, monkeypatch, traces):
    one = planned()
    found = Foresight().alone(*one)
    (path,) = folder.iterdir()
    for content in (b"\xff", path.read_bytes().replace(b"1", b"2", 5)):
        path.write_bytes(content)
        forget(monkeypatch)
        traces.clear()
        assert Foresight().alone(*one) == found
        assert len(traces) == 2
    folder.rename(folder.with_name("gone"))
    folder.write_text("in the way")
    forget(monkeypatch)
    assert Foresight().alone(*one) == found


class Mine(FourBit):
    """Of the user's own: what it takes may change between two runs without a word."""

    packable = True


def test_a_class_of_the_users_own_is_kept_in_no_folder(planned, folder):
    assert Foresight().alone(*planned(quantization=Mine())) is not None
    assert not folder.exists()


def test_the_figure_is_the_same_packed_alone_and_in_any_folder(planned, monkeypatch):
    changes = [{"adapter": LoRA(r=4)}, {"adapter": LoRA(r=16), "seed": 1}, {"optimizer": AdamW(lr=1e-3), "seed": 2}]
    observed = {"memory": PhaseMemory}
    specs = [planned(f"pack/{n}", kind="ragged", callbacks=observed, **one)[0] for n, one in enumerate(changes)]
    packed = Runner().run(specs)
    forget(monkeypatch)
    solo = [Runner().run([replace(spec, folder=spec.folder.parent / "solo" / spec.folder.name)])[0] for spec in specs]
    figures = [[one["memory"]["alone_peak_bytes"] for one in records] for records in (packed, solo)]
    assert figures[0] == figures[1]
    assert figures[0][0] < figures[0][1]
    assert figures[0][0] == figures[0][2]  # a rate and a seed cost nothing
    measured = [one["memory"]["measured_peak_bytes"] for one in packed]
    assert len(set(measured)) == 1  # of the pack
    assert measured[0] > max(figures[0])


def test_each_trial_of_a_pack_has_its_own_state_parameters_and_bytes(planned):
    specs = [planned(f"{r}", adapter=LoRA(r=r))[0] for r in (2, 4, 8)]
    packed = Runner().run(specs)
    for one, r in zip(packed, (2, 4, 8), strict=True):
        llama = r * (4 * (64 + 64) + 3 * (64 + 128))  # one layer
        assert one["adapter"]["trainable_parameters"] == llama
        assert 4 * llama < one["adapter"]["bytes"] < 4 * llama + 8192  # of its file, with names and shapes
        assert one["optimizer"]["state_bytes"] == 2 * 4 * llama


def test_the_start_waits_for_no_trace_of_a_trial_alone(planned, monkeypatch):
    order = []
    real, advance = alone.peak, Trial.finish_step
    monkeypatch.setattr(alone, "peak", lambda *a: order.append("alone") or real(*a))
    monkeypatch.setattr(Trial, "finish_step", lambda trial: order.append("step") or advance(trial))
    Runner().run([planned()[0]])
    assert order == ["step"] * 4 + ["alone"]


def test_a_batch_with_one_shorter_row_needs_no_more_than_alone_says(planned, tmp_path):
    """It is as wide as one of the longest rows, and has a mask of its padding as well."""
    rows = [{"q": "a" * 20, "a": "b" * 43}] * 8 + [{"q": "a" * 20, "a": "b" * 40}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Files(train=str(path), validation=str(path), prompt="{q}", target="{a}", batch_size=8)
    spec, encoded = planned(adapter=Full(), data=data)
    lengths = (64,) * 7 + (61,)
    ragged = Pass(0, (BatchShape(lengths, lengths, 8 * 44),))
    assert Foresight().alone(spec, encoded) >= predict_step([spec], Geometry((ragged,), False)).predicted_peak_bytes
