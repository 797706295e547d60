# SPDX-License-Identifier: Apache-2.0
"""Federated averaging on CIFAR-10 in FLARE's simulator, tracked by any backend at the server, the clients, or both."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import client
import data
import torch
from flags import FlagParser, add_training_flags, training_args
from model import SmallCNN
from results import Outcome, forget_outcome, print_outcome, read_outcome

from trackhub import registry
from trackhub.config import TrackingConfig
from trackhub.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

NAME = "cifar10_fedavg"
HERE = Path(__file__).resolve().parent

EXIT_JOB_FAILED, EXIT_BAD_FLAGS, EXIT_UNDELIVERED = 1, 2, 3

# FLARE stops an external trainer this long after the last round, so that its last lines can run.
SHUTDOWN_TIMEOUT_S = 30.0


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the values of the flags."""
    parser = FlagParser(description=__doc__, epilog="Flags may be spelled with hyphens as well.")
    add_training_flags(parser)

    tracking = parser.add_argument_group("tracking")
    tracking.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="repeatable; default tensorboard; none turns tracking off; 'trackhub backends' lists what is installed",
    )
    tracking.add_argument("--client_backend", action="append", metavar="NAME", help="at the clients, where they differ")
    tracking.add_argument(
        "--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="option of a backend; repeatable"
    )
    for side, default in (("server", True), ("clients", False)):
        tracking.add_argument(
            f"--streamed_to_{side}",
            action=argparse.BooleanOptionalAction,
            default=default,
            help=f"run the backends {'on the server' if side == 'server' else 'at each client'}; "
            f"default {'on' if default else 'off'}",
        )
    tracking.add_argument("--strict", action="store_true", help=f"exit {EXIT_UNDELIVERED} when anything is undelivered")

    running = parser.add_argument_group("running")
    running.add_argument(
        "--launch_external_process", action="store_true", help="run each site's client.py in a process of its own"
    )
    running.add_argument("--workspace", type=Path, metavar="DIR", help=f"default: runs/{NAME}-<time>")
    running.add_argument("--export", type=Path, metavar="DIR", help="write the job to DIR; do not run it")
    running.add_argument("--prepare_data", action="store_true", help="get CIFAR-10, by download if need be, and stop")
    return parser.parse_args(argv)


def tracking_config(args: argparse.Namespace) -> TrackingConfig:
    """Return the tracking that the flags describe.

    Raises:
        ConfigError: they contradict each other, or an option is wrong.
        PluginError: a backend is installed but cannot be used. Both are checked only where the job also runs.
    """
    if args.client_backend and not args.streamed_to_clients:
        raise ConfigError("--client_backend: nothing runs at the clients; add --streamed_to_clients")
    config = TrackingConfig.from_flags(
        args.backend or ["tensorboard"],
        client_backends=args.client_backend,
        options=args.option,
        streamed_to_server=args.streamed_to_server,
        streamed_to_clients=args.streamed_to_clients,
    )
    if args.export is None:
        for name, options in {**(config.server or {}), **(config.clients or {})}.items():
            registry.build_options(name, registry.load(name), options)
    return config


def build_recipe(args: argparse.Namespace, config: TrackingConfig, client_args: list[str]) -> FedAvgRecipe:
    """Return FLARE's FedAvg recipe for this job, with tracking added.

    Raises:
        ConfigError: what the flags say cannot be written into a job.
    """
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    from trackhub.flare.recipe import add_tracking

    tracked = bool(config.server or config.clients)
    if not tracked:
        client_args.append("--no_tracking")
    # "Client side only" promises that the server sees no metric, and FLARE would send these with the weights.
    weights_only = tracked and not config.server
    if weights_only:
        client_args.append("--no_send_metrics")
    spaced = [word for word in client_args if " " in word]
    if spaced:
        raise ConfigError(f"{spaced[0]!r} has a space in it, at which FLARE splits arguments; use a path without one")
    recipe = FedAvgRecipe(
        name=NAME,
        model=SmallCNN(args.seed),
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        # Relative, so that each site runs the copy that the job brings along. FLARE looks for it where this process is.
        train_script="client.py",
        train_args=" ".join(client_args),
        key_metric="" if weights_only else "accuracy",  # by which FLARE keeps the best model; empty for not at all
        launch_external_process=args.launch_external_process,
        # The simulator's sites run on this machine, with this interpreter's packages; others have their own python3.
        command="python3 -u" if args.export else f"{sys.executable} -u",
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    if tracked:
        add_tracking(recipe, server=config.server, clients=config.clients)
    return recipe


def run(args: argparse.Namespace, config: TrackingConfig) -> Outcome:
    """Run the job in FLARE's simulator.

    Raises:
        ConfigError, DataError: before training starts, something that the flags name cannot be used.
    """
    from nvflare.recipe import SimEnv

    workspace = (args.workspace or Path("runs") / f"{NAME}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    if " " in str(workspace):
        raise ConfigError(f"--workspace {str(workspace)!r} has a space in it, at which FLARE splits it; choose another")
    # Once for all sites: with "auto" they must not decide each for itself, nor all download at once.
    dataset = data.load(args.dataset, args.data_root, seed=args.seed)
    args.dataset = dataset.name
    if args.data_root is not None:
        os.environ[data.DATA_ROOT_ENV] = str(args.data_root.resolve())  # which the simulator's sites inherit
        args.data_root = None
    if args.torch_threads is None:
        args.torch_threads = max(1, (os.cpu_count() or 1) // args.n_clients)
    summaries = workspace / "sites"

    print(f"Running {NAME} on {dataset.origin}; workspace {workspace}", flush=True)
    environment = SimEnv(num_clients=args.n_clients, workspace_root=str(workspace))
    result = Path(environment.workspace_root) / NAME
    forget_outcome(result, summaries)
    failure = None
    with contextlib.chdir(HERE):
        recipe = build_recipe(args, config, [*training_args(args), "--summary_dir", str(summaries)])
        try:
            recipe.run(environment)
        except RuntimeError as error:
            failure = str(error)
    outcome = read_outcome(result, summaries, config, args.n_clients, failure)
    checkpoint = result / "server" / "simulate_job" / "app_server" / "FL_global_model.pt"
    if failure is None and checkpoint.is_file():
        outcome.global_model = evaluate_checkpoint(checkpoint, dataset.test)
    return outcome


def evaluate_checkpoint(path: Path, images: data.Images) -> tuple[float, float]:
    """Return loss and accuracy (0 to 1) of the last global model, which FLARE saved and no site received."""
    model = SmallCNN()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    loss, accuracy, _ = client.evaluate(model, images, torch.device("cpu"))
    return loss, accuracy


def main(argv: list[str]) -> int:
    """Run the job as the flags say, and return the exit status."""
    args = parse_args(argv)
    # FLARE takes a flag named --export out of sys.argv when it is imported, and warns about it. It has been parsed.
    sys.argv[1:] = []
    try:
        if args.prepare_data:
            print(f"CIFAR-10 is in {data.prepare(args.data_root)}")
            return 0
        config = tracking_config(args)
        if args.export is not None:
            target = args.export.resolve()
            with contextlib.chdir(HERE):
                build_recipe(args, config, training_args(args)).export(str(target))
            print(f"The job is in {target / NAME}: submit it to a FLARE system, or run it with 'nvflare simulator'.")
            return 0
        outcome = run(args, config)
    except (ConfigError, PluginError, data.DataError) as error:
        print(f"job.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_FLAGS
    print_outcome(outcome)
    if outcome.failure is not None:
        return EXIT_JOB_FAILED
    return EXIT_UNDELIVERED if args.strict and outcome.undelivered else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
