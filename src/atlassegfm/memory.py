"""How much memory this process takes at its peak."""

from __future__ import annotations

import sys
from pathlib import Path

#: Where Linux tells of a process's own memory, and takes the request to begin a new peak ("5": proc(5)).
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> bool:
    """Begin a new peak at what is in use now; False where the system cannot, and the peak stays that of the process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mb() -> int | None:
    """Largest resident memory since the last reset, or of the process so far; None where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024)
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
