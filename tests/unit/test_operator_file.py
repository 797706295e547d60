# SPDX-License-Identifier: Apache-2.0
"""What a job may do at a site, by the operator's file, by the environment, and without either."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trackhub import conceal as conceal_module
from trackhub import registry
from trackhub.conceal import conceal
from trackhub.errors import ConfigError
from trackhub.limits import Limits
from trackhub.operator_file import BackendRules, OperatorFile, read_operator_file
from trackhub.policy import Policy

if TYPE_CHECKING:
    from tests.conftest import MakePlugin

ACME = """
    from typing import Annotated, Any

    import msgspec

    from trackhub.spi import Backend, Credentials, OptionMark

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        url: Annotated[str, OptionMark.HOST] = ""
        store: Annotated[str, OptionMark.HOST, OptionMark.PATH] = ""
        folder: Annotated[str, OptionMark.PATH] = ""
        token: Annotated[str, OptionMark.SECRET] = ""
        settings: Annotated[dict[str, Any], OptionMark.HOST] = {}
        team: Annotated[str, OptionMark.SHARED] = ""
        note: str = ""

    class Acme(Backend[Options]):
        spi = 1
        credentials = Credentials(("ACME_TOKEN",), ("ACME_URL", "ACME_PROXY"), "https://acme.example")

        def open_run(self, info): ...

    class Files(Acme):
        credentials = Credentials()
"""


@pytest.fixture(autouse=True)
def acme(make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = make_plugin("acme", {"acme": "acme_p:Acme", "files": "acme_p:Files"}, {"acme_p": ACME})
    monkeypatch.syspath_prepend(str(plugin))


@pytest.fixture(autouse=True)
def no_known_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(conceal_module, "_known", ())
    yield
    logging.setLogRecordFactory(factory)


def ask(tmp_path: Path, options: dict[str, Any], toml: str = "", name: str = "acme") -> dict[str, Any]:
    """Return what the site makes of a job's options."""
    local, run = tmp_path / "local", tmp_path / "run"
    local.mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    if toml:
        (local / "trackhub.toml").write_text(toml)
    return registry.permitted_options(name, options, read_operator_file(local), run)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "https://evil.example"},
        {"url": "http://acme.example"},
        {"url": "https://acme.example:444"},
        {"url": "https://acme.example.evil.example"},
        {"url": "https://acme.example\\.evil.example"},
        {"url": "https://acme.example%2eevil.example"},
        {"url": "acme.example"},
        {"url": "https:///"},
        {"store": "http://evil.example/x"},
        {"store": "evil.example"},
        {"store": "sqlite:////etc/x.db"},
        {"store": "sqlite:///../x.db"},
        {"store": "sqlite+pysqlite:////etc/x.db"},
        {"store": "SQLITE:////etc/x.db"},
        {"store": "sqlite:///x.db?uri=true&file=/etc/x"},
        {"store": "sqlite:///%2fetc/x.db"},
        {"store": "file:///etc/x"},
        {"store": "file:/etc/x"},
        {"store": "file://host/etc/x"},
        {"folder": "/etc/x"},
        {"folder": ".."},
        {"folder": "a/../../b"},
        {"folder": "~/x"},
        {"folder": "file:/etc"},
        {"folder": "a\x00b"},
        {"folder": "link/x"},
        {"folder": " /etc/x"},
        {"folder": "$HOME/x"},
        {"url": "https://acme.example:0"},
        {"url": "//evil.example"},
        {"url": "https:/acme.example"},
        {"token": "${secret:OTHER}"},
        {"token": "${secret:file:/etc/passwd}"},
        {"settings": {"proxy": "http://evil.example"}},
        {"team": "another"},
    ],
    ids=str,
)
def test_without_a_file_a_job_does_not_reach_past_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)

    with pytest.raises(ConfigError, match=re.escape("operator")) as caught:
        ask(tmp_path, options)

    assert str(caught.value).startswith(f"acme.{next(iter(options))}")
    assert "local/trackhub.toml" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"url": "https://acme.example"},
        {"url": "https://ACME.example:443/path"},
        {"store": "sqlite:///x.db"},
        {"folder": "curves"},
        {"folder": "a/../b"},
        {"token": "${secret:ACME_TOKEN}"},
        {"note": "https://elsewhere.example"},
        {"url": "", "folder": "", "settings": {}},
    ],
    ids=str,
)
def test_without_a_file_a_job_uses_its_own_folder_and_the_usual_host(tmp_path: Path, options: dict[str, Any]) -> None:
    assert ask(tmp_path, options) == options


