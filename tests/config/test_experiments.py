"""Every ready experiment composes, counts what its paper says, and trains offline on a small base of its architecture.

The data are rows under the column names that the experiment's templates use, read by the real loader from a folder.
"""

import gzip
import json

import pytest

from loralab.config.build import trial_spec
from loralab.config.compose import compose
from loralab.config.places import data_root
from loralab.planning.count import count
from loralab.running.runner import Runner

FOLDER = data_root() / "conf" / "experiment"
NAMES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
SMALL = {
    "t5": "d_model: 32, d_kv: 16, d_ff: 64, num_layers: 2, num_decoder_layers: 2, num_heads: 2",
    "distilbert": "dim: 32, hidden_dim: 64, n_layers: 2, n_heads: 2",
    "phi": "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2",
    "gpt2": "n_embd: 32, n_layer: 2, n_head: 2",
    "llama": "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2",
    "roberta": "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2",
}
COUNTS = {  # of parameters, new heads left out: LoRA's table 2 and QLoRA's r = 64 on all layers; the others by formula
    "flan_t5_samsum": 1_769_472,
    "distilbert_imdb": 147_456,
    "phi2_dialogsum": 32 * 32 * 4 * 2 * 2560,
    "gpt2_medium_e2e": 24 * 4 * (1024 + 3072),
    "llama_alpaca": 159_907_840,
    "llama_guanaco": 159_907_840,
    **{f"roberta_glue/{task}": 294_912 for task in ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")},
}


def of(name, folder, *more):
    return trial_spec(compose([f"+experiment={name}", *more]), folder)


def test_every_experiment_is_counted():
    assert set(NAMES) == set(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_it_counts_what_is_published(name, tmp_path):
    spec = of(name, tmp_path)
    counted = count(spec.model, spec.quantization, spec.adapter)["adapter_parameters"]
    assert counted == COUNTS[name]


@pytest.fixture
def folder_of(tmp_path, real_data):
    """Writes train, validation and test files of real rows under other names of their columns; returns the folder."""

    def write(source, columns, label):
        folder = tmp_path / "rows"
        folder.mkdir()
        with gzip.open(real_data / source / "train.jsonl.gz", "rt") as lines:
            given = [json.loads(line) for line, _ in zip(lines, range(24), strict=False)]
        named = [{name: row[field] for name, field in columns.items()} for row in given]
        for row, place in zip(named, range(24), strict=True):
            row.update({} if label is None else {"label": label(given[place], place)})
        for split, part in (("train", named[:12]), ("validation", named[12:18]), ("test", named[18:])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return folder

    return write


def columns_of(name):
    """(data set of the test folder, {column of the hub's: its field there}, its label)."""
    pairs = {"mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "qqp": ("question1", "question2")}
    task = name.partition("/")[2]
    if name in ("flan_t5_samsum", "phi2_dialogsum"):
        return "dialogsum", {"dialogue": "dialogue", "summary": "summary"}, None
    if name == "gpt2_medium_e2e":
        return "e2e_nlg", {"meaning_representation": "mr", "human_reference": "ref"}, None
    if name == "llama_alpaca":
        return "alpaca_en_demo", {name: name for name in ("instruction", "input", "output")}, None
    if name == "llama_guanaco":
        return "dialogsum", {"text": "dialogue"}, None
    if task in ("sst2", "cola") or name == "distilbert_imdb":
        column = "text" if name == "distilbert_imdb" else "sentence"
        return "rotten_tomatoes", {column: "text"}, lambda row, place: place % 2
    first, second = pairs.get(task, ("sentence1", "sentence2"))
    label = (lambda row, place: place / 5) if task == "stsb" else (lambda row, place: place % 2)
    return "mrpc", {first: "sentence1", second: "sentence2"}, label


ALIKE = {"roberta_glue/" + task for task in ("mnli", "sst2", "qnli", "qqp", "rte")} | {"llama_guanaco"}  # to others


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in NAMES])
def test_it_trains_offline_on_its_architecture(name, tmp_path, folder_of, make_model):
    source, columns, label = columns_of(name)
    full = of(name, tmp_path).model
    kind = full.config["model_type"]
    generated = [] if "class" in full.task else ["data.generate_rows=1"]
    spec = of(
        name,
        tmp_path / "run",
        *(
            "model=random",
            f"model.task={full.task}",
            f"model.tokenizer={make_model('llama').tokenizer}",
            "model.max_length=64",
        ),
        *(f"+model.config={{model_type: {kind}, vocab_size: 258, {SMALL[kind]}}}", "model.dtype=float32"),
        *("model.gradient_checkpointing=false", f"data.name={folder_of(source, columns, label)}"),
        *("++data.config_name=null", "data.validation=validation", "data.batch_size=2", *generated),
        *(
            "trainer.max_steps=2",
            "trainer.accumulate_grad_batches=1",
            "trainer=cpu",
            "logger=none",
            "plan.record=false",
        ),
    )
    (record,) = Runner().run([spec])
    assert record["status"] == "completed", record["error"]
    assert record["metrics"][spec.metric] is not None
