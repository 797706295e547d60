# SPDX-License-Identifier: Apache-2.0
"""Logs into the federation run how the job proceeds: rounds, sites, waits, bytes of model, and FLARE's own metrics.

`trackhub.flare.receiver_widget` makes a `FederationWatch` on the server. It learns everything from FLARE's events, so a
training script needs no line for it. `trackhub.flare.read_task_events` reads the events, and
`trackhub.flare.round_facts` works out what they say of a round.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from trackhub.delivery import FederationRun
from trackhub.flare import flare_internals, read_task_events
from trackhub.flare.model_updates import ModelUpdates
from trackhub.flare.read_task_events import HandedTask, ReturnedTask
from trackhub.flare.round_facts import TABLE_HEAD, Round

__all__ = ["FederationWatch"]

_MAX_ROUNDS_IN_SUMMARY = 200


class FederationWatch(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """Watches the rounds of the server's workflows. FLARE calls it from several threads."""

    def __init__(self, engine: Any, federation: FederationRun, *, update_statistics: bool = False) -> None:
        """Watch the server's events from now on.

        Args:
            engine: FLARE's engine in this process.
            federation: where to write what is seen.
            update_statistics: measure what each site changed in the model. It takes a pass or two over each result.
        """
        super().__init__()
        self._federation = federation
        self._updates = ModelUpdates(self.logger.warning) if update_statistics else None
        self._lock = threading.Lock()
        self._round: Round | None = None
        self._best: tuple[int, dict[str, float]] | None = None
        self._rows: list[str] = []
        self._last = 0
        self._begun = 0
        self._warned = False
        flare_internals.add_first_handler(engine, self)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Handle one of FLARE's events. Never raises."""
        if flare_internals.is_from_another_process(fl_ctx):
            return
        try:
            self._handle(event_type, fl_ctx)
        except Exception as e:
            if not self._warned:
                self._warned = True
                self.log_warning(
                    fl_ctx,
                    f"the federation run lacks the facts of the event {event_type}: {type(e).__name__}: {e}. The job "
                    "goes on. This FLARE may be newer than trackhub knows",
                    fire_event=False,
                )

    def _handle(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == flare_internals.ROUND_STARTED:
            self._begin(flare_internals.round_of_context(fl_ctx))
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER:
            if (handed := read_task_events.handed_task(fl_ctx)) is not None:
                self._hand(handed)
                if self._updates is not None:  # after `_hand`, which may begin a round and forget models sent before
                    self._updates.note_sent(handed.id, fl_ctx.get_prop(FLContextKey.TASK_DATA))
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            if (returned := read_task_events.returned_task(fl_ctx)) is not None and (took_part := self._take(returned)):
                self._measure(returned.id, *took_part, fl_ctx.get_prop(FLContextKey.TASK_RESULT))
        elif event_type == read_task_events.MODEL_SAVED:
            self._note_event()
        elif event_type == read_task_events.AFTER_AGGREGATION:
            self._note_aggregation(read_task_events.aggregated_metrics(fl_ctx), read_task_events.site_weights(fl_ctx))
        elif event_type == read_task_events.BEST_MODEL:
            number, metrics = read_task_events.best_metrics(fl_ctx)
            if number is not None:
                self._best = (number, metrics)
        elif event_type == read_task_events.ROUND_DONE:
            self._begin(None)
        elif event_type == EventType.END_WORKFLOW:
            self._begin(None, is_end_of_workflow=True)
        elif event_type == EventType.ABOUT_TO_END_RUN:
            self._begin(None, is_end_of_workflow=True)
            self._summarise()

    def _begin(self, number: int | None, *, is_end_of_workflow: bool = False) -> None:
        """End the present round. Begin this one, or none if it is None.

        Args:
            number: the round that begins.
            is_end_of_workflow: the present round ended with the last event in it. What FLARE does to end a workflow
                takes seconds, such as importing torch.
        """
        self._end_updates()
        with self._lock:
            ended, self._round = self._round, None if number is None else Round(number)
            if ended is not None and ended.sampled:
                seconds = (ended.last_event_at if is_end_of_workflow else time.monotonic()) - ended.began
                self._last = ended.number
                self._rows.append(ended.row(seconds))
                self._federation.log(ended.facts(seconds), ended.number)
            if number is not None:
                self._begun += 1
                self._federation.log({"fl/rounds_started": self._begun}, number)

    def _hand(self, task: HandedTask) -> None:
        current = self._round
        if task.round is not None and (current is None or task.round > current.number):
            self._begin(task.round)  # some workflows fire no event for a round; only their tasks carry it
        with self._lock:
            current = self._round
            if current is None or task.round not in (None, current.number):
                return
            if new := current.hand(task):
                self._federation.log({f"fl/sampled/{site}": 1.0 for site in sorted(new)}, current.number)

    def _take(self, result: ReturnedTask) -> tuple[str, int] | None:
        """Take a result. Return its site and round if it is a good one of the present round."""
        with self._lock:
            current = self._round
            if current is None or (taken := current.take(result)) is None:
                return None  # of an earlier round, which has ended without it
            site, facts = taken
            self._federation.log(facts, current.number)
            return (site, current.number) if result.is_ok else None

    def _measure(self, task_id: str, site: str, number: int, result: Any) -> None:
        """Measure an update without the lock, so that FLARE can hand out tasks meanwhile."""
        if self._updates is not None:
            self._federation.log(self._updates.take(task_id, site, result), number)

    def _end_updates(self) -> None:
        current = self._round
        if self._updates is not None and current is not None:
            self._federation.log(self._updates.end(), current.number)

    def _note_event(self) -> None:
        with self._lock:
            if self._round is not None:
                self._round.note_event()

    def _note_aggregation(self, metrics: dict[str, float], weights: dict[str, float]) -> None:
        self._end_updates()
        self._note_event()
        with self._lock:
            if self._round is not None and (metrics or weights):
                # These keys begin with "aggregated/", not with "fl/". TensorBoard and MLflow sort keys, and so show
                # them first.
                named = {f"aggregated/{name}": value for name, value in metrics.items()}
                named |= {f"fl/weight/{site}": weight for site, weight in weights.items()}
                self._federation.log(named, self._round.number)

    def _summarise(self) -> None:
        """Log at the end of the job which model was best, and how the rounds went."""
        with self._lock:
            best, rows, self._rows = self._best, self._rows, []
        if best is not None:
            number, metrics = best
            self._federation.log({"fl/best_round": number} | {f"fl/best/{k}": v for k, v in metrics.items()}, number)
        if rows:
            left_out = len(rows) - _MAX_ROUNDS_IN_SUMMARY
            note = f"\n\nThe first {left_out} rounds are left out." if left_out > 0 else ""
            table = "\n".join([TABLE_HEAD, *rows[-_MAX_ROUNDS_IN_SUMMARY:]])
            self._federation.log_text("fl/how_it_ran", f"How the federation ran:\n\n{table}{note}", self._last)
