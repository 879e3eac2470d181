"""What a machine is, as one JSON object on stdout: python -m benchmarks.machine.

Libraries as `runtime.capabilities` finds them, the GPU as torch and nvidia-smi see it, the host.
A process of its own, so that no one who asks holds memory of the device.
"""

import dataclasses
import json
import os
import platform
import subprocess
from typing import Any

import torch

from megatron_ponder.runtime.capabilities import find_capabilities

QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,mig.mode.current"
GIB = 1 << 30


def describe_machine() -> dict[str, Any]:
    """The machine by name of what is described."""
    memory_gib = None
    if torch.cuda.is_available():
        memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return {
        "capabilities": dataclasses.asdict(find_capabilities()),
        "memory_gib": memory_gib,
        "nvidia_smi": _nvidia_smi(),
        "host": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
    }


def _nvidia_smi() -> str | None:
    """Its answer to a few questions; None where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    print(json.dumps(describe_machine(), indent=1))
