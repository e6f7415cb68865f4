"""What several CUDA devices have free, asked for in a process of its own.

The process that shares work out computes on none of them: a question asked here would leave CUDA's context, half a GiB,
on the first one for as long as a sweep runs.
"""

import json
import logging
import subprocess
import sys
from functools import cache

log = logging.getLogger(__name__)

ASK = "import json, torch; print(json.dumps([torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]))"
LIMIT_S = 120.0


@cache
def free_of_each() -> tuple[int, ...]:
    """Bytes free on each device that this process may use, when it was first asked; empty where that is unknown."""
    try:
        command = [sys.executable, "-c", ASK]
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=True)
        return tuple(map(int, json.loads(said.stdout)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("what the CUDA devices have free is not known (%s); packs are not held to it", error)
        return ()
