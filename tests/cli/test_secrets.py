"""A token of W&B or of the hub reaches no file that a run or a sweep leaves, and no line that it says."""

import logging

import pytest
from lightning.pytorch import Callback

from loralab.cli import main
from loralab.records import record
from loralab.records.secrets import masked, redact

HUB = "hf_" + "Qz" * 15  # the form of the hub's tokens
KEY = "4f" * 20  # the form of W&B's keys: 40 hexadecimal digits
PLAIN = "neither-form-but-behind-a-key-of-that-name"
VALUE = "neither-form-and-known-from-the-environment"
PLANTED = (HUB, KEY, PLAIN, VALUE)


class Talks(Callback):
    """The user's own: it is given secrets, logs them, and its error holds them."""

    pack_aware = True

    def __init__(self, api_key: str = "", note: str = "", fails: bool = False) -> None:
        self.api_key, self.note, self.fails = api_key, note, fails

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        text = "signing in with api_key=%s, {'token': '%s'}, %s %s"
        logging.getLogger(__name__).warning(text, self.api_key, self.api_key, self.note, VALUE)
        if self.fails and index:
            raise ValueError(f"401 for {self.note} {VALUE} {HUB}, api_key={self.api_key}")


@pytest.fixture
def planted(tiny_arguments, tmp_path, monkeypatch, capfd):
    """The folder of a sweep of two trials, one of which fails, and what it said; secrets are everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("NOTE", HUB)
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    lines = [f"_target_: {__name__}.Talks", "note: ${oc.env:NOTE}", f"api_key: {PLAIN}", "fails: false"]
    every = "checkpoint:\n  _target_: loralab.training.checkpoint.Checkpoint\n  every_n_steps: 1\n"
    file = tmp_path / "conf" / "callbacks" / "talks.yaml"
    file.write_text(every + "talks:\n" + "".join(f"  {line}\n" for line in lines))
    kept = [word for word in tiny_arguments if not word.startswith(("logger", "callbacks"))]
    words = ["callbacks=talks", f"callbacks.talks.api_key={PLAIN}", f"callbacks.talks.note='{KEY} {HUB}'"]
    words += ["callbacks.talks.fails=${seed}", "seed=0,1", "logger=wandb", "logger.mode=offline"]
    words.append(f"logger.tags=[{KEY}]")
    code = main.run(["train", "-m", *kept, *words, "hydra.launcher.pack=off", "hydra.sweep.dir=s"])
    said = capfd.readouterr()
    return code, tmp_path / "s", said.out + said.err


def test_no_planted_secret_is_in_a_file_or_a_line(planted):
    code, folder, said = planted
    names = {path.name for path in folder.rglob("*")}
    expected = {"sweep.json", "multirun.yaml", "result.json", "config.yaml", "train.log", "index.html", "results.csv"}
    assert code == 1
    assert expected | {"README.md", "last.pt", "metrics.jsonl"} <= names
    assert sum(name.endswith(".wandb") for name in names) == 3, "of two trials and of the report"
    files = [path for path in folder.rglob("*") if path.is_file()]
    held = {str(path): [text for text in PLANTED if text.encode() in path.read_bytes()] for path in files}
    assert {path: texts for path, texts in held.items() if texts} == {}
    assert [text for text in PLANTED if text in said] == []
    assert "signing in with api_key=***, {'token': '***'}, *** *** ***" in said
    (failed,) = [one for one in map(record.read, record.find(folder)) if one["status"] == "failed"]
    assert "ValueError: 401 for *** *** *** ***, api_key=***" in failed["error"]


def test_a_configuration_that_is_shown_has_no_secret(tiny_arguments, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    more = [f"+model.config.api_key={PLAIN}", f"+model.config.note={HUB}", f"+model.config.more={VALUE}"]
    assert main.run(["train", "--cfg", "job", *tiny_arguments, *more]) == 0
    shown = capsys.readouterr().out
    assert "api_key: ***" in shown
    assert [text for text in PLANTED if text in shown] == []


def test_a_traceback_has_no_secret(monkeypatch, capsys):
    def fails(arguments):
        raise ValueError(f"401 for api_key={PLAIN} {HUB}")

    monkeypatch.setattr(main, "_dispatch", fails)
    assert main.run(["ls", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.count("401 for api_key=*** ***") == 2
    assert [text for text in PLANTED if text in said] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("logger.api_key=abc, next", "logger.api_key=***, next"),
        ('{"password": "abc", "r": 8}', '{"password": "***", "r": 8}'),
        ("  hub_token: abc\n  r: 8", "  hub_token: ***\n  r: 8"),
        ("https://me:abc@host/x", "https://***@host/x"),
        ("pad_token=</s> token: 5 of 8, tokenizer=bpe tokens=3", None),
        ("api_key=null, token='', at 7f3a", None),
        ("commit " + "4f" * 20, "commit ***"),
    ],
)
def test_lines_lose_their_secrets_and_nothing_else(text, shown):
    assert masked(text) == (text if shown is None else shown)
    assert masked(masked(text)) == masked(text)


def test_a_short_value_of_the_environment_hides_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "nf4")
    assert redact({"quantization": "nf4_double"}) == {"quantization": "nf4_double"}
