# SPDX-License-Identifier: Apache-2.0
"""The contract's groups on a backend's life: the class itself, one job from start to end, and who is who in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from trackhub import registry
from trackhub.delivery.sender import Sender
from trackhub.records import Kind, Params
from trackhub.run import RunStatus, Side
from trackhub.spi import SPI_VERSION, Backend, BackendContext, Capabilities, JobInfo
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.testing.checks.base import ContractBase, Kit
from trackhub.testing.comparison import differences
from trackhub.testing.expectation import expect
from trackhub.testing.log_calls import Call, metric, series
from trackhub.testing.readback import ReadBack
from trackhub.testing.scenarios import check_run
from trackhub.testing.version import KIT_VERSION
from trackhub.writer.writer import Writer

__all__ = ["Identity", "LifeCycle"]


class LifeCycle(ContractBase):
    """The class, its options, and one job from start to end."""

    def test_class_can_be_loaded(self) -> None:
        """It is a backend for this version of the SPI, with options and capabilities of the right types."""
        cls = self.backend
        assert isinstance(cls, type), f"{cls!r} is no class"
        assert issubclass(cls, Backend), f"{cls!r} is no subclass of trackhub.spi.Backend"
        assert cls.spi == SPI_VERSION, f"it is written for version {cls.spi} of the SPI, this is {SPI_VERSION}"
        assert cls.open_run is not Backend.open_run, "it does not implement open_run(info)"
        assert isinstance(cls.capabilities, Capabilities), "its capabilities are no trackhub.spi.Capabilities"
        assert issubclass(cls.Options, msgspec.Struct), "its Options are no msgspec.Struct"
        assert cls.Options.__struct_config__.forbid_unknown_fields, "its Options let unknown fields pass"

    def test_contract_version_is_one_that_exists(self) -> None:
        """``Backend.contract`` is the version of the kit that it passed, or 0."""
        assert 0 <= self.backend.contract <= KIT_VERSION, (
            f"it says that it passed version {self.backend.contract} of the contract; this kit is version {KIT_VERSION}"
        )

    def test_making_a_backend_does_no_work(self, tmp_path: Path) -> None:
        """The constructor leaves nothing behind: what can fail or wait belongs into preflight or open_run."""
        workdir = tmp_path / "run" / self.name
        store = tmp_path / "store"
        workdir.mkdir(parents=True)
        store.mkdir()
        options = registry.build_options(self.name, self.backend, dict(self.options(store)))
        before = sorted(tmp_path.rglob("*"))
        backend = self.backend(options, BackendContext(workdir, JobInfo("job"), Side.SERVER))
        after = sorted(tmp_path.rglob("*"))
        backend.close()
        assert after == before, f"making the backend made files: {sorted(set(after) - set(before))}"

    def test_job_without_records_ends(self, kit: Kit) -> None:
        """A receiver that nothing is logged to starts and ends."""
        rig = kit.rig().start()
        rig.finish()
        assert not rig.is_hung(), "the backend has not returned from a call"

    @pytest.mark.parametrize("status", list(RunStatus), ids=str)
    def test_status_is_told(self, kit: Kit, status: RunStatus) -> None:
        """A run ends as what it was: finished, failed or aborted."""
        rig = kit.rig().start()
        can_log = Kind.PARAMS in rig.can.kinds
        calls = [*series("loss", range(3)), *([Call(Params({"lr": 0.5}))] if can_log else [])]
        rig.log("site-1", calls)
        rig.finish(status)
        assert rig.run("site-1").state == "finished", f"the run could not be finished: {rig.run('site-1')}"
        self._check_status(rig.read("site-1"), status)

    def test_site_that_failed_ends_as_failed(self, kit: Kit) -> None:
        """In a job that finished, the run of a site whose training failed is not shown as finished."""
        rig = kit.rig().start()
        params = [Call(Params({"lr": 0.5}))] if Kind.PARAMS in rig.can.kinds else []
        for site in ("site-1", "site-2"):
            rig.log(site, [*series("loss", range(3)), *params])
        rig.finish(failed=["site-2"])
        self._check_status(rig.read("site-1"), RunStatus.FINISHED)
        self._check_status(rig.read("site-2"), RunStatus.FAILED)

    def test_results_can_be_looked_at(self, kit: Kit) -> None:
        """What ``results`` names exists."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(3)))
        rig.finish()
        results = rig.run("site-1").results
        if results is not None:
            assert results.url or results.path or results.command, "it has results, but none of url, path and command"
            path = results.resolved(rig.root).path
            assert path is None or Path(path).exists(), f"there is no {path}"

    def test_run_opened_again_is_the_same_run(self, kit: Kit) -> None:
        """A run that was finished goes on when more is delivered: nothing is lost, nothing is twice."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(10)))
        rig.finish()
        again = kit.keep(rig.again()).start()
        again.log("site-1", series("loss", range(10, 20), scale=2.0))
        again.finish()
        check_run(again, self, ["site-1"], "a finished run was opened again and got more records")

    def test_calls_of_the_writer(self, kit: Kit) -> None:
        """What `trackhub.Writer` takes arrives: bool, int, numpy and torch scalars, where these are installed."""
        rig = kit.rig().start()
        spool = kit.store / "spool"
        create_spool(spool, SpoolInfo("site-1", rig.job, ("server",)))
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
        assert not problems, f"what the writer was given is not what is stored: {problems}"

    def _check_status(self, found: ReadBack, status: RunStatus) -> None:
        if "status" in self.cannot_tell:
            assert found.status is None, "status: declared in cannot_tell, but read_back tells it"
            return
        wanted = self.canonical_status(status)
        assert found.status == wanted, f"the run ended as {status.value}, and the store says {found.status!r}"
        assert self.canonical_status(RunStatus.FINISHED) != self.canonical_status(RunStatus.FAILED)


class Identity(ContractBase):
    """Who is who."""

    def test_two_sites_do_not_mix(self, kit: Kit) -> None:
        """Two sites log the same metric at the same steps, in turns; each has its own points."""
        rig = kit.rig().start()
        for turn in range(5):
            for number, site in enumerate(("site-1", "site-2", "server")):
                rig.log(site, [metric("loss", turn + number / 4, turn)])
        rig.finish()
        check_run(rig, self, ["site-1", "site-2", "server"], "two sites logged the same metric")

    def test_two_jobs_do_not_mix(self, kit: Kit) -> None:
        """Two jobs with the same site, metric and steps, in one store where that can be, are two runs."""
        rigs = [kit.rig(shared=True).start() for _ in range(2)]
        for number, rig in enumerate(rigs):
            rig.log("site-1", series("loss", range(5), scale=1.0 + number))
        for rig in rigs:
            rig.finish()
        for rig in rigs:
            check_run(rig, self, ["site-1"], "two jobs logged the same metric")

    def test_two_sides_do_not_mix(self, kit: Kit) -> None:
        """What the server and a client record of one site, in one store where that can be, are two runs."""
        sides = (Side.SERVER, Side.CLIENT)
        rigs = [kit.rig(shared=True, job=f"both-{uuid4().hex[:8]}", side=side).start() for side in sides]
        for number, rig in enumerate(rigs):
            rig.log("site-1", series("loss", range(5), scale=1.0 + number))
        for rig in rigs:
            rig.finish()
        for rig in rigs:
            check_run(rig, self, ["site-1"], "both sides recorded one site")

    def test_two_processes_of_a_site_share_its_run(self, kit: Kit) -> None:
        """The ranks of a trainer log the same metric at the same steps into one run, and nothing is lost."""
        rig = kit.rig().start()
        for turn in range(3):
            for rank, stream in enumerate(("rank-0", "rank-1")):
                calls = [metric("loss", turn + rank / 4, turn), metric("free", turn + rank / 8)]
                rig.log("site-1", calls, stream=stream)
        rig.finish()
        check_run(rig, self, ["site-1"], "two processes of one site logged")


def _array_values() -> dict[str, tuple[Any, float]]:
    """Return scalars of the array libraries that are installed, and the number that each is."""
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
