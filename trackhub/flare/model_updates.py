# SPDX-License-Identifier: Apache-2.0
"""Measures each site's model update: its norm, and its cosine with the mean of all updates.

The cosine shows how far the sites agree. `trackhub.flare.federation_facts` calls this on the server if the job asks for
it. An *update* is the difference between the model that a site returns and the model that it received. Some sites send
this difference itself. Updates stay in memory until the round's aggregation is done.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey

from trackhub.flare.read_task_events import model_in
from trackhub.printable import printable

__all__ = ["MAX_KEPT_BYTES", "ModelUpdates"]

MAX_KEPT_BYTES = 1 << 30
"""How much memory the updates of one round may take, in bytes. A number takes 4 in each update, and 8 in the sum."""

_BLOCK = 1 << 16  # numbers that are handled together, since they fit into a processor's cache
_MAX_WARNINGS = 20
_Array = np.ndarray[Any, Any]
_Pairs = dict[str, tuple[_Array, _Array | None]]


class _UnreadableError(Exception):
    """A result cannot be measured, for a reason that the log says."""


class ModelUpdates:
    """Measures the updates of one round at a time. FLARE may call it from several threads. No method raises."""

    def __init__(self, warn: Callable[[str], None], max_bytes: int = MAX_KEPT_BYTES) -> None:
        """Begin without a round.

        Args:
            warn: writes a line into the log.
            max_bytes: as `MAX_KEPT_BYTES`.
        """
        self._warn = warn
        self._warned: set[str] = set()
        self._max_bytes = max_bytes
        self._sent: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()  # protects all fields below
        self._seen: set[str] = set()
        self._norms: dict[str, float] = {}
        self._kept: dict[str, dict[str, _Array]] = {}
        self._sum: dict[str, _Array] = {}
        self._bytes = 0
        self._left_out: set[str] = set()

    def of_next_round(self) -> ModelUpdates:
        """Return measurements for the next round. What this one has told the log is not told again."""
        found = ModelUpdates(self._warn, self._max_bytes)
        found._warned = self._warned
        return found

    def note_sent(self, task_id: str, data: Any) -> None:
        """Note the model in a task that a site gets. Keeps FLARE's own arrays, and copies none."""
        model = model_in(data)
        if model is not None and isinstance(model.data, Mapping):
            self._sent[task_id] = model.data

    def take(self, task_id: str, site: str, result: Any) -> dict[str, float]:
        """Measure the update in a site's result. Blocks for a pass or two over the model.

        Args:
            task_id: the task, as for ``note_sent``.
            site: the site. The first result with a model in a round counts.
            result: the result.

        Returns:
            key -> norm of the update. Empty if the result has no model that can be read.
        """
        sent, model = self._sent.pop(task_id, None), model_in(result)
        if model is None or (sent is None and model.data_kind == DataKind.WEIGHTS):
            return {}  # only metrics, or the task held no model to compare with, as in cross-site evaluation
        with self._lock:
            if site in self._seen:
                return {}
            self._seen.add(site)
            try:
                norm = self._measure(site, _pairs(model, sent))
            except Exception as e:  # a model of a form that is not known here must not harm the job
                self._leave_out(site, str(e) if isinstance(e, _UnreadableError) else f"{type(e).__name__}: {e}")
                return {}
            return {f"fl/update_norm/{site}": norm}

    def end(self) -> dict[str, float]:
        """Return what is known of the round as a whole, and forget it. Blocks for a pass over each update."""
        self._sent.clear()
        with self._lock:
            try:
                found = {f"fl/update_cosine/{site}": cosine for site, cosine in self._cosines()}
            except Exception as e:  # no memory, for example
                found = {}
                for site in self._norms:
                    self._leave_out(site, f"{type(e).__name__}: {e}")
            if self._left_out:
                found["fl/updates_left_out"] = float(len(self._left_out))
            self._seen, self._norms, self._kept, self._sum, self._left_out = set(), {}, {}, {}, set()
            self._bytes = 0
            return found

    def _leave_out(self, site: str, reason: str) -> None:
        self._left_out.add(site)
        message = f"site {printable(site)}: the norm or cosine of its update is missing: {printable(reason)[:300]}"
        if message not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(message)
            self._warn(message)

    def _measure(self, site: str, pairs: _Pairs) -> float:
        """Return an update's norm. Keep the update, and add it to the sum, as far as there is room."""
        for name, total in self._sum.items():
            if name in pairs and pairs[name][0].size != total.size:
                raise _UnreadableError(f"its array {name!r} and that of another site differ in size")
        numbers = sum(after.size for after, _ in pairs.values())
        new = 8 * sum(after.size for name, (after, _) in pairs.items() if name not in self._sum)
        is_kept = self._bytes + new + 4 * numbers <= self._max_bytes
        kept = {name: np.empty(after.size, np.float32) for name, (after, _) in pairs.items()} if is_kept else {}
        squares = 0.0
        with np.errstate(all="ignore"):
            for name, (after, before) in pairs.items():
                for at, block in _blocks(after, before):
                    squares += _product(block, block)
                    if is_kept:
                        kept[name][at] = block
            if not math.isfinite(squares):
                self._leave_out(site, "it holds numbers that are not finite, or too large")
                return math.sqrt(squares) if squares >= 0 else math.nan
            if self._bytes + new > self._max_bytes:
                self._leave_out(site, f"the model is larger than the {self._max_bytes} bytes that updates may take")
                return math.sqrt(squares)
            for name, (after, before) in pairs.items():
                if name not in self._sum:
                    self._sum[name] = np.zeros(after.size)
                total = self._sum[name]
                if is_kept:
                    total += kept[name]
                else:
                    for at, block in _blocks(after, before):
                        total[at] += block
        self._bytes += new
        self._norms[site] = math.sqrt(squares)
        if is_kept:
            self._kept[site] = kept
            self._bytes += 4 * numbers
        else:
            self._leave_out(
                site, f"the round's updates take more than {self._max_bytes} bytes. Only the cosine is missing"
            )
        return self._norms[site]

    def _cosines(self) -> Iterator[tuple[str, float]]:
        """Yield the cosine between each kept update and the mean of all. An update of only zeros has no cosine."""
        with np.errstate(all="ignore"):
            length = math.sqrt(sum(_product(block, block) for a in self._sum.values() for _, block in _blocks(a, None)))
            for site, arrays in self._kept.items():
                product = sum(
                    _product(block, self._sum[name][at]) for name, a in arrays.items() for at, block in _blocks(a, None)
                )
                both = self._norms[site] * length
                if both > 0 and math.isfinite(product / both):
                    yield site, max(-1.0, min(1.0, product / both))


