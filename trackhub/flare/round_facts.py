# SPDX-License-Identifier: Apache-2.0
"""Works out what happened in one round: which sites took part, who waited for whom, how many model bytes were sent.

`federation_facts` tells a `Round` which tasks the server hands out and which results come. A round may have several
tasks: to all sites at once, to one site after another, or one task after another to the same sites.
"""

from __future__ import annotations

import math
import time

from trackhub.flare.read_task_events import HandedTask, ReturnedTask
from trackhub.printable import printable

__all__ = ["TABLE_HEAD", "Round"]

TABLE_HEAD = (
    "| round | seconds | sampled | reported | missing | failed | all others waited for |\n"
    + ("| ---: " * 4 + "| --- " * 3 + "|")
)  # fmt: skip
"""The head of the table whose rows `Round.row` returns, in Markdown."""


class _Handed:
    """A task that one site has got. Times are of the monotonic clock."""

    __slots__ = ("at", "has_answer", "out_since", "result_at", "task")

    def __init__(self, task: HandedTask, at: float, out_since: float) -> None:
        self.task = task
        self.at = at
        self.out_since = out_since  # since when the site could ask for it
        self.has_answer = False
        self.result_at: float | None = None  # None until the result comes, and if the site says that the task failed


class Round:
    """What has happened in one round. Not thread-safe. Times are of the monotonic clock.

    Attributes:
        number: the round.
        began: when it began.
        last_event_at: when the last thing happened in it.
        last_made_at: when the newest of its tasks was made, as in `HandedTask`.
        sampled: the sites for which the workflow had a task.
        failed: the sites that say that a task failed.
    """

    def __init__(self, number: int) -> None:
        """Begin the round now."""
        self.number = number
        self.began = self.last_event_at = time.monotonic()
        self.last_made_at = 0.0
        self.sampled: set[str] = set()
        self.failed: set[str] = set()
        self._targets: set[tuple[str, str]] = set()  # workflow's task, site that it is for
        self._handed: dict[str, _Handed] = {}
        self._first_handed: dict[str, float] = {}
        self._steps: dict[str, float] = {}
        self._bytes_sent = 0
        self._bytes_received = 0

    def note_event(self) -> None:
        """Note that something happens in this round now."""
        self.last_event_at = time.monotonic()

    def hand(self, task: HandedTask) -> set[str]:
        """Note that a site gets a task. Return the sites that the round did not expect before."""
        self.note_event()
        now = self.last_event_at
        self.last_made_at = max(self.last_made_at, task.made_at)
        # If a site asks again, FLARE hands out the same task again. The site's time counts from the first time.
        if task.id not in self._handed:
            first = self._first_handed.setdefault(task.workflow_task, now)
            self._handed[task.id] = _Handed(task, now, now if task.is_relay else first)
        self._bytes_sent += task.model_bytes
        self._targets |= {(task.workflow_task, site) for site in task.targets}
        new = {task.site, *task.targets} - self.sampled
        self.sampled |= new
        return new

    def take(self, result: ReturnedTask) -> tuple[str, dict[str, float]] | None:
        """Note a result. Return its site, and the facts about it. None if this round handed out no such task."""
        if result.id not in self._handed:
            return None
        self.note_event()
        handed = self._handed[result.id]
        handed.has_answer = True
        site = handed.task.site
        self._bytes_received += result.model_bytes
        facts = {f"fl/seconds/{handed.task.name}/{site}": self.last_event_at - handed.at}
        if result.is_ok:
            handed.result_at = self.last_event_at
        elif site not in self.failed:
            self.failed.add(site)
            facts[f"fl/failed/{site}"] = 1.0
        if result.steps is not None and self._steps.get(site) != result.steps:
            self._steps[site] = facts[f"fl/steps/{site}"] = result.steps
        return site, facts

    def missing(self) -> set[str]:
        """Return the sampled sites that lack an answer to one of their tasks, and have not failed."""
        got = {(handed.task.workflow_task, handed.task.site) for handed in self._handed.values()}
        waiting = {site for _, site in self._targets - got}
        waiting |= {handed.task.site for handed in self._handed.values() if not handed.has_answer}
        return waiting - self.failed

    def reported(self) -> set[str]:
        """Return the sites from which all results of the round have come."""
        return self.sampled - self.missing() - self.failed

    def _results_at(self) -> dict[str, float]:
        """Return site -> when its last result came."""
        found: dict[str, float] = {}
        for results in self._results_together():
            found |= results
        return found

    def _results_together(self) -> list[dict[str, float]]:
        """Return site -> when its result came, for each group of tasks that were out at the same time.

        A site waits for the others of its group only. In a relay, each site is a group of its own.
        """
        found: list[dict[str, float]] = []
        last = -math.inf
        done = [(handed.out_since, handed.result_at, handed.task.site) for handed in self._handed.values()]
        for out_since, at, site in sorted((out, at, site) for out, at, site in done if at is not None):
            if out_since >= last:
                found.append({})
            found[-1][site] = max(at, found[-1].get(site, at))
            last = max(last, at)
        return found

    def waits(self) -> dict[str, float]:
        """Return site -> how many seconds its results waited for the last result of their groups.

        `_results_together` says what a group is.
        """
        found: dict[str, float] = {}
        for results in self._results_together():
            last = max(results.values())
            for site, at in results.items():
                found[site] = found.get(site, 0.0) + last - at
        return found

    def waited_for(self) -> dict[str, float]:
        """Return site -> how many seconds all other sites of its group waited for it alone.

        Only sites whose result came last are in it.
        """
        found: dict[str, float] = {}
        for results in self._results_together():
            if len(results) > 1:
                (second, _), (last, site) = sorted((at, site) for site, at in results.items())[-2:]
                found[site] = found.get(site, 0.0) + last - second
        return found

    def facts(self, seconds: float) -> dict[str, float]:
        """Return what the federation run says of the whole round when it ends."""
        missing, reported = self.missing(), self.reported()
        found = {
            "fl/round_seconds": seconds,
            "fl/sites_sampled": len(self.sampled),
            "fl/sites_reported": len(reported),
            "fl/sites_missing": len(missing),
            "fl/sites_failed": len(self.failed),
            "fl/model_bytes_sent": self._bytes_sent,
            "fl/model_bytes_received": self._bytes_received,
        }
        found |= {f"fl/missing/{site}": 1 for site in missing}
        results_at = self._results_at()
        found |= {f"fl/result_after_seconds/{site}": results_at[site] - self.began for site in sorted(reported)}
        found |= {f"fl/wait_seconds/{site}": wait for site, wait in self.waits().items()}
        found |= {f"fl/waited_for_seconds/{site}": wait for site, wait in self.waited_for().items()}
        return found

    def row(self, seconds: float) -> str:
        """Return the round's row of the table that `TABLE_HEAD` begins, in Markdown."""
        waited = "; ".join(f"{_cell(site)}, {wait:.1f} s" for site, wait in self.waited_for().items()) or "-"
        missing, failed = (", ".join(map(_cell, sorted(sites))) or "-" for sites in (self.missing(), self.failed))
        return (
            f"| {self.number} | {seconds:.1f} | {len(self.sampled)} | {len(self.reported())} | {missing} | {failed} "
            f"| {waited} |"
        )


def _cell(name: str) -> str:
    return printable(name).replace("|", "\\|")
