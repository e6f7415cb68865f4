"""The docstring task: a function of the standard library without its docstring -> the docstring's first line.

Mined from the running interpreter, so nothing is downloaded; the rows depend on the Python version,
and the fingerprint says which rows they were. ``python -m loralab.data.docstrings`` rebuilds the hashes of
training functions that ship with the package.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from functools import cache
from pathlib import Path

from loralab.data import mining
from loralab.data.base import SPLITS, DataSpec, Row, Splits, fingerprint, hash_order, make_splits
from loralab.errors import DataError
from loralab.records.fingerprints import cache_folder
from loralab.spec import spec

log = logging.getLogger(__name__)

OPENER = '\n    """'
CLOSER = '"""'
FEWEST_HELD_OUT = 100
TRAINING_KEYS = Path(__file__).with_name("docstrings_train.bin")
KEY_BYTES = 8
FIRST_LETTER = re.compile(r"[A-Za-z]")
NOT_A_SUMMARY = ("See ", "test ", "Test ")

Mined = dict[str, list[Row]]


@spec("data")
class Docstrings(DataSpec):
    """Some 5,000 training pairs and 500 held-out ones; split by file, so no function leaks."""

    def source(self) -> str | None:
        """16 hex digits of all mined rows: they change with the Python that runs."""
        return _fingerprint_of_rows(mining.stdlib_root())

    def splits(self) -> Splits:
        root = mining.stdlib_root()
        rows = load_or_mine(root)
        held_out = len(rows["validation"]) + len(rows["test"])
        if held_out < FEWEST_HELD_OUT or not rows["train"]:
            raise DataError(
                f"data=docstrings: the standard library in {root} yields {len(rows['train'])} training and "
                f"{held_out} held-out docstrings; at least {FEWEST_HELD_OUT} held-out ones are needed. "
                "This Python seems to be installed without its sources: use a full Python, or data=files"
            )
        return make_splits("docstrings", rows, limit=self.limit)


def mine(root: Path) -> Mined:
    """Pairs by split, in an order fixed by hash (so ``limit`` takes a fair part), each function once.

    A held-out function that is also a training function, here or in the Python that the shipped base was
    trained with, is dropped.
    """
    mined: Mined = {split: [] for split in SPLITS}
    keys = {split: set[bytes]() for split in SPLITS}
    seen = {split: set[bytes]() for split in SPLITS}
    pending: list[tuple[str, mining.Function, Row]] = []
    for path in mining.python_files(root):
        relative = path.relative_to(root).as_posix()
        split = mining.split_of(relative)
        for function in mining.functions(mining.read_source(path) or ""):
            keys[split].add(function.key)
            if summary := first_line(function):
                keys[split].add(function.answer_key)
                row = Row(function.code + OPENER, summary + CLOSER, where=f"{relative}:{function.line}")
                pending.append((split, function, row))
    forbidden = {
        "train": set[bytes](),
        "validation": keys["train"] | training_keys(),
        "test": keys["train"] | keys["validation"] | training_keys(),
    }
    for split, function, row in pending:
        if function.key in seen[split] or not forbidden[split].isdisjoint((function.key, function.answer_key)):
            continue
        seen[split].add(function.key)
        mined[split].append(row)
    return {split: sorted(rows, key=lambda row: hash_order(row.where)) for split, rows in mined.items()}


def first_line(function: mining.Function) -> str | None:
    """The docstring's first line where the pair is a fair question, else None."""
    summary = function.summary
    words = len(summary.split())
    fits = 3 <= words <= 25 and len(summary) <= 160 and 40 <= len(function.code) <= 1600
    if not fits or function.statements < 1 or not summary.isascii() or CLOSER in summary:
        return None
    if not FIRST_LETTER.match(summary) or summary.startswith(NOT_A_SUMMARY):
        return None
    return summary


def training_keys() -> set[bytes]:
    """Keys of the training functions of the Python that the shipped base saw."""
    try:
        packed = TRAINING_KEYS.read_bytes()
    except OSError:
        log.warning("%s is missing: held-out docstrings are not checked against it", TRAINING_KEYS.name)
        return set()
    return {packed[start : start + KEY_BYTES] for start in range(0, len(packed), KEY_BYTES)}


def load_or_mine(root: Path) -> Mined:
    """Mined rows by split, from the user's cache; where that is missing or damaged they are mined and cached."""
    path = cache_path(root)
    rows = _read_cache(path)
    if rows is None:
        rows = mine(root)
        _write_cache(path, rows)
    return rows


@cache
def _fingerprint_of_rows(root: Path) -> str:
    return fingerprint(load_or_mine(root))


def cache_path(root: Path) -> Path:
    """The cache file: its name is a hash of the interpreter, its library's place, and the code that mines."""
    digest = hashlib.sha256(f"{sys.version}\0{root}\0".encode())
    for part in (Path(__file__), Path(mining.__file__), TRAINING_KEYS):
        digest.update(part.read_bytes() if part.is_file() else b"")
    return cache_folder() / f"docstrings-{digest.hexdigest()[:16]}.json.gz"


def _read_cache(path: Path) -> Mined | None:
    try:
        stored = json.loads(gzip.decompress(path.read_bytes()))
        return {
            split: [Row(prompt, target, where=where) for prompt, target, where in stored[split]] for split in SPLITS
        }
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _write_cache(path: Path, rows: Mined) -> None:
    stored = {split: [(row.prompt, row.target, row.where) for row in rows[split]] for split in SPLITS}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(json.dumps(stored).encode(), compresslevel=6))
        partial.replace(path)
    except OSError as error:
        log.debug("mined docstrings are not cached: %s", error)


def write_training_keys(root: Path, path: Path = TRAINING_KEYS) -> int:
    """(Re)build the shipped hashes from the training files below ``root``; returns how many there are."""
    keys = set[bytes]()
    for source in mining.python_files(root):
        if mining.split_of(source.relative_to(root).as_posix()) == "train":
            for function in mining.functions(mining.read_source(source) or ""):
                keys |= {function.key} if len(function.code) >= 40 else set()
                keys |= {function.answer_key} if first_line(function) else set()
    path.write_bytes(b"".join(sorted(keys)))
    return len(keys)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%d training functions -> %s", write_training_keys(mining.stdlib_root()), TRAINING_KEYS)
