# SPDX-License-Identifier: Apache-2.0
"""Checks of one job from start to end: how its runs end, what shows them, and that a finished run can go on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.sender import Sender
from trackhub.job_and_run_info import RunStatus
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.testing.checks.fixtures import ContractFixtures, Kit, one_param
from trackhub.testing.comparison import differences
from trackhub.testing.expectation import expect
from trackhub.testing.readback import ReadBack
from trackhub.testing.receiver_rig import ReceiverRig
from trackhub.testing.sample_calls_and_requests import metric, series
from trackhub.testing.scenario_delivery import check_run
from trackhub.writer.writer import Writer

__all__ = ["LifecycleChecks"]


class LifecycleChecks(ContractFixtures):
    """One job from start to end."""

    def test_job_without_records_ends(self, kit: Kit) -> None:
        """A receiver without any record starts and ends."""
        rig = kit.rig().start()
        rig.finish()
        assert not rig.is_hung(), "the backend has not returned from a call"

    @pytest.mark.parametrize("status", list(RunStatus), ids=str)
    def test_status_is_told(self, kit: Kit, status: RunStatus) -> None:
        """A run ends as what it was: finished, failed, aborted or killed."""
        rig = kit.rig().start()
        rig.log("site-1", [*series("loss", range(3)), *one_param(rig.can)])
        rig.finish(status)
        assert rig.run("site-1").state == "finished", f"the run could not be finished: {rig.run('site-1')}"
        self._check_status(rig.read("site-1"), status)

    def test_site_that_failed_ends_as_failed(self, kit: Kit) -> None:
        """In a job that finished, the run of a site whose training failed is not shown as finished."""
        rig = kit.rig().start()
        for site in ("site-1", "site-2"):
            rig.log(site, [*series("loss", range(3)), *one_param(rig.can)])
        rig.finish(failed=["site-2"])
        self._check_status(rig.read("site-1"), RunStatus.FINISHED)
        self._check_status(rig.read("site-2"), RunStatus.FAILED)

    def test_results_move_with_the_run_folder(self, kit: Kit) -> None:
        """What ``results`` names exists, also after the job's run folder was moved."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(3)))
        rig.finish()
        moved = Path(shutil.move(rig.root, rig.root.with_name("moved folder")))
        report = read_journal_report(moved / rig.folder.name / JOURNAL_NAME)
        results = report.lanes[self.name]["site-1"].results
        if results is None:
            return
        assert results.url or results.path or results.command, "results() returns none of url, path and command"
        for what, text in (("path", results.path), ("command", results.command)):
            assert text is None or not _names(rig, text), (
                f"results(): the {what} {text!r} names the folder that was moved away. Make it relative to the job's "
                "run folder: context.shown(path)"
            )
        assert results.path is None or Path(results.path).exists(), (
            f"results(): there is no {results.path}. Give a path relative to the job's run folder, or an absolute one "
            "outside"
        )

    def test_run_opened_again_is_the_same_run(self, kit: Kit) -> None:
        """A run that was finished goes on when more is delivered: nothing is lost, and nothing is there twice."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(10)))
        rig.finish()
        again = kit.again(rig)
        again.log("site-1", series("loss", range(10, 20), scale=2.0))
        again.finish()
        check_run(again, ["site-1"], "a finished run was opened again and got more records")

    def test_calls_of_the_writer(self, kit: Kit) -> None:
        """What `trackhub.Writer` takes arrives: bool, int, and scalars of numpy and torch where these are installed."""
        rig = kit.rig().start()
        spool = kit.store / "spool"
        create_spool(spool, SpoolInfo("site-1", rig.job.id, ("server",)))
        plain = {"bool": True, "int": 7, "int64 max": 2**63 - 1, "int64 min": -(2**63), "float": 0.5}
        values = {**{key: (value, float(value)) for key, value in plain.items()}, **_array_values()}
        with Writer(spool) as writer:
            for step, (key, (value, _)) in enumerate(values.items()):
                writer.log({f"type {key}": value}, step=step)
        sender = Sender(spool, lambda request, _: rig.request("site-1", request))
        sender.start()
        sender.close(self.deadline_s)
        rig.finish()
        found = rig.read("site-1")
        calls = [metric(f"type {key}", number, step) for step, (key, (_, number)) in enumerate(values.items())]
        wanted = expect([("main", call) for call in calls], rig.can, self, timed=False).held
        bare = [msgspec.structs.replace(point, time=None) for point in found.points]
        problems = differences("points", wanted, ReadBack(points=bare), self)
        assert not problems, f"the store does not hold what the writer was given: {problems}"

    def _check_status(self, found: ReadBack, status: RunStatus) -> None:
        if "status" in self.cannot_tell:
            assert found.status is None, "cannot_tell declares status, but read_back tells it: remove the declaration"
            return
        word = self.canonical_status(status)
        assert found.status == word, f"the run ended as {status.value}, and the store says {found.status!r}"
        assert status is RunStatus.FINISHED or word != self.canonical_status(RunStatus.FINISHED), (
            f"canonical_status: {word!r} stands for {status.value} and for finished; expected two words"
        )


def _names(rig: ReceiverRig, text: str) -> bool:
    """Return whether a text holds the path of the job's run folder."""
    return str(rig.root.absolute()) in text or str(rig.root.resolve()) in text


def _array_values() -> dict[str, tuple[Any, float]]:
    """Return scalars of the installed array libraries, each with the number that it stands for."""
    values: dict[str, tuple[Any, float]] = {}
    if importlib.util.find_spec("numpy"):
        import numpy as np

        values |= {"numpy float32": (np.float32(0.25), 0.25), "numpy float16": (np.float16(0.125), 0.125)}
        values |= {"numpy int64": (np.int64(2**40), 2.0**40), "numpy bool": (np.bool_(True), 1.0)}
        values |= {"numpy array": (np.array([[1.5]]), 1.5)}
    if importlib.util.find_spec("torch"):
        import torch

        values |= {"torch float32": (torch.tensor(0.75), 0.75), "torch int64": (torch.tensor([3]), 3.0)}
        values |= {"torch bool": (torch.tensor(True), 1.0)}
    return values
