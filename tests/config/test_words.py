"""The command line taken apart, and quotes that Hydra needs and no shell gives."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from loralab.cli.main import parse
from loralab.config.compose import as_called, settled_words
from loralab.config.words import quoted
from loralab.errors import ConfigError


def parsed(word):
    return OverridesParser.create().parse_override(quoted([word])[0]).value()


def test_hydras_flags_may_stand_anywhere_with_their_values():
    words = parse(["train", "seed=0", "-m", "--cfg", "job", "lr=1", "--package=x"])
    assert words.words == ["seed=0", "lr=1"]
    assert words.hydra == ["-m", "--cfg", "job", "--package", "x"]
    assert words.many


def test_hydras_flags_are_handed_on_as_they_stand():
    words = parse(
        ["-cd", "a b", "train", "-cn=x", "--hydra-help", "--config-dir=c", "lr=1", "--config-name", "y", "-sc"]
    )
    assert words.hydra == [
        *("--config-dir", "a b", "--config-name", "x", "--hydra-help", "--config-dir", "c", "--config-name", "y"),
        "--shell-completion",
    ]
    assert words.words == ["lr=1"]


def test_hydras_flags_have_one_spelling_each_and_info_needs_no_value():
    assert parse(["train", "-c", "job", "-p=x", "--multirun"]).hydra == ["--cfg", "job", "--package", "x", "-m"]
    assert parse(["train", "--info", "adapter.r=4"]).hydra == ["--info", "all"]
    assert parse(["train", "-i", "plugins"]).hydra == ["--info", "plugins"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--cfg"], "--cfg needs a value; valid: job, hydra, all"),
        (["train", "--cfg", "-m"], "--cfg needs a value"),
        (["train", "--cfg=jb"], "--cfg jb is unknown; did you mean job?"),
        (["train", "--package"], "--package needs a value"),
        (["sweep", "--resume", "--fresh"], "--resume needs a value"),
        (["sweep", "--resume="], "--resume needs a value"),
        (["train", "-cd"], "--config-dir needs a value; valid: --config-dir DIR"),
        (["bench", "--out", "--json"], "--out needs a value; valid: --out FILE"),
    ],
)
def test_a_flag_that_lacks_its_value_is_refused(words, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--resume", "x"], "loralab train has no --resume; valid: loralab sweep"),
        (["train", "--resume"], "loralab train has no --resume; valid: loralab sweep"),
        (["plan", "--preview"], "loralab plan has no --preview; valid: loralab train, loralab sweep"),
        (["report", "-m", "x"], "loralab report has no -m; valid: loralab train, loralab sweep"),
        (["--fresh"], "loralab has no --fresh; valid: loralab train, loralab sweep"),
        (["count", "--jsn"], "did you mean --json"),
        (["train", "--multrun"], "did you mean --multirun"),
    ],
)
def test_a_flag_of_another_command_says_whose_it_is_and_a_wrong_one_the_nearest(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


@pytest.mark.parametrize(
    "flag",
    ["-x", "--cgf", "--fresh=1", "--jsn", "-m=1", "-mx", "--hydra-hlp", "--fres", "--config-path=x", "-cp", "-r"],
)
def test_an_unknown_flag_is_refused_with_the_nearest(flag):
    with pytest.raises(ConfigError, match=f"no flag '{flag}'"):
        parse(["train", flag])


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/a b/c.jsonl",
            "it's.csv",
            'quote".csv',
            "a,b.csv",
            "a=b.csv",
            "(x).csv",
            "[x].csv",
            "{x}.csv",
            "a;b#c&d~e.csv",
        ),
        *("\u65e5\u672c\u8a9e.jsonl", "dol$lar.csv", "100%.csv", "plain.csv", "007", "1e3", "true", "nan", " a "),
        *("runs/lr=0.001,r=8", "back\\slash's", "ends in \\", "${open", "a\\'b", "#&;*?!|<>^`"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "hydra.run.dir", "model.name_or_path"])
def test_any_path_arrives_as_it_is(key, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not path.startswith("/"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert OmegaConf.create({"x": parsed(f"{key}={path}")}).x == path


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab/.:=,'\"\\ (){}[]~$#;&*?!|<>%@+-^`1\u65e5\u00e9"), min_size=1, max_size=12))
def test_any_folder_at_all_can_be_a_run_folder(path):
    quoted_already = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    assume(not quoted_already and "${" not in path and not path.startswith("~"))
    assert parsed(f"hydra.run.dir={path}") == path


def test_a_tilde_is_the_home_folder_where_no_shell_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a b")
    assert parsed("hydra.sweep.dir=~/runs,1") == "/home/a b/runs,1"


def test_a_file_that_exists_is_no_interpolation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "${x}.csv").touch()
    assert OmegaConf.create({"x": parsed("data.train=${x}.csv")}).x == "${x}.csv"
    assert parsed("hydra.run.dir=runs/${now:%Y},1") == "runs/${now:%Y},1"


def test_a_regular_expression_needs_no_quotes_of_hydras():
    assert parsed("adapter.target_modules=(q|v)_proj") == "(q|v)_proj"
    assert quoted(["adapter.target_modules=q_proj,v_proj"]) == ["adapter.target_modules=q_proj,v_proj"]


def test_a_list_of_paths_that_are_no_file_is_a_sweep_over_them():
    assert quoted(["data.train=a.csv,b.csv"]) == ["data.train=a.csv,b.csv"]
    assert quoted(["data.train=a=1.csv,b.csv"]) == ["data.train='a=1.csv',b.csv"]
    assert quoted(["adapter.target_modules=[q_proj,v_proj]"]) == ["adapter.target_modules=[q_proj,v_proj]"]


@pytest.mark.parametrize("template", ["{mr}\\n", "plain text, with comma", "it's {x}: ", "q}", "{a}={b}"])
def test_a_template_arrives_as_the_shell_gave_it(template):
    assert parsed(f"data.prompt={template}") == template
    assert parsed(f"data.prompt='{template.replace(chr(39), chr(92) + chr(39))}'") == template


@pytest.mark.parametrize("given", ["['{p}','{h}']", '["{p}", "{h}"]', "[{p},{h}]", "[{p}, '{h}']", "[ '{p}' , '{h}' ]"])
def test_two_templates_are_a_list(given):
    assert parsed(f"data.text={given}") == ["{p}", "{h}"]


@pytest.mark.parametrize("template", ["[INST] {q} [/INST]", "[{q}]", "[CLS] {p}, {h} [SEP]"])
def test_one_template_in_brackets_is_a_text(template):
    assert parsed(f"data.text={template}") == template


@pytest.mark.parametrize(
    ("word", "found", "said"),
    [
        ("adapter.lora_alpha='${loralab.mul:2,${adapter.r}}'", 16, "adapter.lora_alpha=16"),
        ("++data.text='${oc.env:TEXT} it'", "a, b it", "++data.text='a, b it'"),
        ("data.text='${oc.env:TEXT}'", "${x}", "data.text='\\${x}'"),
        ("data.text='\\${x}'", "${x}", "data.text='\\${x}'"),
        ("data.text='plain'", "plain", "data.text='plain'"),
    ],
)
def test_a_setting_written_as_an_interpolation_is_said_by_its_value(word, found, said):
    hydra = OmegaConf.create({"overrides": {"task": [word]}, "runtime": {"choices": {}}})
    content = {"adapter": {"lora_alpha": found}, "data": {"text": found}}
    assert settled_words(hydra, content) == [said]
    assert as_called(hydra) == [word]
    value = OverridesParser.create().parse_override(said).value()
    assert OmegaConf.create({"it": value})["it"] == found