def test_an_absolute_path_in_the_job_s_folder_is_its_own(tmp_path: Path) -> None:
    options = {"folder": str(tmp_path / "run" / "curves"), "store": f"sqlite:///{tmp_path / 'run'}/x.db"}

    assert ask(tmp_path, options) == options


def test_the_environment_names_the_host_in_place_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_URL", "https://acme.hospital.org/base")

    assert ask(tmp_path, {"url": "https://acme.hospital.org"})
    with pytest.raises(ConfigError, match=re.escape("acme.hospital.org")):
        ask(tmp_path, {"url": "https://acme.example"})


@pytest.mark.parametrize("login", ["me:hunter2x", "hunter2x", "me:hunter2x%2F", "a@b:hunter2x"])
def test_a_login_in_the_environments_url_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    monkeypatch.setenv("ACME_URL", f"https://{login}@acme.corp/api")

    assert ask(tmp_path, {"url": "https://acme.corp/api"}) == {"url": "https://acme.corp/api"}
    with pytest.raises(ConfigError, match=r"https://acme\.corp/api") as refused:
        ask(tmp_path, {"url": "https://evil.example"})
    assert "hunter2x" not in str(refused.value)
    assert "hunter2x" not in conceal(f"cannot connect to https://{login}@acme.corp/api")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_password_of_a_proxy_is_concealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://me:hunter%2F3y@proxy.corp:8080")

    registry.build_options("acme", registry.load("acme"), {})

    shown = conceal("cannot reach http://me:hunter%2F3y@proxy.corp:8080, login hunter/3y")
    assert shown == "cannot reach http://me:***@proxy.corp:8080, login ***"


def test_a_url_of_the_environment_that_cannot_be_read_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_URL", "https://[acme")
    monkeypatch.setenv("HTTPS_PROXY", "proxy.corp:8080")

    with pytest.raises(ConfigError, match="not a host"):
        ask(tmp_path, {})


def test_the_file_allows_hosts_paths_secrets_and_values(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    toml = f"""
        [backends.acme]
        hosts = ["https://one.example", "http://two.example:8080"]
        paths = ["{shared}"]
        secrets = ["OTHER", "file:/run/secrets/acme"]
        [backends.acme.values]
        team = ["team-*"]
        settings = ["*"]
    """
    options = {
        "url": "http://two.example:8080",
        "folder": str(shared / "curves"),
        "store": f"sqlite:///{shared}/x.db",
        "token": "${secret:OTHER}",
        "settings": {"proxy": "http://three.example"},
        "team": "team-a",
    }

    assert ask(tmp_path, options, toml) == options
    for change in (
        {"url": "https://acme.example"},
        {"folder": str(tmp_path / "shared-not")},
        {"token": "${secret:ANOTHER}"},
        {"team": "other"},
    ):
        with pytest.raises(ConfigError, match="operator"):
            ask(tmp_path, {**options, **change})


def test_hosts_in_the_file_replace_the_default_host_also_where_a_job_names_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape("no option names a host, so the backend would use its default; 'https://acme.example'"),
    ):
        ask(tmp_path, {}, '[backends.acme]\nhosts = ["https://one.example"]')
    with_host = '[backends.acme]\nhosts = ["https://one.example"]\n[backends.acme.fixed]\nurl = "https://one.example"'
    assert ask(tmp_path, {}, with_host) == {"url": "https://one.example"}


def test_a_job_cannot_change_what_the_operator_fixed(tmp_path: Path) -> None:
    toml = '[backends.acme]\noptions = ["note"]\n[backends.acme.fixed]\nfolder = "/srv/x"\nteam = "ours"'

    assert ask(tmp_path, {"folder": "/etc", "note": "n"}, toml) == {"folder": "/srv/x", "team": "ours", "note": "n"}
    with pytest.raises(ConfigError, match=re.escape("acme.url: a job may not set this option")):
        ask(tmp_path, {"url": "https://acme.example"})


def test_a_name_in_a_store_of_the_job_s_own_is_free(tmp_path: Path) -> None:
    for options in ({"team": "any"}, {"team": "any", "store": "sqlite:///x.db"}):
        assert ask(tmp_path, options, name="files") == options
    with pytest.raises(ConfigError, match=re.escape("files.team: 'any' may belong to others")):
        toml = f'[backends.files]\npaths = ["{tmp_path}"]'
        ask(tmp_path, {"team": "any", "folder": str(tmp_path)}, toml, name="files")
    with pytest.raises(ConfigError, match=re.escape("files.team: 'any' may belong to others")):
        toml = '[backends.files]\nhosts = ["host"]'
        ask(tmp_path, {"team": "any", "url": "host"}, toml, name="files")


