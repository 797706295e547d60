# SPDX-License-Identifier: Apache-2.0
"""A policy in a provisioned federation: nothing that a site withholds reaches a file, message or log of the server."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.harness import Job, files_with
from tests.integration.poc import SITES, Poc, PocResult, operator_file, poc, wandb
from trackhub.cli.status import spool_status
from trackhub.delivery.journal.find_journals_and_spools import find

__all__ = ["operator_file", "poc", "wandb"]  # the fixtures that the test below asks for

pytestmark = pytest.mark.long

LISTENER = """
import os

from nvflare.apis.event_type import EventType
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.widgets.widget import Widget


class Listener(Widget):
    '''Writes down every message that the server's process of the job gets, by the site that it comes from.'''

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.START_RUN:
            self.folder = os.environ["TRACKHUB_TEST_OUT"].replace("{job}", fl_ctx.get_job_id())
            os.makedirs(self.folder, exist_ok=True)
            fl_ctx.get_engine().get_cell().core_cell.add_incoming_filter("*", "*", self.note)

    def note(self, message):
        site = message.get_header(MessageHeaderKey.ORIGIN).split(".")[0]
        payload = message.payload if isinstance(message.payload, (bytes, bytearray)) else repr(message.payload).encode()
        with open(os.path.join(self.folder, site + ".messages"), "ab") as file:
            file.write(repr(message.headers).encode() + bytes(payload))
"""

LEAKY_TRAINER = """
import hashlib
import io

import PIL.Image
import PIL.PngImagePlugin
from nvflare.client.tracking import MLflowWriter, SummaryWriter
from torch.utils.tensorboard import SummaryWriter as TorchWriter

from trackhub import Writer

writer, stock, of_mlflow = Writer(), SummaryWriter(), MLflowWriter()
captured = TorchWriter(os.path.join(OUT, SITE + "-tensorboard"))


def token(what):  # so that the script itself, which the server has, holds none of them
    return hashlib.sha256(f"{SITE} {what}".encode()).hexdigest()[:16]


def number(what):
    return int(token(what), 16) / 16**16


def picture(what):
    about, file = PIL.PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("about", token(what))
    PIL.Image.new("RGB", (2, 2)).save(file, "png", pnginfo=about)
    return file.getvalue()


def train(n):
    writer.log({"train/" + token("key"): number("train"), "val/loss": number("val"), "val/acc": 0.5}, n)
    writer.log({"train/loss": number("alone")}, n)
    writer.log({"val/" + token("denied by the job"): 0.5}, n)
    writer.log_params({token("param key"): token("param"), "val/nested": {"x": token("nested")}})
    writer.set_tags({token("tag key"): token("tag")})
    writer.log_text("val/text", token("text"))
    writer.log_image("val/image", picture("image"), n, token("caption"))
    writer.log_histogram(token("histogram key"), [number("histogram"), 2.0], n)
    writer.log_table(token("table key"), [token("column")], [[token("cell")]], n)
    path = os.path.join(OUT, SITE + token("file name"))
    with open(path, "w") as file:
        file.write(token("file"))
    writer.log_artifact(path, token("artifact key"))
    writer.log({token("bad key"): object()})
    writer.summarize({token("final key"): token("final"), "val/final": number("final value")})
    of_mlflow.log_param(token("stock param key"), token("stock param"))
    of_mlflow.set_tag(token("stock tag key"), token("stock tag"))
    captured.add_scalar("train/" + token("captured key"), number("captured"), n)
    captured.add_text("val/captured", token("captured text"), n)
    stock.add_scalar("train/" + token("stock key"), number("stock"), n)
    stock.add_scalar("val/stock", number("val"), n)


