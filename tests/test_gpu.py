"""The measurements for a card, as far as a machine without one can go."""

import json

import pytest
import torch

from loralab import gpu


@pytest.fixture
def session(tmp_path):
    (tmp_path / "work").mkdir()
    gpu.write_rows(tmp_path / "work")
    return gpu.Session(tmp_path, True, tmp_path / "work")


def test_without_a_card_it_says_so_and_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_leaves_its_error_and_the_next_goes_on(session, tmp_path):
    def broken(session, told):
        told["half"] = 1
        raise ValueError("<broken>")

    def late(session, told):
        raise gpu.Late("3 s were left")

    session.part("machine", broken)
    session.part("tests", late)
    session.part("paged", gpu.paged)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [parts[name]["status"] for name in ("machine", "tests", "paged")] == ["failed", "out of time", "completed"]
    assert (parts["machine"]["half"], parts["machine"]["error"]) == (1, "ValueError: <broken>")
    assert {arm["status"] for arm in parts["paged"]["arms"]} == {"not applicable"}
    page = (tmp_path / "index.html").read_text()
    assert "&lt;broken&gt;" in page
    assert "<broken>" not in page


def test_all_parts_end_within_nine_minutes():
    assert list(gpu.BUDGETS) == list(gpu.PARTS)
    assert sum(gpu.BUDGETS.values()) <= 540


def test_a_cap_leaves_half_of_the_state_beside_the_paged_peak():
    pilot = {"status": "completed", "paged_bytes": 2**30, "state_bytes": 2**30, "measured_peak_bytes": 4 * 2**30}
    roomy = {"paged_adamw": pilot}
    assert gpu._limits("cap", "adamw_32bit", roomy) == gpu._limits("cap", "paged_adamw", roomy) == ["memory.cap=4.500"]
    assert gpu._limits("cap", "paged_adamw_8bit", roomy) == ["memory.cap=4.125"]
    with pytest.raises(LookupError):
        gpu._limits("cap", "paged_adamw", {})


def test_tokens_per_second_of_a_pack_count_its_seconds_once():
    def one(size):
        return {"status": "completed", "time": {"train_s": 2.0, "tokens": 10}, "pack": {"size": size}}

    assert gpu._throughput([one(2), one(2)])["tokens_per_s"] == pytest.approx(10.0)
    assert gpu._throughput([one(1), one(1)])["tokens_per_s"] == pytest.approx(5.0)


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu_completes_every_part(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--cpu"]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} == {"completed"}
    assert all(run["predicted_over_measured"] == pytest.approx(1, rel=0.05) for run in parts["planner"]["runs"])
    assert set(parts["packed"]["packed"]["pack_sizes"]) == {gpu.TRIALS}
    assert "<svg" in (tmp_path / "index.html").read_text()
