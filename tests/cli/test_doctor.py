"""The doctor finds what is missing and says what to do."""

import json

import pytest

from loralab.cli import doctor, main
from loralab.models import pretrained
from loralab.optim import optimizers

NAMES = {"python", "torch", "cuda", "bitsandbytes", "nf4", "paged optimizers", "packages", "model=tiny", "wandb", "git"}


def test_every_check_has_a_finding_and_every_warning_a_fix():
    findings = doctor.examine()
    assert {one["name"] for one in findings} >= NAMES
    assert all(one["status"] in ("ok", "warn", "fail") for one in findings)
    assert all(one["fix"] for one in findings if one["status"] != "ok")


def test_a_missing_base_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHIPPED_FOLDER", tmp_path)
    assert doctor.shipped_base()["status"] == "fail"


def test_a_damaged_base_is_a_failure_that_names_the_file(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("cut off")
    monkeypatch.setattr(pretrained, "SHIPPED_FOLDER", tmp_path)
    found = doctor.shipped_base()
    assert found["status"] == "fail"
    assert "model.safetensors is damaged" in found["detail"]


@pytest.mark.parametrize(("reason", "status"), [("there is no CUDA device", "warn"), ("", "ok")])
def test_paging_is_what_the_optimizers_find(monkeypatch, reason, status):
    monkeypatch.setattr(optimizers, "cannot_page", lambda: reason)
    assert doctor.paging()["status"] == status
    assert reason in doctor.paging()["detail"]


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def wandb_mode():
        raise OSError("netrc is a folder")

    monkeypatch.setattr(doctor, "wandb_mode", wandb_mode)
    broken = [one for one in doctor.examine() if one["status"] == "fail" and "netrc" in one["detail"]]
    assert len(broken) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command_prints_a_table_or_one_json_object(capsys, flags):
    assert main.run(["doctor", *flags]) == 0
    printed = capsys.readouterr().out
    if flags:
        assert {one["name"] for one in json.loads(printed)["checks"]} >= NAMES
    else:
        assert "nf4" in printed


@pytest.mark.parametrize(
    ("mode", "status", "said"), [("offline", "ok", "says offline"), ("of", "fail", "did you mean"), ("", "ok", "auto")]
)
def test_doctor_says_what_the_environment_makes_of_wandb(monkeypatch, mode, status, said):
    for name in ("WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", mode)
    found = doctor.wandb_mode()
    assert (found["status"], said in found["detail"]) == (status, True)
