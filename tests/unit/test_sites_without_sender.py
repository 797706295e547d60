# SPDX-License-Identifier: Apache-2.0
"""The server asks its sites whether they have a sender. No answer, and no missing one, of a site harms the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.widgets.streaming import create_analytic_dxo

from trackhub.delivery import Limits, Receiver, RunStatus, Side
from trackhub.flare.record_for_sites_without_sender import SitesWithoutSender

SITES = ("honest", "hostile")


class Engine:
    """A server's engine whose clients answer as ``answers`` says. A client without an answer takes the whole time.

    Attributes:
        answers: what each site answers.
        asked: the sites of each question.
    """

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[list[str]] = []

    def get_participating_clients(self) -> dict[str, Any]:
        return {site: SimpleNamespace(name=site, get_fqcn=lambda site=site: site) for site in SITES}

    @contextlib.contextmanager
    def new_context(self) -> Iterator[FLContext]:
        yield FLContext()

    def send_aux_request(self, targets: list[str], timeout: float, **_: Any) -> dict[str, Any]:
        self.asked.append(targets)
        if not all(site in self.answers for site in targets):
            time.sleep(timeout)
        return {site: self.answers[site] for site in targets if site in self.answers}


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path, job="job-1", side=Side.SERVER, backends={}, limits=Limits(deadline_s=0))
    receiver.start()
    yield receiver
    receiver.finish(RunStatus.FINISHED)


@contextlib.contextmanager
def sites_of(engine: Engine, receiver: Receiver) -> Iterator[SitesWithoutSender]:
    sites = SitesWithoutSender(FLComponent(), engine, receiver, Limits())
    yield sites
    sites.close(5)


def event() -> Shareable:
    shareable: Shareable = create_analytic_dxo("loss", 0.5, AnalyticsDataType.SCALAR, global_step=1).to_shareable()
    return shareable


def with_headers(headers: Any) -> Shareable:
    reply = Shareable()
    reply[ReservedHeaderKey.HEADERS] = headers
    return reply


@pytest.mark.parametrize(
    "answer", [with_headers({ReservedHeaderKey.RC: [1]}), with_headers("none"), "no", None, make_reply("OK\x1b[2J")]
)
def test_an_answer_that_is_none_costs_no_answer_of_another_site(receiver: Receiver, answer: Any) -> None:
    engine = Engine(honest=make_reply(ReturnCode.TOPIC_UNKNOWN), hostile=answer)
    with sites_of(engine, receiver) as sites:
        for site in SITES:
            sites.note_started(site)

        sites.ask_now()

        assert sites.found() == {"honest"}


def test_a_site_that_does_not_answer_costs_no_wait_at_each_of_its_events(receiver: Receiver) -> None:
    """FLARE hands over the events of all sites in one thread."""
    engine = Engine(honest=make_reply(ReturnCode.TOPIC_UNKNOWN))
    with sites_of(engine, receiver) as sites:
        began = time.monotonic()
        for _ in range(10):
            sites.take("hostile", event())
            sites.take("honest", event())

        assert engine.asked.count(["hostile"]) <= 1 + (time.monotonic() - began) / 2
        assert sites.found() == {"honest"}
    assert receiver.sites.heard() >= {"honest"}


def test_no_event_waits_for_the_answer_of_another_site(receiver: Receiver) -> None:
    engine = Engine(honest=make_reply(ReturnCode.TOPIC_UNKNOWN))
    with sites_of(engine, receiver) as sites:
        sites.take("honest", event())
        is_asking, may_answer = threading.Event(), threading.Event()

        def ask(targets: list[str], **_: Any) -> dict[str, Any]:
            is_asking.set()
            may_answer.wait(30)
            return {}

        engine.send_aux_request = ask  # type: ignore[method-assign, assignment]
        sites.note_started("hostile")
        asking = threading.Thread(target=sites.ask_now)
        asking.start()
        assert is_asking.wait(30)

        sites.take("honest", event())

        assert asking.is_alive()
        may_answer.set()
        asking.join()
