"""Sweep files and conf/ of the user's own: found before loralab's, from any folder, and told apart when they change."""

import itertools
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import loralab
from loralab.analysis.results import read_results
from loralab.cli import main
from loralab.cli.sweep import sweep_arguments
from loralab.config.build import trial_id
from loralab.config.compose import compose, plain, sweep_axes
from loralab.config.places import data_root
from loralab.config.sweep_files import choice, names
from loralab.errors import ConfigError
from loralab.records import record

SWEEP = """
defaults: [override /adapter: mine]
sweep: {question: 'What does r do?'}
hydra: {sweeper: {params: {adapter.r: [2, 4]}}}
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The current folder, with an adapter yaml and sweep files, one of them below sweeps/."""
    files = {
        "sweeps/first.yaml": SWEEP,
        "sweeps/deep/er.yaml": SWEEP,
        "a sweep.yaml": SWEEP,
        "lr=3.yaml": SWEEP,
        "conf/adapter/mine.yaml": "defaults: [lora]\nr: 3\nlora_alpha: 6.0\n",
        "conf/quantization/nf4.yaml": "defaults: [int8_absmax]\n",
        "conf/experiment/own.yaml": "defaults: [override /adapter: mine]\nseed: 7\n",
        "conf/train.yaml": "another: application\n",
        "conf/main.yaml": "defaults: [train, _self_]\nseed: 5\n",
        "more/adapter/mine.yaml": "defaults: [lora]\nr: 5\n",
    }
    folder = tmp_path / "lab"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def shown(capsys, *words):
    """The YAML that ``--cfg`` prints."""
    assert main.run([*words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("first", "first"),
        ("deep/er", "deep/er"),
        ("sweeps/deep/er.yaml", "deep/er"),
        ("a sweep.yaml", "a sweep"),
        ("./lr=3.yaml", "lr=3"),
        ("{lab}/a sweep.yaml", "a sweep"),
        ("rank", "rank"),
    ],
)
def test_a_sweep_is_found_by_its_name_and_by_its_path(lab, capsys, word, name):
    words = ["sweep", word.format(lab=lab), "--cfg"]
    assert shown(capsys, *words, "job", "-p", "sweep")["name"] == name
    assert shown(capsys, *words, "hydra", "-p", "hydra.sweep")["dir"] == f"runs/{name}"


def test_a_sweep_file_outside_of_the_folder_and_a_name_of_ones_own_go_first(lab, capsys, tmp_path, monkeypatch):
    (tmp_path / "out.yaml").write_text("adapter: {r: 7}\nhydra: {sweeper: {params: {seed: [3, 4]}}}\n")
    (lab / "sweeps" / "rank.yaml").write_text("adapter: {r: 9}\nhydra: {sweeper: {params: {seed: 3}}}\n")
    assert shown(capsys, "sweep", "../out.yaml", "--cfg", "job", "-p", "adapter")["r"] == 7
    assert shown(capsys, "sweep", "rank", "--cfg", "job", "-p", "adapter")["r"] == 9
    assert sweep_axes("rank") == sweep_axes("../out") == ["seed"]
    monkeypatch.chdir(tmp_path)
    assert sweep_axes("rank", lab) == ["seed"]  # of the folder that it was begun in
    assert sweep_axes("rank") == ["adapter.r", "seed"]


