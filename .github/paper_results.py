"""`make papers`: runs the paper sweeps at their mini scale; their tables with verdicts go to .github/results/."""

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".github" / "results"
VERDICTS = ("holds", "does not hold", "cannot tell", "not comparable")


def main(names: list[str]) -> int:
    """Runs the sweeps ``names`` (none: all), which skip what is finished; the worst exit code."""
    codes = [run(name) for name in names or sorted(path.stem for path in (ROOT / "sweeps" / "paper").glob("*.yaml"))]
    write_index()
    return max(codes, default=0)


def run(name: str) -> int:
    """Runs one and copies its report, with how long it took, to the results; the exit code of the sweep."""
    folder, begun = ROOT / "runs" / "paper" / name, time.monotonic()
    command = [sys.executable, "-m", "loralab.cli", "sweep", f"paper/{name}", "scale=mini", f"hydra.sweep.dir={folder}"]
    code = subprocess.run([*command, "logger=none"], cwd=ROOT).returncode
    report = folder / "report" / "report.md"
    if report.is_file():
        RESULTS.mkdir(exist_ok=True)
        about = f"{datetime.now():%d %B %Y}; this run took {time.monotonic() - begun:.0f} s; exit code {code}."
        text = report.read_text("utf-8").replace(f"{ROOT}/", "").replace(str(ROOT), ".")
        (RESULTS / f"{name}.md").write_text(f"{about}\n\n{text}", "utf-8")
        (RESULTS / f"{name}.json").write_text(json.dumps(claims(folder), indent=1) + "\n", "utf-8")
    return code


def claims(folder: Path) -> list[dict[str, Any]]:
    """The verdicts of a sweep, as its results.json has them."""
    stored = json.loads((folder / "report" / "results.json").read_text("utf-8"))
    return list(stored["claims"])


def write_index() -> None:
    """A line for each claim of each sweep that has results."""
    lines = ["# Paper sweeps at their mini scale", "", "| sweep | claim | verdict | seeds |", "|---|---|---|---:|"]
    counts = dict.fromkeys(VERDICTS, 0)
    for path in sorted(RESULTS.glob("*.json")):
        for one in json.loads(path.read_text("utf-8")):
            counts[one["verdict"]] = counts.get(one["verdict"], 0) + 1
            where = [f"{axis} = {value}" for axis, value in one["where"].items()]
            claim = " where ".join([one["claim"], *([", ".join(where)] if where else [])]).replace("|", "\\|")
            lines.append(f"| [{path.stem}]({path.stem}.md) | `{claim}` | {one['verdict']} | {len(one['seeds'])} |")
    lines[1:1] = ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) + "."]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