def test_a_backend_that_is_not_allowed_is_not_even_imported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("backend 'acme' is not allowed at this site")) as caught:
        ask(tmp_path, {"no_such_option": 1}, 'backends_allowed = ["jsonl"]')

    assert "local/trackhub.toml" in str(caught.value)


def test_limits_of_the_file_and_then_of_the_environment_win_over_the_job_s() -> None:
    operator = OperatorFile(limits={"sites_s": 5.0})
    environ = {"TRACKHUB_SITES_S": "6", "TRACKHUB_DEADLINE_S": "7"}
    job = {"sites_s": 3600, "deadline_s": 3600, "poll_s": 0.1}

    limits = operator.limits_for(job, environ=environ)

    assert (limits.sites_s, limits.deadline_s, limits.poll_s) == (5.0, 7.0, 0.1)
    assert limits.barrier_s == Limits().barrier_s


def test_state_dir_is_the_operator_s_or_in_the_job_s_folder(tmp_path: Path) -> None:
    assert OperatorFile(state_dir="/srv/x").state_dir_for("/etc", tmp_path) == "/srv/x"
    assert OperatorFile().state_dir_for(None, tmp_path) is None
    assert OperatorFile().state_dir_for("state", tmp_path) == str(tmp_path / "state")
    for outside in ("/etc", "..", "~/x"):
        with pytest.raises(ConfigError, match="outside its own folder"):
            OperatorFile().state_dir_for(outside, tmp_path)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("state_dir = 1", "state_dir: expected `str | null`"),
        ('state_dir = "srv"', "state_dir: expected an absolute path, got 'srv'"),
        ("sites_s = 1", "unknown field `sites_s`"),
        ("[limits]\nsites_s = -1", "limits.sites_s"),
        ("[limits]\nno = 1", "limits.no: unknown limit"),
        ('[backends.wandb]\nhost = "x"', "backends"),
        ('[backends.wandb]\nhosts = "x"', "expected `array`"),
        ('[backends.wandb]\nhosts = ["https://u@h"]', "backends.wandb.hosts: 'https://u@h' is not a host"),
        ('[backends.wandb]\npaths = ["x"]', "backends.wandb.paths: expected an absolute path, got 'x'"),
        ('[backends.wandb]\nsecrets = ["A B"]', "backends.wandb.secrets: 'A B' is neither"),
        ("x = ", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "trackhub.toml").write_text(toml)

    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_operator_file(tmp_path)

    assert str(tmp_path / "trackhub.toml") in str(caught.value)


def test_a_file_that_cannot_be_read_refuses_every_job(tmp_path: Path) -> None:
    (tmp_path / "trackhub.toml").mkdir()

    with pytest.raises(ConfigError, match="cannot be read"):
        read_operator_file(tmp_path)


def test_a_link_to_nothing_is_no_missing_file_and_refuses_every_job(tmp_path: Path) -> None:
    (tmp_path / "trackhub.toml").symlink_to(tmp_path / "not-mounted" / "trackhub.toml")

    with pytest.raises(ConfigError, match="a link to a file that does not exist"):
        read_operator_file(tmp_path)


def test_the_page_for_operators_shows_every_key_in_a_file_that_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "trackhub.toml").write_text(shown)

    operator = read_operator_file(tmp_path)

    assert all(getattr(operator, key) for key in OperatorFile.__struct_fields__)
    rules = operator.backends.values()
    assert all(any(getattr(rule, key) for rule in rules) for key in BackendRules.__struct_fields__)


def test_the_operators_policy_and_the_jobs_both_hold(tmp_path: Path) -> None:
    (tmp_path / "trackhub.toml").write_text('forbid_kinds = ["image"]\n[policy]\nallow = ["val/*"]\n')

    rules = read_operator_file(tmp_path).site_rules(Policy(digits=3), tmp_path)

    assert rules.policies == (("job", Policy(digits=3)), ("operator", Policy(allow=("val/*",))))
    assert (rules.forbid_kinds, rules.operator_folder) == (("image",), str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('forbid_kinds = ["images"]', "forbid_kinds: 'images' is not a kind of record; expected one of metrics"),
        ("[policy]\ndigit = 3", "policy: .*unknown field `digit`"),
        ('[policy]\ndeny = ["images:*"]', "policy.deny: .*expected one of metrics"),
        ("[policy]\ndigits = 0", "policy.digits: expected `int` >= 1"),
    ],
)
def test_a_wrong_policy_of_the_operator_refuses_every_job(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trackhub.toml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        read_operator_file(tmp_path)
