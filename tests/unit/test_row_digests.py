# SPDX-License-Identifier: Apache-2.0
"""The digest of a row gives the aggregation what the row gives. `test_aggregation` compares them for any records."""

from __future__ import annotations

from trackhub.delivery.federation.aggregation import JOB_ENDED, Aggregation
from trackhub.records import Metrics, Record


def record(values: dict[str, float], step: int, round_: int) -> Record:
    return Record(0, 1000.0, step, round_, Metrics(values))


def test_a_row_with_a_weight_of_each_step_need_not_be_read() -> None:
    """The key of the weights is none that is aggregated here. Still, no row with it may be passed over."""
    aggregation = Aggregation(None, "n")
    aggregation.add("site-1", [record({"n": 1.0, "loss": 1.0}, step, 0) for step in range(5)])
    rows = [record({"n": float(step), "loss": 1.0}, step, 0) for step in range(5, 10)]

    digest = aggregation.digest()
    digest.add({"n", "loss"}, rows)

    assert digest.keys == {"n"}
    assert aggregation.add_digest("site-1", digest)


def test_a_digest_that_waited_while_its_key_was_ruled_out_gives_what_its_row_gives() -> None:
    """Otherwise a receiver that is started again, and reads the row, writes other statistics."""
    row = [record({"loss": 1.0}, 17, 3), record({"n": 100.0}, 3, 3)]
    live, restarted = Aggregation(None, "n"), Aggregation(None, "n")
    digest = live.digest()
    digest.add({"loss", "n"}, row)
    found = list[list[tuple[int, dict[str, float]]]]()
    for aggregation in (live, restarted):
        aggregation.add("site-2", [record({"loss": 1.0}, 17, 3), record({"n": 50.0}, 3, 3)])
        if aggregation is restarted or not aggregation.add_digest("site-1", digest):
            aggregation.add("site-1", row)
        ended = aggregation.add_facts([record({JOB_ENDED: 1.0}, 3, 3)])
        found.append([(output.round, output.values) for output in ended])

    assert found[0] == found[1]
    assert found[1][0][1]["n/mean"] == 75.0
