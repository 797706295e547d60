# SPDX-License-Identifier: Apache-2.0
"""Logs into the federation run how the job proceeds: rounds, sites, waits, bytes of model, and FLARE's own metrics.

`trackhub.flare.receiver_widget` makes a `FederationFacts` on the server. It learns everything from FLARE's events, so a
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

__all__ = ["FederationFacts"]

_MAX_ROUNDS_IN_SUMMARY = 200


class FederationFacts(FLComponent):  # type: ignore[misc]  # FLARE has no types
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
        self._first: int | None = None  # the first round of the present workflow
        self._is_announced = False  # True if the present workflow fires an event for each round
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
            self._is_announced = True
            self._begin(flare_internals.round_of_context(fl_ctx))
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER:
            if (handed := read_task_events.handed_task(fl_ctx)) is not None:
                self._hand(handed, fl_ctx.get_prop(FLContextKey.TASK_DATA))
        elif event_type == EventType.BEFORE_PROCESS_SUBMISSION:
            if (returned := read_task_events.returned_task(fl_ctx)) is not None:
                self._take(returned, fl_ctx.get_prop(FLContextKey.TASK_RESULT))
        elif event_type == read_task_events.MODEL_SAVED:
            self._note_event()
        elif event_type == read_task_events.AFTER_AGGREGATION:
            self._note_aggregation(read_task_events.aggregated_metrics(fl_ctx), read_task_events.site_weights(fl_ctx))
        elif event_type == read_task_events.BEST_MODEL:
            number, metrics = read_task_events.best_metrics(fl_ctx)
            if number is not None:  # log it now, since a server that is killed sees no end of the job
                named = {f"fl/best/{name}": value for name, value in metrics.items()}
                self._federation.log({"fl/best_round": number} | named, number)
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
        with self._lock:
            ended = self._switch(number, is_end_of_workflow=is_end_of_workflow)
            if number is None and is_end_of_workflow:
                self._first, self._is_announced = None, False
        self._log_updates(*ended)

    def _switch(self, number: int | None, *, is_end_of_workflow: bool = False) -> tuple[ModelUpdates | None, int]:
        """Do what `_begin` does, with the lock held. Return the ended round's updates and its number.

        The caller logs what follows from the updates without the lock: it takes a pass over each of them.
        """
        ended, self._round = self._round, None if number is None else Round(number)
        updates, self._updates = self._updates, None if self._updates is None else self._updates.of_next_round()
        if ended is not None and ended.sampled:
            seconds = (ended.last_event_at if is_end_of_workflow else time.monotonic()) - ended.began
            self._last = ended.number
            self._rows.append(ended.row(seconds))
            self._federation.log(ended.facts(seconds), ended.number)
        if number is not None:
            self._begun += 1
            self._first = number if self._first is None else self._first
            self._federation.log({"fl/rounds_started": self._begun}, number)
        return (None, 0) if ended is None else (updates, ended.number)

    def _hand(self, task: HandedTask, data: Any) -> None:
        ended: tuple[ModelUpdates | None, int] = None, 0
        # FLARE hands out tasks from several threads at once. One lock is held from the look at the present round to
        # the note of the task. Otherwise two threads could begin the same round.
        with self._lock:
            if task.round is not None and self._begins(task, task.round):
                ended = self._switch(task.round)
            current = self._round
            if current is not None and task.round in (None, current.number):
                if new := current.hand(task):
                    self._federation.log({f"fl/sampled/{site}": 1.0 for site in sorted(new)}, current.number)
                if self._updates is not None:
                    self._updates.note_sent(task.id, data)
        self._log_updates(*ended)

    def _begins(self, task: HandedTask, number: int) -> bool:
        """Return whether a round begins with this task: some workflows fire no event for a round.

        A lower round than the present one is that of a late task, unless the workflow counts its rounds again from the
        first one. Such a task was made after those of the present round.
        """
        current = self._round
        if current is None or number > current.number:
            return True
        is_first = self._first is not None and number <= self._first
        return not self._is_announced and is_first and number < current.number and task.made_at > current.last_made_at

    def _take(self, result: ReturnedTask, data: Any) -> None:
        with self._lock:
            current, updates = self._round, self._updates
            if current is None or (taken := current.take(result)) is None:
                return  # of an earlier round, which has ended without it
            site, facts = taken
            self._federation.log(facts, current.number)
        if updates is not None and result.is_ok:  # without the lock, so that FLARE can hand out tasks meanwhile
            self._federation.log(updates.take(result.id, site, data), current.number)

    def _log_updates(self, updates: ModelUpdates | None, number: int) -> None:
        """Log what follows from all updates of a round, and forget them."""
        if updates is not None:
            self._federation.log(updates.end(), number)

    def _note_event(self) -> None:
        with self._lock:
            if self._round is not None:
                self._round.note_event()

    def _note_aggregation(self, metrics: dict[str, float], weights: dict[str, float]) -> None:
        with self._lock:
            current, updates = self._round, self._updates
        if current is not None:
            self._log_updates(updates, current.number)
        self._note_event()
        with self._lock:
            if self._round is not None and (metrics or weights):
                # These keys begin with "aggregated/", not with "fl/". TensorBoard and MLflow sort keys, and so show
                # them first.
                named = {f"aggregated/{name}": value for name, value in metrics.items()}
                named |= {f"fl/weight/{site}": weight for site, weight in weights.items()}
                self._federation.log(named, self._round.number)

    def _summarise(self) -> None:
        """Log at the end of the job how the rounds went."""
        with self._lock:
            rows, self._rows = self._rows, []
        if rows:
            left_out = len(rows) - _MAX_ROUNDS_IN_SUMMARY
            note = f"\n\nThe first {left_out} rounds are left out." if left_out > 0 else ""
            table = "\n".join([TABLE_HEAD, *rows[-_MAX_ROUNDS_IN_SUMMARY:]])
            self._federation.log_text("fl/how_it_ran", f"How the federation ran:\n\n{table}{note}", self._last)
