"""What was trained is on disk, whole, whoever's format it has; and comes back."""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loralab.adapters import export
from loralab.adapters.attached import attached
from loralab.adapters.base import Adapter, AdapterSpec, generator_for
from loralab.adapters.export import load, save
from loralab.adapters.files import read_state, write_state
from loralab.adapters.full import Full
from loralab.adapters.lora import LoRA
from loralab.errors import ArtifactError, DiskError
from loralab.running.runner import Runner

LAYER = "model.layers.0.mlp.up_proj"


class Kind(Enum):
    ONE = 1
    TWO = 2


class Projected(nn.Module):
    """A trained vector behind a fixed random matrix, which the seed draws and no file holds."""

    def __init__(self, size, seed):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(3))
        self.register_buffer("mix", torch.randn(size, 3, generator=generator_for(seed, LAYER)), persistent=False)

    def forward(self, x, y, key):
        return y + self.mix @ self.v


class Failing(Adapter):
    def export(self, folder):
        save_file({"a part": torch.zeros(1)}, folder / "half.safetensors")
        raise ValueError("not today")


class Forgetful(Adapter):
    def export(self, folder):
        (folder / "notes.json").write_text("{}")


class InText(Adapter):
    """A format of its own."""

    def export(self, folder):
        values = {name: value.tolist() for name, value in self.state_dict().items()}
        (folder / "numbers.list").write_text(json.dumps(values))

    def restore(self, folder):
        stored = json.loads((folder / "numbers.list").read_text())
        self.load_state_dict({name: torch.tensor(value) for name, value in stored.items()})


class HalfThere(InText):
    restore = Adapter.restore

    def export(self, folder):
        super().export(folder)


@dataclass(frozen=True)
class Own(AdapterSpec):
    kind: Kind = Kind.ONE
    where: Path = Path()
    names: tuple[str, ...] = ()

    def attach(self, model, seed=0):
        adapter = self.makes(model, self)
        adapter.add(LAYER, Projected(128, seed))
        return adapter


@dataclass(frozen=True)
class Fails(Own):
    makes = Failing


@dataclass(frozen=True)
class Forgets(Own):
    makes = Forgetful


@dataclass(frozen=True)
class Writes(Own):
    makes = InText


@dataclass(frozen=True)
class WritesOnly(Own):
    makes = HalfThere


