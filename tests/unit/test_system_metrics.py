# SPDX-License-Identifier: Apache-2.0
"""What is measured of a host and of a job's processes agrees with the system, and nothing breaks what measures."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from trackhub.errors import ConfigError
from trackhub.system_metrics import SystemMetrics, check_interval

WAIT_S = 30.0
CHILD = "import sys; data = bytearray(64_000_000); print('ready', flush=True); sys.stdin.read()"


def measured(folder: Path, enough: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Measure until what is measured is enough, and return it."""
    found: list[dict[str, float]] = []
    done = threading.Event()

    def log(values: dict[str, float]) -> None:
        if enough(values):
            found.append(values)
            done.set()

    metrics = SystemMetrics(log, 0.01, folder)
    metrics.start()
    try:
        assert done.wait(WAIT_S)
    finally:
        metrics.stop()
    return found[0]


def test_memory_disk_and_network_of_the_host_agree_with_the_system(tmp_path: Path) -> None:
    values = measured(tmp_path, lambda _: True)

    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(tmp_path))
    assert values["system/system_memory_usage_percentage"] == pytest.approx(memory.percent, abs=20)
    assert values["system/disk_usage_percentage"] == pytest.approx(disk.percent, abs=5)
    assert values["system/disk_available_megabytes"] == pytest.approx(disk.free / 1e6, rel=0.2)
    assert values["system/network_receive_megabytes"] >= 0
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert not [key for key in values if "gpu" in key]


def test_the_jobs_memory_includes_what_its_processes_started(tmp_path: Path) -> None:
    alone = measured(tmp_path, lambda _: True)
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        together = measured(tmp_path, lambda values: values["system/job_processes"] > alone["system/job_processes"])
        child.kill()

    assert together["system/job_memory_usage_megabytes"] >= alone["system/job_memory_usage_megabytes"] + 50


def test_the_jobs_cpu_time_is_that_of_this_process(tmp_path: Path) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        values = measured(tmp_path, lambda values: values["system/job_cpu_percentage"] > 0)
    finally:
        stop.set()
        thread.join()

    assert values["system/job_cpu_percentage"] > 0


def fake_nvml() -> Any:
    """Return what stands for NVIDIA's library: two GPUs, of which the second one says almost nothing."""

    def not_supported(_: int) -> None:
        raise RuntimeError("not supported")

    own = psutil.Process().pid
    running = [SimpleNamespace(pid=own, usedGpuMemory=3_000_000), SimpleNamespace(pid=1, usedGpuMemory=None)]
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=4_000_000, total=8_000_000),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=75) if handle == 0 else not_supported(handle),
        nvmlDeviceGetPowerUsage=lambda handle: 250_000 if handle == 0 else not_supported(handle),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: running if handle == 0 else not_supported(handle),
    )


def test_each_gpu_is_measured_as_far_as_its_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())

    values = measured(tmp_path, lambda _: True)

    assert {key: value for key, value in values.items() if "gpu" in key} == {
        "system/gpu_0_memory_usage_megabytes": 4.0,
        "system/gpu_0_memory_usage_percentage": 50.0,
        "system/gpu_0_utilization_percentage": 75.0,
        "system/gpu_0_power_usage_watts": 250.0,
        "system/gpu_0_job_memory_megabytes": 3.0,
        "system/gpu_1_memory_usage_megabytes": 4.0,
        "system/gpu_1_memory_usage_percentage": 50.0,
    }


def test_a_part_that_cannot_be_measured_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError("a sandbox")

    monkeypatch.setattr(psutil, "net_io_counters", forbidden)
    monkeypatch.setattr(psutil, "virtual_memory", forbidden)

    values = measured(tmp_path, lambda _: True)

    assert "system/job_processes" in values
    assert not [key for key in values if "network" in key or "system_memory" in key]


def test_without_psutil_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    metrics = SystemMetrics(lambda values: None, 0.01, tmp_path)

    metrics.start()
    metrics._thread.join(WAIT_S)
    metrics.stop()

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on" in caplog.text


def test_a_log_that_raises_ends_the_thread_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def log(values: dict[str, float]) -> None:
        raise OSError("the disk is gone")

    metrics = SystemMetrics(log, 0.01, tmp_path)
    metrics.start()
    metrics._thread.join(WAIT_S)
    metrics.stop()

    assert "the disk is gone" in caplog.text


def test_stop_before_start_has_no_effect(tmp_path: Path) -> None:
    SystemMetrics(lambda values: None, 1.0, tmp_path).stop()


@pytest.mark.parametrize("interval", [0, 0.1, -1, True, "10", float("inf"), float("nan"), [1]])
def test_an_interval_that_cannot_be_meant_is_refused(interval: Any) -> None:
    with pytest.raises(ConfigError, match="system_metrics"):
        check_interval(interval)


@pytest.mark.parametrize("interval", [None, 0.5, 10, 3600.0])
def test_an_interval_in_seconds_is_taken(interval: Any) -> None:
    check_interval(interval)
