# SPDX-License-Identifier: Apache-2.0
"""How cost grows: with sites, and in curves also with records, keys, batches and backends.

The command calls `many_sites`, `measure_curves` and `draw_curves`. All of them feed one receiver with a real journal
and real lanes, but without FLARE.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.backend_rates import bare
from tests.bench.load import BATCH, feed, open_receiver, requests
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.store_counts import count_mlflow
from tests.bench.subprocesses import in_child, own_cpu_s, peak_mb, resident_mb
from trackhub.job_and_run_info import RunStatus

__all__ = ["draw_curves", "many_sites", "measure_curves"]

_EACH = 1000
_FIRST_BATCH = (
    "MLflow's own log_batch takes half as long again for the first batch of a run as for a later one. With 1,000 "
    "records each, every site's batch is its first; the next figure has as many runs on both sides"
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 320, 70, 40, 50
_HEAD = "# Growth, as `make bench-curves` measured it"
_COLOURS = ("#2272b4", "#c82d4c", "#3ba974", "#8f5bd7", "#e29d1e")


def many_sites(quick: bool) -> list[Experiment]:
    """Return the experiments that compare many sites with two sites and the same load."""
    label = f"1,000 sites x {_EACH:,} records into TensorBoard"
    load = Experiment(
        "1,000 sites, TensorBoard",
        {"many": _arm(1000, ["tensorboard"]), "few": _arm(2, ["tensorboard"], 1000)},
        [
            Figure(label, "2 sites with as many", "rate", "many", "few", "records/s", "times more", 0.8,
                   "a thousand runs are opened, each with a folder and files of its own, and each ends with an fsync"),
            Figure("memory of an idle site at the receiver", "", "idle_kb", "many", "", "KB", "at most", 50),
            Figure("open files of the receiver at 1,000 sites", "", "files", "many", "", "files", "at most", 64),
        ],
        repeat=1 if quick else 5,
    )  # fmt: skip
    if quick:
        return [load]
    # MLflow takes two minutes for a million points. Costs are linear in the sites, so 100 sites show the same ratio.
    both = ["tensorboard", "mlflow"]
    label = f"100 sites x {_EACH:,} records into TensorBoard and MLflow"
    arms = {"many": _arm(100, both), "few": _arm(2, both, 100), "bare": bare("mlflow", _EACH, 100)}
    figures = [
        Figure(label, "2 sites with as many", "rate", "many", "few", "records/s", "times more", 0.8, _FIRST_BATCH),
        Figure(label, "MLflow's log_batch, 100 runs, nothing else", "rate", "many", "bare", "records/s",
               "times more", 0.8),
    ]  # fmt: skip
    return [load, Experiment("100 sites, both", arms, figures, repeat=1)]


def _arm(sites: int, backends: list[str], as_of: int = 0) -> Arm:
    each = _EACH * as_of // sites if as_of else _EACH

    def run(folder: Path) -> Run:
        result = in_child("growth:load", 1800.0, folder=str(folder), sites=sites, each=each, backends=backends)
        return Run(result["values"], sites * each, result["stored"])

    return run


def load(
    folder: str, sites: int, each: int, backends: list[str], keys: int = 1, batch: int = BATCH
) -> dict[str, Any]:  # fmt: skip
    """Feed one receiver from eight threads, and wait until every backend has confirmed every record.

    Args:
        folder: the job's run folder.
        sites: how many sites.
        each: records from each site.
        backends: their names; they get no options.
        keys: metrics in each record.
        batch: records in each request.
    """
    root = Path(folder)
    names = [f"site-{i + 1:04d}" for i in range(sites)]
    # All sites send the same records, each under its own name, so the requests are made once.
    prepared = list(requests(each, keys=keys, batch=batch))
    hello, batches, final = prepared[:1], prepared[1:-1], prepared[-1:]
    receiver = open_receiver(root, {name: {} for name in backends})
    before_mb = resident_mb()
    begin, cpu = time.perf_counter(), own_cpu_s()
    feed(receiver, dict.fromkeys(names, hello + batches + final))
    accepted = time.perf_counter() - begin
    files = len(list(Path("/proc/self/fd").iterdir()))
    report = receiver.finish(RunStatus.FINISHED)
    seconds = time.perf_counter() - begin
    stored = [sum(site.journaled for site in report.sites.values())]
    stored += [sum(run.confirmed for run in report.lanes[name].values()) for name in backends]
    if "tensorboard" in backends:
        stored.append(_count_events(root / "tensorboard") // keys)
    if "mlflow" in backends:
        stored.append(count_mlflow(root / "mlflow" / "mlflow.db") // keys)
    values = {
        "rate": sites * each / seconds,
        "accepted_rate": sites * each / accepted,
        "cpu_us": (own_cpu_s() - cpu) / (sites * each) * 1e6,
        "files": files,
        "idle_kb": (peak_mb() - before_mb) / sites * 1024,
    }
    return {"values": values, "stored": min(stored)}


def _count_events(folder: Path) -> int:
    """Count scalars by their tags: decoding a million protobuf messages would take a minute.

    The plugin's own marks hold tags as well, but in quotes. These are taken off.
    """
    contents = (path.read_bytes() for path in folder.rglob("*.trackhub"))
    return sum(content.count(b"train/") - content.count(b'"train/') for content in contents)


def measure_curves(quick: bool, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure every curve. Each point is the median of three runs; with ``quick`` it is one run.

    Args:
        quick: fewer records and runs.
        tell: takes one line about each point.
    """
    most = 100_000 if quick else 1_000_000
    counts = [n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= most]
    repeat = 1 if quick else 3

    def point(label: str, key: str, **load: Any) -> float:
        values = sorted(_load(load)[key] for _ in range(repeat))
        tell(f"curve {label}: {load}: {values[len(values) // 2]:.4g}")
        return values[len(values) // 2]

    load = {"sites": 2, "keys": 1, "backends": ["tensorboard"]}
    total, per_site = most // 10, most // 1000
    return [
        _curve("records", "records in the job", "records/s from the first request to the last confirmation", {
            name: [[n, point("records", "rate", **{**load, "each": n // 2, "backends": names})] for n in counts]
            for name, names in (("journal alone", []), ("tensorboard", ["tensorboard"]), ("jsonl", ["jsonl"]))
        }),
        _curve("keys", "metrics in a record", "metric values/s", {
            name: [
                [k, k * point("keys", "rate", **{**load, "keys": k, "each": total // 2 // k, "backends": names})]
                for k in (1, 10, 100)
            ]
            for name, names in (("journal alone", []), ("tensorboard", ["tensorboard"]))
        }),
        _curve("sites", "sites", f"records/s, {per_site:,} records from each site", {
            name: [[n, point("sites", "rate", **{**load, "sites": n, "each": per_site, "backends": names})]
                   for n in (1, 4, 16, 64, 256, 1000)]
            for name, names in (("journal alone", []), ("tensorboard", ["tensorboard"]))
        }),
        _curve("batches", "records in a batch", f"records/s, {per_site // 10} from each of 100 sites in turn", {
            name: [
                [n, point("batches", "rate", **{**load, "sites": 100, "each": per_site // 10, "batch": n,
                                                "backends": names})]
                for n in (1, 10, 100) if n <= per_site // 10
            ]
            for name, names in (("journal alone", []), ("tensorboard", ["tensorboard"]))
        }),
        _curve("backends", "backends in one receiver", "records/s until all of them have confirmed", {
            "in this order: tensorboard, jsonl, mlflow": [
                [n, point("backends", "rate", **{**load, "each": total // 10, "backends": names[:n]})]
                for names in (["tensorboard", "jsonl", "mlflow"],)
                for n in (0, 1, 2, 3)
            ]
        }),
    ]  # fmt: skip


def _load(load: Mapping[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="trackhub-bench-") as folder:
        values: dict[str, float] = in_child("growth:load", folder=folder, **load)["values"]
    return values


def _curve(name: str, x: str, unit: str, series: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {"name": name, "x": x, "unit": unit, "series": series}


def draw_curves(curves: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write each curve as ``<name>.svg``, and all of them as tables into ``README.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    for curve in curves:
        (folder / f"{curve['name']}.svg").write_text("\n".join(_svg(curve)) + "\n", encoding="utf-8")
    tables = "\n\n".join("\n".join(_table(curve)) for curve in curves)
    (folder / "README.md").write_text(f"{_HEAD}\n\n{tables}\n", encoding="utf-8")


def _table(curve: Mapping[str, Any]) -> list[str]:
    series = curve["series"]
    lines = [f"| {curve['x']} | " + " | ".join(series) + " |", "|" + " ---: |" * (1 + len(series))]
    for row in zip(*series.values(), strict=True):
        lines += [f"| {row[0][0]:,} | " + " | ".join(f"{value:,.0f}" for _, value in row) + " |"]
    return [
        f"## {curve['name'].capitalize()}",
        "",
        f"{curve['unit']}:",
        "",
        *lines,
        "",
        f"![{curve['name']}]({curve['name']}.svg)",
    ]


def _svg(curve: Mapping[str, Any]) -> list[str]:
    """Draw a curve. Its points have equal distances, since they are powers; the y axis begins at zero."""
    series: dict[str, list[list[float]]] = curve["series"]
    names, points = list(series), list(series.values())
    top = max(value for line in points for _, value in line) or 1.0
    inner_width, inner_height = _WIDTH - 2 * _LEFT, _HEIGHT - _TOP - _BOTTOM
    base = _HEIGHT - _BOTTOM

    def at(i: int, value: float) -> str:
        return f"{_LEFT + inner_width * i / max(len(points[0]) - 1, 1):.1f},{base - inner_height * value / top:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18">{curve["unit"]}</text>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{curve["x"]}</text>',
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _LEFT}" fill="none" stroke="black"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{top:,.0f}</text>',
        f'<text x="{_LEFT - 6}" y="{base + 4}" text-anchor="end">0</text>',
    ]
    for i, (x, _) in enumerate(points[0]):
        lines.append(f'<text x="{at(i, 0).split(",")[0]}" y="{base + 16}" text-anchor="middle">{x:,}</text>')
    for n, (name, line) in enumerate(zip(names, points, strict=True)):
        colour = _COLOURS[n % len(_COLOURS)]
        path = " ".join(at(i, value) for i, (_, value) in enumerate(line))
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{_LEFT + 8}" y="{_TOP + 14 * (n + 1)}" fill="{colour}">{name}</text>')
    return [*lines, "</svg>"]
