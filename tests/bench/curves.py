# SPDX-License-Identifier: Apache-2.0
"""How cost grows with records, keys, sites and backends, as tables and pictures: ``make bench-curves``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.child import in_child

__all__ = ["draw_all", "measure_all"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 320, 70, 40, 50
_HEAD = "# Growth, as `make bench-curves` measured it"
_COLOURS = ("#2272b4", "#c82d4c", "#3ba974", "#8f5bd7", "#e29d1e")


def measure_all(quick: bool, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure every curve; each point is the median of three runs, one if quick."""
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
        values: dict[str, float] = in_child("scale:load", folder=folder, **load)["values"]
    return values


def _curve(name: str, x: str, unit: str, series: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {"name": name, "x": x, "unit": unit, "series": series}


def draw_all(curves: Sequence[Mapping[str, Any]], folder: Path) -> None:
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
    """Draw a curve: the points at equal distances, since they are powers; heights from zero."""
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
