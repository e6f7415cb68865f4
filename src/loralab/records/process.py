"""Which process writes a record: its number alone is given again, at the latest after a restart of the machine."""

from pathlib import Path

BOOT, STARTED = Path("/proc/sys/kernel/random/boot_id"), 19  # the place behind the name in /proc/PID/stat


def mark(pid: int) -> str | None:
    """What tells the process ``pid`` of this machine from a later one of the same number; None where that is not known:
    there is no such process, or this is no Linux."""
    try:
        boot, stat = BOOT.read_text().strip(), Path(f"/proc/{pid}/stat").read_text()
        return f"{boot} {stat.rpartition(')')[2].split()[STARTED]}"
    except (OSError, IndexError):
        return None
