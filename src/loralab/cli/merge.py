"""``loralab merge``: a run's adapter as part of its base's weights, and what that costs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.cli.arguments import JSON, Arguments, Command, Flag
from loralab.errors import ConfigError

READING = {  # of the table's columns
    "KL(run || it)": "KL: from the run's predictions to this model's, mean of a target in nats, as the loss is",
    "weight error": "weight error: RMS of the difference to what the run computes with / RMS of the delta",
    "codes changed": "codes changed: share of the quantized weights",
    "delta kept": "delta kept: the part of it that survives quantizing again, <kept, delta> / <delta, delta>",
}
ROWS = 64  # as artifacts/merge.py has it, which needs torch


def run(arguments: Arguments) -> int:
    """Merges one run; the table on stdout."""
    if len(arguments.words) != 1 or arguments.out is None:
        raise ConfigError("loralab merge needs the folder of one run and --out DIR; loralab ls shows which there are")
    rows = _rows(arguments)
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.artifacts.merge import Request, merge

    out = Path(arguments.out).expanduser()
    request = Request(out, arguments.onto, arguments.requantize, arguments.dtype, rows)
    result = merge(Path(arguments.words[0]), request)
    print(json.dumps(result) if arguments.json else render(result))
    return 0


def _rows(arguments: Arguments) -> int:
    """Rows to measure on; 0: not at all. Raises ConfigError."""
    if arguments.no_measure:
        return 0
    given = str(ROWS) if arguments.rows is None else arguments.rows
    if not given.isascii() or not given.isdigit() or not int(given[:9]):
        raise ConfigError(f"--rows {given}; valid: a whole number from 1, or --no-measure")
    return int(given[:9])


def render(result: Mapping[str, Any]) -> str:
    """The table of the ways, what was written, and notes."""
    from loralab.reporting.layout import aligned, terminal_width, wrapped

    about = result["measured"]
    head = f"{result['out']}: {result['base']['name']} with {result['method']} merged into it"
    kind = "dense, " if result["format"] == "dense" else "bitsandbytes' codes; all else "
    lines = [f"{head} ({result['written']}; {kind}{result['dtype']})"]
    if about:
        rows = [
            ["the run", _number(about["loss"]), *["-"] * 4],
            ["without adapter", *_cells(result["without_adapter"])],
            *([_mark(way, result), *_cells(one)] for way, one in result["ways"].items()),
        ]
        titles = ["", "loss", "KL(run || it)", "weight error", "codes changed", "delta kept"]
        used = [place for place in range(6) if place < 3 or any(row[place] != "-" for row in rows)]
        shown = [[row[place] for place in used] for row in rows]
        lines += ["", *aligned([titles[place] for place in used], shown, range(1, len(used)))]
        rows_used = (
            f"on {about['rows']} of {about['of']} validation rows at even distances, {about['targets']:,} targets"
        )
        lines += ["", f"{rows_used}; *: written"]
        reading = "; ".join(READING[title] for title in (titles[place] for place in used) if title in READING)
        lines += wrapped(f"delta: what the run adds to a weight; {reading}", terminal_width(), "  ")
    for note in result["notes"]:
        lines += wrapped(note, terminal_width(), "  ")
    return "\n".join(line.rstrip() for line in lines)


def _mark(way: str, result: Mapping[str, Any]) -> str:
    return f"{way} *" if way == result["written"] else way


def _cells(one: Mapping[str, Any]) -> list[str]:
    kl = one.get("kl")
    shares = [_share(one.get(key)) for key in ("weight_error", "codes_changed", "delta_kept")]
    return [_number(one.get("loss")), "-" if kl is None else f"{kl:#.3g}", *shares]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}" if value >= 1e-4 or value <= 0 else f"{value:.1e}"


MERGE = Command(
    name="merge",
    summary="a run's adapter merged into its base's weights, with what that costs",
    about="Writes the base of a run with its adapter merged in, as a folder that plain transformers opens, and\n"
    "measures on the run's validation rows what each way of merging costs. Over a quantized base these are:\n"
    "dequantized, the update on the values that the codes stand for, which is what was trained, up to rounding to\n"
    "--dtype; original, on the weights before quantization, which the adapter was not trained on; requantized, the\n"
    "first one quantized again. Methods that no weight can hold (bottleneck, prefix, prompt) are refused.",
    usage="RUN --out DIR",
    examples={
        "loralab merge runs/train/TIME --out merged": "dense; over a quantized base on its dequantized weights",
        "loralab merge RUN --out merged --onto original --dtype bfloat16": "on the weights before quantization",
        "loralab merge RUN --out merged --requantize --rows 256": "quantized again, measured on 256 rows",
    },
    writes="DIR: the model, config and tokenizer (the generation config too), and merge.json with the figures of all\n"
    "ways and of each weight; a table on stdout. DIR must be new or empty.",
    run=run,
    own_flags=(
        Flag(("--out",), "the folder that is written", "DIR"),
        Flag(
            ("--onto",),
            "of a quantized base: the weights that the update is added to (dequantized, since it was trained on those)",
            "WEIGHTS",
            choices=("dequantized", "original"),
        ),
        Flag(
            ("--requantize",),
            "written quantized again: nf4, fp4 and llm_int8 as bitsandbytes' codes, any other scheme (and layers that "
            "transformers does not read as such) as the dense values of its codes",
        ),
        Flag(
            ("--dtype",),
            "of all that is written dense (that of the base's checkpoint)",
            "DTYPE",
            choices=("float32", "bfloat16"),
        ),
        Flag(("--rows",), f"validation rows to measure on, at even distances ({ROWS})", "N"),
        Flag(("--no-measure",), "merges without measuring, and without the run's data"),
        JSON,
    ),
)