def _pairs(model: DXO, sent: Mapping[str, Any] | None) -> _Pairs:
    """Return each array of an update, flat: as the site returned it, and as the server had sent it.

    The second is None if the site returned a difference. Integer arrays are left out, and so are arrays that are
    missing on one side or differ in shape. An array that is left out counts as unchanged.

    Raises:
        _UnreadableError: nothing is left, or the model is in a form that is not known here.
    """
    algorithm = model.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)
    if algorithm is not None:
        raise _UnreadableError(f"it is encrypted, quantized or otherwise processed ({algorithm})")
    if model.data_kind == DataKind.COLLECTION or not isinstance(model.data, Mapping):
        raise _UnreadableError("it holds the models of several clients, or something that is not a model of arrays")
    pairs: _Pairs = {}
    for name, value in model.data.items():
        after = _floats(value)
        before = None if sent is None else _floats(sent.get(name))
        if after is None or (sent is not None and (before is None or before.shape != after.shape)):
            continue
        if before is not None:
            before = None if model.data_kind == DataKind.WEIGHT_DIFF else before.reshape(-1)
        pairs[str(name)] = after.reshape(-1), before
    if not pairs:
        raise _UnreadableError(
            "expected floating-point arrays with the names and shapes of the arrays that the server sent; found none"
        )
    return pairs


def _floats(value: Any) -> _Array | None:
    """Return an array of floating-point numbers as numpy has it. None for everything else.

    Raises:
        _UnreadableError: it is something else, such as a tensor on a disk or an encrypted array.
    """
    if value is None or isinstance(value, int | str):
        return None
    if isinstance(value, float | np.ndarray | np.generic):
        array = np.asarray(value)
        return array if array.dtype.kind == "f" else None
    if callable(getattr(value, "detach", None)) and callable(getattr(value, "is_floating_point", None)):
        if not value.is_floating_point():
            return None
        tensor = value.detach().cpu()
        # numpy has no bfloat16.
        found: _Array = (tensor if tensor.element_size() >= 4 else tensor.float()).numpy()
        return found
    raise _UnreadableError(f"it holds a {type(value).__name__}; expected only arrays")


def _blocks(after: _Array, before: _Array | None) -> Iterator[tuple[slice, _Array]]:
    """Yield the difference of two arrays piece by piece, as 64-bit floats, and where each piece is."""
    for begin in range(0, after.size, _BLOCK):
        at = slice(begin, begin + _BLOCK)
        block = after[at].astype(np.float64)
        if before is not None:
            block -= before[at]
        yield at, block


def _product(a: _Array, b: _Array) -> float:
    """Return the sum of the products.

    ``einsum`` computes it in this thread alone. ``@`` would start threads, and these wait on a busy machine.
    """
    return float(np.einsum("i,i->", a, b))
