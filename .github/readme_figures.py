"""Measures what README.md states as figures, and writes each into its block with date, machine and versions.

``make readme-figures`` measures all of them (half an hour on two cores, best with nothing else running);
``make readme-figures ARGS="quickstart quantize"`` measures those. A block lies between ``<!-- figures:NAME -->`` and
``<!-- /figures:NAME -->``; whatever stands there is replaced, and nothing else of the file is touched.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "readme"
LORALAB = [sys.executable, "-m", "loralab.cli.main"]
SCHEMES = (  # of the study's table: one of each family
    *("scheme", "none", "int8_absmax_tensor", "int8_absmax", "llm_int8", "int8_product_absmax", "int4_absmax"),
    *("fp4", "fp4_e2m1", "fp4_e3m0", "nf4", "nf4_double", "nf4_32_double"),
)
VERSIONS = ("torch", "transformers", "lightning", "bitsandbytes", "peft", "accelerate")
Json = Mapping[str, Any]


def quickstart(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The sweep's table, its seconds as a whole process, and how far its memory predictions were off."""
    folder = RUNS / "quickstart"
    seconds, out = run("sweep", "quickstart", "--fresh", "logger=none", f"hydra.sweep.dir={folder}")
    records = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/result.json"))]
    table = out.partition("\nreport:")[0].strip()
    yield "quickstart", f"{minutes(seconds)} from start to end; {stamp(records[0]['environment'])}:\n\n{fenced(table)}"
    yield "memory", memory(records)
    screenshot(folder / "report" / "index.html", ROOT / ".github" / "report.png")


def memory(records: Sequence[Json]) -> str:
    """Predicted over measured peaks; the records of one pack hold one measurement."""
    pairs = {
        (one["memory"]["predicted_peak_bytes"], one["memory"]["measured_peak_bytes"])
        for one in records
        if one["memory"]["predicted_peak_bytes"] and one["memory"]["measured_peak_bytes"]
    }
    if not pairs:
        return "no prediction could be held against a measurement in this run."
    ratios = sorted(predicted / measured for predicted, measured in pairs)
    shown = f"{ratios[0]:.3f} to {ratios[-1]:.3f}" if len(ratios) > 1 else f"{ratios[0]:.3f}"
    return (
        f"Predicted over measured peak of the quickstart's {len(ratios)} passes: {shown}"
        f" ({stamp(records[0]['environment'])})."
    )


PLANS = {  # what trains -> its settings
    "full": ["adapter=full"],
    "LoRA": ["adapter.r=4"],
    "QLoRA": ["adapter.r=64", "quantization=nf4_double", "optimizer=paged_adamw"],
}
PUBLISHED = {  # LoRA, section 4.2 (GPT-3); QLoRA, abstract (65B): with float32 states, and activations of their own
    **{("gpt3", "full"): "1.2 TB", ("gpt3", "LoRA"): "350 GB"},
    **{("llama_65b", "full"): "over 780 GB", ("llama_65b", "QLoRA"): "under 48 GB"},
}


def plans(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Predicted peaks of published sizes on CUDA, by kind, beside what the papers say they take."""
    lines = [
        "| base | trained | weights | gradients | state | activations and the rest | peak | paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in ("llama_7b", "llama_65b", "gpt3"):
        settings = [f"model={model}", "data.batch_size=1", "model.max_length=512", "model.gradient_checkpointing=true"]
        for trained, words in PLANS.items():
            _, out = run("plan", "--json", *settings, *words)
            found = json.loads(out)
            kinds = found["by_kind"]
            parts = [kinds["base"] + kinds["constants"] + kinds["adapter"], kinds["gradients"], kinds["optimizer"]]
            peak = found["predicted_peak_bytes"]
            shown = " | ".join(f"{part / 1e9:.1f}" for part in [*parts, peak - sum(parts), peak])
            lines.append(f"| {model} | {trained} | {shown} | {PUBLISHED.get((model, trained), '')} |")
    yield "plans", "GB (1e9 bytes); one row of 512 tokens, gradient checkpointing:\n\n" + "\n".join(lines)


def quantize(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Some rows of the quantization study of the shipped base."""
    folder = RUNS / "quantize"
    seconds, out = run("quantize", "--evaluate", "data=samples", "logger=none", f"hydra.run.dir={folder}")
    table = out.partition("\nreport:")[0].strip()
    found = json.loads((folder / "quantize.json").read_text("utf-8"))
    machine = {"cpu": found["machine"], "versions": found["versions"]}
    yield "quantize", f"{minutes(seconds)}; {stamp(machine)}:\n\n{fenced(chosen(table, SCHEMES))}"


def chosen(table: str, schemes: Sequence[str]) -> str:
    """The table's heading and the rows of these schemes, in its own order."""
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("scheme"))
    kept = [line for line in lines[start:] if line.startswith("--") or line.split(" ")[0] in schemes]
    return "\n".join([*lines[:start], *kept])


