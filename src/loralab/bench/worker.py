"""``python -m loralab.bench.worker ENGINE``: a library with its base model loaded; a request a line in, an answer out.

ENGINE is a class, such as ``loralab.bench.peers.WithTrainer``: made from the first line, its ``answer`` has the rest.
Whoever started the process decides when each is asked for, so that several libraries can be measured in turn.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

from loralab.errors import LoralabError

Row = dict[str, Any]


class Python:
    """An engine for command lines: ``python WORDS`` in ``folder``, whose output is this process's log."""

    def __init__(self, setup: Row) -> None:
        """Nothing is loaded."""

    def answer(self, request: Row) -> Row:
        """{exit_code}."""
        command = [sys.executable, *request["words"]]
        return {"exit_code": subprocess.run(command, cwd=request["folder"], stdin=subprocess.DEVNULL).returncode}


def main() -> None:
    """Writes {} as the answer to {}, as soon as the engine is made. What libraries write to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # for transformers and bitsandbytes, which print to stdout: there only answers may stand
    module, _, name = sys.argv[1].rpartition(".")
    engine = getattr(import_module(module), name)(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        request, begun = json.loads(line), time.perf_counter()
        try:
            answer = engine.answer(request) if request else {}
        except LoralabError as error:  # a paragraph for a reader, and the process goes on
            answer = {"error": str(error)}
        answers.write(json.dumps({"seconds": time.perf_counter() - begun, **answer}) + "\n")


if __name__ == "__main__":
    main()
