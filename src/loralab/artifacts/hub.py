"""The adapter of a run uploaded to the Hugging Face hub, with its card."""

from pathlib import Path

from loralab.artifacts.reopen import read_run
from loralab.errors import ArtifactError, ConfigError
from loralab.records import card


def push(run: Path, repo: str) -> str:
    """Uploads RUN/adapter as the model ``repo``, made where there is none, and returns the address of the commit.

    The token is huggingface_hub's own (HF_TOKEN, or that of ``hf auth login``). Raises ConfigError without a token or
    for a name that is none, ArtifactError where the run has no adapter or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    record = read_run(run)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"REPO={repo!r} is no name of the hub's: {_line(error)}; valid: user/name") from error
    token = get_token()
    if not token:
        raise ConfigError("loralab push needs a token of the hub; valid: HF_TOKEN, or hf auth login")
    folder = run / "adapter"
    if not (folder / card.CARD).is_file():  # of a run that an earlier version trained
        card.write(folder, record)
    try:
        api = HfApi(token=token)
        made = api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=f"loralab trial {record['trial']}"
        )
    except Exception as error:  # httpx's, huggingface_hub's and the operating system's share no base
        reason = _line(error).replace(token, "***")
        raise ArtifactError(f"{folder} was not uploaded to {repo}: {type(error).__name__}: {reason}") from None
    return str(done.commit_url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
