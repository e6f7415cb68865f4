"""What is forgotten: the loss on rows that no trial is trained on, beside that of the base without any adapter."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from loralab.adapters.full import Full
from loralab.adapters.lora import LoRA
from loralab.adapters.prefix import Prefix
from loralab.cli import main
from loralab.config.build import trial_id
from loralab.config.compose import compose
from loralab.data.base import DataSpec, Row, make_splits
from loralab.data.files import Files
from loralab.planning.foresee import _heaviest_scored, _weighing
from loralab.quantization.none import NoQuantization
from loralab.records import card, record
from loralab.running import inputs
from loralab.running.inputs import Inputs
from loralab.running.runner import Runner

CLOSE = 1e-6  # of a loss; seen: 1.1e-7. Sums of float32 in another order


@pytest.fixture
def plain(make_model):
    """transformers' own model of the llama base, and its tokenizer."""

    def make():
        spec = make_model("llama")
        return spec.weights(spec.prepared_config(None), NoQuantization(), "auto", "cpu").eval(), spec.load_tokenizer()

    return make


@torch.no_grad()
def summed(model, tokenizer, prompt, target, end):
    """(nll of ``target``, its tokens), row by row; ``end``: whether the end of text is part of it."""
    given, wanted = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target))
    wanted = [*wanted, *([tokenizer.eos_token_id] if end else [])]
    logits = model(input_ids=torch.tensor([[*given, *wanted]])).logits[0, len(given) - 1 : -1]
    return float(F.cross_entropy(logits.double(), torch.tensor(wanted), reduction="sum")), len(wanted)


