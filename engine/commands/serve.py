"""``stepfusion serve``: a model behind HTTP, on Ray Serve or in this process."""

from __future__ import annotations

import argparse
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stepfusion.commands.arguments import (
    add_device_argument,
    add_lora_argument,
    add_model_argument,
    add_path_arguments,
    chosen_lora,
)
from stepfusion.commands.provenance import add_metadata_argument
from stepfusion.commands.streams import tell
from stepfusion.options import ExecutionOptions
from stepfusion.serving.http.logs import LEVELS
from stepfusion.serving.http.stopping import exit_at_once, terminate_with

if TYPE_CHECKING:
    from stepfusion.serving.async_engine import AsyncEngine
    from stepfusion.serving.http.model_app import ModelApp

_EXAMPLES = """examples:
  stepfusion serve fashion-mnist --local           # in this process; a form to try it at http://127.0.0.1:8000
  stepfusion serve MODEL --replicas 4 --gpus 1     # on Ray Serve, a GPU a replica
  curl -d '{"labels": "Sneaker"}' -H 'Content-Type: application/json' http://127.0.0.1:8000/v1/generate > one.png

SIGTERM or Ctrl-C takes no more requests, finishes those under way for --drain seconds, and exits with 0, or with 1 if
the engine is dead; if a tick does not end, it is left behind some 5 seconds later. A second signal kills at once.
There is no authentication: whoever reaches the port can use it."""
_MOST = 1 << 31
_MOST_PRIORITY = 1000  # that AsyncEngine.submit takes


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion serve``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add_model_argument(parser)

    add = parser.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s: this machine only)")
    add("--port", type=int, default=8000, help="0 with --local takes a free one (default: %(default)s)")
    add(
        "--allowed-hosts",
        metavar="NAMES",
        help="hosts that requests may name, separated by commas, such as example.org,*.example.org; * is any "
        "(default: localhost alone for requests that arrive at it, and any for others)",
    )
    add("--drain", type=float, default=30.0, metavar="S", help="seconds to finish for (default: %(default)s)")
    add(
        "--hang-after",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which a tick that has not ended makes the engine dead, and /healthz say so; start-up "
        "does not count; 0 is never (default: %(default)s)",
    )
    add_metadata_argument(add)
    add(
        "--log-level",
        choices=LEVELS,
        help="what --local writes to stderr: info has a line for each request (default: info)",
    )
    add("--exit-with-parent", action="store_true", help="SIGTERM to itself when the process that started it is gone")

    add = parser.add_argument_group("what runs it").add_argument
    add("--local", action="store_true", help="uvicorn in this process, without Ray")
    add(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster to join (default: one of this machine, for as long as this runs)",
    )
    add("--replicas", type=int, default=1, metavar="N", help="engines, each a process (default: %(default)s)")
    add(
        "--cpus",
        type=float,
        metavar="N",
        help="the cores of each replica, which also are its threads (default: a fair share)",
    )
    add(
        "--gpus",
        type=float,
        metavar="N",
        help="the GPUs of each replica (default: 1 if there is one that --device allows)",
    )

    add = parser.add_argument_group("how to run the model").add_argument
    add_device_argument(add)
    add_path_arguments(add)
    add_lora_argument(add)
    add("--lanes", type=int, metavar="N", help="the most images at a time (default: 64 on a CPU, what fits on a GPU)")
    add(
        "--invariant",
        action="store_true",
        help="keep one number of lanes, so that an image's bits do not depend on what else runs; a tick "
        "with one image then takes as long as a full one",
    )

    add = parser.add_argument_group("limits").add_argument
    add("--queue", type=int, default=1024, metavar="N", help="images that may wait for a lane (default: %(default)s)")
    add(
        "--max-images",
        type=int,
        default=64,
        metavar="N",
        help="the most images of one request (default: %(default)s)",
    )
    add("--max-steps", type=int, metavar="N", help="the most steps of one image (default: the model's timesteps)")
    add(
        "--max-evaluations",
        type=int,
        default=16_000,
        metavar="N",
        help="the most evaluations of the network for one request: images * steps, twice that with "
        "guidance (default: %(default)s)",
    )
    add(
        "--max-previews",
        type=int,
        default=1000,
        metavar="N",
        help="the most previews of one stream: images * steps / every (default: %(default)s)",
    )
    add(
        "--max-priority",
        type=int,
        default=0,
        metavar="N",
        help="the highest that a client may choose, from 0 to 1000 (default: %(default)s: no one passes the others)",
    )
    add(
        "--max-body",
        type=int,
        default=1 << 16,
        metavar="BYTES",
        help="the most bytes of one request's JSON (default: %(default)s)",
    )


