# SPDX-License-Identifier: Apache-2.0
"""Federated averaging on CIFAR-10 in FLARE, tracked by any backend at the server, the clients, or both."""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import data
import print_job_summary
import torch
from evaluation import DEVICE, evaluate
from flags import spelled, training_args, training_parser
from model import SmallCNN

from trackhub import registry
from trackhub.config import TrackingConfig
from trackhub.errors import ConfigError, PluginError
from trackhub.preflight import Readiness, check_ready

NAME, SUMMARIES = "cifar10_fedavg", "sites"
HERE = Path(__file__).resolve().parent
POLL_S = 3.0  # how often a job in a federation is asked whether it has ended
EXIT_JOB_FAILED, EXIT_BAD_FLAGS, EXIT_UNDELIVERED, EXIT_INTERRUPTED = 1, 2, 3, 130


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the values of the flags."""
    parser = training_parser(__doc__)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("tracking").add_argument
    add("--backend", action="append", metavar="NAME", help="repeatable; default tensorboard; none turns tracking off")
    add("--client_backend", action="append", metavar="NAME", help="repeatable; at the clients, where they differ")
    add("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="repeatable; option of a backend")
    add("--streamed_to_server", action=switch, default=True, help="run the backends on the server; default on")
    add("--streamed_to_clients", action=switch, default=False, help="run the backends at each client; default off")
    add("--aggregate", action="append", metavar="PATTERN", help="repeatable; keys whose mean over the sites is tracked")
    add("--aggregate_weight", metavar="KEY", help="the metric by which a site weighs in weighted means")
    add("--update_statistics", action="store_true", help="measure what each site changed in the model")
    add("--context", action=switch, default=True, help="log in each run what it was made with; default on")
    add("--system_metrics", type=float, metavar="SECONDS", help="measure each site's host and processes every SECONDS")
    add("--log_model", choices=("best", "last"), help="keep this global model in the federation run")
    add("--strict", action="store_true", help=f"exit {EXIT_UNDELIVERED} when anything is undelivered")
    add = parser.add_argument_group("running").add_argument
    add("--env", choices=["sim", "poc", "prod"], default="sim", help="FLARE's simulator, a new POC, or a federation")
    add("--startup_kit", type=Path, metavar="DIR", help="of the user who submits the job; for --env prod")
    add("--launch_external_process", action="store_true", help="run each site's client.py in a process of its own")
    add("--workspace", type=Path, metavar="DIR", help=f"default: runs/{NAME}-<time>")
    add("--export", type=Path, metavar="DIR", help="write the job to DIR; do not run it")
    add("--prepare_data", action="store_true", help="get CIFAR-10, by download if need be, and stop")
    args = parser.parse_args(spelled(argv))
    if (args.env == "prod") != (args.startup_kit is not None):
        parser.error("--env prod and --startup_kit DIR belong together")
    if args.env != "sim" and (args.strict or args.workspace or args.export):
        parser.error("--strict, --workspace and --export are for the simulator; leave out --env")
    return args


def sites_are_here(args: argparse.Namespace) -> bool:
    """Return whether all sites run on this machine and inherit the environment of this process."""
    return args.export is None and args.env != "prod"


def tracking_config(args: argparse.Namespace) -> TrackingConfig:
    """Return the tracking that the flags describe.

    Raises:
        ConfigError: they contradict each other, or an option is wrong.
        PluginError: a backend cannot be used.
    """
    config = TrackingConfig.from_flags(
        args.backend or ["tensorboard"],
        client_backends=args.client_backend,
        options=args.option,
        streamed_to_server=args.streamed_to_server,
        streamed_to_clients=args.streamed_to_clients,
        aggregate=args.aggregate,
        aggregate_weight=args.aggregate_weight,
        update_statistics=args.update_statistics,
        context=args.context,
        system_metrics=args.system_metrics,
        log_model=args.log_model,
    )
    if sites_are_here(args):  # elsewhere, other backends may be installed
        for name, options in {**(config.server or {}), **(config.clients or {})}.items():
            registry.check_options(name, options)
    return config


def check_backends(config: TrackingConfig) -> None:
    """Try each backend as the job will use it. A missing login shows now, and not after the start.

    Raises:
        ConfigError: a backend cannot be used.
    """
    for name, options in {**(config.server or {}), **(config.clients or {})}.items():
        ready = check_ready(name, options)
        if ready.word == Readiness.NO:
            raise ConfigError(f"the backend {name!r} cannot be used: {ready.remark}")
        if ready.remark:
            print(f"{name}: {ready.remark}", file=sys.stderr)


def prepare_sites(args: argparse.Namespace) -> Any:
    """Make the decisions that must be the same for all sites on this machine. Return the test images.

    Raises:
        DataError: the images cannot be loaded.
    """
    args.dataset, _, test_images = data.load(args)  # what "auto" means here
    if args.data_root is not None:
        os.environ[data.DATA_ROOT_ENV] = str(args.data_root.resolve())  # the sites inherit it
        args.data_root = None
    if args.torch_threads is None:
        args.torch_threads = max(1, (os.cpu_count() or 1) // args.n_clients)
    return test_images


def build_recipe(args: argparse.Namespace, config: TrackingConfig, summaries: Path | None = None) -> Any:
    """Return FLARE's FedAvg recipe for this job, with tracking added.

    Args:
        args: the flags.
        config: the tracking.
        summaries: the folder where each site writes its last metrics, for the last screen. None writes none.

    Raises:
        ConfigError: a path has a space in it.
    """
    from evaluate_last_model import EvaluateLastModel
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    from trackhub.flare.recipe import add_tracking

    client_args = training_args(args)
    if summaries is not None:
        client_args += ["--summary_dir", str(summaries)]
    # "Client side only" promises that the server sees no metric, and FLARE would send these with the weights.
    weights_only = config.clients is not None and config.server is None
    if weights_only:
        client_args += ["--no_send_metrics"]
    for word in client_args:
        if " " in word:
            raise ConfigError(
                f"{word!r} has a space in it, at which FLARE splits arguments; use a path without one, "
                "such as --workspace /tmp/cifar10"
            )
    recipe = FedAvgRecipe(
        name=NAME,
        model=SmallCNN(args.seed),
        min_clients=args.n_clients,
        num_rounds=args.num_rounds,
        # The path is relative, so that each site runs the copy in the job. FLARE looks for it in the current folder.
        train_script="client.py",
        train_args=" ".join(client_args),
        key_metric="" if weights_only else "accuracy",  # FLARE keeps the best model by this metric; empty keeps none
        launch_external_process=args.launch_external_process,
        # Sites on this machine have this interpreter's packages; others have their own python3.
        command=f"{sys.executable} -u" if sites_are_here(args) else "python3 -u",
        shutdown_timeout=30.0,  # time for the last lines of an external trainer, before FLARE stops it
    )
    if config.server or config.clients:
        if config.server and args.dataset != "auto":  # the server must not decide by itself what "auto" means
            # A recipe has no public call yet that adds a component of one's own to the server.
            recipe._job.to_server(EvaluateLastModel(args.dataset, args.seed), id="last_model")
        more = ("aggregate", "aggregate_weight", "update_statistics", "context", "system_metrics", "log_model")
        add_tracking(recipe, config.server, config.clients, **{name: getattr(config, name) for name in more})
    return recipe


def run(args: argparse.Namespace, config: TrackingConfig) -> int:
    """Run the job in FLARE's simulator, print the last screen, and return the exit status.

    Raises:
        ConfigError, DataError: before training starts, something that the flags name cannot be used.
    """
    from nvflare.recipe import SimEnv

    from trackhub.watch import show_job

    check_backends(config)
    test_images = prepare_sites(args)
    args.workspace = (args.workspace or Path("runs") / f"{NAME}-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    environment = SimEnv(num_clients=args.n_clients, workspace_root=str(args.workspace))
    result = Path(environment.workspace_root) / NAME
    sites = [f"site-{number}" for number in range(1, args.n_clients + 1)]
    receivers = (["server"] if config.server else []) + (sites if config.clients else [])
    run_folders = {receiver: result / receiver / "simulate_job" for receiver in receivers}
    failure: RuntimeError | None = None
    with contextlib.chdir(HERE):
        recipe = build_recipe(args, config, args.workspace / SUMMARIES)
        print(f"Running {NAME} on {args.dataset} images; workspace {args.workspace}", flush=True)
        print_job_summary.forget(run_folders, args.workspace / SUMMARIES)
        try:
            with show_job(result, args.workspace / "flare.log") as show:
                recipe.run(environment)
        except RuntimeError as error:
            failure = error

    if show.was_interrupted:
        print("\nInterrupted. What the sites have logged is delivered now:", flush=True)
        # What it delivers is in the tables below. Its progress and its problems go to stderr.
        replay = [sys.executable, "-m", "trackhub.cli", "replay", str(result), "--timeout-s", "30"]
        subprocess.run(replay, stdout=subprocess.DEVNULL, check=False)
    print_job_summary.print_metrics(args.workspace / SUMMARIES)
    checkpoint = result / "server" / "simulate_job" / "app_server" / "FL_global_model.pt"
    if failure is None and checkpoint.is_file():
        model = SmallCNN().to(memory_format=torch.channels_last).to(DEVICE)
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        loss, accuracy, _ = evaluate(model, test_images)
        print(f"\nFinal global model: test accuracy {accuracy:.2%}, test loss {loss:.4f}")
    delivered = print_job_summary.print_delivery(run_folders)
    print(f"\nFiles of the job: {result}")
    if show.was_interrupted:
        return EXIT_INTERRUPTED
    if failure is not None:
        print("", *show.last_lines(), f"The job failed: {failure}", sep="\n")
        return EXIT_JOB_FAILED
    return EXIT_UNDELIVERED if args.strict and not delivered else 0


def federation(args: argparse.Namespace, config: TrackingConfig) -> Any:
    """Return a new POC, or the federation that the startup kit belongs to.

    Raises:
        ConfigError, DataError: something that the flags name cannot be used.
    """
    from nvflare.recipe import PocEnv, ProdEnv

    if args.env == "poc":
        check_backends(config)
        prepare_sites(args)
        return PocEnv(num_clients=args.n_clients)
    if not (args.startup_kit / "startup" / "fed_admin.json").is_file():
        raise ConfigError(f"--startup_kit: {args.startup_kit} has no startup/fed_admin.json, as a user's kit has")
    return ProdEnv(str(args.startup_kit.resolve()))


def submit(args: argparse.Namespace, config: TrackingConfig) -> int:
    """Run the job in a POC or a federation, say how to fetch what it left there, and return the exit status.

    The POC goes on running, since its server has the results.

    Raises:
        ConfigError, DataError: before the job is submitted, something that the flags name cannot be used.
    """
    environment = federation(args, config)
    with contextlib.chdir(HERE):
        recipe = build_recipe(args, config)
        try:
            submitted = recipe.run(environment)
        except RuntimeError as error:
            print(f"The job was not submitted: {error}")
            return EXIT_JOB_FAILED
    job_id, status = submitted.get_job_id(), ""
    print("Waiting for the end of the job. Ctrl-C ends the waiting, and not the job.", flush=True)
    try:
        while not status.startswith("FINISHED"):
            time.sleep(POLL_S)
            with contextlib.redirect_stdout(None):  # FLARE says each time that it connects
                status = submitted.get_status() or "unknown"
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        print(f"\nJob {job_id}: {status}")
        kit = args.startup_kit or next(Path(environment.poc_workspace).glob(f"*/prod_00/{environment.username}"))
        sides = {"server": bool(config.server), "clients": bool(config.clients)}
        print_job_summary.print_fetching(job_id, kit, **sides, is_poc=args.env == "poc")
    return 0 if status == "FINISHED:COMPLETED" else EXIT_JOB_FAILED


def main(argv: list[str]) -> int:
    """Run or export the job as the flags say, and return the exit status."""
    args = parse_args(argv)
    # The flags are parsed. When FLARE is imported, it would take --export out of sys.argv, and warn about it.
    sys.argv[1:] = []
    try:
        if args.prepare_data:
            print(f"CIFAR-10 is in {data.prepare(args.data_root)}")
            return 0
        config = tracking_config(args)
        if args.env != "sim":
            return submit(args, config)
        if args.export is None:
            return run(args, config)
        target = args.export.resolve()
        with contextlib.chdir(HERE):
            build_recipe(args, config).export(str(target))
        print(f"The job is in {target / NAME}: submit it to a FLARE system, or run it with 'nvflare simulator'.")
        return 0
    except (ConfigError, PluginError, data.DataError) as error:
        print(f"job.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_FLAGS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
