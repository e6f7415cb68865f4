"""Data sets of the Hugging Face hub, or a local folder of one, through the ``datasets`` library."""

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from loralab.data.base import SPLITS, Splits
from loralab.data.rows import Record, RowSpec
from loralab.errors import ConfigError, DataError
from loralab.records import fingerprints
from loralab.spec import spec

CONNECT_SECONDS = 3.0


@spec("data")
class Hub(RowSpec):
    """``name`` is a hub id or a local folder; ``train``, ``validation`` and ``test`` name its splits.

    A slice such as ``train[:90%]`` is a split too.
    """

    name: str | None = None
    config_name: str | None = None
    train: str = "train"
    validation: str | None = "validation"  # null: one training row in ten, chosen by hash
    test: str | None = "test"

    def source(self) -> str | None:
        """Of a local folder's files; of a hub id's commit in the cache of this machine."""
        folder = Path(str(self.name)).expanduser()
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return fingerprints.of([str(path.relative_to(folder)), fingerprints.file_digest(path)] for path in files)
        snapshot = fingerprints.hub_snapshot(str(self.name), "dataset")
        return None if snapshot is None else fingerprints.of([snapshot.name])

    def splits(self) -> Splits:
        if not self.name:
            raise ConfigError("data.name is missing: a hub id such as nyu-mll/glue, or a local folder")
        library = _library()
        names = {split: value for split in SPLITS if (value := getattr(self, split))}
        parts = {split: self.load(library, value) for split, value in names.items()}
        classes = [] if self.scores else self.class_names(parts["train"])
        named = {} if self.labels or not self.label else {self.label: classes}
        records = {split: _records(part, f"{self.name}[{names[split]}]", named) for split, part in parts.items()}
        return self.assemble(self.name, records, labels=classes)

    def load(self, library: Any, split: str) -> Any:
        """One split; from the cache alone where the hub cannot be reached, so that it fails in seconds."""
        name = str(self.name)
        folder = Path(name).expanduser()
        offline = not folder.is_dir() and not hub_reachable()
        if offline:
            library.config.HF_HUB_OFFLINE = True
        try:
            return library.load_dataset(str(folder) if folder.is_dir() else name, self.config_name, split=split)
        except Exception as error:  # the library raises a dozen unrelated kinds
            reason = "the hub cannot be reached and the cache holds no such data set" if offline else str(error)
            raise DataError(
                f"data.name={name!r} (config_name={self.config_name}, split {split!r}) cannot be loaded: "
                f"{reason.strip().splitlines()[0] if reason.strip() else type(error).__name__}"
            ) from error

    def class_names(self, train: Any) -> list[str]:
        """The names that the data set itself gives to the numbers of its label column."""
        feature = (getattr(train, "features", None) or {}).get(self.label) if self.label else None
        return list(getattr(feature, "names", None) or [])


def _library() -> Any:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError(
            "data=hub needs the datasets library (pip install datasets); or save its rows for data=files"
        ) from None
    return datasets


def _records(part: Any, name: str, named: Mapping[str, list[str]]) -> Iterator[Record]:
    """A record a row, from 0; ``named``: {column: the class names that its numbers are replaced by}."""
    for index, fields in enumerate(part):
        classes = {key: names[fields[key]] for key, names in named.items() if _is_class_index(fields.get(key), names)}
        yield Record({**fields, **classes}, f"{name}:{index}")


def _is_class_index(value: Any, names: list[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)


def hub_reachable() -> bool:
    """Whether the hub's host (or the proxy on the way) accepts a connection within seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    address = urlsplit(getproxies().get("https") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False
