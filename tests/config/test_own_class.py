"""A class named on the command line in place of a yaml's: its own options and words, found in the current folder."""

import importlib
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from loralab.adapters.lora import LoRA
from loralab.cli import main
from loralab.config.build import trial_spec
from loralab.config.compose import compose, plain
from loralab.config.words import forced
from loralab.data.docstrings import Docstrings
from loralab.errors import ConfigError
from loralab.records import record

SOURCE = """
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loralab.adapters.base import Adapter, AdapterSpec, freeze, match_targets
from loralab.adapters.lora import LoRA


class Scale(nn.Module):
    def __init__(self, size, gain):
        super().__init__()
        self.gain, self.scale = gain, nn.Parameter(torch.zeros(size))

    def forward(self, x, y, key):
        return y * (1 + self.gain * self.scale)


@dataclass(frozen=True)
class IA3(AdapterSpec):
    target_modules: Any = field(default_factory=lambda: ["q_proj"])
    gain: float = 1.0

    def __post_init__(self):
        if self.gain == 0:
            raise ValueError("gain cannot be 0")

    def attach(self, model, seed=0):
        freeze(model)
        adapter = Adapter(model, self)
        for name in match_targets(model, self.target_modules):
            adapter.add(name, Scale(model.get_submodule(name).out_features, self.gain))
        return adapter


@dataclass(frozen=True)
class Bare(AdapterSpec):
    def attach(self, model, seed=0):
        return IA3().attach(model, seed)


@dataclass(frozen=True)
class Odd(IA3):
    thing: nn.Module = None


@dataclass(frozen=True)
class Wide(LoRA):
    r: int = 3
    makes = Adapter
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module in the current folder, which is nowhere on the path."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


def node(*words):
    return plain(compose(list(words)))["adapter"]


def test_the_yamls_keys_that_the_class_lacks_are_left_out_and_its_own_are_taken(mine):
    named = f"adapter._target_={mine}.IA3"
    assert node(named) == {"_target_": f"{mine}.IA3", "target_modules": "all-linear"}
    assert node(named, "adapter.gain=2", "adapter.target_modules=[v_proj]")["gain"] == 2
    assert node(f"adapter._target_={mine}.Bare") == {"_target_": f"{mine}.Bare"}
    assert node(f"adapter._target_={mine}.Wide")["r"] == 8  # what both have stays the yaml's


@pytest.mark.parametrize(
    ("cls", "word", "message"),
    [
        ("IA3", "adapter.r=4", "adapter.r is not an option of IA3; valid: gain, target_modules"),
        ("IA3", "adapter.gian=4", "adapter.gian is not an option of IA3; did you mean gain?"),
        ("IA3", "adapter.gain=x", "adapter.gain must be a number, got 'x'"),
        ("IA3", "adapter.gain=0", "adapter: IA3 refuses its options: gain cannot be 0"),
        ("Bare", "adapter.gain=4", "adapter.gain is not an option of Bare; it has none"),
        (
            "Odd",
            "adapter.gain=4",
            "adapter.thing: Odd declares the type Module, by which no setting can be checked; valid: Any",
        ),
        ("IA4", "adapter.gain=4", "cannot be found"),
    ],
)
def test_what_the_class_does_not_take_is_refused_in_its_own_words(mine, tmp_path, cls, word, message):
    with pytest.raises(ConfigError) as refused:
        trial_spec(compose([f"adapter._target_={mine}.{cls}", word]), tmp_path)
    assert message in str(refused.value)


def test_a_sweep_over_classes_gives_each_its_own_keys(mine, tiny_arguments, tmp_path, capsys):
    words = [word for word in tiny_arguments if not word.startswith("adapter.")]
    axis = f"adapter._target_={mine}.IA3,loralab.adapters.lora.LoRA,{mine}.Bare"
    sweep_words = ["hydra/launcher=packed", f"hydra.sweep.dir={tmp_path / 's'}", "data.limit=6"]
    assert main.run(["train", "-m", *words, *sweep_words, axis]) == 0
    stored = [record.read(place) for place in record.find(tmp_path / "s")]
    kept = {one["config"]["adapter"]["_target_"].rpartition(".")[2]: one["config"]["adapter"] for one in stored}
    assert {name: len(keys) for name, keys in kept.items()} == {"IA3": 2, "LoRA": 1 + len(fields(LoRA)), "Bare": 1}
    assert main.run(["sweep", "--resume", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().err.count("finished before") == 3


def test_a_class_in_a_sweep_files_body_takes_the_place_of_the_group(mine, tmp_path):
    """As on the command line: the yaml's keys that it lacks are left out, of every group that takes a class."""
    (tmp_path / "sweeps").mkdir()
    body = {
        "adapter": {"_target_": f"{mine}.IA3", "gain": 2},
        "quantization": {"_target_": "loralab.quantization.none.NoQuantization"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "schedule": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 5},
        "data": {"_target_": "loralab.data.docstrings.Docstrings", "limit": 6},
    }
    file = tmp_path / "sweeps" / "own.yaml"
    file.write_text(f"# @package _global_\n{yaml.safe_dump({**body, 'hydra': {'sweeper': {'params': {}}}})}")
    config = compose(["+sweeps=own", "quantization=nf4", "data=chat"])
    made = plain(config)
    assert made["adapter"] == {**body["adapter"], "target_modules": "all-linear"}
    assert set(made["quantization"]) == {"_target_", "compute_dtype", "dequantize", "skip_modules"}  # not nf4's others
    assert made["optimizer"] == {**body["optimizer"], "lr_ratio": 1.0}
    assert made["schedule"] == body["schedule"]
    assert set(made["data"]) <= {"_target_", *(field.name for field in fields(Docstrings))}
    spec = trial_spec(config, tmp_path)
    assert (type(spec.adapter).__name__, spec.adapter.gain, type(spec.data)) == ("IA3", 2, Docstrings)
    file.write_text(file.read_text().replace("gain: 2", "gian: 2"))
    with pytest.raises(ConfigError, match=r"adapter.gian is not an option of IA3; did you mean gain\?"):
        trial_spec(compose(["+sweeps=own"]), tmp_path)


def test_cfg_job_shows_the_classs_own_keys(mine, capsys):
    assert main.run(["train", f"adapter._target_={mine}.IA3", "adapter.gain=2", "--cfg", "job", "-p", "adapter"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    assert sorted(shown) == [f"_target_: {mine}.IA3", "gain: 2", "target_modules: all-linear"]


def test_the_console_script_finds_a_class_of_the_current_folder(tmp_path):
    (tmp_path / "plainly.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass A:\n    gain: int = 1\n"
    )
    # as a script has it
    script = "import sys; sys.path.pop(0); from loralab.cli.main import run; sys.exit(run(sys.argv[1:]))"
    words = ["train", "adapter._target_=plainly.A", "--cfg", "job", "-p", "adapter"]
    run = [sys.executable, "-c", script, *words]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "r: 8" in done.stdout, "_target_" in done.stdout) == (0, False, True), done.stderr


def test_only_the_words_of_a_group_whose_class_is_named_are_forced():
    words = ["adapter._target_=a.B", "adapter.gain=2", "+adapter.x=1", "~adapter.y", "optimizer.lr=1", "adapter=lora"]
    assert forced(words) == ["++adapter._target_=a.B", "++adapter.gain=2", *words[2:]]
    assert forced(words[1:]) == words[1:]
