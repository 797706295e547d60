# SPDX-License-Identifier: Apache-2.0
"""``trackhub backends`` lists what is installed, whatever its state, and says what a backend can store."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trackhub.spi import SPI_VERSION

if TYPE_CHECKING:
    from tests.conftest import MakePlugin

GOOD = """
    from typing import Annotated

    import msgspec

    from trackhub.spi import Backend, BackendRun, Capabilities, ConfirmedBy, KeyRule, Kind, OptionMark, RunInfo

    print("a plugin that talks")

    class AcmeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        url: Annotated[str, OptionMark.HOST] = "http://localhost"
        api_key: Annotated[str | None, OptionMark.SECRET] = None
        cache: Annotated[str, OptionMark.PATH, OptionMark.HOST] = ""
        level: int = 1

    class Acme(Backend[AcmeOptions]):
        spi = 1
        capabilities = Capabilities(
            confirmed_by=ConfirmedBy.WRITE,
            key_rule=KeyRule(max_chars=1000, chars="a-z", edge_chars="a-y", reserved_keys=frozenset({"b", "a"})),
            key_rules={Kind.PARAMS: KeyRule(max_chars=None, chars="", reserved_prefixes=("_",), is_path=True)},
        )

        def open_run(self, info: RunInfo) -> BackendRun:
            raise NotImplementedError
"""


def trackhub(*args: str, path: list[Path] | None = None, prelude: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{prelude}\nimport sys; from trackhub.cli import main\nsys.argv = ['trackhub', *{list(args)!r}]\nmain()"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or [])), "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)


def listed(document: str) -> dict[str, dict[str, Any]]:
    return {backend["name"]: backend for backend in json.loads(document)["backends"]}


def test_a_working_backend_is_listed_with_its_capabilities() -> None:
    done = trackhub("backends", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["version"], document["spi"]) == (1, SPI_VERSION)
    jsonl = listed(done.stdout)["jsonl"]
    assert (jsonl["distribution"], jsonl["state"], jsonl["problem"]) == ("flare-trackhub", "ok", "")
    assert "metrics" in jsonl["capabilities"]["kinds"]


def test_a_backend_that_cannot_be_used_is_listed_with_the_reason(make_plugin: MakePlugin) -> None:
    """It is no error of the command, and hides no other backend."""
    path = [
        make_plugin("acme-good", {"good": "acme_good:Acme"}, {"acme_good": GOOD}),
        make_plugin("acme-broken", {"bad": "acme_bad:Acme"}, {"acme_bad": "import module_that_is_not_there"}),
        make_plugin("acme-one", {"twice": "acme_good:Acme"}),
        make_plugin("acme-two", {"twice": "acme_good:Acme"}),
    ]

    as_json = trackhub("backends", "--json", path=path)
    as_table = trackhub("backends", path=path)

    assert (as_json.returncode, as_table.returncode) == (0, 0)
    found = listed(as_json.stdout)
    assert (found["good"]["state"], found["bad"]["state"], found["twice"]["state"]) == ("ok", "broken", "conflict")
    assert "No module named 'module_that_is_not_there'" in found["bad"]["problem"]
    assert found["bad"]["capabilities"] is None
    for part in ("acme-broken", "broken", "module_that_is_not_there", "acme-one 1.0", "acme-two 1.0"):
        assert part in as_table.stdout


@pytest.fixture
def good(make_plugin: MakePlugin) -> list[Path]:
    return [make_plugin("acme-good", {"good": "acme_good:Acme"}, {"acme_good": GOOD})]


def test_json_has_the_marks_of_options_and_the_key_rules_by_kind(good: list[Path]) -> None:
    done = trackhub("backends", "good", "--json", path=good)

    assert done.returncode == 0
    assert list(listed(done.stdout)) == ["good"]
    backend = listed(done.stdout)["good"]
    assert backend["options"] == ["url", "api_key", "cache", "level"]
    assert backend["option_marks"] == {"url": ["host"], "api_key": ["secret"], "cache": ["host", "path"], "level": []}
    capabilities = backend["capabilities"]
    assert (capabilities["confirmed_by"], capabilities["redelivery"]) == ("write", "at_least_once")
    assert capabilities["key_rule"] == {
        "max_chars": 1000, "chars": "a-z", "edge_chars": "a-y", "reserved_keys": ["a", "b"], "reserved_prefixes": [],
        "reserved_as": "", "is_path": False,
    }  # fmt: skip
    assert list(capabilities["key_rules"]) == ["params"]
    assert capabilities["key_rules"]["params"]["reserved_prefixes"] == ["_"]


def test_a_backend_that_is_named_is_shown_with_its_options_and_key_rules(good: list[Path]) -> None:
    done = trackhub("backends", "good", path=good)

    assert done.returncode == 0
    about, options = done.stdout.split("Options, as good.NAME=VALUE\n")
    shown = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in about.splitlines()[1:])
    assert done.stdout.startswith("good: acme-good 1.0, ok\n")
    assert {"  api_key (default: not set, secret)", "  level (default: 1)"} <= set(options.splitlines())
    assert shown["confirmed by"] == "write"
    assert shown["keys"] == "at most 1,000 characters, of [a-z], first and last of [a-y], none of a b"
    assert shown["keys of params"] == "a relative path, none of _..."


def test_a_named_backend_that_cannot_be_used_is_shown_with_the_reason(make_plugin: MakePlugin) -> None:
    path = [make_plugin("acme-broken", {"bad": "acme_bad:Acme"}, {"acme_bad": "import module_that_is_not_there"})]

    done = trackhub("backends", "bad", path=path)

    assert done.returncode == 0
    assert done.stdout.startswith("bad: acme-broken 1.0, broken\n")
    assert "module_that_is_not_there" in done.stdout


def test_types_of_options_that_cannot_be_read_make_a_backend_broken(make_plugin: MakePlugin) -> None:
    source = GOOD.replace("level: int", "level: 'Nowhere'")
    path = [make_plugin("acme-odd", {"odd": "acme_odd:Acme"}, {"acme_odd": source})]

    done = trackhub("backends", "--json", path=path)

    assert done.returncode == 0
    assert listed(done.stdout)["odd"]["state"] == "broken"
    assert "Nowhere" in listed(done.stdout)["odd"]["problem"]
    assert listed(done.stdout)["jsonl"]["state"] == "ok"


def test_a_name_that_is_not_installed_is_an_error_that_names_what_there_is() -> None:
    done = trackhub("backends", "jsnol")

    assert done.returncode == 1
    assert "there is no backend 'jsnol' here" in done.stderr
    assert "jsonl" in done.stderr
    assert done.stdout == ""


def test_listing_imports_no_tracking_sdk_and_no_flare() -> None:
    code = (
        "import contextlib, io, json, sys; from trackhub.cli import main\n"
        "sys.argv = ['trackhub', 'backends', '--json']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n    main()\n"
        "heavy = ('tensorboard', 'wandb', 'mlflow', 'mlflow_skinny', 'nvflare', 'torch', 'numpy', 'sqlalchemy')\n"
        "names = [backend['name'] for backend in json.loads(out.getvalue())['backends']]\n"
        "print(json.dumps([names, [name for name in heavy if name in sys.modules]]))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    names, heavy = json.loads(done.stdout)
    assert "jsonl" in names
    assert heavy == []


@pytest.mark.parametrize("library", ["click", "rich"])
def test_without_the_cli_extra_the_command_says_what_to_install(library: str) -> None:
    done = trackhub("backends", prelude=f"import sys; sys.modules[{library!r}] = None")

    assert done.returncode == 2
    assert done.stdout == ""
    assert f"needs {library}" in done.stderr
    assert "pip install 'flare-trackhub[cli]'" in done.stderr


OPERATOR = """
    backends_allowed = ["good", "jsonl"]
    state_dir = "/srv/trackhub"

    [limits]
    sites_s = 60

    [backends.good]
    options = ["url", "level"]
    hosts = ["https://acme.example"]
    paths = ["/srv/acme"]
    secrets = ["TEAM_KEY"]

    [backends.good.fixed]
    api_key = "${secret:TEAM_KEY}"
