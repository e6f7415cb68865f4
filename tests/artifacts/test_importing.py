"""What PEFT and loralib wrote becomes a run; what does not fit is refused, and nothing is written."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
from made import Bases, in_peft, logits, logits_of_run, moved
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loralab.artifacts.importing import import_adapter
from loralab.artifacts.loralib import read_loralib
from loralab.cli.main import run
from loralab.config.build import trial_id
from loralab.errors import ArtifactError, ConfigError
from loralab.records import record as records

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bases(base_folder):
    return Bases(base_folder)


def saved(model, folder, by=0.1, **config):
    """A PEFT adapter of ``model`` that has moved, saved as ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
        moved([one for one in theirs.parameters() if one.requires_grad], by)
        theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """The folder of PEFT's LoRA over the Llama; read it, do not change it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    saved(bases("llama", "none").plain, folder, r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},  # PEFT saves the base's table too
        {"target_modules": r".*\.1\..*_proj", "exclude_modules": ["up_proj", "k_projection"]},
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": 1,
            "alpha_pattern": {"q_proj": 3, "absent": 9},
        },
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "model.norm"]},
    ],
    ids=["embedding", "pattern", "blocks", "orthogonal", "whole modules"],
)
def test_options_of_lora_mean_what_they_mean_in_peft(bases, inputs, tmp_path, fields):
    base = bases("llama", "none")
    theirs = saved(base.plain, tmp_path / "peft", r=4, task_type="CAUSAL_LM", **fields)
    import_adapter(tmp_path / "peft", tmp_path / "run", ["trainer=cpu"])
    ours = logits_of_run(tmp_path / "run", inputs(), base.inputs)
    assert float((logits(theirs, inputs()) - ours).abs().max()) < 1e-5
    assert float((logits(base.plain, inputs()) - ours).abs().max()) > 1e-3


def test_experts_that_are_one_parameter_are_those_of_peft(base_folder, inputs, tmp_path):
    keys = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    keys |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 258, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **keys)).eval()
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder("llama")).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    given = {"target_modules": ["q_proj"], "target_parameters": experts, "task_type": "CAUSAL_LM", "r": 2}
    theirs = saved(model, tmp_path / "peft", **given)
    import_adapter(tmp_path / "peft", tmp_path / "run", ["trainer=cpu"])
    ours = logits_of_run(tmp_path / "run", inputs(), None)
    assert float((logits(theirs, inputs()) - ours).abs().max()) < 1e-5
    assert float((logits(model, inputs()) - ours).abs().max()) > 1e-3


def test_the_record_says_where_the_run_is_from_and_that_it_is_no_trial_of_a_sweep(adapter, base_folder, tmp_path):
    record = import_adapter(adapter, tmp_path / "run", ["val/loss=2.5", "seed=3"])
    stored = records.read(tmp_path / "run")
    assert stored["status"] == "completed"
    assert stored["metrics"] == {"val/loss": 2.5}
    assert stored["adapter"]["note"].startswith(f"imported from {adapter} (PEFT")
    assert stored["config"]["adapter"]["r"] == 4
    assert stored["config"]["model"]["name_or_path"] == str(base_folder("llama"))
    assert stored["adapter"]["bytes"] == (tmp_path / "run" / "adapter" / WEIGHTS).stat().st_size
    assert record["trial"] != trial_id(stored["config"])
    shutil.rmtree(tmp_path / "run")
    assert import_adapter(adapter, tmp_path / "run")["metrics"] == {}


def test_the_card_of_an_import_claims_no_training_of_its_own(adapter, tmp_path):
    """The record's configuration is whole, so that it can be opened; optimizer, steps and seed are those of nobody."""
    import_adapter(adapter, tmp_path / "run", ["val/loss=2.5"])
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Numbers that were given with the import." in text
    for claimed in ("optimizer", "max_steps", "seed", "loralab train"):
        assert claimed not in text


