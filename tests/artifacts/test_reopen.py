"""A run opened again computes what it computed when it was trained; what does not fit is refused."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from loralab.artifacts.damage import Damage
from loralab.artifacts.exporting import export_run
from loralab.artifacts.reopen import open_run, read_run
from loralab.artifacts.text import completion
from loralab.errors import ArtifactError
from loralab.running.inputs import Inputs

PLAIN = {
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "distilbert": AutoModelForSequenceClassification,
}


@pytest.mark.parametrize("family", PLAIN)
def test_logits_are_those_of_peft_on_the_same_folders(finished, base_folder, inputs, family):
    folder = finished(family)
    opened = open_run(folder)
    given = inputs(opened.spec.model.task)
    with opened.adapted(2):
        ours = opened.model(**given).logits
    opened.close()
    labels = {"num_labels": 3} if family == "distilbert" else {}
    base = PLAIN[family].from_pretrained(base_folder(family), **labels).eval()
    with torch.no_grad():
        without = base(**given).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter").eval()(**given).logits
    assert (ours - plain).abs().max() < 1e-5
    assert (ours - without).abs().max() > 1e-3


def test_its_validation_loss_is_the_recorded_one(finished):
    """By the loss of plain transformers over the validation rows, with the adapter."""
    folder = finished("llama")
    opened = open_run(folder)
    data = Inputs().rows(opened.spec)
    total = count = 0.0
    for row in data.validation:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with opened.adapted(1):
            loss = opened.model(input_ids=ids, labels=labels).loss
        targets = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * targets, count + targets
    opened.close()
    assert total / count == pytest.approx(opened.record["metrics"]["val/loss"], rel=1e-5)


HALF = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize("precision", HALF)
def test_what_it_writes_and_scores_is_computed_in_its_precision(finished, precision):
    opened, seen = open_run(finished("llama", f"trainer.precision={precision}")), []
    layer = opened.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    completion(opened, "alpha", {"max_new_tokens": 2})
    damage = Damage(opened, Inputs().rows(opened.spec), 1000)
    damage.base(opened.model)
    opened.close()
    assert set(seen) == {HALF[precision]}
    assert damage.about["loss"] == pytest.approx(opened.record["metrics"]["val/loss"], rel=5e-3)


def test_runs_of_one_base_share_it(finished):
    inputs = Inputs()
    first, second = open_run(finished("llama"), inputs), open_run(finished("llama", "adapter.r=2"), inputs)
    assert first.base is second.base
    second.close()
    first.close()


def test_what_has_no_adapter_or_no_fitting_base_is_refused(finished, base_folder, tmp_path):
    folder = finished("llama")
    with pytest.raises(ArtifactError, match="no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is no run but holds 1: name one of them"):
        read_run(folder.parent)
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "adapter")
    with pytest.raises(ArtifactError, match="has no adapter"):
        read_run(copy)
    shutil.copytree(folder / "adapter", copy / "adapter")
    base = shutil.copytree(base_folder("llama"), tmp_path / "base")
    record = json.loads((copy / "result.json").read_text())
    record["config"]["model"]["name_or_path"] = str(base)
    (copy / "result.json").write_text(json.dumps(record))
    open_run(copy).close()
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    with pytest.raises(ArtifactError, match="the weights of .* have changed since"):
        open_run(copy)


def test_a_file_of_the_adapter_runs_nothing(finished, tmp_path):
    copy = shutil.copytree(finished("llama"), tmp_path / "copy")
    path = copy / "adapter" / "adapter_spec.json"
    stored = {**json.loads(path.read_text()), "class": "os.mkdir", "fields": {"path": str(tmp_path / "made")}}
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match="os.mkdir is not an adapter's spec"):
        open_run(copy)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {}}, "damaged: its config has no model"),
        ({"trial": "../../elsewhere"}, "damaged: '../../elsewhere' is no name of a trial"),
    ],
)
def test_a_damaged_record_is_refused(finished, tmp_path, change, says):
    copy = shutil.copytree(finished("llama"), tmp_path / "copy")
    record = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(ArtifactError, match=re.escape(says)):
        open_run(copy)


def test_values_that_are_not_finite_are_neither_opened_nor_exported(finished, tmp_path):
    copy = shutil.copytree(finished("llama"), tmp_path / "copy")
    path = copy / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    next(value for name, value in state.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(state, path)
    for use in (open_run, lambda folder: export_run(folder, tmp_path / "out")):
        with pytest.raises(ArtifactError, match="lora_B.* holds nan or infinite values"):
            use(copy)
    assert not (tmp_path / "out").exists()


def test_relative_paths_are_those_of_where_the_run_was_started(arguments, base_folder, tmp_path, monkeypatch):
    from loralab.cli.main import run

    monkeypatch.chdir(base_folder("llama").parent)
    words = [word for word in arguments("llama") if not word.startswith("model.name_or_path")]
    assert run(["train", *words, "model.name_or_path=base", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    monkeypatch.chdir(tmp_path)
    open_run(tmp_path / "run").close()