"""


def check(tmp_path: Path, make_plugin: MakePlugin, toml: str | None) -> subprocess.CompletedProcess[str]:
    plugin = make_plugin("acme-good", {"good": "acme_good:Acme"}, {"acme_good": GOOD})
    (tmp_path / "site" / "local").mkdir(parents=True)
    if toml is not None:
        (tmp_path / "site" / "local" / "trackhub.toml").write_text(toml)
    return trackhub("backends", "--check", "--workspace", str(tmp_path / "site"), path=[plugin])


def test_a_right_operator_s_file_is_shown_as_what_jobs_may_do(tmp_path: Path, make_plugin: MakePlugin) -> None:
    done = check(tmp_path, make_plugin, OPERATOR)

    assert done.returncode == 0, done.stderr
    assert "trackhub.toml is valid" in done.stdout
    assert "sites_s = 60" in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["good"])
    assert row == ["good", "https://acme.example", "/srv/acme", "TEAM_KEY", "api_key"]
    assert "mlflow" not in done.stdout


def test_without_an_operator_s_file_the_check_says_what_holds(tmp_path: Path, make_plugin: MakePlugin) -> None:
    done = check(tmp_path, make_plugin, None)

    assert done.returncode == 0, done.stderr
    assert "The strictest rules hold" in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["wandb"])
    assert row == ["wandb", "https://api.wandb.ai", "-", "WANDB_API_KEY", "-"]


@pytest.mark.parametrize(
    ("toml", "problems"),
    [
        ('backend_allowed = ["good"]', ["unknown field `backend_allowed`"]),
        (
            'backends_allowed = ["goood", "jsonl"]\n'
            '[backends.good]\noptions = ["uri"]\n[backends.jsonl.fixed]\npath = 1',
            [
                "no backend 'goood'",
                "'good' is not in backends_allowed",
                "'uri' is not an option",
                "jsonl.path: expected",
            ],
        ),
        (
            'forbid_kinds = ["image"]\n[policy]\nallow = ["val/*", "image:grid"]\ndeny = ["val/*"]\n'
            '[backends.good]\noptions = []\n[backends.good.values]\nuri = ["*"]\napi_key = []\n'
            '[backends.jsonl]\noptions = ["path"]\n[backends.jsonl.fixed]\npath = "x"',
            [
                "policy: 'val/*' is in allow and in deny",
                "policy.allow: 'image:grid' has no effect, since forbid_kinds has 'image'",
                "backends.good.values: 'api_key' is not in backends.good.options, so no job may give it",
                "backends.good.values: 'api_key' has no pattern, so every value is refused",
                "backends.jsonl.fixed: 'path' is also in backends.jsonl.options, but the fixed value is used",
            ],
        ),
        ('[policy]\nallow = ["val/*"]\ndeny = ["*"]', ["deny has a pattern that matches every key"]),
        ('[policy.clip]\n"val/*" = [1, 0]', ["[1.0, 0.0] is not a range"]),
        ("[limits]\nsites_s = -1", ["limits.sites_s"]),
        ('[backends.good.fixed]\napi_key = "literal"', ["good.api_key: a secret must not be written"]),
        ('[backends.good.values]\nno = ["*"]', ["backends.good.values: 'no' is not an option; there are: api_key"]),
    ],
)  # fmt: skip
def test_a_wrong_operator_s_file_is_refused_with_all_its_problems(
    tmp_path: Path, make_plugin: MakePlugin, toml: str, problems: list[str]
) -> None:
    done = check(tmp_path, make_plugin, toml)

    assert (done.returncode, done.stdout) == (1, "")
    for problem in problems:
        assert problem in done.stderr


def test_the_check_needs_the_workspace_of_a_site(tmp_path: Path) -> None:
    done = trackhub("backends", "--check", "--workspace", str(tmp_path))

    assert done.returncode == 1
    assert "is not the workspace of a FLARE site" in done.stderr


def test_an_option_is_shown_with_its_default_and_its_meaning() -> None:
    as_text = trackhub("backends", "wandb").stdout
    as_json = listed(trackhub("backends", "wandb", "--json").stdout)["wandb"]["option_help"]

    assert re.search(r"upload_interval_s \(default: 2\.0\)\n +seconds between uploads", as_text)
    assert re.search(r"api_key \(default: not set, secret\)", as_text)
    assert as_json["step_metric"]["default"] == "step"
    assert as_json["mode"]["meaning"].startswith("online needs a login on the receiver's machine. offline writes files")
    assert all(text["meaning"] for text in as_json.values())


def test_options_without_a_docstring_are_shown_by_name(make_plugin: MakePlugin) -> None:
    path = [make_plugin("acme-good", {"good": "acme_good:Acme"}, {"acme_good": GOOD})]

    shown = trackhub("backends", "good", path=path).stdout

    assert "  level (default: 1)\n" in shown
    assert "  url (default: http://localhost, host)\n" in shown


CANNOT_BE_USED = """
    from trackhub.spi import Backend, BackendRun, Capabilities, ConfigError, ConfirmedBy, RunInfo, TransientError
    from trackhub.spi import ANY_KEY

    class Acme(Backend):
        spi = 1
        capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE, key_rule=ANY_KEY)

        def preflight(self) -> None:
            raise {error}

        def open_run(self, info: RunInfo) -> BackendRun:
            raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("error", "ready", "remark"),
    [
        ("ConfigError('acme: nobody is logged in')", "no", "acme: nobody is logged in"),
        ("TransientError('the store sleeps')", "not now", "the store sleeps"),
        ("SystemError('what is this')", "not now", "SystemError: what is this"),
    ],
)
def test_the_check_says_why_a_backend_is_not_ready(
    make_plugin: MakePlugin, error: str, ready: str, remark: str
) -> None:
    path = [make_plugin("acme", {"acme": "acme:Acme"}, {"acme": CANNOT_BE_USED.format(error=error)})]

    done = trackhub("backends", "acme", "--check", path=path)

    assert done.returncode == 1
    assert re.search(rf"acme +{ready} +{remark}", done.stdout)


def test_the_check_says_that_a_backend_is_ready_and_with_which_warning(tmp_path: Path) -> None:
    no_login = f"import os; os.environ.pop('WANDB_API_KEY', None); os.environ['HOME'] = {str(tmp_path)!r}"

    done = trackhub("backends", "wandb", "--check", prelude=no_login)

    assert done.returncode == 0
    assert re.search(r"wandb +yes +W&B: no login was found", done.stdout)
