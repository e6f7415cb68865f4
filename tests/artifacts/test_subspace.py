"""``loralab subspace`` on finished runs: its updates are what the runs compute with, its figures those of the whole
matrices."""

import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from transformers import AutoModelForCausalLM

from loralab.adapters.attached import attached
from loralab.adapters.hooks import AdapterHooks, BatchSlice
from loralab.adapters.lora import LoRA
from loralab.analysis import subspace_runs
from loralab.analysis.updates import open_updates, sources_of
from loralab.cli.main import run
from loralab.running.inputs import Inputs

FEW = "adapter.target_modules=[q_proj,v_proj]"
METHODS = {  # family and words of a run, the layers that it adapts
    "lora": ("llama", [], 14),
    "gpt2": ("gpt2", ["adapter.lora_alpha=64"], 8),
    "rslora": ("llama", [FEW, "adapter.use_rslora=true"], 4),
    "dora": ("llama", [FEW, "adapter.use_dora=true"], 4),
    "pissa": ("llama", [FEW, "adapter.init_lora_weights=pissa"], 4),
    "lora_fa": ("llama", ["adapter=lora_fa", FEW], 4),
    "embedding": ("llama", ["adapter.target_modules=[q_proj,embed_tokens]"], 3),
    "vera": ("llama", ["adapter=vera", FEW, "adapter.r=6"], 4),
    "intrinsic": ("llama", ["adapter=intrinsic", FEW, "adapter.dimension=50"], 4),
    "full": ("llama", ["adapter=full", "optimizer.lr=0.001"], 14),
}


def read_updates(folder):
    opened = open_updates(folder, Inputs())
    try:
        return {name: opened.read(name) for name in opened.sources}
    finally:
        opened.run.close()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_with_the_updates_added_computes_what_the_run_computes(finished, base_folder, inputs, method):
    family, words, count = METHODS[method]
    folder, given = finished(family, *words), inputs()
    updates = read_updates(folder)
    assert len(updates) == count
    model = AutoModelForCausalLM.from_pretrained(base_folder(family)).eval()
    with torch.no_grad():
        bare = model(**given).logits
        for name, update in updates.items():
            turned = family == "gpt2" or "embed" in name
            weight = model.get_submodule(name).weight
            assert torch.equal(weight.t() if turned else weight, update.weight)
            weight += update.matrix().t() if turned else update.matrix()
        if method == "full":  # its norms, embeddings and head train too
            trained = AutoModelForCausalLM.from_pretrained(folder / "adapter").state_dict()
            for name in updates:
                assert torch.allclose(model.get_submodule(name).weight, trained[f"{name}.weight"], atol=1e-7)
            return
        ours = model(**given).logits
    opened = open_updates(folder, Inputs()).run
    with opened.adapted(2):
        expected = opened.model(**given).logits
    assert (ours - expected).abs().max() < 1e-5
    assert (bare - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])  # whose experts are (out, in), and (in, out)
