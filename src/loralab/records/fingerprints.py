"""Fingerprints of a base, a tokenizer and data files by their bytes on disk; none of them is loaded.

Fingerprints are 16 hex digits. A file is hashed whole, once: its digest is cached while its path, size, times and
inode are unchanged.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SHIPPED = "loralab/tiny"
SHIPPED_FOLDER = Path(__file__).parents[1] / "tiny"
LENGTH = 16
# Files that decide what a base computes; *.py: its own code, which trust_remote_code runs.
BASE_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("config.json", "generation_config.json", "*.py"),
)
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("chat_template*", "*.tiktoken", "*.py"),
)
HUB_WEIGHTS = [f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
SETTLED = 2.0  # seconds since the last change, before which a file may change again within one tick of its clock

_digests: dict[tuple[Any, ...], str] = {}  # of this process


def cache_folder() -> Path:
    """The folder of the user's cache: LORALAB_CACHE, else XDG_CACHE_HOME/loralab, else ~/.cache/loralab.

    A relative XDG_CACHE_HOME is ignored (XDG base directory specification).
    """
    if folder := os.environ.get("LORALAB_CACHE"):
        return Path(folder)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (home if home.is_absolute() else Path.home() / ".cache") / "loralab"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits; read only where the cache does not know it. Raises OSError."""
    stamp = _stamp(path)
    key = tuple(stamp.values())
    if key in _digests:
        return _digests[key]
    cached = cache_folder() / "digests" / f"{hashlib.sha256(stamp['path'].encode()).hexdigest()[:32]}.json"
    if (known := _read_digest(cached, stamp)) is not None:
        _digests[key] = known
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(path) == stamp and time.time() - max(stamp["mtime_ns"], stamp["ctime_ns"]) / 1e9 > SETTLED:
        _digests[key] = digest
        _write_digest(cached, {**stamp, "sha256": digest})
    return digest


def _stamp(path: Path) -> dict[str, Any]:
    """Metadata that changes with a file's content; its ctime cannot be set back."""
    stat = path.stat()
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"path": str(path.resolve()), "size": stat.st_size, "inode": stat.st_ino, **times}


def _read_digest(cached: Path, stamp: Mapping[str, Any]) -> str | None:
    """The cached digest; None where there is none for this ``stamp``."""
    try:
        stored = json.loads(cached.read_text("utf-8"))
        digest = str(stored.pop("sha256"))
        return digest if stored == stamp and len(digest) == 64 and int(digest, 16) >= 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not there, or damaged: the file is read again


def _write_digest(cached: Path, content: Mapping[str, Any]) -> None:
    """Other processes see the old file or the new one."""
    partial = cached.with_name(f".{cached.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), "utf-8")
        partial.replace(cached)
    except OSError as error:
        log.debug("the digest of %s is not cached: %s", content["path"], error)


def of(parts: Iterable[Any]) -> str:
    """The fingerprint of plain values, in their order."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def of_files(paths: Iterable[Path]) -> str | None:
    """The fingerprint of files, in their order; None where there is no path, or a file is missing."""
    files = list(paths)
    if not files or not all(path.is_file() for path in files):
        return None
    return of(file_digest(path) for path in files)


def of_folder(folder: Path, patterns: Iterable[str]) -> str:
    """The fingerprint of the files of a folder that match ``patterns``: names and bytes, not the folder's path."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return of([[path.name, file_digest(path)] for path in sorted(files, key=lambda path: path.name)])


def of_pretrained(name_or_path: str) -> str | None:
    """The fingerprint of the weights of a hub id, a local folder or loralab/tiny on disk, before any quantization.

    A folder: every weight file and config.json, whole. A hub id: the commit in this machine's cache and the hashes by
    which it names the files of the model. None where they are not in the cache. Raises OSError.
    """
    if (folder := local_folder(name_or_path)) is not None:
        return of_folder(folder, BASE_FILES)
    snapshot = hub_snapshot(name_or_path)
    files = _hub_files(snapshot) if snapshot is not None else []
    return of([snapshot.name, *([path.name, _blob(path)] for path in files)]) if snapshot and files else None


def of_tokenizer(name_or_path: str) -> str | None:
    """The fingerprint of a tokenizer's files; of a hub id, that of its commit. None where it is not in the cache."""
    if (folder := local_folder(name_or_path)) is not None:
        return of_folder(folder, TOKENIZER_FILES)
    snapshot = hub_snapshot(name_or_path)
    return None if snapshot is None else of([snapshot.name])


def local_folder(name: str) -> Path | None:
    """The folder that a name means; None for a hub id."""
    try:
        folder = SHIPPED_FOLDER if name == SHIPPED else Path(name).expanduser()
        return folder if name and folder.is_dir() else None
    except (OSError, RuntimeError):  # too long a name, no such user
        return None


def hub_snapshot(name: str, kind: str = "model") -> Path | None:
    """The folder of a hub id's current commit in the cache of this machine; None where there is none."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    try:
        commit = (home / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = home / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _hub_files(snapshot: Path) -> list[Path]:
    """config.json and the weight files that transformers would read; none where one of them is missing."""
    first = next((snapshot / name for name in HUB_WEIGHTS if (snapshot / name).is_file()), None)
    if first is None:
        return []
    names = [first.name]
    if first.suffix == ".json":
        try:
            names += sorted(set(json.loads(first.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
    files = [snapshot / name for name in ["config.json", *names]]
    return files if all(path.is_file() for path in files) else []


def _blob(path: Path) -> str:
    """The hash by which the hub's cache stores a file; where it cannot link to one, that of the bytes."""
    return path.readlink().name if path.is_symlink() else file_digest(path)


def of_random(spec: Mapping[str, Any]) -> str:
    """The fingerprint of random weights: architecture (a folder's config.json, the keys that are set), task, seed."""
    folder = local_folder(str(spec.get("name_or_path") or ""))
    stored = of_folder(folder, ("config.json",)) if folder is not None else None
    drawn_on = [_accelerator()] if spec.get("drawn_on") == "device" else []  # other devices draw other numbers
    return of([stored, dict(spec.get("config") or {}), spec.get("task"), spec.get("draw", 0), *drawn_on])


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
