"""By which commit, when, and on which machine a result was made; docs/results.md shows it for every table."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
import common  # noqa: E402


def machine() -> dict[str, str | int]:
    """Describe this machine: cores that this process may use, the processor's name, PyTorch's version."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    return {"cores": cores, "cpu": cpu, "torch": importlib.metadata.version("torch")}


def made(gpu: str | None = None) -> dict[str, str]:
    """Return commit, date and machine. Raises common.UserError without git and a clone."""
    here = machine()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        where = f"{here['cores']} cores, {here['cpu']}" + (f", {gpu}" if gpu else "")
        return {"commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": where}
    raise common.UserError("results name the commit that made them, which needs git and a clone of the repository.")