def speed(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Every row of ``loralab bench``; ``--bench FILE`` takes what an earlier run of it has written."""
    path = Path(args.bench) if args.bench else RUNS / "bench.json"
    if not args.bench:
        run("bench", "--out", str(path), *(["--quick"] if args.quick else []))
    found = json.loads(path.read_text("utf-8"))
    where = datetime.date.fromtimestamp(path.stat().st_mtime)
    about = stamp(found, where) + (", one measurement each (`--quick`)" if args.quick else "")
    yield "speed", f"{found['dtype']}; {about}:\n\n{ratios(found)}"


def decision(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The time to a decision of ``loralab bench decision``, which ``--bench FILE`` may hold."""
    path = Path(args.bench) if args.bench else RUNS / "decision.json"
    if not args.bench:
        run("bench", "decision", "--out", str(path), *(["--quick"] if args.quick else []))
    found = json.loads(path.read_text("utf-8"))
    where = datetime.date.fromtimestamp(path.stat().st_mtime)
    lines = ["| what | by | seconds | times loralab | measured |", "|---|---|---:|---:|---|"]
    for row in found["parts"]["decision"]["rows"]:
        computed = f"{row['measured_trials']} of {row['trials']} trials" if row.get("computed") else "whole"
        lines.append(f"| {row['what']} | {row['name']} | {row['median']:.0f} | {row['ratio']:.2f} | {computed} |")
    for row in found["parts"]["decision"]["rows"]:
        if "same_rates" in row:
            chosen = f"{row['same_rates']} of {row['arms']} arms have the rate that the full grid chose"
            lines.append(f"\n{row['steps']} steps: {chosen}, after {row['trained_steps']:,} trial-steps.")
    yield "decision", f"{found['dtype']}; {stamp(found, where)}:\n\n" + "\n".join(lines)


def ratios(found: Json) -> str:
    """Markdown: each peer's seconds over loralab's at the same task; above 1 loralab is faster."""
    lines = ["| what | against | times loralab | quartiles of the peer | measured |", "|---|---|---:|---|---:|"]
    for row in _rows(found):
        if row["ratio"] is None or row["name"] == "loralab":
            continue
        low, high = row["quartiles"]
        spread = f"{low:.4g} to {high:.4g} {row['unit']}"
        lines.append(f"| {row['what']} | {row['name']} | {row['ratio']:.2f} | {spread} | {row['measurements']} times |")
    apart = [(row["name"], row["loss_difference"]["largest"]) for row in _rows(found) if "loss_difference" in row]
    named = ", ".join(f"{name} {largest:.1e}" for name, largest in apart if name != "loralab")
    notes = [f"Training losses of the single runs differ from loralab's by at most: {named}."] if named else []
    notes += [f"Not measured: {name}: {part['error']}" for name, part in found["parts"].items() if part["error"]]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _rows(found: Json) -> list[Json]:
    return [row for part in found["parts"].values() for row in part["rows"]]


def run(*words: str) -> tuple[float, str]:
    """(seconds from start to end, what it printed) of one command. Ends this script where the command fails."""
    print("loralab", *words, flush=True)
    begun = time.monotonic()
    done = subprocess.run([*LORALAB, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"loralab {' '.join(words)}: exit code {done.returncode}; README.md is as it was")
    return time.monotonic() - begun, done.stdout


def stamp(machine: Json, day: datetime.date | None = None) -> str:
    """``26 November 2026, AMD EPYC x 2, torch 2.13.0, ...``"""
    day = day or datetime.date.today()
    threads = [f"{machine['threads']} threads"] if machine.get("threads") else []
    versions = [f"{name} {machine['versions'][name]}" for name in VERSIONS if machine["versions"].get(name)]
    device = machine.get("gpu") or machine["cpu"]
    return ", ".join([f"{day.day} {day:%B %Y}", device, *threads, *versions])


def minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def screenshot(page: Path, picture: Path) -> None:
    """The page as a picture, where a headless browser is installed; else the old picture stays and that is said."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"no chromium: {picture.relative_to(ROOT)} is not drawn anew", flush=True)
        return
    size = "--window-size=1200,1100"
    words = ["--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={picture}", page.as_uri()]
    subprocess.run([browser, *words], check=True, capture_output=True, timeout=120)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with each named block's content replaced. Raises ValueError for a block that is not there once."""
    for name, content in blocks.items():
        begin, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must hold {begin} ... {end} exactly once")
        text = pattern.sub(lambda _, new=f"{begin}\n{content}\n{end}": new, text)
    return text


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[tuple[str, str]]]] = {
    **{"quickstart": quickstart, "plans": plans, "quantize": quantize, "speed": speed, "decision": decision}
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="loralab bench --quick")
    parser.add_argument("--bench", help="a bench.json that was measured on this machine before")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}; valid: {', '.join(PARTS)}")
    readme = ROOT / "README.md"
    for name in args.parts or PARTS:
        blocks = dict(PARTS[name](args))
        readme.write_text(fill(readme.read_text("utf-8"), blocks), "utf-8")
        print(f"README.md: {', '.join(blocks)}", flush=True)


if __name__ == "__main__":
    main()