def test_generate_writes_with_an_imported_adapter_what_peft_writes(adapter, base_folder, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert run(["import", str(adapter), "--out", folder]) == 0
    about = re.escape(f"{folder}: lora, 2,048 parameters, imported from {adapter}")
    assert re.match(rf"{about}.*, over .*{base_folder('llama')}, quantization=none\n", capsys.readouterr().out)
    assert run(["generate", folder, "--prompt", "alpha ", "max_new_tokens=8", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["runs"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(base_folder("llama"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder("llama")), adapter).eval()
    ids = tokenizer("alpha ", return_tensors="pt", add_special_tokens=False)
    made = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert ours == tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_what_the_configuration_leaves_out_is_pefts_default(adapter, bases, inputs, tmp_path):
    """PEFT's lora_alpha is 8, loralab's 16."""
    folder, base = shutil.copytree(adapter, tmp_path / "peft"), bases("llama", "none")
    stored = json.loads((folder / CONFIG).read_text())
    kept = ("peft_type", "task_type", "target_modules", "base_model_name_or_path")
    (folder / CONFIG).write_text(json.dumps({**{key: stored[key] for key in kept}, "r": 4}))
    import_adapter(folder, tmp_path / "run", ["trainer=cpu"])
    ours = logits_of_run(tmp_path / "run", inputs(), base.inputs)
    assert float((in_peft(base.plain, folder, inputs()) - ours).abs().max()) < 1e-5


def configured(folder, **values):
    stored = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**stored, **values}))


def weighed(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda f: weighed(f, lambda s: s.pop(KEY)), 4, f"it lacks {KEY}"),
        (lambda f: weighed(f, lambda s: s.update(more=torch.zeros(1))), 4, "has more than .* more"),
        (lambda f: configured(f, r=5), 4, rf"{KEY} is \(4, 64\), not \(5, 64\)"),
        (lambda f: configured(f, target_modules=["q_proj"]), 4, "it has more than the adapter of its configuration"),
        (lambda f: configured(f, target_modules=["c_attn"]), 4, "'c_attn' matches no linear layer"),
        (lambda f: configured(f, target_modules=["q_proj", 1]), 4, "a value of another kind than PEFT writes"),
        (lambda f: configured(f, rank_pattern=[1]), 4, r"adapter\.rank_pattern must be"),
        (lambda f: configured(f, modules_to_save="norm"), 4, "it lacks .*input_layernorm.weight"),
        (lambda f: configured(f, r=0), 4, r"adapter\.r must be"),
        (lambda f: weighed(f, lambda s: s[KEY].fill_(float("nan"))), 4, f"{KEY} is not finite"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), 4, "cannot be read"),
        (lambda f: (f / WEIGHTS).unlink(), 4, f"holds no {WEIGHTS}"),
        (lambda f: (f / CONFIG).unlink(), 4, f"holds no {CONFIG}"),
        (lambda f: (f / CONFIG).write_text("{"), 4, "cannot be read"),
        (lambda f: configured(f, peft_type=None), 4, "peft_type=None"),
        (lambda f: configured(f, peft_type="LOHA"), 2, "peft_type=LOHA is no method of loralab's; .*LORA"),
        (lambda f: configured(f, lora_bias=True), 2, "lora_bias=True is an option that loralab lacks"),
        (lambda f: configured(f, trainable_token_indices=[3]), 2, r"trainable_token_indices=\[3\]"),
        (lambda f: configured(f, layer_replication=[[0, 2]]), 2, "layer_replication="),
        (lambda f: configured(f, use_qalora=True), 2, "use_qalora=True"),
        (lambda f: configured(f, revision="v2"), 2, "revision=v2"),
        (lambda f: configured(f, init_lora_weights="olora"), 2, "init_lora_weights=olora trains A and B beside"),
        (lambda f: configured(f, init_lora_weights="pissa_niter_4"), 2, "init_lora_weights=pissa_niter_4"),
        (lambda f: configured(f, init_lora_weights="loftq"), 2, "loftq stands beside a quantized base"),
        (lambda f: configured(f, task_type="TOKEN_CLS"), 2, "task_type=TOKEN_CLS is none"),
        (lambda f: configured(f, task_type=None), 2, "valid: model.task=causal_lm"),
        (lambda f: configured(f, base_model_name_or_path=None), 2, "does not name its base"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_paragraph_and_leaves_nothing(
    adapter, tmp_path, capsys, damage, code, says
):
    folder = shutil.copytree(adapter, tmp_path / "peft")
    damage(folder)
    assert run(["import", str(folder), "--out", str(tmp_path / "run")]) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert re.search(says, told.replace("\n", " ")), told
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_an_adapter_of_another_base_is_refused(adapter, base_folder, tmp_path):
    small = AutoConfig.from_pretrained(base_folder("llama"))
    small.hidden_size, small.head_dim = 32, 16
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(base_folder("llama")).save_pretrained(tmp_path / "small")
    with pytest.raises(ArtifactError, match=r"lora_A.weight is \(4, 64\), not \(4, 32\)"):
        import_adapter(adapter, tmp_path / "run", [f"model.name_or_path={tmp_path / 'small'}"])


def test_a_table_that_is_not_the_bases_is_refused(bases, tmp_path):
    base = bases("llama", "none")
    saved(base.plain, tmp_path / "peft", r=4, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weighed(tmp_path / "peft", lambda state: state[key].add_(1))
    with pytest.raises(ArtifactError, match="holds a model.embed_tokens of its own"):
        import_adapter(tmp_path / "peft", tmp_path / "run")


def test_a_head_that_neither_base_nor_adapter_holds_is_refused(base_folder, bases, tmp_path):
    folder = shutil.copytree(base_folder("distilbert"), tmp_path / "base")
    weighed_base = load_file(folder / "model.safetensors")
    body = {key: value for key, value in weighed_base.items() if not key.startswith("pre_classifier")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    plain_model = bases("distilbert", "none").plain
    saved(plain_model, tmp_path / "peft", r=4, task_type="SEQ_CLS", target_modules=["q_lin"])
    weighed(tmp_path / "peft", lambda s: [s.pop(key) for key in list(s) if "pre_classifier" in key])
    with pytest.raises(ArtifactError, match="it lacks base_model.model.pre_classifier"):
        import_adapter(tmp_path / "peft", tmp_path / "run", [f"model.name_or_path={folder}"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter.r=8"], "adapter.r is what the files say"),
        (["adapter=ia3"], "adapter is what the files say"),
        (["nonsense"], "'nonsense' is not understood"),
        (["val/loss=nan"], "val/loss='nan' must be a finite number"),
        (["val/loss=low"], "val/loss='low' must be a finite number"),
    ],
)
def test_words_that_contradict_the_file_are_refused(adapter, tmp_path, capsys, words, says):
    assert run(["import", str(adapter), "--out", str(tmp_path / "run"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_as_it_is(adapter, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    assert run(["import", str(adapter), "--out", str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "run" / "mine").read_text() == "mine"


LAYERS = [f"roberta.encoder.layer.{n}.attention.self.{one}" for n in (0, 1) for one in ("query", "value")]


def lora_state(model, r=4, head=True):
    """A state dictionary as microsoft/LoRA's RoBERTa checkpoints have it."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name in LAYERS:
        out_features, in_features = model.get_submodule(name).weight.shape
        state[f"{name}.lora_A"] = 0.3 * torch.randn(r, in_features, generator=generator)
        state[f"{name}.lora_B"] = 0.3 * torch.randn(out_features, r, generator=generator)
    for key, value in model.classifier.state_dict().items() if head else ():
        state[f"classifier.{key}"] = value + 0.3 * torch.randn(value.shape, generator=generator)
    return state


@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_loralibs_roberta_computes_what_its_formula_says(bases, inputs, tmp_path, scheme):
    base = bases("roberta", scheme)
    state = lora_state(base.plain)
    biases = {f"{name}.bias": base.plain.get_parameter(f"{name}.bias").detach() + 1 for name in LAYERS}
    state.update(biases)
    torch.save(state, tmp_path / "mnli.bin")
    words = [f"model.name_or_path={base.folder}", "adapter.lora_alpha=12", f"quantization={scheme}", "trainer=cpu"]
    import_adapter(tmp_path / "mnli.bin", tmp_path / "run", words)
    ours = logits_of_run(tmp_path / "run", inputs(), base.inputs)
    merged = copy.deepcopy(base.plain)
    with torch.no_grad():
        for name in LAYERS:
            merged.get_submodule(name).weight += 12 / 4 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        for name, bias in biases.items():
            merged.get_parameter(name).copy_(bias)
    merged.classifier.load_state_dict({key[11:]: value for key, value in state.items() if key.startswith("classifier")})
    assert float((logits(merged, inputs()) - ours).abs().max()) < 1e-5
    assert float((logits(base.plain, inputs()) - ours).abs().max()) > 1e-3
    assert float((in_peft(base.plain, tmp_path / "run" / "adapter", inputs()) - ours).abs().max()) < 1e-5


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("change", "words", "code", "says"),
    [
        (lambda s, f: s.update(evil=Evil(f / "owned")), ["adapter.lora_alpha=16"], 4, "such as code, which is not run"),
        (lambda s, f: None, [], 2, "holds no lora_alpha"),
        (lambda s, f: None, ["adapter.lora_alpha=-1"], 2, "must be a positive number"),
        (lambda s, f: None, ["adapter.lora_alpha=16", "adapter.r=4"], 2, "adapter.r is what the files say"),
        (lambda s, f: s.pop(f"{LAYERS[0]}.lora_B"), ["adapter.lora_alpha=16"], 4, "only one of lora_A and lora_B"),
        (
            lambda s, f: s.update({f"{LAYERS[0]}.lora_A": torch.zeros(8, 64)}),
            ["adapter.lora_alpha=16"],
            4,
            "MergedLinear",
        ),
        (
            lambda s, f: [s.pop(f"{LAYERS[0]}.{one}") for one in ("lora_A", "lora_B")],
            ["adapter.lora_alpha=16"],
            4,
            "it lacks base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight",
        ),
        (lambda s, f: s.update({"roberta.more.weight": torch.zeros(1)}), ["adapter.lora_alpha=16"], 4, "has more than"),
        (lambda s, f: s.update(epoch=3), ["adapter.lora_alpha=16"], 4, "holds a dict; valid: a dictionary of tensors"),
        (
            lambda s, f: [s.pop(key) for key in list(s) if "lora" in key],
            ["adapter.lora_alpha=16"],
            4,
            "holds no lora_A",
        ),
    ],
)
def test_a_loralib_file_that_cannot_be_imported_is_refused(bases, tmp_path, capsys, change, words, code, says):
    base = bases("roberta", "none")
    state = lora_state(base.plain)
    change(state, tmp_path)
    torch.save(state, tmp_path / "x.bin")
    named = [f"model.name_or_path={base.folder}", *words]
    assert run(["import", str(tmp_path / "x.bin"), "--out", str(tmp_path / "run"), *named]) == code
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_a_file_that_is_no_pickle_and_one_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"not a pickle")
    with pytest.raises(ArtifactError, match=r"x.bin is damaged, or holds more"):
        read_loralib(tmp_path / "x.bin", 16.0)
    with pytest.raises(ArtifactError, match="no such file or folder"):
        import_adapter(tmp_path / "absent", tmp_path / "run")
    torch.save(lora_state(plain_roberta(), head=False), tmp_path / "y.bin")
    with pytest.raises(ConfigError, match="does not name its base"):
        import_adapter(tmp_path / "y.bin", tmp_path / "run", ["adapter.lora_alpha=16"])


def plain_roberta():
    keys = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta", vocab_size=258, **keys))
