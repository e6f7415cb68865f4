"""What a search asks: a later call may ask it further, and no other question in the same folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loralab.config import identity
from loralab.config.build import trial_id
from loralab.config.compose import plain
from loralab.errors import ConfigError
from loralab.records.record import shell_line
from loralab.scheduling.space import Space, spoken

KEY = "asked"  # under which a search keeps it
MOST_TOLD = 3  # differences


def of(master: DictConfig, space: Space, also: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON: the space, the seeds and the settings of all points. ``also``: what else makes it this search."""
    content = plain(master)
    given = identity.flat(identity.settings(content))
    settings = {key: value for key, value in given if key not in space.plain() and value != {}}
    about = {"space": space.plain(), "seeds": space.seeds, "settings": settings, "trial": trial_id(content)}
    found: dict[str, Any] = json.loads(json.dumps({**about, **also}, default=repr))
    return found


def check(before: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError where the search that is in ``folder`` asked something else than ``now``; ``before``: what it
    asked, None where it does not say."""
    if before is None:
        return
    found = list(_differences(before, now))
    if not found:
        return
    more = f", and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    raise ConfigError(
        f"{folder} holds a search that asks something else, and its points are no part of this one:"
        f" {'; '.join(found[:MOST_TOLD])}{more}; valid: {shell_line(['loralab', 'sweep', '--resume', str(folder)])},"
        " which goes on with it, --fresh, which begins a new one there, or another hydra.sweep.dir"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    spaces = before["space"], now["space"]
    for key in dict.fromkeys([*spaces[0], *spaces[1]]):
        if spaces[0].get(key) != spaces[1].get(key):
            was, is_now = (spoken(one[key]) if key in one else "not searched" for one in spaces)
            yield f"{key} was {was} and is {is_now}"
    for key in before.keys() & now.keys() - {"space", "settings", "trial"}:
        if before[key] != now[key]:
            yield f"{key} was {_shown(before[key])} and is {_shown(now[key])}"
    if before["trial"] != now["trial"]:  # else they differ in nothing that decides a result
        for key in sorted(before["settings"].keys() | now["settings"].keys()):
            was, is_now = (one["settings"].get(key, "not set") for one in (before, now))
            if was != is_now:
                yield f"{key} was {_shown(was)} and is {_shown(is_now)}"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