@pytest.fixture
def one(load_base):
    """An adapter of ``spec`` whose every parameter has moved."""

    def make(spec, seed=5):
        adapter = attached(spec, load_base().model, seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return adapter

    return make


@pytest.mark.parametrize("spec", [Own(kind=Kind.TWO, where=Path("/a/b")), Writes()], ids=["loralab's", "its own"])
def test_state_spec_and_seed_come_back(one, load_base, tmp_path, spec):
    adapter = one(spec)
    size = save(adapter, tmp_path / "adapter", seed=5)
    files = list((tmp_path / "adapter").iterdir())
    assert size == sum(f.stat().st_size for f in files if f.suffix != ".json")
    assert len({f.stat().st_mode for f in files}) == 1  # safetensors would keep the weights from everybody else
    again = load(tmp_path / "adapter", load_base().model)
    assert again.spec == spec
    assert torch.equal(again.state_dict()[f"deltas.{LAYER.replace('.', '/')}.0.v"], next(adapter.parameters()))
    (delta,), (other,) = ([d for _, d in a.adapted()] for a in (adapter, again))
    assert torch.equal(delta.mix, other.mix)


def test_the_spec_beside_the_weights_names_class_method_fields_and_seed(one, tmp_path):
    save(one(LoRA(r=3, lora_alpha=6.0)), tmp_path / "adapter", seed=5)
    stored = json.loads((tmp_path / "adapter" / export.SPEC).read_text())
    assert (stored["class"], stored["method"], stored["seed"]) == ("loralab.adapters.lora.LoRA", "lora", 5)
    assert (stored["fields"]["r"], stored["fields"]["lora_alpha"]) == (3, 6.0)


@pytest.mark.parametrize("spec", [Fails(), Forgets()], ids=["fails", "writes no weights"])
def test_an_export_that_goes_wrong_loses_nothing(one, load_base, tmp_path, spec):
    adapter = one(spec)
    with pytest.raises(ArtifactError, match=r"the export of F\w+ failed .*in loralab's own format"):
        save(adapter, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "half.safetensors").exists()
    again = load(tmp_path / "adapter", load_base().model)
    assert torch.equal(next(again.parameters()), next(adapter.parameters()))


def test_a_trial_whose_export_fails_is_the_only_one_that_does(make_spec, vary):
    packable = type("Packable", (Fails,), {"packable": True, "__module__": __name__})
    specs = [make_spec("bad", adapter=packable(), max_steps=2), make_spec("good", adapter=LoRA(r=2), max_steps=2)]
    records = Runner().run(specs)
    assert [(one["status"], one.get("exit_code")) for one in records] == [("failed", 4), ("completed", 0)]
    assert "not today" in records[0]["error"]
    assert load_file(specs[0].folder / "adapter" / "adapter_model.safetensors")[
        f"deltas.{LAYER.replace('.', '/')}.0.v"
    ].any()
    assert records[1]["adapter"]["bytes"] == (specs[1].folder / "adapter" / "adapter_model.safetensors").stat().st_size


def test_what_another_method_left_in_the_folder_is_gone(one, tmp_path):
    save(one(Full()), tmp_path / "adapter")
    size = save(one(LoRA(r=2)), tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "adapter_spec.json")
    ]
    assert size == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_written_is_a_disk_error_and_keeps_what_was_there(one, tmp_path, monkeypatch):
    save(one(Own()), tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loralab.adapters.files.save_file", full)
    with pytest.raises(DiskError, match="No space left"):
        save(one(LoRA(r=2)), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_what_does_not_read_back_equal_was_not_written(tmp_path, monkeypatch):
    def lossy(tensors, path, metadata):
        save_file({name: value.half().float() for name, value in tensors.items()}, path, metadata)

    monkeypatch.setattr("loralab.adapters.files.save_file", lossy)
    with pytest.raises(DiskError, match="does not hold what was written"):
        write_state({"a": torch.full((3,), 1 / 3)}, tmp_path / "x.safetensors")


def test_odd_tensors_go_through_a_file(tmp_path):
    buffer = torch.arange(8.0)
    odd = {"nan": torch.tensor([float("nan"), -0.0]), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    odd.update(view=buffer[2:5], whole=buffer, turned=torch.randn(3, 4).T, bool=torch.tensor([True, False]))
    write_state(odd, tmp_path / "x.safetensors")
    found = read_state(tmp_path / "x.safetensors")
    assert found.keys() == odd.keys()
    assert all(torch.equal(found[name], odd[name]) for name in odd if name != "nan")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / export.SPEC).unlink(), "adapter_spec.json cannot be used: .*No such file"),
        (lambda f: (f / export.SPEC).write_text("{"), "adapter_spec.json cannot be used"),
        (lambda f: change(f, **{"class": "nowhere.Gone"}), "No module named 'nowhere'"),
        (lambda f: change(f, **{"class": "pathlib.Path"}), "is not an adapter's spec"),
        (lambda f: change(f, fields={"rank": 3}), "adapter.rank is not an option of LoRA; did you mean rank_pattern"),
        (lambda f: change(f, fields={"r": 0}), "adapter.r must be at least 1"),
        (lambda f: change(f, fields={"r": 5}), "do not agree in base_model.model"),
        (lambda f: change(f, fields={"r": 2, "target_modules": ["q_proj"]}), "do not agree in base_model.model"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "adapter_model.safetensors cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    ],
)
def test_a_folder_that_does_not_hold_an_adapter_of_this_base_is_refused(one, load_base, tmp_path, damage, says):
    save(one(LoRA(r=2)), tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=says):
        load(tmp_path / "adapter", load_base().model)


def change(folder, **values):
    stored = json.loads((folder / export.SPEC).read_text())
    (folder / export.SPEC).write_text(json.dumps({**stored, **values}))


def test_state_that_does_not_fit_is_refused(one, load_base, tmp_path):
    save(one(Own()), tmp_path / "adapter")
    write_state({"v": torch.zeros(3)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="does not fit LlamaForCausalLM: .*Missing key"):
        load(tmp_path / "adapter", load_base().model)


def test_a_format_without_a_way_back_says_so(one, load_base, tmp_path):
    save(one(WritesOnly()), tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="adapter_model.safetensors cannot be read"):
        load(tmp_path / "adapter", load_base().model)


@pytest.mark.parametrize("family", ["gpt2", "t5", "distilbert"])
def test_a_fully_trained_model_is_one_that_transformers_loads(load_base, inputs, tmp_path, family):
    base = load_base(family)
    adapter = attached(Full(), base.model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    given = inputs(base.spec.task)
    ours = base.model.eval()(**given).logits
    save(adapter, tmp_path / "adapter")
    theirs = type(base.model).from_pretrained(tmp_path / "adapter")
    assert torch.equal(theirs.eval()(**given).logits, ours)
    again = load_base(family)
    load(tmp_path / "adapter", again.model)
    assert torch.equal(again.model.eval()(**given).logits, ours)
