"""Slurm's own commands: what partitions there are, the states of jobs, cancelling and requeueing them.

Nothing here needs accounting: squeue answers for every job that waits, runs or has ended a few minutes ago.
"""

import shutil
import subprocess
from collections.abc import Iterable, Sequence

from loralab.errors import ConfigError

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
PATIENCE = 60.0  # seconds for one command
ENDED = {  # of Slurm's job states; all others are on their way
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
EXECUTOR = "hydra.launcher.executor=slurm"


class SlurmError(Exception):
    """A command of Slurm's that failed; its message is Slurm's."""


def call(*words: str, given: str | None = None) -> str:
    """What a command of Slurm's says. Raises SlurmError."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, input=given)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(str(error)) from error
    if done.returncode:
        raise SlurmError(" ".join((done.stderr or done.stdout).split())[:500] or f"code {done.returncode}")
    return done.stdout


def check_there() -> None:
    """Raises ConfigError where this machine has no Slurm."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"{EXECUTOR}, but this machine has no Slurm: {', '.join(missing)} is not on the PATH; valid: a login node"
            " of a cluster, or hydra.launcher.executor=local"
        )


def check_partition(asked: str | None, minutes: int) -> None:
    """Raises ConfigError where Slurm does not answer, a partition of ``asked`` (None: the default one) does not exist,
    or none of them gives ``minutes`` to a job."""
    try:
        lines = call("sinfo", "--noheader", "--all", "--format=%P|%l").split()
    except SlurmError as error:
        raise ConfigError(f"{EXECUTOR}, but Slurm does not answer: {error}") from error
    limits = {name.rstrip("*"): limit for name, _, limit in (line.partition("|") for line in lines)}
    default = [name.rstrip("*") for name in (line.partition("|")[0] for line in lines) if name.endswith("*")]
    names = asked.split(",") if asked else default
    for name in names:
        if name not in limits:
            valid = ", ".join(sorted(limits)) or "none, this cluster has no partition"
            raise ConfigError(f"hydra.launcher.partition={name} does not exist; valid: {valid}")
    if not names:
        raise ConfigError(f"this cluster has no default partition; valid: hydra.launcher.partition={'|'.join(limits)}")
    short = {name: limits[name] for name in names if _minutes(limits[name]) < minutes}
    if len(short) == len(names):
        raise ConfigError(
            f"hydra.launcher.timeout_min={minutes} is more than partition {names[0]} allows; valid: at most"
            f" {_minutes(limits[names[0]]):g}. A task is requeued at its limit and goes on from its checkpoints"
        )


def check_job(words: dict[str, object]) -> None:
    """Raises ConfigError where sbatch would refuse a job with these words. Nothing is submitted."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in words.items()]
    try:
        call("sbatch", "--test-only", *flags, given="#!/bin/sh\ntrue\n")
    except SlurmError as error:
        raise ConfigError(f"sbatch refuses what hydra.launcher asks for ({' '.join(flags)}): {error}") from error


def largest_array() -> int:
    """How many tasks an array may have; Slurm's own default where it does not say."""
    try:
        lines = call("scontrol", "show", "config").splitlines()
    except SlurmError:
        lines = []
    found = [line.partition("=")[2].strip() for line in lines if line.startswith("MaxArraySize")]
    return int(found[0]) - 1 if found and found[0].isdigit() else 1000


def states(jobs: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """{job: (state, reason)} of those of ``jobs`` (12, or 12_3 for a task of an array) that Slurm still knows; None
    where it does not answer."""
    asked = sorted({job.partition("_")[0] for job in jobs})
    try:
        said = call("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(asked)}", "--format=%i|%T|%r")
    except SlurmError as error:
        return {} if "Invalid job id" in str(error) else None
    lines = [line.strip().split("|", 2) for line in said.splitlines() if line.count("|") >= 2]
    return {job: (state, reason) for job, state, reason in lines}


def accounted(job: str) -> str:
    """The state that accounting has of a job that squeue has forgotten; empty where there is none."""
    try:
        said = call("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}")
    except SlurmError:
        return ""
    return said.split()[0] if said.split() else ""


def cancel(jobs: Sequence[str]) -> None:
    """Asks Slurm to end ``jobs``. Raises SlurmError."""
    call("scancel", *jobs)


def requeue(job: str) -> None:
    """Puts a running job back into the queue. Raises SlurmError."""
    call("scontrol", "requeue", job)


def _minutes(limit: str) -> float:
    """A time of sinfo's, [days-]hours:minutes:seconds or minutes:seconds, in minutes."""
    days, _, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return float("inf")  # infinite, or n/a
    hours, minutes, seconds = (["0", *parts, "0"] if len(parts) == 1 else ["0", *parts])[-3:]
    return 1440 * int(days or 0) + 60 * int(hours) + int(minutes) + int(seconds) / 60
