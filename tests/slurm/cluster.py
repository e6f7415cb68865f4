"""A Slurm of one node on the loopback interface, without accounting: python tests/slurm/cluster.py start|stop FOLDER.

It needs root and Debian's packages slurm-wlm and munge. The node says that it has two GPUs, which are /dev/null and
/dev/zero under other names: placement can be tested, and nothing can be computed on them.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """
ClusterName=loralab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=300
KillWait=15
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=08:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{lacking[0]} is not on the PATH: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd and munged are started as root"


def start(folder: Path, grace: int = 30) -> None:
    """Starts the daemons and waits until the node is idle. ``grace``: seconds that a preempted job has left."""
    host = socket.gethostname().partition(".")[0]
    for name in ("", "state", "spool", "munge"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o711)
    for number, minor in enumerate((3, 5)):  # of /dev/null and /dev/zero
        with suppress(FileExistsError):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, minor))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    values = {
        **{"folder": folder, "host": host, "grace": grace, "cpus": os.cpu_count(), "memory": int(0.8 * pages / 2**20)},
        **dict(zip(("ctld_port", "slurmd_port"), _free_ports(2), strict=True)),
    }
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    _run("munged", "--force", *(f"--{option}={folder}/munge/{name}" for option, name in files.items()))
    _run("slurmctld", "-i", "-f", f"{folder}/slurm.conf")
    _run("slurmd", "-N", host, "-f", f"{folder}/slurm.conf")
    _wait_for_node(folder)


def stop(folder: Path) -> None:
    """Ends the daemons of ``start``, and the jobs that they run."""
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=30)
    for name in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
        with suppress(OSError, ValueError):
            process = int((folder / name).read_text())
            os.kill(process, signal.SIGTERM)
            _wait_for_end(process)


def _wait_for_node(folder: Path) -> None:
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
        if "idle" in done.stdout:
            return
        time.sleep(0.1)
    stop(folder)
    raise TimeoutError(f"the node of {folder} is not idle: {done.stdout}{done.stderr}; see {folder}/slurmctld.log")


def _wait_for_end(process: int) -> None:
    with suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(process, 0)
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with closing(socket.socket()) as first, closing(socket.socket()) as second:
        sockets = (first, second)[:count]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _run(*words: str) -> None:
    # daemons keep what they are given: a pipe would never be closed
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    {"start": start, "stop": stop}[sys.argv[1]](Path(sys.argv[2]).absolute())
