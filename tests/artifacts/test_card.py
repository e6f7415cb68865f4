"""The card beside an adapter: what the hub reads, what a reader reads, and nothing that is nobody's business."""

import re

import pytest
from huggingface_hub import ModelCard
from made import logits, logits_of_run

from loralab.adapters.files import weight_bytes
from loralab.records import card
from loralab.records import record as records
from loralab.running.inputs import Inputs
from loralab.running.runner import Runner


def loaded(folder):
    return ModelCard.load(folder / "adapter" / "README.md", ignore_metadata_errors=False)


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "text-generation"), ("t5", "text2text-generation"), ("distilbert", "text-classification")],
)
def test_the_hub_reads_the_base_the_library_and_every_metric(finished, family, task):
    folder = finished(family)
    data, record = loaded(folder).data, records.read(folder)
    assert (data.library_name, data.pipeline_tag, data.tags) == ("peft", task, ["loralab", "lora"])
    assert data.base_model is None  # a folder of this machine is none of the hub's models
    values = {one.metric_name: one.metric_value for one in data.eval_results}
    assert values == pytest.approx({key: value for key, value in record["metrics"].items() if value is not None})
    assert {(one.task_type, one.dataset_name, one.dataset_split) for one in data.eval_results} == {
        (task, record["data"]["name"], "validation")
    }


def test_a_reader_finds_base_data_settings_seed_versions_and_the_command(finished):
    folder = finished("llama")
    text, record = loaded(folder).content, records.read(folder)
    for part in (
        *(record["base"]["fingerprint"], record["data"]["fingerprint"], record["trial"], "20 train, 7 validation"),
        *("r=8, lora_alpha=16.0", "lr=0.05", "max_steps=4", "quantization of the base: none"),
        f"| val/loss | {record['metrics']['val/loss']:.6g} |",
        "One run with one seed (0): no interval.",
        f"torch {record['environment']['versions']['torch']}",
        "loralab train model=hf model.name_or_path=",
    ):
        assert part in text, part


@pytest.mark.parametrize("family", ["llama", "t5", "distilbert"])
def test_the_lines_that_load_it_do(finished, inputs, family):
    folder = finished(family)
    (code,) = re.findall(r"```python\n(.*?)```", loaded(folder).content, re.DOTALL)
    scope = {}
    exec(code.replace("this folder", str(folder / "adapter")), scope)
    given = inputs({"t5": "seq2seq_lm"}.get(family, "causal_lm"))
    ours = logits_of_run(folder, given, Inputs())
    assert float((logits(scope["model"], given) - ours).abs().max()) < 1e-5


def test_the_card_counts_no_byte_of_the_adapter(finished):
    folder = finished("llama")
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert records.read(folder)["adapter"]["bytes"] == weight_bytes(folder / "adapter") == size


@pytest.mark.parametrize(
    ("words", "library", "says"),
    [
        (["adapter=intrinsic", "adapter.dimension=50"], "loralab", "`loralab generate RUN --prompt TEXT`"),
        (["adapter=full"], "transformers", 'AutoModelForCausalLM.from_pretrained("this folder")'),
        (["quantization=nf4_double"], "peft", "The base was quantized (nf4_double)"),
    ],
)
def test_other_formats_say_what_opens_them(finished, words, library, says):
    found = loaded(finished("llama", *words))
    assert found.data.library_name == library
    assert says in found.content


@pytest.fixture
def described(finished):
    """The card of a run whose record has other values."""

    def make(**changes):
        folder = finished("llama")
        record = records.read(folder)
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            record[section] = {**record[section], key: value} if key else value
        return card.text(folder / "adapter", record)

    return make


@pytest.mark.parametrize(
    ("name", "base"), [("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("gpt2", "gpt2"), ("random", None)]
)
def test_a_base_of_the_hub_is_named_as_such(described, name, base):
    assert ModelCard(described(base__name=name), ignore_metadata_errors=False).data.base_model == base


def test_a_relative_folder_is_no_model_of_the_hub(described, base_folder):
    folder = base_folder("llama")
    text = described(base__name=folder.name, cwd=str(folder.parent))
    assert ModelCard(text, ignore_metadata_errors=False).data.base_model is None


@pytest.mark.parametrize(("dtype", "shown"), [("float32", ", dtype='float32')"), ("auto", ")")])
def test_the_base_is_loaded_with_the_run_s_dtype(described, dtype, shown):
    """transformers takes the checkpoint's own without it, which for the shipped base is bfloat16."""
    text = described(base__name="llama", config__model={"task": "causal_lm", "dtype": dtype})
    assert f"from_pretrained('llama'{shown}\n" in text


def test_of_a_quantized_base_it_says_what_opens_the_adapter_over_that(described):
    assert "loralab.load(RUN)" not in described()
    node = {"_target_": "loralab.quantization.four_bit.FourBit"}
    text = described(config__quantization=node, choices__quantization="nf4_double")
    assert "The base was quantized (nf4_double)" in text
    assert "loralab.load(RUN)" in text


def test_without_a_finite_metric_there_is_no_model_index(described):
    text = described(metrics={"val/loss": None})
    assert ModelCard(text).data.eval_results is None
    assert "None were measured." in text


def test_no_secret_and_no_home_is_in_it(described, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    words = [
        "data.train=/home/somebody/work/rows.jsonl",
        "data.test=/home/somebody/else.jsonl",
        "logger.api_key=abc123",
    ]
    words.append("model.name_or_path=https://me:hf_abcdefghijkl@host/x")
    text = described(overrides=words, cwd="/home/somebody/work", base__name="/home/somebody/llama")
    for hidden in ("somebody", "abc123", "hf_abcdefghijkl"):
        assert hidden not in text
    assert "data.train=rows.jsonl" in text
    assert "data.test=~/else.jsonl" in text
    assert "Path('~/llama').expanduser()" in text


def test_a_card_that_cannot_be_written_fails_the_trial_and_keeps_the_adapter(make_spec, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loralab.records.card.text", full)
    spec = make_spec(max_steps=1)
    (record,) = Runner().run([spec])
    assert (record["status"], record["exit_code"]) == ("failed", 7)
    assert "README.md cannot be written: No space left" in record["error"]
    assert (spec.folder / "adapter" / "adapter_model.safetensors").is_file()
