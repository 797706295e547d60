# SPDX-License-Identifier: Apache-2.0
"""Measures CPU, memory, disk, network and GPUs of the host, and of this process and all processes that it started.

`trackhub.flare.records_made_by_trackhub` starts it at each site, if the job asks for it. The values go through the
site's own writer. It needs psutil, and for GPUs NVIDIA's ``nvidia-ml-py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trackhub.errors import ConfigError
from trackhub.mark_own_threads import OwnThread

__all__ = ["PREFIX", "SystemMetrics", "check_interval"]

PREFIX = "system/"
"""The prefix of all keys. MLflow shows keys with it on a page of their own, and knows the names of the host's keys."""

MIN_INTERVAL_S = 0.5
_MAX_SHARE = 0.02  # of one core; where measuring is slow, the pauses are longer
_STOP_S = 2.0
_MEGABYTE = 1e6
_log = logging.getLogger(__name__)


def check_interval(interval_s: object) -> None:
    """Check the seconds between two measurements when the job is written.

    Raises:
        ConfigError: they are neither None nor a number of at least `MIN_INTERVAL_S`.
    """
    is_number = isinstance(interval_s, int | float) and not isinstance(interval_s, bool)
    if interval_s is not None and not (is_number and MIN_INTERVAL_S <= interval_s < float("inf")):  # type: ignore[operator]
        raise ConfigError(
            f"tracking: system_metrics: expected the seconds between two measurements, at least {MIN_INTERVAL_S}, or "
            f"None to measure nothing, got {interval_s!r}"
        )


class SystemMetrics:
    """Measures with a thread of its own, from ``start`` to ``stop``. Never raises into its caller.

    A value that cannot be measured is left out. If measuring fails as a whole, it warns once and ends.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], interval_s: float, folder: Path) -> None:
        """Prepare; ``start`` starts the thread.

        Args:
            log: takes what was measured.
            interval_s: the shortest time between two measurements, in seconds. It is longer where measuring is slow.
            folder: the disk that holds it is measured.
        """
        self._log_values = log
        self._interval_s = interval_s
        self._folder = folder
        self._stop = threading.Event()
        self._thread = OwnThread(target=self._main, name="trackhub-system-metrics", daemon=True)

    def start(self) -> None:
        """Start to measure. The first values come after one interval, since a rate needs a beginning and an end."""
        self._thread.start()

    def stop(self) -> None:
        """Stop measuring. Waits up to two seconds for a measurement that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def _main(self) -> None:
        try:
            with _probe(self._folder) as probe:
                probe.measure()
                pause = self._interval_s
                while not self._stop.wait(pause):
                    before = time.thread_time()
                    values = probe.measure()
                    if values and not self._stop.is_set():
                        self._log_values({f"{PREFIX}{key}": value for key, value in values.items()})
                    pause = max(self._interval_s, (time.thread_time() - before) / _MAX_SHARE)
        except Exception as e:  # noqa: BLE001  # training goes on, whatever psutil or a driver does
            _log.warning("system metrics end here, and training goes on: %s: %s", type(e).__name__, e)


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[_Probe]:
    import psutil

    nvml = _nvml()
    try:
        yield _Probe(psutil, nvml, folder)
    finally:
        if nvml is not None:
            with contextlib.suppress(Exception):
                nvml.nvmlShutdown()


def _nvml() -> Any:
    """Return NVIDIA's library, ready for use. None if it is not installed, or if there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001  # not installed, or no driver
        return None
    return pynvml


class _Probe:
    """Measures once for each call. Used by one thread."""

    def __init__(self, psutil: Any, nvml: Any, folder: Path) -> None:
        self._psutil = psutil
        self._nvml = nvml
        self._folder = folder
        self._own = psutil.Process()
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._at = time.monotonic()
        self._network_before = _or_none(psutil.net_io_counters)

    def measure(self) -> dict[str, float]:
        """Return what can be measured now, by name."""
        found: dict[str, float] = {}
        pids: set[int] = set()
        for part in (lambda: self._job(pids), self._host, self._disk, self._network, lambda: self._gpus(pids)):
            # A part may be forbidden to this process, such as the network in a sandbox. The other parts still count.
            found |= _or_none(part) or {}
        return found

    def _job(self, pids: set[int]) -> dict[str, float]:
        """Return the CPU use and the memory of this process and of all that it started. Add their ids to ``pids``."""
        memory, cpu_s = 0, {}
        for process in [self._own, *self._own.children(recursive=True)]:
            with contextlib.suppress(self._psutil.Error):  # it has just ended
                with process.oneshot():
                    times = process.cpu_times()
                    memory += process.memory_info().rss
                    cpu_s[process.pid, process.create_time()] = times.user + times.system
                pids.add(process.pid)
        now = time.monotonic()
        used = sum(max(0.0, seconds - self._cpu_s.get(key, 0.0)) for key, seconds in cpu_s.items())
        share = used / max(now - self._at, 1e-9)
        self._cpu_s, self._at = cpu_s, now
        return {
            "job_cpu_percentage": 100 * share,
            "job_memory_usage_megabytes": memory / _MEGABYTE,
            "job_processes": float(len(cpu_s)),
        }

    def _host(self) -> dict[str, float]:
        memory = self._psutil.virtual_memory()
        return {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
        }

    def _disk(self) -> dict[str, float]:
        disk = self._psutil.disk_usage(str(self._folder))
        return {
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }

    def _network(self) -> dict[str, float]:
        """Return what the host has sent and received since the start."""
        now, before = self._psutil.net_io_counters(), self._network_before
        if now is None or before is None:
            return {}
        return {
            "network_receive_megabytes": (now.bytes_recv - before.bytes_recv) / _MEGABYTE,
            "network_transmit_megabytes": (now.bytes_sent - before.bytes_sent) / _MEGABYTE,
        }

    def _gpus(self, pids: set[int]) -> dict[str, float]:
        if self._nvml is None:
            return {}
        found: dict[str, float] = {}
        for number in range(self._nvml.nvmlDeviceGetCount()):
            found |= _or_none(lambda number=number: self._gpu(number, pids)) or {}  # type: ignore[misc]
        return found

    def _gpu(self, number: int, pids: set[int]) -> dict[str, float]:
        nvml, name = self._nvml, f"gpu_{number}"
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        found = {
            f"{name}_memory_usage_megabytes": memory.used / _MEGABYTE,
            f"{name}_memory_usage_percentage": 100 * memory.used / memory.total,
        }
        # Some drivers cannot measure these, for example on a GPU that is divided (MIG).
        if (rates := _or_none(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))) is not None:
            found[f"{name}_utilization_percentage"] = float(rates.gpu)
        if (power := _or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle))) is not None:
            found[f"{name}_power_usage_watts"] = power / 1000
        if (running := _or_none(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))) is not None:
            own = [process.usedGpuMemory or 0 for process in running if process.pid in pids]
            found[f"{name}_job_memory_megabytes"] = sum(own) / _MEGABYTE
        return found


def _or_none(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except Exception:  # noqa: BLE001  # psutil and drivers raise errors of many kinds
        return None