rounds(train)
"""
TOKENS = (
    *("key", "denied by the job", "param key", "param", "nested", "tag key", "tag", "text", "image", "caption"),
    *("histogram key", "table key", "column", "cell", "file name", "file", "artifact key", "bad key", "stock key"),
    *("final key", "final", "stock param key", "stock param", "stock tag key", "stock tag", "captured key"),
    "captured text",
)
NUMBERS = ("train", "alone", "val", "histogram", "stock", "final value", "captured")


def _planted(site: str) -> dict[str, tuple[bytes, ...]]:
    """Return all that the script at a site logs and the policy withholds, in each form in which it may be written."""
    token = {what: hashlib.sha256(f"{site} {what}".encode()).hexdigest()[:16] for what in (*TOKENS, *NUMBERS)}
    found: dict[str, tuple[bytes, ...]] = {what: (token[what].encode(),) for what in TOKENS}
    for what in NUMBERS:
        value = int(token[what], 16) / 16**16
        found[what] = (
            repr(value)[:10].encode(),
            struct.pack("<d", value),
            struct.pack(">d", value),
        )
    return found


@pytest.mark.parametrize("external", [False, True])
def test_only_what_the_operators_policy_allows_is_anywhere_on_the_server(
    poc: Poc, tmp_path: Path, operator_file: Callable[[str, str], None], external: bool
) -> None:
    """The other site has no policy of an operator: what it logs is found, so the search finds what is there."""
    operator_file("site-1", 'forbid_kinds = ["artifact"]\n[policy]\nallow = ["metrics:val/*"]\ndigits = 3\n')
    tracking = {
        "server": ["jsonl", "tensorboard"],
        "clients": ["jsonl"],
        "capture": ["tensorboard"],
        "policy": {
            "deny": [f"val/{hashlib.sha256(f'{site} denied by the job'.encode()).hexdigest()[:8]}*" for site in SITES]
        },
    }
    more = """
    from listener import Listener
    job.to_server(Listener(), id="listener")
    """
    job = Job(tmp_path, LEAKY_TRAINER, tracking, external=external, more=more, modules={"listener": LISTENER})

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    (tmp_path / "messages").mkdir()
    for site in SITES:
        shutil.copy(poc.out / result.job / f"{site}.messages", tmp_path / "messages")
    # The server's kit has its run folder and all logs. The download has what the job store keeps, unpacked.
    places = [result.server, result.startup / "server", tmp_path / "messages"]
    shutil.copy(poc.workspace.parent / "server.log", tmp_path / "messages")
    found = {
        site: {
            what: [p for folder in places for p in files_with(folder, *forms)] for what, forms in _planted(site).items()
        }
        for site in SITES
    }
    assert {what: paths for what, paths in found["site-1"].items() if paths} == {}
    assert {what for what, paths in found["site-2"].items() if not paths} == {"denied by the job", "bad key"}
    stored = result.records(result.server, "site-1")
    assert {record["kind"] for record in stored} == {"metrics", "end"}  # so what it was made with is not there either
    points = {(k, v) for record in stored if record["kind"] == "metrics" for k, v in record["values"].items()}
    assert {key for key, _ in points} == {"val/loss", "val/acc", "val/stock"}
    value = round(int(hashlib.sha256(b"site-1 val").hexdigest()[:16], 16) / 16**16, 3)
    assert {v for _, v in points} == {value, 0.5}
    _assert_counts(result)


def _assert_counts(result: PocResult) -> None:
    """The equations hold, the server knows a number, the site knows the rules, and keeps all but forbidden kinds."""
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert (report["balanced"], report["status"]) == (True, "finished")
    counts = report["sites"]["site-1"]["at_site"]
    assert counts["logged"] == counts["withheld"] + counts["acked"] + sum(counts["dropped"].values())
    (spool,) = find(result.client("site-1")).spools
    receivers = spool_status(spool)["receivers"]
    by_rule = receivers["server"]["withheld_by_rule"]
    assert sum(by_rule.values()) == counts["withheld"] > 0
    assert by_rule.keys() == {
        "operator.allow",
        "operator.forbid_kinds artifact",
        *(r for r in by_rule if r[:8] == "job.deny"),
    }
    assert receivers["client"]["withheld_by_rule"] == {"operator.forbid_kinds artifact": 2}
    own = result.records(result.client("site-1"), "site-1")
    assert {"text", "image", "histogram", "table"} <= {record["kind"] for record in own}
    assert "artifact" not in {record["kind"] for record in own}
