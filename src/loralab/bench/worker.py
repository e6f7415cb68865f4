"""``python -m loralab.bench.worker JOB``: one library with its base model loaded; a trial a line in, its times out.

Whoever started it decides when each trial runs, so that several libraries can be measured in turn.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENGINES = {
    "trainer": ("loralab.bench.peers", "WithTrainer"),
    "lightning": ("loralab.bench.peers", "WithLightning"),
    "loralab": ("loralab.bench.ours", "Loralab"),
    "resident": ("loralab.bench.ours", "Resident"),
}


class Clock:
    """When each step ended, everything queued on the device included."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def __call__(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step but the first, which has no beginning."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def main() -> None:
    """Answers one JSON object when ready and one a trial; what libraries write to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    job: Row = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    module, name = ENGINES[job["engine"]]
    engine = getattr(import_module(module), name)(job)
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(json.dumps(engine.trial(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
