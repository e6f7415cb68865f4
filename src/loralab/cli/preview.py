"""``loralab sweep NAME --preview``: the arms of a sweep, as a table."""

from loralab.analysis.values import as_number, short_names
from loralab.reporting.layout import aligned, terminal_width, wrapped
from loralab.scheduling.previewing import Arm, Preview


def text(preview: Preview) -> str:
    """What would run: how many trials, and a line for each arm with the scale of its update and its rates."""
    count, finished = sum(arm.trials for arm in preview.arms), sum(arm.finished for arm in preview.arms)
    names = short_names([*preview.axes, *preview.tune])
    arms = f"{len(preview.arms)} arm{'s' * (len(preview.arms) != 1)}"
    tuned = f"; {' and '.join(names[key] for key in preview.tune)} tuned for each arm" if preview.tune else ""
    done = f"; {finished} finished before" if finished else ""
    if preview.search and not preview.arms:
        return "\n".join(wrapped(f"{preview.search} none. Nothing was run.", terminal_width()))
    about = f"{count} trials in {preview.folder}: {arms}{tuned}{done}. Nothing was run."
    titles = [names[key] for key in preview.axes] + [names[key] for key in preview.tune]
    titles += ["scale", "lr x scale", "seeds", "steps", "trials"]
    rows = [_row(preview, arm) for arm in preview.arms]
    kept = [place for place, _ in enumerate(titles) if any(row[place] != "-" for row in rows)]
    table = aligned([titles[place] for place in kept], [[row[place] for place in kept] for row in rows], range(0))
    search = wrapped(preview.search, terminal_width()) if preview.search else []
    return "\n".join([*search, *wrapped(about, terminal_width()), "", *table])


def _row(preview: Preview, arm: Arm) -> list[str]:
    values = [arm.values[key].strip("'") for key in preview.axes] + [" ".join(arm.tuned[key]) for key in preview.tune]
    rates = [rate for word in arm.rates if (rate := as_number(word)) is not None]
    scaled = "-" if arm.scale is None or not rates else " ".join(f"{rate * arm.scale:.3g}" for rate in rates)
    scale = "-" if arm.scale is None else f"{arm.scale:.4g}"
    steps = " to ".join(str(step) for step in dict.fromkeys((arm.steps[0], arm.steps[-1])))
    return [*values, scale, scaled, " ".join(arm.seeds), steps, str(arm.trials)]
