"""An upload goes through huggingface_hub with its token, and every refusal is one line."""

import socket
from types import SimpleNamespace

import pytest

from loralab.cli.main import run

TOKEN = "hf_thisisnotarealtoken"


@pytest.fixture
def with_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)


@pytest.fixture
def stand_in(monkeypatch, with_token):
    """An HfApi that notes what it is asked; ``error`` is raised by its upload."""
    seen = SimpleNamespace(calls=[], error=None)

    class Api:
        def __init__(self, token):
            seen.calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            seen.calls.append(("create_repo", repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if seen.error:
                raise seen.error
            names = sorted(path.name for path in folder_path.iterdir())
            seen.calls.append(("upload_folder", repo_id, names, commit_message))
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return seen


def test_the_adapter_and_its_card_are_uploaded(finished, stand_in, capsys):
    assert run(["push", str(finished("llama")), "me/mine"]) == 0
    out = capsys.readouterr()
    assert out.out == "https://huggingface.co/me/mine/commit/1\n"
    assert TOKEN not in out.out + out.err
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "adapter_spec.json"]
    token, created, uploaded = stand_in.calls
    assert token == ("token", TOKEN)
    assert created == ("create_repo", "me/mine", {"exist_ok": True})
    assert uploaded[:3] == ("upload_folder", "me/mine", files)
    assert uploaded[3].startswith("loralab trial ")


def test_what_the_hub_refuses_is_one_line_without_the_token(finished, stand_in, capsys):
    stand_in.error = OSError(f"403 Forbidden\nfor {TOKEN}")
    assert run(["push", str(finished("llama")), "me/mine"]) == 4
    told = capsys.readouterr().err
    assert "was not uploaded to me/mine: OSError: 403 Forbidden for ***" in told
    assert len(told.strip().splitlines()) == 1
    assert TOKEN not in told


@pytest.mark.parametrize("repo", ["a/b/c", ".x", "a--b", "a b", "me/mine.git"])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(finished, stand_in, capsys, repo):
    assert run(["push", str(finished("llama")), repo]) == 2
    assert not stand_in.calls
    assert "valid: user/name" in capsys.readouterr().err


def test_without_a_token_nothing_is_sent(finished, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert run(["push", str(finished("llama")), "me/mine"]) == 2
    assert "needs a token of the hub; valid: HF_TOKEN, or hf auth login" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line(finished, with_token, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    assert run(["push", str(finished("llama")), "me/mine"]) == 4
    told = capsys.readouterr().err
    assert "was not uploaded to me/mine: ConnectError" in told
    assert "Traceback" not in told
    assert TOKEN not in told


def test_offline_is_said(finished, with_token, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["push", str(finished("llama")), "me/mine"]) == 4
    assert "OfflineModeIsEnabled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [([], 2, "needs RUN"), (["nowhere", "me/mine"], 4, "nowhere: no such folder")],
)
def test_wrong_words_are_one_sentence(words, code, says, capsys):
    assert run(["push", *words]) == code
    assert says in capsys.readouterr().err
