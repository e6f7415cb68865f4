"""``loralab latency``: what a method costs at inference, merged and not."""

import json
import re
from collections.abc import Mapping
from typing import Any

from loralab.cli.arguments import CONFIG_DIR, JSON, Arguments, Command, Flag
from loralab.errors import ConfigError

READING = (
    "pass: rows x tokens; over the base: an arm's median time over the base's of the same round, the geometric mean of "
    "a round and the next one, which is in reverse order; median and quartiles of these pairs; base, again: the same "
    "as base, so what the measurement cannot tell apart"
)


def run(arguments: Arguments) -> int:
    """Forward passes of every arm in turn, over one base."""
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    shapes, passes = _shapes(arguments.shapes), _count(arguments.passes)
    from loralab.bench import latency
    from loralab.training.trainer import quiet

    quiet()
    methods = arguments.methods.split(",") if arguments.methods else latency.METHODS
    measured = latency.latency(
        arguments.overrides(), methods, shapes or latency.SHAPES, passes, config_dir=arguments.config_dir
    )
    print(json.dumps(measured) if arguments.json else render(measured))
    return 0


def render(measured: Mapping[str, Any]) -> str:
    """A table; below it what the ratio is of, and where it was measured."""
    from loralab.cli.terminal import table
    from loralab.reporting.layout import terminal_width, wrapped

    lines = [("pass", "arm", "parameters", "mean", "std", "median", "over the base (quartiles)")]
    for row in measured["rows"]:
        low, high = row["over_base_quartiles"]
        times = [f"{1000 * row[key]:.2f} ms" for key in ("mean_s", "std_s", "median_s")]
        over = f"{_percent(row['over_base'])} ({_percent(low)} to {_percent(high)})" if row["arm"] != "base" else ""
        lines.append((f"{row['rows']} x {row['tokens']}", row["arm"], f"{row['parameters']:,}", *times, over))
    about = measured["environment"]
    where = about.get("gpu") if measured["device"] == "cuda" else about.get("cpu")
    reading = wrapped(READING, terminal_width(), "  ")
    text = f"{measured['base']}, quantization={measured['quantization']}; {where}, threads: {measured['threads']}"
    text += "; merged weights are dense" if measured["quantization"] != "none" else ""
    left_out = "".join(f"; {rows} x {tokens} does not fit the base" for rows, tokens in measured["left_out"])
    return "\n".join([table(lines, right=(2, 3, 4, 5, 6)), "", *reading, f"{text}{left_out}"])


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def _shapes(text: str | None) -> list[tuple[int, int]]:
    """``1x128,16x256``; empty without the flag."""
    words = text.split(",") if text else []
    for word in words:
        if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", word):
            raise ConfigError(f"--shapes {word} is no shape; valid: ROWSxTOKENS, as in 1x128,16x256")
    return [(int(rows), int(tokens)) for rows, _, tokens in (word.partition("x") for word in words)]


def _count(text: str | None) -> int:
    if text is None:
        return 50
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ConfigError(f"--passes {text} is no number of passes; valid: a whole number from 1")
    return int(text)


LATENCY = Command(
    name="latency",
    summary="what a method costs at inference, merged and not",
    about="Times forward passes of a base alone, with the adapter of each method, and with it merged (LoRA, table 1),\n"
    "interleaved. Settings are Hydra's k=v of train; methods are those of conf/method.",
    usage="[k=v ...]",
    examples={
        "loralab latency": "the shipped base",
        "loralab latency model=hf model.name_or_path=gpt2-medium --passes 100": "as in the paper",
        "loralab latency --methods lora,dora --shapes 1x64 --json": "for a script",
    },
    writes="nothing.",
    run=run,
    own_flags=(
        Flag(("--methods",), "of conf/method, separated by commas (lora,bottleneck,pfeiffer,prefix)", "NAMES"),
        Flag(("--shapes",), "rows and tokens of a pass (1x128,16x256,32x512)", "SHAPES"),
        Flag(("--passes",), "forward passes an arm and shape (50)", "N"),
        CONFIG_DIR,
        JSON,
    ),
)
