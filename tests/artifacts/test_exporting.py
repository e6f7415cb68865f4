"""What is copied, what is refused; the logits are compared in test_interop.py."""

import json

import pytest
import torch
from made import Bases, write_run
from safetensors.torch import load_file, save_file

from loralab.artifacts.exporting import export_run
from loralab.cli.main import run
from loralab.errors import ArtifactError


@pytest.fixture(scope="module")
def write(base_folder, tmp_path_factory):
    base = Bases(base_folder)("llama", "none")
    return lambda *words: write_run(
        tmp_path_factory.mktemp("run") / "run", base.folder, "llama", "none", words, base.inputs
    )


def test_files_that_are_pefts_already_are_copied_with_a_card(finished, tmp_path, capsys):
    folder, out = finished("llama"), tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert run(["export", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: README.md, adapter_config.json, adapter_model.safetensors\n"
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (out / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_veras_matrices_of_several_shapes_lie_in_one_pair(write, tmp_path):
    export_run(write("adapter=vera", "adapter.r=8"), tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 24  # 64x64, 128x64, 64x128
    assert tuple(state["base_model.vera_A"].shape) == (24, 128)
    assert tuple(state["base_model.vera_B"].shape) == (128, 24)
    d = state["base_model.model.model.layers.0.mlp.down_proj.vera_lambda_d"]
    assert int((d != 0).sum()) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter=bottleneck"], "adapter=bottleneck is no method of PEFT's"),
        (["adapter=intrinsic"], "loralab merge writes the base with it merged"),
        (["adapter=last_layer"], "loralab merge writes the base with the trained blocks"),
    ],
)
def test_what_peft_lacks_is_refused_naming_loralabs_own_files(write, tmp_path, capsys, words, says):
    folder = write(*words)
    assert run(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert f"in loralab's own format, are in {folder / 'adapter'}" in told
    assert not list(tmp_path.iterdir())


def test_a_folder_or_a_file_that_is_there_is_left_as_it_is(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name, says in (("file", "is a file"), ("full", "is not empty")):
        assert run(["export", str(finished("llama")), "--out", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.parametrize("command", ["export", "merge"])
def test_the_folder_one_stands_in_and_one_behind_a_link_are_written(finished, tmp_path, monkeypatch, command, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "here")
    words = [command, str(finished("llama")), *(["--no-measure"] if command == "merge" else []), "--out"]
    assert run([*words, "."]) == run([*words, str(tmp_path / "link")]) == 0
    assert {one.name for one in (tmp_path / "here").iterdir()} == {one.name for one in (tmp_path / "there").iterdir()}
    assert list((tmp_path / "there").glob("*model.safetensors"))
    capsys.readouterr()
    assert run([*words, str(tmp_path / "lost")]) == 2
    assert "lost leads nowhere, and nothing is overwritten" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "lost", "there"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot be read"),
        (lambda path: without_a_layer(path), "holds nothing of model.layers.0.mlp.up_proj, which"),
    ],
)
def test_damaged_weights_are_not_copied(write, tmp_path, damage, says):
    folder = write("adapter.r=2")
    damage(folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=says):
        export_run(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def without_a_layer(path):
    save_file({key: value for key, value in load_file(path).items() if "layers.0.mlp.up_proj" not in key}, path)


def test_layers_that_peft_would_not_load_are_named(write, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("loralab.adapters.peft.misread", lambda model, names: names[:2])
    export_run(write("adapter.r=2"), tmp_path / "out")
    assert "PEFT does not load what was trained at 2 of the 14 layers (model.layers.0" in caplog.text


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["export"], 2, "needs the folder of one run"),
        (["export", "nowhere"], 2, "needs --out DIR"),
        (["export", "nowhere", "--out", "x"], 4, "nowhere: no such folder"),
        (["import"], 2, "needs PATH"),
        (["import", "nowhere"], 2, "needs --out DIR"),
    ],
)
def test_wrong_words_are_one_sentence(words, code, says, capsys):
    assert run(words) == code
    assert says in capsys.readouterr().err


def test_bitfits_carrier_changes_nothing_by_itself(finished, base_folder, tmp_path):
    run_folder = write_run(
        tmp_path / "run",
        base_folder("gpt2"),
        "gpt2",
        "none",
        ["adapter=bitfit"],
        Bases(base_folder)("gpt2", "none").inputs,
    )
    export_run(run_folder, tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = [value for key, value in state.items() if ".lora_" in key]
    assert len(factors) == 2
    assert not any(torch.count_nonzero(value) for value in factors)
