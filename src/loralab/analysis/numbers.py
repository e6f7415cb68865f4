"""Every number that records have, as a table of floats: what rows are averages of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from loralab.analysis.trials import TrialResult
from loralab.analysis.values import flat, is_number
from loralab.records import schema

Layer = tuple[int, str]  # of two that have a key, the one with the higher number counts; and the key's first part


def numbers(trials: Sequence[TrialResult]) -> pd.DataFrame:
    """The columns of ``SweepResults.frame`` that have any number, a row a trial; what is none is missing.

    A section that trials share is read once for all of them.
    """
    layers: dict[Layer, dict[int, tuple[Any, list[int]]]] = {}
    for place, trial in enumerate(trials):
        for layer, section in _layers(trial):
            layers.setdefault(layer, {}).setdefault(id(section), (section, []))[1].append(place)
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for (_, name), sections in sorted(layers.items(), key=lambda item: item[0][0]):
        for section, places in sections.values():
            at = places if len(places) > 1 else places[0]
            for key, value in (flat(name, section) if name else section).items():
                if key not in columns and is_number(value):
                    columns[key] = np.full(len(trials), math.nan)
                if key in columns:
                    columns[key][at] = value if is_number(value) else math.nan
    return pd.DataFrame(columns, index=range(len(trials)))


def _layers(trial: TrialResult) -> Iterator[tuple[Layer, Any]]:
    record = trial.record
    yield from (((0, name), record[name]) for name in schema.KEYS if isinstance(record.get(name), Mapping))
    yield (1, ""), record["choices"]
    yield from (((2, name), value) for name, value in record["config"].items())
    yield (3, ""), record["metrics"]
    yield (4, ""), {"trial": None, "folder": None, "status": None, "seed": record["seed"]}