def run_serve(args: argparse.Namespace) -> int:
    """Serve as ``args`` say until it is told to stop; returns the exit status."""
    _check_arguments(args)
    _check_installed(args)
    parent = os.getppid()
    model = _model(args)
    if args.exit_with_parent:
        terminate_with(parent)
    if args.local:
        return _run_locally(args, model)
    _run_with_ray(args, model)
    return 0


def _model(args: argparse.Namespace) -> ModelApp:
    """What is served, with which limits and to which hosts."""
    from stepfusion.serving.http.hosts import check_hosts
    from stepfusion.serving.http.limits import Limits
    from stepfusion.serving.http.model_app import ModelApp

    path, hosts = Path(args.model), args.allowed_hosts
    return ModelApp(
        str(path.resolve()) if path.is_dir() else args.model,
        path.name or args.model,
        execution=ExecutionOptions(
            device=args.device,
            dtype=args.dtype,
            backend=args.backend,
            network=args.network,
            batch=args.lanes,
            invariant=args.invariant,
        ),
        queue=args.queue,
        hang_after=args.hang_after or None,
        limits=Limits(
            images=args.max_images,
            evaluations=args.max_evaluations,
            previews=args.max_previews,
            priority=args.max_priority,
            body=args.max_body,
        ),
        max_steps=args.max_steps,
        metadata=not args.no_metadata,
        lora=tuple((str(Path(file).resolve()), scale) for file, scale in chosen_lora(args) or ()),
        host=args.host or None,
        allowed_hosts=None if hosts is None else check_hosts(host.strip() for host in hosts.split(",")),
    )


def _run_locally(args: argparse.Namespace, model: ModelApp) -> int:
    from stepfusion.serving.http.local_server import listen, serve_locally

    with listen(args.host, args.port) as listening:
        app = model.make()
        _announce(args, listening.getsockname()[1])
        serve_locally(app, listening, drain=args.drain, log_level=args.log_level or "info")
    return _status(app.state.service)


def _status(service: AsyncEngine) -> int:
    """0, or 1 if the engine is dead; a thread of it that hangs does not keep this process from ending."""
    status = int(not service.live)
    if status:
        tell("stepfusion: the engine was dead; the log says why")
    if service.left_behind:
        exit_at_once(status)
    return status


def _run_with_ray(args: argparse.Namespace, model: ModelApp) -> None:
    from stepfusion.serving.http.ray_server import Replicas, serve_with_ray

    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    gpus = float(on_gpu) if args.gpus is None else args.gpus
    share = 1 if on_gpu else max(1, (os.cpu_count() or 1) // args.replicas)
    serve_with_ray(
        model,
        Replicas(args.replicas, share if args.cpus is None else args.cpus, gpus),
        host=args.host,
        port=args.port,
        address=args.ray,
        drain=args.drain,
        ready=lambda: _announce(args, args.port),
    )


def _announce(args: argparse.Namespace, port: int) -> None:
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"stepfusion: {args.model} at http://{host}:{port}", flush=True)


def _check_arguments(args: argparse.Namespace) -> None:
    _check_counts(args)
    for name in ("drain", "hang_after", "cpus", "gpus"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number of at least 0, got {value}")
    if not (0 if args.local else 1) <= args.port < 1 << 16:
        raise ValueError(f"--port must be in [1, 65535], or 0 with --local, got {args.port}")
    if args.log_level is not None and not args.local:
        raise ValueError("--log-level is an option of --local, and Ray Serve has logs of its own")
    for name, default in (("ray", None), ("replicas", 1), ("cpus", None), ("gpus", None)):
        if args.local and getattr(args, name) != default:
            raise ValueError(f"--{name} is an option of Ray Serve, and --local does without it")


def _check_counts(args: argparse.Namespace) -> None:
    counts = ("queue", "max_images", "max_steps", "max_evaluations", "max_previews", "max_body", "replicas", "lanes")
    for name in counts:
        value = getattr(args, name)
        if value is not None and not 1 <= value < _MOST:
            raise ValueError(f"--{name.replace('_', '-')} must be in [1, {_MOST - 1}], got {value}")
    if not 0 <= args.max_priority <= _MOST_PRIORITY:
        raise ValueError(f"--max-priority must be in [0, {_MOST_PRIORITY}], got {args.max_priority}")


def _check_installed(args: argparse.Namespace) -> None:
    for module in ("starlette", "pydantic", "uvicorn"):
        if find_spec(module) is None:
            raise ImportError(
                f"stepfusion serve needs {module}: pip install 'stepfusion[serve]', or [http] for --local"
            )
    if not args.local and (find_spec("ray") is None or find_spec("ray.serve") is None):
        raise ImportError("stepfusion serve needs Ray: pip install 'stepfusion[serve]', or use --local, without Ray")
