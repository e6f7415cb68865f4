"""A table cell's picture: the seeds of a row, their mean and its interval, on one scale for all rows."""

from collections.abc import Sequence

from markupsafe import Markup

from loralab.analysis.arms import Arm


def strips(arms: Sequence[Arm]) -> list[Markup]:
    """One for each arm, empty for an arm without a score; the scale holds every seed and every interval."""
    ends = [end for arm in arms for end in arm.extent]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    return [Markup() if arm.mean is None else strip(arm.scores, arm.mean, arm.reach, low, high) for arm in arms]


def strip(values: Sequence[float], mean: float, reach: float | None, low: float, high: float) -> Markup:
    """``reach``: half the interval about the mean; None draws no bar."""

    def at(value: float) -> str:
        return f"{6 + (value - low) / ((high - low) or 1.0) * 108:.1f}"

    parts = ['<line class="grid" x1="2" x2="118" y1="9.0" y2="9.0"/>']
    if reach is not None:
        parts.append(f'<line class="bar" x1="{at(mean - reach)}" x2="{at(mean + reach)}" y1="9.0" y2="9.0"/>')
    parts += [f'<circle class="seed" cx="{at(value)}" cy="9.0" r="2.4"/>' for value in values]
    parts.append(f'<circle class="mean" cx="{at(mean)}" cy="9.0" r="4"/>')
    return Markup(f'<svg class="strip" viewBox="0 0 120 18" aria-hidden="true">{"".join(parts)}</svg>')
