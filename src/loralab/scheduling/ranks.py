"""One run in several processes (trainer=ddp, trainer=fsdp): this one starts them, watches them and reads the record.

All of them get the same composed settings and see the same files. The first one works in the run folder; what the
others would write goes to a temporary folder, which is removed. Where one ends too early the others are ended too, so
that none waits for it, and the record says which it was.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.errors import Interrupted, LoralabError, explain
from loralab.records import record
from loralab.records.log_file import LogFile
from loralab.records.secrets import MaskedFormatter
from loralab.scheduling.job import Job, Record
from loralab.scheduling.train_log import FORMAT, NAME, TerminalFilter
from loralab.scheduling.workers import devices
from loralab.signals import listen, unlisten

if TYPE_CHECKING:
    from loralab.training.specs import TrialSpec

log = logging.getLogger(__name__)

ASKED = "asked.json"
POLL = 0.05  # seconds
PATIENCE = 120.0  # seconds that the first process may need to write where it stands
GRACE = 20.0  # seconds in which the others may end by themselves and write why, once one has failed
TIMEOUT = timedelta(hours=2)  # of one exchange: a process may write or wait for a disk meanwhile
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def run(job: Job, spec: "TrialSpec", progress: bool = False) -> Record:
    """The record of ``job``, whose folder the caller holds, after its processes have ended. An interruption is handed
    on to the first process and, once its record is written, leaves as an exception."""
    size, rows, cuda = spec.trainer.processes, spec.data.batch_size, spec.trainer.device == "cuda"
    log.info(
        "%s runs alone, in %d processes, each with %d of the %d rows of a batch", job.trial, size, rows // size, rows
    )
    scratch = Path(tempfile.mkdtemp(prefix="loralab-"))
    try:
        asked = {"job": job.as_json(), "parent": os.getpid(), "size": size, "progress": progress, "cuda": cuda}
        (scratch / ASKED).write_text(json.dumps(asked))
        _lend_checkpoint(job.folder, scratch, size)
        group = _Group(scratch, size, devices("cuda") if cuda else [])
        try:
            cause = group.wait()
        except Interrupted as stopped:
            group.interrupt(stopped.exit_code - 128)
            _mark_interrupted(job, stopped)
            raise
        finally:
            group.kill()
        return _settled(job, scratch, group, cause)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lend_checkpoint(folder: Path, scratch: Path, size: int) -> None:
    """Lets the other processes go on from the checkpoint that the first one goes on from."""
    for rank in range(1, size):
        place = scratch / str(rank) / "checkpoints"
        place.mkdir(parents=True)
        if (file := folder / "checkpoints" / "last.pt").is_file():
            (place / file.name).symlink_to(file.absolute())


class _Group:
    """The processes, by their number."""

    def __init__(self, scratch: Path, size: int, cards: list[str]) -> None:
        """``cards``: what CUDA_VISIBLE_DEVICES is set to, one a process; empty on a CPU."""
        threads = max(1, (os.cpu_count() or 1) // size)
        self.processes = []
        for rank in range(size):
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if cards:
                environment["CUDA_VISIBLE_DEVICES"] = cards[rank]
            command = [sys.executable, "-m", "loralab.scheduling.ranks", str(scratch), str(rank)]
            # a group of its own: Ctrl-C on a terminal reaches this process, which hands it on
            self.processes.append(subprocess.Popen(command, env=environment, process_group=0))

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each process, negative for a signal; None while it runs."""
        return [process.poll() for process in self.processes]

    def wait(self) -> int | None:
        """Returns when all have ended: the number of the one that failed first, None where none has. The others then
        have GRACE seconds to end, and as many once the first has completed its record."""
        ended: float | None = None
        while None in (codes := self.codes):
            if ended is None and (codes[0] is not None or any(codes)):
                ended = time.monotonic()
            if ended is not None and time.monotonic() - ended > GRACE:
                break
            time.sleep(POLL)
        if self.codes[0] == 0:  # the record is written, whatever became of the others since
            return None
        # one that was killed, or says why it failed, comes before those that miss it
        order = {rank: (code > 0, code == 1, rank) for rank, code in enumerate(self.codes) if code}
        return min(order, key=lambda rank: order[rank], default=0)

    def interrupt(self, number: int) -> None:
        """Hands a signal on to the first process, and returns when it has written where it stands."""
        if self.processes[0].poll() is None:
            self.processes[0].send_signal(number)
        with suppress(subprocess.TimeoutExpired):  # of an exchange that another process has left
            self.processes[0].wait(PATIENCE)

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _mark_interrupted(job: Job, stopped: Interrupted) -> None:
    """Says so in a record that the first process could not close."""
    stored = record.read_if_whole(job.folder)
    if stored is not None and stored["status"] == "running":
        stored.update(status=stopped.status, error=str(stopped), exit_code=stopped.exit_code)
        record.write(job.folder, stored)


