# SPDX-License-Identifier: Apache-2.0
"""Checks that a backend tells runs apart: two sites, two jobs, both sides, and two processes of one site."""

from __future__ import annotations

from collections.abc import Sequence

from trackhub.job_and_run_info import FEDERATION, SERVER, Side
from trackhub.testing.checks.fixtures import ContractFixtures, Kit
from trackhub.testing.receiver_rig import ReceiverRig
from trackhub.testing.sample_calls_and_requests import Call, metric, new_job, series
from trackhub.testing.scenario_delivery import DeliveredScenarios, check_run, scenario

__all__ = ["IdentityChecks"]

_DIFFICULT = "é/../ x%2F 損失"


@scenario(f"a site: {_DIFFICULT}")
def _difficult_site() -> Sequence[Call]:
    return series("loss", range(3))


class IdentityChecks(ContractFixtures):
    """Which records belong to which run."""

    def test_two_sites_do_not_mix(self, kit: Kit) -> None:
        """Several sites log the same metric at the same steps, in turns. Each run has its own points."""
        sites = ("site-1", "site-2", SERVER, FEDERATION)
        rig = kit.rig().start()
        for turn in range(5):
            for number, site in enumerate(sites):
                rig.log(site, [metric("loss", turn + number / 4, turn)])
        rig.finish()
        check_run(rig, sites, "several sites logged the same metric")

    def test_two_jobs_do_not_mix(self, kit: Kit) -> None:
        """Two jobs log the same site, metric and steps to one store, where that is possible. They are two runs."""
        rigs = [kit.rig(shared=True, job=new_job(name)).start() for name in ("first", "second")]
        _log_and_check(rigs, "two jobs logged the same metric")

    def test_two_jobs_of_one_name_do_not_mix(self, kit: Kit) -> None:
        """Two jobs of the same name are two runs. The id identifies a job; the name is for people."""
        rigs = [kit.rig(shared=True, job=new_job("cifar10")).start() for _ in range(2)]
        _log_and_check(rigs, "two jobs of one name logged the same metric")

    def test_two_sides_do_not_mix(self, kit: Kit) -> None:
        """Server and client record the same job and site, in one store where that is possible. They are two runs."""
        job = new_job()
        rigs = [kit.rig(shared=True, job=job, side=side).start() for side in (Side.SERVER, Side.CLIENT)]
        _log_and_check(rigs, "both sides recorded one site")

    def test_two_processes_of_a_site_share_its_run(self, kit: Kit) -> None:
        """The ranks of a trainer log the same metric at the same steps. All of it is in the site's run."""
        rig = kit.rig().start()
        for turn in range(3):
            for rank, stream in enumerate(("rank-0", "rank-1")):
                calls = [metric("loss", turn + rank / 4, turn), metric("free", turn + rank / 8)]
                rig.log("site-1", calls, stream=stream)
        rig.finish()
        check_run(rig, ["site-1"], "two processes of one site logged")

    def test_site_with_a_difficult_name(self, scenarios: DeliveredScenarios) -> None:
        """A site's name may hold any characters. Its run lies where it should, and is found by the name."""
        scenarios[f"a site: {_DIFFICULT}"].check()

    def test_job_with_a_difficult_name(self, kit: Kit) -> None:
        """A job's name may hold any characters, too."""
        rig = kit.rig(shared=True, job=new_job(_DIFFICULT)).start()
        _log_and_check([rig], "a job with a difficult name logged")


def _log_and_check(rigs: list[ReceiverRig], what: str) -> None:
    """Let every job log the same metric at the same steps, with other values."""
    for number, rig in enumerate(rigs):
        rig.log("site-1", series("loss", range(5), scale=1.0 + number))
    for rig in rigs:
        rig.finish()
    for rig in rigs:
        check_run(rig, ["site-1"], what)