def test_every_expert_has_an_update_of_its_own(load_base, inputs, kind):
    sizes = {
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        "gpt_oss": {"num_local_experts": 4, "head_dim": 32, "intermediate_size": 32},
    }
    base, given = load_base(config={"model_type": kind, "num_key_value_heads": 2, **sizes[kind]}), inputs()
    adapter = attached(LoRA(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj"]), base.model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        with AdapterHooks.of(base.model).batch(BatchSlice(adapter, 2)):
            expected = base.model.eval()(**given).logits
        spec = SimpleNamespace(adapter=adapter.spec, seed=0)
        found = dict(sources_of(SimpleNamespace(adapter=adapter, model=base.model, spec=spec)))
        updates = {name: source.read() for name, source in found.items()}
        adapter.detach()
        for name, update in updates.items():
            *path, last = name.split(".")
            assert tuple(update.matrix().shape) == found[name].shape
            if last.isdigit():
                weight = base.model.get_parameter(".".join(path))[int(last)]
                weight += update.matrix().t() if kind == "gpt_oss" else update.matrix()
            else:
                base.model.get_submodule(name).weight += update.matrix()
        assert len(updates) == 2 * (4 + 1)
        assert (base.model(**given).logits - expected).abs().max() < 1e-5


def test_an_update_is_what_peft_merges(finished, base_folder):
    folder = finished("llama")
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    for name, update in read_updates(folder).items():
        key = f"{name}.weight"
        assert torch.allclose(update.matrix(), merged[key] - before[key], atol=1e-6)
        assert update.matrix().abs().max() > 1e-3


def test_last_layer_tuning_has_the_trained_weight_less_the_base_s(finished, base_folder):
    folder = finished("llama", "adapter=last_layer")
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama")).state_dict()
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    updates = read_updates(folder)
    assert len(updates) == 7
    for name, update in updates.items():
        (key,) = (one for one in stored if one.replace("/", ".").startswith(f"deltas.{name}.") and "weight" in one)
        assert torch.equal(update.dense, stored[key] - base[f"{name}.weight"])
        assert update.spectrum().rank > 4


def test_the_command_writes_the_figures_of_every_layer(finished, base_folder, tmp_path, capsys):
    folder = shutil.copytree(finished("llama"), tmp_path / "run")
    assert run(["subspace", str(folder), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads((folder / "subspace.json").read_text())
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (state[f"base_model.model.{name}.lora_{factor}.weight"].double().numpy() for factor in "AB")
    s = np.linalg.svd(2 * b @ a)[1][:8]  # lora_alpha / r
    figures = made["layers"][name]
    assert figures["singular_values"] == pytest.approx(s, rel=1e-5)
    assert (figures["type"], figures["r"], figures["shape"]) == ("self_attn.v_proj", 8, [64, 64])
    shares = [one["effective_rank"] for one in made["layers"].values() if one["type"] == "self_attn.v_proj"]
    group = made["types"]["self_attn.v_proj"]["effective_rank"]
    assert (group["mean"], group["of"]) == (pytest.approx(np.mean(shares)), 2)
    assert group["most"]["value"] == max(shares)
    assert run(["subspace", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{np.mean(shares):.2f}" in next(line for line in out.splitlines() if line.startswith("self_attn.v_proj"))
    assert out.endswith(f"written: {folder / 'subspace.json'}\n")


def test_two_runs_are_compared_by_the_directions_of_their_factors(finished, tmp_path, capsys):
    first = shutil.copytree(finished("llama"), tmp_path / "run")
    second = finished("llama", FEW, "adapter.r=2", "seed=1")
    assert run(["subspace", str(first), str(second), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    trial = json.loads((second / "result.json").read_text())["trial"]
    assert made == json.loads((first / f"subspace_{trial}.json").read_text())
    assert not (first / "subspace.json").exists()
    assert (len(made["layers"]), len(made["only_in"][0]), made["only_in"][1]) == (4, 10, [])
    name = "model.layers.0.self_attn.q_proj"
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second)]
    factors = [[state[f"base_model.model.{name}.lora_{factor}.weight"].numpy() for factor in "AB"] for state in files]
    bases = {
        "A": [np.linalg.svd(a)[2].T for a, _ in factors],
        "B": [np.linalg.svd(b)[0] for _, b in factors],
        "delta_left": [np.linalg.svd(b @ a)[0] for a, b in factors],
        "delta_right": [np.linalg.svd(b @ a)[2].T for a, b in factors],
    }
    for what, (u, v) in bases.items():
        found = made["layers"][name][what]
        assert (found["n"], len(found["phi"]), len(found["phi"][0])) == (64, 8, 2)
        for i, j in ((1, 1), (2, 2), (8, 2), (5, 1)):
            expected = np.mean(np.cos(subspace_angles(u[:, :i], v[:, :j])) ** 2)
            assert found["phi"][i - 1][j - 1] == pytest.approx(expected, abs=1e-4)
    mean = np.mean([made["layers"][f"model.layers.{i}.self_attn.q_proj"]["A"]["phi"][1][1] for i in range(2)])
    points = {(one["i"], one["j"]): one for one in made["types"]["q_proj"]["A"]}
    assert list(points) == [(1, 1), (2, 2), (8, 2)]
    assert points[2, 2]["phi"] == pytest.approx(mean)
    assert points[8, 2]["random"] == 8 / 64
    assert run(["subspace", str(first), str(second), "--layers", "q_proj"]) == 0
    out = capsys.readouterr().out
    assert f"{mean:.3f} ({2 / 64:.3f})" in out
    assert "only run adapts model.layers.0.self_attn.k_proj" in out


def test_ranks_of_one_seed_begin_alike_and_the_table_says_how_much(finished, tmp_path, capsys):
    """Without a step of training A is its start; the smaller rank's rows are the larger's first ones."""
    small, large = (
        shutil.copytree(finished("llama", FEW, "trainer.max_steps=0", f"adapter.r={r}"), tmp_path / str(r))
        for r in (2, 8)
    )
    assert run(["subspace", str(small), str(large), "--json"]) == 0
    for figures in json.loads(capsys.readouterr().out)["layers"].values():
        assert figures["A"] == figures["A_start"]
        assert figures["A"]["phi"][1][7] == 1.0
        assert not {"B", "delta_left"} & set(figures)  # they are 0
    assert run(["subspace", str(small)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("q_proj"))
    assert line.split() == ["q_proj", "2", "0", "0.000", "0.0000", *["-"] * 6, "0.00"]
    assert "nan" not in (small / "subspace.json").read_text().lower()


def test_a_full_fine_tune_is_compared_with_an_adapter_by_its_update_alone(finished, tmp_path, capsys):
    full = shutil.copytree(finished("llama", "adapter=full", "optimizer.lr=0.001"), tmp_path / "full")
    assert run(["subspace", str(full), str(finished("llama", FEW)), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [set(one) for one in made["layers"].values()] == [{"type", "shape", "delta_left", "delta_right"}] * 4
    assert len(made["only_in"][0]) == 10


def test_of_a_large_layer_it_says_how_long_it_will_take(finished, monkeypatch, caplog):
    monkeypatch.setattr(subspace_runs, "LARGE", 128 * 64 - 1)
    with caplog.at_level(logging.WARNING):
        subspace_runs.measure(finished("llama"), Inputs(), r".*\.up_proj")
    assert "of 2 layers, up to 128 x 64: about 1 min; --layers PATTERN takes fewer" in caplog.text
    caplog.clear()
    subspace_runs.measure(finished("llama"), Inputs(), "q_proj")
    assert not caplog.text


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "needs the folder of a run, or of two, and was given 0"),
        (["nowhere"], 4, "nowhere: no such folder"),
        (["llama", "nowhere"], 4, "nowhere: no such folder"),
        (["llama", "gpt2"], 4, "directions of different weights do not compare"),
        (["prefix"], 2, "adapter=prefix has no weight update"),
        (["llama", "--layers", "q_prj"], 2, "--layers q_prj names no adapted layer; did you mean q_proj?"),
        (["llama", "--layers", "("], 2, "--layers='(' is not a valid regular expression"),
        (["q", "up"], 4, "adapt no layer in common"),
    ],
)
def test_wrong_words_are_one_sentence_and_write_nothing(finished, tmp_path, words, code, text, capsys):
    made = {
        "llama": lambda: finished("llama"),
        "gpt2": lambda: finished("gpt2", "adapter.lora_alpha=64"),
        "prefix": lambda: finished("llama", "adapter=prefix", "adapter.num_virtual_tokens=2"),
        "q": lambda: finished("llama", "adapter.target_modules=[q_proj]"),
        "up": lambda: finished("llama", "adapter.target_modules=[up_proj]"),
    }
    folders = {word: shutil.copytree(made[word](), tmp_path / word) for word in words if word in made}
    capsys.readouterr()
    assert run(["subspace", *(str(folders.get(word, word)) for word in words)]) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.rglob("subspace*.json"))


def test_values_that_are_not_finite_and_a_file_that_cannot_be_written_are_said(finished, tmp_path, capsys):
    folder = shutil.copytree(finished("llama", FEW), tmp_path / "run")
    (folder / "subspace.json").mkdir()
    assert run(["subspace", str(folder)]) == 7
    assert "subspace.json cannot be written" in capsys.readouterr().err
    path = folder / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = "model.layers.1.self_attn.v_proj"
    for factor in ("lora_A", "lora_B"):  # finite, and their product is not
        state[f"base_model.model.{name}.{factor}.weight"][0, 0] = 1e30
    save_file(state, path)
    assert run(["subspace", str(folder)]) == 4
    assert f"the update of {name} holds nan or infinite values" in capsys.readouterr().err
