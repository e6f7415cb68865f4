"""The space of a search (``hydra/sweeper=optuna``): what overrides leave open, and values to try it with."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from loralab.errors import ConfigError

WITHIN = 0.382  # of the way through an interval: where it is tried beside its ends
MOST_TRIED = 20  # choices of a key; of more, the ends


class Space:
    """What overrides leave open: ``fixed`` words, those of the ``seeds`` and the ``distributions`` of the others."""

    def __init__(self, words: Sequence[str]) -> None:
        """``words``: overrides, the later of two for one key counts. Raises ConfigError."""
        self.fixed: list[str] = []
        self.seeds: list[str] = []
        self.distributions: dict[str, Any] = {}
        parsed = {str(one.get_key_element()): one for one in OverridesParser.create().parse_overrides(list(words))}
        for key, override in parsed.items():
            if not override.is_sweep_override():
                self.fixed.append(str(override.input_line))
            elif key == "seed":
                self.seeds = [f"seed={text}" for text in _texts(override)]
            else:
                self.distributions[key] = _distribution(override)
        if not self.distributions:
            raise ConfigError(
                "hydra/sweeper=optuna has no space to search; valid: at least one interval, range or choice, as in"
                " optimizer.lr=tag(log,interval(1e-4,1e-2))"
            )

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a point."""
        return [f"{key}={_text(value)}" for key, value in params.items()]

    def trials(self, params: Mapping[str, Any]) -> list[list[str]]:
        """The overrides of the trials of a point, one for each seed."""
        words = [*self.fixed, *self.words(params)]
        return [[*words, seed] for seed in self.seeds] or [words]

    def probes(self) -> list[list[str]]:
        """Overrides of trials by which the space can be tried before anything runs: each choice and, of an interval,
        its ends and a value within, the other keys at the first of theirs."""
        values = {key: _tried(one) for key, one in self.distributions.items()}
        first = {key: own[0] for key, own in values.items()}
        points = [first, *({**first, key: value} for key, own in values.items() for value in own[1:])]
        return [self.trials(point)[0] for point in points]

    def suggest(self, trial: Any) -> None:
        """Has ``trial``, one of Optuna's, given each value that it lacks."""
        for key, one in self.distributions.items():
            if hasattr(one, "choices"):
                trial.suggest_categorical(key, one.choices)
            else:
                suggest = trial.suggest_int if isinstance(one.low, int) else trial.suggest_float
                suggest(key, one.low, one.high, log=one.log)

    def plain(self) -> dict[str, dict[str, Any]]:
        """{key: ``{low, high, log, whole}`` of an interval, or ``{choices}``}, for JSON."""
        return {key.lstrip("+"): _plain(one) for key, one in self.distributions.items()}


def spoken(plain: Mapping[str, Any]) -> str:
    """``0.0003 to 0.03 (log)``, ``1, 2, 4``: a part of ``Space.plain``."""
    if "choices" in plain:
        return ", ".join(plain["choices"])
    return f"{_text(plain['low'])} to {_text(plain['high'])}{' (log)' if plain['log'] else ''}"


def _distribution(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(_texts(override))
    log_scale, low, high = "log" in value.tags, value.start, value.end
    if low is None or high is None or not low < high or (log_scale and low <= 0):
        raise ConfigError(f"{override.input_line}: an interval rises, and one on a log scale is above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log_scale)
    return FloatDistribution(float(low), float(high), log=log_scale)


def _texts(override: Override) -> list[str]:
    """The values of a choice or a range, as overrides write them."""
    texts = [str(text) for text in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    if not texts:
        raise ConfigError(f"{override.input_line} has no value; valid: choice(A,B) or range(FROM,TO,STEP)")
    return list(dict.fromkeys(texts))


def _tried(distribution: Any) -> list[Any]:
    if hasattr(distribution, "choices"):
        choices = list(distribution.choices)
        return choices if len(choices) <= MOST_TRIED else [choices[0], choices[-1]]
    low, high = distribution.low, distribution.high
    within = low * (high / low) ** WITHIN if distribution.log else low + WITHIN * (high - low)
    return list(dict.fromkeys([low, int(within) if isinstance(low, int) else within, high]))


def _plain(distribution: Any) -> dict[str, Any]:
    if hasattr(distribution, "choices"):
        return {"choices": list(distribution.choices)}
    low, high = distribution.low, distribution.high
    return {"low": low, "high": high, "log": distribution.log, "whole": isinstance(low, int)}


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
