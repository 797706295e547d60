# SPDX-License-Identifier: Apache-2.0
"""``trackhub attach``: add tracking to an exported job. `trackhub.flare.attach_to_job_folder` does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import click

from trackhub.cli.output import print_error, print_lines
from trackhub.config import parse_option_flags
from trackhub.errors import ConfigError
from trackhub.runnable_commands import command_for

__all__ = ["attach"]

_DEFAULTS = {"take_over": True, "federation": True, "capture_only": False}  # of the others: None, or an empty text


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--server", "-s", multiple=True, metavar="NAME", help="A backend on the server; repeatable.")
@click.option("--client", "-c", multiple=True, metavar="NAME", help="A backend at each client; repeatable.")
@click.option("--option", "-o", multiple=True, metavar="NAME.KEY=VALUE", help="An option of a backend; repeatable.")
@click.option("--limit", multiple=True, metavar="NAME=VALUE", help="A limit, such as deadline_s=60; repeatable.")
@click.option("--name", help="The job's name, as people see it; by default FLARE's.")
@click.option("--notes", default="", help="A description of the job, in Markdown.")
@click.option("--tag", multiple=True, help="A label for every run of the job; repeatable.")
@click.option(
    "--take-over",
    type=click.Choice(["true", "events", "copy", "false"]),
    default="true",
    help="Whether to record what FLARE's own writers log, as for add_tracking.",
)
@click.option(
    "--capture",
    multiple=True,
    metavar="SDK",
    help="Also record what the scripts log with tensorboard, wandb or mlflow; repeatable.",
)
@click.option("--capture-only", is_flag=True, help="Do not pass on to the SDK what --capture records.")
@click.option("--aggregate", multiple=True, metavar="PATTERN", help="Statistics of these keys over sites; repeatable.")
@click.option(
    "--flare-metrics",
    multiple=True,
    type=click.Choice(["clients", "server"]),
    help="Where to record the metrics that FLARE carries itself, as for add_tracking; repeatable.",
)
@click.option("--no-context", is_flag=True, help="Do not log in each run how the job was made.")
@click.option(
    "--system-metrics", type=float, metavar="SECONDS", help="Measure each site's host and processes at this interval."
)
@click.option("--log-model", type=click.Choice(["best", "last"]), help="Keep this global model in the federation run.")
@click.option("--state-dir", help="The folder for spools and journals at every site.")
@click.option("--dry-run", is_flag=True, help="Show the change, and change nothing.")
def attach(folder: Path, server: Sequence[str], client: Sequence[str], dry_run: bool, **more: Any) -> None:
    """Add tracking to an exported job.

    FOLDER is the job's folder, with its meta file. The command changes the JSON and HOCON files of the job's apps, and
    shows how. It keeps each original with .orig at the end of its name. For YAML it prints what to insert. The last
    lines are the commands that run the job.

    \b
    Examples:
      trackhub attach jobs/my-job --server tensorboard
      trackhub attach jobs/my-job -s wandb -o wandb.project=cifar10 --client jsonl

    The exit status is 1 if something is left to do by hand.
    """
    try:
        from trackhub.flare.attach_to_job_folder import clients_of, plan_attach, write_changes
        from trackhub.flare.recipe import tracking_components
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"nvflare", "pyhocon", "yaml"}:
            raise
        print_error(
            "attach needs FLARE, which is not installed here: pip install 'flare-trackhub[flare]' "
            "(in a clone: pip install -e '.[flare]')"
        )
        sys.exit(2)
    components = _without_defaults(tracking_components(**_arguments(server, client, more)))
    changes, by_hand, warnings = plan_attach(folder, components)
    if not dry_run:
        write_changes(changes)
    for change in changes:
        print_lines(*change.diff().splitlines(), *(f"note: {change.path}: {note}" for note in change.notes), "")
    print_lines(*(f"note: {warning}" for warning in warnings))
    for left in by_hand:
        print_lines(f"{left.path}: {left.reason}:", *left.block.splitlines(), "")
    verb = "would change" if dry_run else "changed"
    kept = "" if dry_run or not changes else "; the originals end in .orig"
    print_lines(f"{verb} {len(changes)} file(s) of {folder}{kept}")
    if by_hand:
        print_error(f"{len(by_hand)} file(s) are left for you to change: see above")
        sys.exit(1)
    if not dry_run:
        print_lines(*_next_steps(folder, clients_of(folder)))


def _next_steps(folder: Path, clients: int) -> list[str]:
    """Return the commands that run the job and show what became of its records."""
    runs = Path("runs", folder.absolute().name)
    simulator = command_for("nvflare simulator", folder)
    return [
        "Run it in FLARE's simulator, and look:",
        f"  {simulator} -w {quote(str(runs))} -n {clients} -t {clients}",
        f"  {command_for('trackhub status', runs)}",
        "Or in a federation that has trackhub at each site:",
        f"  {command_for('nvflare job submit -j', folder)}",
    ]


def _arguments(server: Sequence[str], client: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `tracking_components`.

    Raises:
        ConfigError: no backend is named, or an option belongs to none of them.
    """
    options = parse_option_flags(more["option"])
    if not server and not client:
        raise ConfigError("attach: name a backend: --server NAME, --client NAME or both")
    if strange := sorted(set(options) - {*server, *client}):
        raise ConfigError(
            f"attach: --option {strange[0]}.…: this job gets no backend {strange[0]!r}. Name it with --server or "
            "--client"
        )
    take_over: Any = {"true": True, "false": False}.get(more["take_over"], more["take_over"])
    return {
        "server": {name: options.get(name, {}) for name in server} or None,
        "clients": {name: options.get(name, {}) for name in client} or None,
        "name": more["name"],
        "notes": more["notes"],
        "tags": list(more["tag"]),
        "take_over": take_over,
        "capture": list(more["capture"]),
        "capture_only": more["capture_only"],
        "aggregate": list(more["aggregate"]) or None,
        "flare_metrics": list(more["flare_metrics"]),
        "limits": _limits(more["limit"]) or None,
        "state_dir": more["state_dir"],
        "context": not more["no_context"],
        "system_metrics": more["system_metrics"],
        "log_model": more["log_model"],
    }


def _without_defaults(components: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the components without the arguments that have their defaults."""

    def told(args: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in args.items() if not _is_default(name, value)}

    return {file: [{**one, "args": told(one["args"])} for one in listed] for file, listed in components.items()}


def _is_default(name: str, value: Any) -> bool:
    if name == "server_receiver":  # None is not its default
        return False
    return value is _DEFAULTS.get(name) or value == ""


def _limits(flags: Sequence[str]) -> dict[str, float]:
    """Return limits by name.

    Raises:
        ConfigError: a flag is not of the form NAME=VALUE with a number.
    """
    limits = {}
    for flag in flags:
        name, _, text = flag.partition("=")
        try:
            limits[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError as error:
            raise ConfigError(f"attach: --limit {flag!r}: expected NAME=VALUE, such as deadline_s=60") from error
    return limits
