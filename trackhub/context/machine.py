# SPDX-License-Identifier: Apache-2.0
"""Describes what this process runs on: versions of Python and packages, and the kind of machine.

`trackhub.flare` calls it at each site and on the server. It imports no package that it names, and starts no process.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

__all__ = ["describe_machine"]

_PACKAGES = ("nvflare", "torch", "tensorflow", "jax", "numpy", "lightning", "transformers", "scikit-learn", "xgboost")
_TRACKHUB = "flare-trackhub"
_PLUGINS = "trackhub.backends"  # the group of entry points by which backends are found
_GPUS = Path("/proc/driver/nvidia/gpus")
_CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))
_CONTAINER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "container")
_GIB = 1 << 30


def describe_machine() -> dict[str, str | int | bool]:
    """Return ``versions/...`` and ``host/...`` of this process. Takes some milliseconds.

    It describes the kind of machine, and nothing that identifies one: no host name, address, user or kernel release.
    """
    found: dict[str, str | int | bool] = {"versions/python": platform.python_version()}
    found |= {f"versions/{name}": version for name, version in _versions((*_PACKAGES, _TRACKHUB, *_plugins()))}
    found |= {"host/os": platform.system(), "host/machine": platform.machine(), "host/cpus": _cpus()}
    found["host/container"] = _is_container()
    if (memory := _memory_gib()) is not None:
        found["host/memory_gib"] = memory
    if gpus := _gpus():
        found["host/gpus"] = ", ".join(gpus)
    return found


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in dict.fromkeys(names):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _plugins() -> list[str]:
    """Return the distributions that have a backend."""
    return sorted({point.dist.name for point in metadata.entry_points(group=_PLUGINS) if point.dist is not None})


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # this system has no such call
        return os.cpu_count() or 1


def _is_container() -> bool:
    return any(map(Path.exists, _CONTAINER_FILES)) or any(map(os.environ.get, _CONTAINER_VARIABLES))


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    """Return the models of NVIDIA's GPUs, as the driver names them."""
    found = []
    for file in sorted(_GPUS.glob("*/information")):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found