def _settled(job: Job, scratch: Path, group: _Group, cause: int | None) -> Record:
    """The final record. Where process ``cause`` was killed, or it failed and is not the first one, it says so."""
    if cause is None:
        return record.read(job.folder)
    stored = record.read_if_whole(job.folder) or job.refusal(LoralabError(""))
    code, name = group.codes[cause] or 0, f"process {cause + 1} of {len(group.processes)}"
    other = record.read_if_whole(scratch / str(cause)) if cause else None
    if code < 0:
        known = Interrupted(-code if -code in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM)
        text = f"{name} was ended by signal {-code}: by hand, or by a host that has no memory left"
        stored.update(status=known.status, error=text, exit_code=known.exit_code)
    elif other is not None and other["exit_code"]:
        stored.update({key: other[key] for key in ("status", "exit_code")}, error=f"{name}: {other['error']}")
    elif not stored["error"]:
        failed = LoralabError(f"{name} ended with code {code} before its record was written")
        stored.update(status=failed.status, error=str(failed), exit_code=failed.exit_code)
    record.write(job.folder, stored)
    return stored


def main(scratch: Path, rank: int) -> int:
    """One of the processes. Returns the exit code of its trial."""
    if rank == 0:
        listen()
    else:  # the first one says where training stops; the others are ended when it has
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    asked = json.loads((scratch / ASKED).read_text())
    if rank:
        threading.Thread(target=_outlive, args=(asked["parent"],), daemon=True).start()
    else:
        _stop_with(asked["parent"])
    job = Job.from_json(asked["job"])
    if rank:
        job.folder = scratch / str(rank)
    _log_to(job.folder / NAME, terminal=rank == 0)
    try:
        _join(scratch, rank, asked["size"], asked["cuda"])
        return int(_run(job, rank, asked["progress"])["exit_code"] or 0)
    except Interrupted as stopped:
        return stopped.exit_code
    except Exception as error:
        failure = explain(error)
        if isinstance(failure, LoralabError):
            job.refuse(failure)
        return failure.exit_code
    finally:
        if rank == 0 and os.getppid() != asked["parent"]:
            shutil.rmtree(scratch, ignore_errors=True)


def _join(scratch: Path, rank: int, size: int, cuda: bool) -> None:
    """Meets the other processes, by a file."""
    import torch
    import torch.distributed as dist
    from torchmetrics import metric

    if cuda:
        torch.cuda.set_device(0)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of the host need not resolve
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{scratch / 'meeting'}",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    # every process scores all rows, which they have given each other: nothing is to be added up once more
    metric.jit_distributed_available = lambda: False  # type: ignore[attr-defined]


def _run(job: Job, rank: int, progress: bool) -> Record:
    import torch.distributed as dist

    from loralab.running.runner import Runner

    (stored,) = Runner(progress=progress and rank == 0).run([_spec(job, rank)])
    if not stored["exit_code"]:
        dist.destroy_process_group()
    return stored


def _spec(job: Job, rank: int) -> "TrialSpec":
    """The trial of one process; but for the first one nothing of it is kept."""
    spec = job.described()
    if not rank:
        return spec
    from loralab.records.loggers import Loggers
    from loralab.training.checkpoint import Checkpoint

    kept = {name: make for name, make in spec.callbacks.items() if getattr(make, "func", make) is not Checkpoint}
    return replace(spec, logger=Loggers(()), callbacks=kept)


def _stop_with(parent: int) -> None:
    """Has Linux interrupt this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _outlive(parent: int) -> None:
    """Ends this process some time after the one that started it has ended: the first process, which is interrupted
    then, must find it there for the exchange under way."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE)
    os._exit(1)


def _log_to(path: Path, terminal: bool) -> None:
    """Lines of this process go to ``path`` and, of the first one, to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[Any] = [LogFile(path, delay=True, encoding="utf-8")]
    handlers[0].setFormatter(MaskedFormatter(FORMAT))
    if terminal:
        handlers.append(logging.StreamHandler())
        handlers[1].setFormatter(MaskedFormatter("%(message)s"))
        handlers[1].addFilter(TerminalFilter())
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    logging.getLogger("loralab").setLevel(logging.INFO)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), int(sys.argv[2]))
    unlisten()
    sys.exit(code)
