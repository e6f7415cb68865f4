"""The command line taken apart, and quotes that Hydra needs and no shell gives."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from loralab.errors import ConfigError
from loralab.words import Words, quoted


def parsed(word):
    return OverridesParser.create().parse_override(quoted([word])[0]).value()


def test_hydras_flags_may_stand_anywhere_with_their_values():
    words = Words.parse(["train", "seed=0", "-m", "--cfg", "job", "lr=1", "--package=x"])
    assert words.rest == ["seed=0", "lr=1"]
    assert words.hydra == ["-m", "--cfg", "job", "--package", "x"]
    assert words.many


@pytest.mark.parametrize("flag", ["-x", "--cgf", "--fresh=1", "--jsn"])
def test_an_unknown_flag_is_refused_with_the_nearest(flag):
    with pytest.raises(ConfigError, match=f"no flag '{flag}'"):
        Words.parse(["train", flag])


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
        *("\u65e5\u672c\u8a9e.jsonl", "dol$lar.csv", "100%.csv", "plain.csv"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "hydra.run.dir", "model.name_or_path"])
def test_any_path_arrives_as_it_is(key, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/" not in path:
        (tmp_path / path).touch()
    assert parsed(f"{key}={path}") == path


def test_a_list_of_paths_that_are_no_file_is_a_sweep_over_them():
    assert quoted(["data.train=a.csv,b.csv"]) == ["data.train=a.csv,b.csv"]
    assert quoted(["adapter.target_modules=[q_proj,v_proj]"]) == ["adapter.target_modules=[q_proj,v_proj]"]


@pytest.mark.parametrize("template", ["{mr}\\n", "plain text, with comma", "it's {x}: ", "q}", "{a}={b}"])
def test_a_template_arrives_as_the_shell_gave_it(template):
    assert parsed(f"data.prompt={template}") == template
    assert parsed(f"data.prompt='{template.replace(chr(39), chr(92) + chr(39))}'") == template
