"""The doctor finds what is missing and says what to do."""

import json

import pytest

from loralab import cli, doctor, models

NAMES = {"python", "torch", "cuda", "bitsandbytes", "nf4", "paged optimizers", "packages", "model=tiny", "wandb"}


def test_every_check_has_a_finding_and_every_warning_a_fix():
    findings = doctor.examine()
    assert {one["name"] for one in findings} >= NAMES
    assert all(one["status"] in ("ok", "warn", "fail") for one in findings)
    assert all(one["fix"] for one in findings if one["status"] != "ok")


def test_a_missing_base_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED_FOLDER", tmp_path)
    assert doctor.shipped_base()["status"] == "fail"


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def wandb_mode():
        raise OSError("netrc is a folder")

    monkeypatch.setattr(doctor, "wandb_mode", wandb_mode)
    broken = [one for one in doctor.examine() if one["status"] == "fail" and "netrc" in one["detail"]]
    assert len(broken) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command_prints_a_table_or_one_json_object(capsys, flags):
    assert cli.run(["doctor", *flags]) == 0
    printed = capsys.readouterr().out
    if flags:
        assert {one["name"] for one in json.loads(printed)["checks"]} >= NAMES
    else:
        assert "nf4" in printed