def mean_loss(model, tokenizer, path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sums, counts = zip(*(summed(model, tokenizer, row["q"], row["a"], True) for row in rows), strict=True)
    return sum(sums) / sum(counts)


def test_the_losses_are_those_of_plain_transformers_without_and_with_the_adapter(make_spec, make_data, rows, plain):
    spec = make_spec(data=make_data(forgetting=make_data("ragged", batch_size=3)), max_steps=6)
    (stored,) = Runner().run([spec])
    assert stored["status"] == "completed", stored["error"]
    found, path = stored["metrics"], rows["ragged", "validation"]
    model, tokenizer = plain()
    base = mean_loss(model, tokenizer, path)
    tuned = mean_loss(PeftModel.from_pretrained(model, spec.folder / "adapter").eval(), tokenizer, path)
    assert abs(tuned - base) > 0.01
    assert found["forgetting/base_loss"] == pytest.approx(base, rel=CLOSE)
    assert found["forgetting/loss"] == pytest.approx(tuned, rel=CLOSE)
    assert found["forgetting/increase"] == found["forgetting/loss"] - found["forgetting/base_loss"]
    assert found["forgetting/perplexity"] == math.exp(found["forgetting/loss"])
    assert stored["data"]["forgetting"]["rows"] == 7
    assert stored["data"]["forgetting"]["name"] == "ragged_train.jsonl"


def test_a_text_is_scored_in_bits_per_byte_and_answers_by_choice(make_spec, make_data, tmp_path, plain):
    text = tmp_path / "held.txt"
    text.write_text("\n".join(f"line {i} of a text" for i in range(9)))
    choices = [{"q": f"{i} ", "a": "no" if i % 2 else "yes"} for i in range(8)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    answers = str(tmp_path / "choices.jsonl")
    parts = {"train": answers, "validation": answers, "prompt": "{q}", "target": "{a}", "choices": ["yes", "no"]}
    texts = Files(train=str(text), validation=str(text), batch_size=2)
    specs = [
        make_spec(str(n), data=make_data(forgetting=one), max_steps=1) for n, one in enumerate((texts, Files(**parts)))
    ]
    of_text, of_choices = (one["metrics"] for one in Runner().run(specs))
    nats = of_text["forgetting/loss"] * len(text.read_bytes() + b".")  # the end of text is a target, too
    assert of_text["forgetting/bits_per_byte"] == pytest.approx(nats / math.log(2) / text.stat().st_size, rel=1e-12)
    model, tokenizer = plain()

    def share(model):
        def likelier(row):
            found = {one: -summed(model, tokenizer, row["q"], one, False)[0] for one in ("yes", "no")}
            return max(found, key=found.get) == row["a"]

        return sum(map(likelier, choices)) / len(choices)

    assert of_choices["forgetting/base_choice_accuracy"] == share(model)
    tuned = PeftModel.from_pretrained(model, specs[1].folder / "adapter").eval()
    assert of_choices["forgetting/choice_accuracy"] == share(tuned)


def test_packed_trials_forget_what_they_forget_alone_and_train_as_without_such_rows(make_spec, make_data, weights):
    others = [make_data("ragged", batch_size=3), None, make_data("ragged", batch_size=2)]

    def specs(name, others):
        return [
            make_spec(
                f"{name}{n}", seed=n, adapter=LoRA(r=2 * n + 2), data=make_data(forgetting=other), max_steps=3 + n
            )
            for n, other in enumerate(others)
        ]

    packed, without = specs("packed", others), specs("without", [None] * 3)
    together, apart = Runner().run(packed), [Runner().run([one])[0] for one in specs("alone", others)]
    assert [one["pack"]["size"] for one in together] == [3] * 3
    assert [one["metrics"] for one in together] == [one["metrics"] for one in apart]
    assert ["forgetting/loss" in one["metrics"] for one in together] == [True, False, True]
    for ours, theirs, stored in zip(packed, without, Runner().run(without), strict=True):
        assert all(torch.equal(value, weights(theirs.folder)[name]) for name, value in weights(ours.folder).items())
        mine = next(one for one in together if one["seed"] == stored["seed"])
        assert stored["metrics"].items() <= mine["metrics"].items()


def test_the_bare_base_is_scored_once_and_before_it_is_trained_itself(make_spec, make_data, monkeypatch):
    scored, real = [], inputs.bare_scores
    monkeypatch.setattr(inputs, "bare_scores", lambda *given: scored.append(1) or real(*given))
    data, runner = make_data(forgetting=make_data("ragged")), Runner()
    methods = [LoRA(r=2), Full(), LoRA(r=4), Prefix(num_virtual_tokens=2)]
    stored = [
        runner.run([make_spec(str(n), adapter=one, data=data, max_steps=2)])[0]["metrics"]
        for n, one in enumerate(methods)
    ]
    assert len({one["forgetting/base_loss"] for one in stored}) == len(scored) == 1
    assert len({one["forgetting/loss"] for one in stored}) == 4


def test_a_base_that_is_not_trained_has_forgotten_nothing(make_spec, make_data):
    spec = make_spec(data=make_data(forgetting=make_data("ragged", batch_size=4)), max_steps=0)
    assert Runner().run([spec])[0]["metrics"]["forgetting/increase"] == 0


def test_an_encoder_with_a_decoder_is_scored_too(make_spec, make_data):
    spec = make_spec(family="t5", data=make_data(forgetting=make_data("ragged")), max_steps=1)
    (stored,) = Runner().run([spec])
    assert stored["metrics"]["forgetting/base_loss"] > 0, stored["error"]


def test_the_plan_sees_the_heaviest_pass_of_all_that_is_scored(make_spec, make_data):
    spec = make_spec(data=make_data(batch_size=1, forgetting=make_data("pairs", batch_size=5)))
    rows = Inputs().rows(spec)
    found = _heaviest_scored([spec], [rows], _weighing([spec], "cpu"))
    assert len(found.present[0].inputs) == 5


def test_the_card_says_which_rows_a_score_is_of(make_spec, make_data):
    spec = make_spec(data=make_data(forgetting=make_data("ragged")), max_steps=1)
    (stored,) = Runner().run([spec])
    results = {one.metric_name: (one.dataset_name, one.dataset_split) for one in card._results(stored)}
    assert results["val/loss"] == ("pairs_train.jsonl", "validation")
    assert results["forgetting/loss"] == ("ragged_train.jsonl", "validation")
    assert not {"forgetting/increase", "forgetting/base_loss"} & results.keys()


@pytest.fixture
def command(tiny_arguments, rows, tmp_path, capsys):
    """Runs ``train`` in a folder of its own; (exit code, what it said)."""
    folder = f"hydra.run.dir={tmp_path / 'run'}"

    def run(*words, usual=True):
        own = [
            "+data@data.forgetting=files",
            *(f"data.forgetting.{split}={rows['ragged', split]}" for split in ("train", "validation")),
            *("data.forgetting.prompt={q}", "data.forgetting.target={a}", "data.forgetting.batch_size=3"),
        ]
        full = "adapter=full" in words
        shared = [word for word in tiny_arguments if not (full and word.startswith("adapter."))]
        code = main.run(["train", *shared, folder, *(own if usual else []), *words])
        return code, capsys.readouterr().err

    return run


def test_a_finished_trial_gets_the_scores_from_its_adapter_and_keeps_its_id(command, rows, tmp_path):
    assert command(usual=False)[0] == 0
    before, adapter = record.read(tmp_path / "run"), tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    code, said = command()
    assert (code, "they are of its adapter" in said, "finished before" in said) == (0, True, True)
    after = record.read(tmp_path / "run")
    assert adapter.stat().st_mtime_ns == written
    assert after["trial"] == before["trial"]
    assert after["metrics"].items() > before["metrics"].items()
    assert "they are of its adapter" not in command()[1]
    other = f"data.forgetting.validation={rows['pairs', 'validation']}"
    assert "they are of its adapter" in command(other)[1]
    assert record.read(tmp_path / "run")["metrics"]["forgetting/loss"] != after["metrics"]["forgetting/loss"]
    assert command("--fresh")[0] == 0
    trained = record.read(tmp_path / "run")
    assert trained["metrics"] == after["metrics"]
    assert trained["data"] == after["data"]
    assert trained["config"] == after["config"]


def test_of_a_base_that_was_trained_itself_too(command, tmp_path):
    assert command("adapter=full", usual=False)[0] == 0
    assert command("adapter=full")[0] == 0
    after = record.read(tmp_path / "run")["metrics"]
    assert command("adapter=full", "--fresh")[0] == 0
    assert record.read(tmp_path / "run")["metrics"] == after
    assert after["forgetting/increase"] != 0


def test_rows_that_cannot_be_read_leave_a_finished_trial_as_it_is(command, tmp_path):
    assert command(usual=False)[0] == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    code, said = command("data.forgetting.train=nowhere.jsonl")
    assert (code, "data.forgetting.train='nowhere.jsonl': there is no such file" in said) == (3, True)
    code, said = command("data.forgetting.limit=0")
    assert (code, "data.forgetting.limit must be at least 1" in said) == (2, True), said
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_files_that_have_changed_are_scored_again(command, rows, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(rows["ragged", "validation"].read_text())
    assert command(f"data.forgetting.validation={held}")[0] == 0
    assert "they are of its adapter" not in command(f"data.forgetting.validation={held}")[1]
    held.write_text("".join(held.read_text().splitlines(keepends=True)[:3]))
    assert "they are of its adapter" in command(f"data.forgetting.validation={held}")[1]
    assert record.read(tmp_path / "run")["data"]["forgetting"]["rows"] == 3


def test_the_id_is_that_of_the_trial_without_such_rows(tiny_arguments):
    more = ["+data@data.forgetting=docstrings", "data.forgetting.limit=3"]
    assert trial_id(compose([*tiny_arguments, *more])) == trial_id(compose(tiny_arguments))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data.forgetting=docstrings"], 2, "valid: +data@data.forgetting=docstrings"),
        (["data.forgetting=3"], 2, "data.forgetting must be a mapping with a _target_, got 3"),
        (["+data.forgetting._target_=loralab.adapters.lora.LoRA"], 2, "LoRA' is no DataSpec"),
        (["+data@data.forgetting=docstrings", "data.forgetting.generate_rows=2"], 2, "data.forgetting.generate_rows=2"),
        (["+data@data.forgetting=docstrings", "data.forgetting.packing=true"], 2, "data.forgetting.packing=True"),
        (
            ["+data@data.forgetting=docstrings", "+data@data.forgetting.forgetting=docstrings"],
            2,
            "data.forgetting.forgetting=",
        ),
        (["+data@data.forgetting=docstrings", "metric=forgetting/loss"], 2, "nothing is chosen or ranked"),
        (["+data@data.forgetting=docstrings", "model.task=sequence_classification"], 2, "data.forgetting: model.task="),
    ],
)
def test_wrong_settings_are_refused_in_one_paragraph(command, tmp_path, words, code, message):
    found, said = command(*words, usual=False)
    assert (found, message in said, "Traceback" in said) == (code, True, False), said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class TrainingOnly(DataSpec):
    """Holds nothing out."""

    def splits(self):
        return make_splits("training_only", {"train": [Row("a", "b")]})


def test_rows_of_another_task_and_an_empty_split_are_refused(make_spec, make_data, tmp_path):
    (tmp_path / "held.txt").write_text("a line\n" * 20)
    text = Files(train=str(tmp_path / "held.txt"))
    no_column = make_data(forgetting=make_data(target="{z}"))
    found = [
        Runner().run([spec])[0]
        for spec in (
            make_spec(family="t5", data=make_data(forgetting=text)),
            make_spec(data=no_column),
            make_spec(data=make_data(forgetting=TrainingOnly())),
        )
    ]
    assert [one["exit_code"] for one in found] == [2, 3, 3]
    task, column, split = (one["error"] for one in found)
    assert task.startswith(
        "data.forgetting: model.task=seq2seq_lm needs data.prompt and data.target, but data held.txt"
    )
    assert "data.forgetting: " in column
    assert "'z'" in column
    assert split == "data.forgetting: the validation split of training_only is empty"