def test_conf_is_searched_before_loralabs_by_every_command_and_python(lab, capsys):
    assert main.run(["count", "adapter=mine", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert main.run(["count", "adapter=lora", "adapter.r=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == counted
    words = ["quantization=nf4", "study.weights=gauss", "study.shape=[64,64]", "logger=none", "--json"]
    assert main.run(["quantize", *words]) == 0
    assert list(json.loads(capsys.readouterr().out)["schemes"]) == ["int8_absmax"]
    assert (
        loralab.plan(["adapter=mine", "plan.device=cpu"]).by_kind
        == loralab.plan(["adapter.r=3", "adapter.lora_alpha=6", "plan.device=cpu"]).by_kind
    )
    assert shown(capsys, "train", "+experiment=own", "--cfg", "job", "-p", "adapter")["r"] == 3
    assert shown(capsys, "train", "+experiment=own", "--cfg", "job")["seed"] == 7


@pytest.mark.parametrize("flag", [["-cd", "more"], ["--config-dir={lab}/more"]])
def test_the_folder_of_the_flag_goes_before_conf(lab, capsys, flag):
    flags = [word.format(lab=lab) for word in flag]
    assert shown(capsys, "train", "adapter=mine", *flags, "--cfg", "job", "-p", "adapter")["r"] == 5
    assert compose(["adapter=mine"], config_dir="more").adapter.r == 5
    assert compose(["adapter=mine"]).adapter.r == 3


def test_the_primary_configuration_stays_loralabs_until_another_is_named(lab, capsys):
    assert "another" not in shown(capsys, "train", "--cfg", "job")
    assert shown(capsys, "train", "--config-name", "main", "--cfg", "job")["seed"] == 5


def test_info_shows_what_is_searched_and_the_repository_is_not_searched_twice(lab, capsys, monkeypatch):
    assert main.run(["train", "--info", "searchpath"]) == 0
    out = capsys.readouterr().out
    assert out.index(f"own://{lab}/conf") < out.index(f"file://{data_root()}/conf")
    monkeypatch.chdir(data_root())
    assert main.run(["train", "--info", "searchpath"]) == 0
    assert "own://" not in capsys.readouterr().out
    assert len(names()) == len(set(names()))
    assert choice("sweeps/rank.yaml") == "rank"


def test_a_shell_completes_ones_own_names_and_options(lab, monkeypatch, capsys):
    for line, wanted in (
        ("loralab sweep ", {"first", "deep/er", "rank"}),
        ("loralab sweep ./", {"./conf/", "./lr=3.yaml"}),
        ("loralab train adapter=m", {"adapter=mine"}),
        ("loralab train +experiment=o", {"+experiment=own"}),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        assert main.run(["-sc", "query=bash"]) == 0
        assert wanted <= set(capsys.readouterr().out.split())


AXES = """
hydra:
  sweeper:
    params:
      adapter.target_modules: [[q_proj], [q_proj, v_proj], all-linear, "q_(a|b),c"]
      adapter.exclude_modules: "[q_proj],[q_proj,v_proj]"
      adapter.layers_to_transform: [null, [0, 1]]
      adapter.use_dora: [true, false]
      +adapter.rank_pattern: [{q_proj: 4}, {}]
      optimizer.lr: [1.0e-3, 2]
      data.generate_rows: 0
      model.tokenizer: ["yes", "12", "a b, c's"]
"""


def test_an_axis_holds_values_of_any_kind(tmp_path):
    """What Hydra composes of each word is what YAML says of it."""
    (tmp_path / "axes.yaml").write_text(AXES)
    words = sweep_arguments(choice(str(tmp_path / "axes.yaml")), [])
    given = yaml.safe_load(AXES)["hydra"]["sweeper"]["params"]
    given["adapter.exclude_modules"] = [["q_proj"], ["q_proj", "v_proj"]]
    for key, values in given.items():
        (axis,) = [word for word in words if word.startswith(f"{key}=")]
        every = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([axis]), None)
        found = []
        for (word,) in itertools.chain(*every):
            group, _, name = key.lstrip("+").partition(".")
            found.append(plain(compose([f"++{word.lstrip('+')}"]))[group][name])
        assert found == (values if isinstance(values, list) else [values])
        assert [type(value) for value in found] == [type(v) for v in (values if isinstance(values, list) else [values])]


def test_the_trial_of_a_sweep_file_has_the_id_of_its_settings_wherever_the_file_lies(lab, tmp_path):
    (tmp_path / "moved.yaml").write_text(SWEEP)
    words = ["adapter.r=4", "adapter.lora_alpha=6"]
    ids = {trial_id(compose([each, *words])) for each in ("+sweeps=first", "+sweeps=deep/er", "+sweeps=../moved")}
    assert ids == {trial_id(compose(words))}


PLAIN = "hydra: {sweeper: {params: {seed: [0, 1]}}}\n"
BAD = {
    "no yaml": ("a: [1, 2\nb: }\n", "bad.yaml:2: no YAML"),
    "empty": ("# nothing\n", "bad.yaml is empty; valid: a mapping"),
    "list": ("- a\n", "bad.yaml holds a list; valid: a mapping"),
    "no axes": ("adapter: {r: 2}\n", "bad.yaml has no axes; valid: hydra.sweeper.params with them"),
    "axis without a value": ("hydra: {sweeper: {params: {seed: []}}}\n", "the axis seed has no value"),
    "axes as a list": ("hydra: {sweeper: {params: [seed]}}\n", "hydra.sweeper.params=['seed'] is no group of settings"),
    "sweep as a word": ("sweep: x\n" + PLAIN, "sweep='x' is no group of settings"),
    "key of the file": ("adapter: {rnk: 2}\n" + PLAIN, "adapter.rnk is not an option of LoRA; did you mean r?"),
    "group of the file": ("adaptor: {r: 2}\n" + PLAIN, "adaptor is not an option; did you mean adapter?"),
    "key of an axis": (
        "hydra: {sweeper: {params: {adapter.rr: [1]}}}\n",
        "adapter.rr is not an option; did you mean r?",
    ),
    "option": ("defaults: [override /adapter: mien]\n" + PLAIN, "did you mean mine? valid: bitfit"),
    "option, of which kind": ("defaults: [override /adapter: mien]\n" + PLAIN, "of your own files: broken, mine"),
    "option of an axis": ("hydra: {sweeper: {params: {adapter: [lora, mien]}}}\n", "adapter=mien: there is no such"),
    "option as a text": (
        "adapter: lora\n" + PLAIN,
        "adapter: 'lora' is a text, where an option's settings belong; valid",
    ),
    "axis of another option": (
        "defaults: [override /adapter: bitfit]\nhydra: {sweeper: {params: {adapter.r: [1]}}}\n",
        "adapter.r is not an option of the adapter that is chosen here; valid: one of its own",
    ),
    "no list of defaults": ("defaults: {adapter: lora}\n" + PLAIN, "defaults must be a list"),
    "own conf": ("defaults: [override /adapter: broken]\n" + PLAIN, "conf/adapter/broken.yaml:2: no YAML: mapping"),
    "class": ("adapter: {_target_: nowhere.A}\n" + PLAIN, "there is no module nowhere; "),
    "no adapter": ("adapter: {_target_: loralab.data.files.Files}\n" + PLAIN, "is no AdapterSpec; valid: a dataclass"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sweep_file_is_exit_2_and_nothing_is_written(lab, capsys, case):
    text, said = BAD[case]
    (lab / "bad.yaml").write_text(text)
    (lab / "conf/adapter/broken.yaml").write_text("r: 3\n  x: : 2\n")
    before = sorted(lab.rglob("*"))
    assert main.run(["sweep", "bad.yaml"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(lab.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("fisrt", "did you mean first? valid: a .yaml file, in ./sweeps: deep/er, first; loralab's: alpha, "),
        ("nowhere.yaml", "there is no file nowhere.yaml; valid: a .yaml file, in ./sweeps: deep/er, first; loralab's"),
        ("sweeps.yaml", "sweeps.yaml is a folder; valid: a sweep file (sweeps.yaml/x.yaml)"),
        ("./first", "valid: the path of a file, ./first.yaml, or a name"),
        ("a sweep", "did you mean the file ./a sweep.yaml?"),
    ],
)
def test_a_sweep_that_is_not_there_is_exit_2_with_what_there_is(lab, capsys, word, said):
    (lab / "sweeps.yaml").mkdir()
    (lab / "sweeps.yaml" / "x.yaml").write_text(SWEEP)
    assert main.run(["sweep", word]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError) as raised:
        loralab.sweep(word)
    assert said in str(raised.value)


def test_axes_may_come_from_the_command_line_or_be_none_on_purpose(lab):
    (lab / "one.yaml").write_text("adapter: {r: 2}\n")
    assert sweep_arguments("./one", ["seed=0,1"])[-1] == "seed=0,1"
    (lab / "one.yaml").write_text("hydra: {sweeper: {params: {}}}\n")
    assert sweep_arguments("./one", []) == ["+sweeps=./one", "hydra.sweeper.params=null"]


def test_a_sweep_of_ones_own_is_resumed_and_rerun_from_another_folder(lab, tiny_arguments, monkeypatch, capsys):
    words = [word for word in tiny_arguments if not word.startswith("adapter")]
    assert main.run(["sweep", "a sweep.yaml", "-cd", "more", *words, "data.limit=2"]) == 0
    folder = lab / "runs" / "a sweep"
    trials = {trial.record["trial"]: trial for trial in read_results(folder).trials}
    assert sorted(trial.record["config"]["adapter"]["r"] for trial in trials.values()) == [2, 4]
    for name, trial in trials.items():
        assert trial.record["code"]["files"] == ["a sweep.yaml", "more/adapter/mine.yaml"]
        enter, where, _, *command = shlex.split(trial.rerun)
        assert (enter, where, command[:4]) == ("cd", str(lab), ["loralab", "train", "--config-dir", "more"])
        arguments = main.parse(command[1:])
        assert trial_id(compose(arguments.overrides(), config_dir=arguments.config_dir)) == name
    elsewhere = lab.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (folder / min(trials) / record.RESULT).unlink()
    assert main.run(["sweep", "--resume", str(folder)]) == 0
    assert {place.name for place in record.find(folder)} == set(trials)
    assert list(elsewhere.iterdir()) == []
    assert "finished before" in capsys.readouterr().err

    (lab / "more/adapter/mine.yaml").write_text("defaults: [lora]\nr: 5\nlora_alpha: 1.0\n")
    os.chdir(elsewhere)
    assert main.run(["sweep", "--resume", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "a sweep.yaml, more/adapter/mine.yaml: one of these has changed since" in said
    assert {place.name for place in record.find(folder)} == set(trials)
    (lab / "a sweep.yaml").unlink()
    os.chdir(elsewhere)
    assert main.run(["sweep", "--resume", str(folder)]) == 2
    assert f"is gone from {lab}; valid: the file in its place" in capsys.readouterr().err


def test_axes_beside_resume_add_trials_of_a_sweep_of_ones_own_whose_files_are_as_they_were(lab, tiny_arguments, capsys):
    words = [word for word in tiny_arguments if not word.startswith("adapter")]
    assert main.run(["sweep", "a sweep.yaml", "-cd", "more", *words, "data.limit=2"]) == 0
    folder = lab / "runs" / "a sweep"
    assert main.run(["sweep", "--resume", str(folder), "seed=3,4"]) == 0
    found = [record.read(place) for place in record.find(folder)]
    assert sorted((one["config"]["adapter"]["r"], one["seed"]) for one in found)[:3] == [(2, 0), (2, 3), (2, 4)]
    assert len(found) == 6
    (lab / "more/adapter/mine.yaml").write_text("defaults: [lora]\nr: 5\nlora_alpha: 1.0\n")
    assert main.run(["sweep", "--resume", str(folder), "seed=5,6"]) == 2
    assert "one of these has changed since" in capsys.readouterr().err
    assert len(list(record.find(folder))) == 6


CLASSES = {
    "own.Nope": "own (own.py) has no Nope; valid: Thing",
    "owm.Thing": "there is no module owm; did you mean own",
    "own.sub.Thing": "own has no module sub",
    "broken.Thing": "broken.py:2: invalid syntax",
    "raising.Thing": "raising.py:2: NameError: name 'y' is not defined",
    "lacking.Thing": "lacking.py:1: ModuleNotFoundError: No module named 'a_module_that_is_nowhere'",
    "Thing": "a class is named with its module; valid: MODULE.CLASS",
    "own.Thing": "is no AdapterSpec; valid: a dataclass derived from loralab.adapters.base.AdapterSpec",
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_cannot_be_had_is_refused_with_the_part_that_failed(lab, capsys, name, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own.py").write_text("class Thing:\n    pass\n")
    Path("broken.py").write_text("x = 1\nx = = 2\n")
    Path("raising.py").write_text("x = 1\nx = y\n")
    Path("lacking.py").write_text("import a_module_that_is_nowhere\n")
    for module in ("own", "broken", "raising", "lacking"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert main.run(["count", f"adapter._target_={name}"]) == 2
    assert CLASSES[name] in capsys.readouterr().err
    sys.modules.pop("own", None)
