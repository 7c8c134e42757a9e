"""``stepfusion generate``: many images as shards, on one device, several, or a cluster, resumable at any moment."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepfusion.bulk.checkpoint import Checkpoint, read_checkpoint
from stepfusion.bulk.directory import REPORT, check_out
from stepfusion.bulk.job import DEFAULT_UNIT, MAX_INDEX, MAX_UNITS, Job
from stepfusion.bulk.labels import read_labels_file
from stepfusion.bulk.new_job import make_job
from stepfusion.bulk.placement import MOST_WORKERS, Launch, Placement
from stepfusion.bulk.prompts import read_prompts_file
from stepfusion.bulk.run import run, verify
from stepfusion.bulk.shards import FORMATS
from stepfusion.bulk.worker import WorkerConfig
from stepfusion.commands.arguments import (
    add_lora_argument,
    add_model_argument,
    add_path_arguments,
    add_sampler_arguments,
    chosen_lora,
    table_request,
)
from stepfusion.commands.labels import read_classes, read_label
from stepfusion.execution.plan import make_plan
from stepfusion.model_spec import ModelSpec
from stepfusion.options import ExecutionOptions
from stepfusion.samplers.table_request import TableRequest

_EXAMPLES = """examples:
  stepfusion generate fashion-mnist --num 10000 --out images              # the same command again goes on
  stepfusion generate fashion-mnist --num 50000 --out images --npz        # for FID evaluators
  stepfusion generate path/to/model --num 1000000 --out images --devices cuda:0,cuda:1
  stepfusion generate path/to/model --num 1000000 --out /shared/images --ray auto
  torchrun --nproc-per-node 8 -m stepfusion.commands.main generate path/to/model -n 1000000 --out images
  stepfusion generate path/to/stable-diffusion --prompts prompts.txt --guidance 7.5 --out images
  stepfusion generate --verify images"""


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion generate``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add_model_argument(parser, nargs="?")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="DIR",
        help="make nothing, and check what is there: hashes, and every image once",
    )

    add = parser.add_argument_group("what to make").add_argument
    add("-n", "--num", type=int, metavar="N", help="make so many images")
    add(
        "--labels",
        metavar="LIST",
        help="names or numbers of classes, separated by commas, taken in turn by index (default: all classes)",
    )
    add(
        "--labels-file", type=Path, metavar="FILE", help="a label for each image: one on a line, or int64 [N] in .npy"
    )
    text = "a text file of prompts in UTF-8, one on a line, an image each, of models with a text encoder"
    add("--prompts", type=Path, metavar="FILE", help=text)
    add("--negative", metavar="TEXT", help="what guidance leads away from (default: no prompt)")
    add_lora_argument(add)
    add("--guidance", type=float, metavar="W", help="classifier-free guidance scale; 1 is none (the default)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="take the noise of this seed, from 0 to 2**64 - 1 (default: %(default)s)",
    )
    add(
        "--first-index",
        type=int,
        default=0,
        metavar="I",
        help="make the images I, I+1, ... of the seed (default: %(default)s)",
    )

    add_sampler_arguments(parser)

    add = parser.add_argument_group("what to write").add_argument
    add("--out", type=Path, metavar="DIR", help="a directory; what this command has begun there goes on")
    add(
        "--format",
        choices=tuple(FORMATS),
        default="webdataset",
        help="the format of the shards (default: %(default)s)",
    )
    add("--unit", type=int, default=DEFAULT_UNIT, metavar="K", help="images a shard (default: %(default)s)")
    add(
        "--npz",
        action="store_true",
        help="also write, at the end, one samples_NxHxWxC.npz with arr_0 and arr_1 (labels)",
    )
    add("--leave-out-nonfinite", action="store_true", help="go on without images that become NaN or infinite")
    add("--quiet", action="store_true", help="show no progress, and print no report")

    add = parser.add_argument_group("where and how to run").add_argument
    add(
        "--devices", metavar="LIST", help="separated by commas, a process each: cuda:0,cuda:1 (default: the best one)"
    )
    add("--ray", metavar="ADDRESS", help="a Ray cluster's address, auto, or local to start one")
    add("--workers", type=int, metavar="N", help="engines with --ray (default: one for each GPU of the cluster)")
    add_path_arguments(add)
    add("--batch", type=int, help="the most images at a time (default: 64 on a CPU, what fits up to 256 on a GPU)")
    add("--threads", type=int, help="CPU threads of an engine on a CPU (default: all, divided by the engines)")
    add(
        "--invariant",
        action="store_true",
        help="keep one batch size for everything, so that an image's bits depend on neither --unit nor "
        "its neighbours; a few images then take as long as a whole batch",
    )


def run_generate(args: argparse.Namespace) -> int:
    """Generate as ``args`` say; returns 0. Everything is checked before any work, and before anything is written."""
    if args.verify is not None:
        return _verify(args)
    prompts = None if args.prompts is None else read_prompts_file(args.prompts, name="--prompts")
    if prompts is not None and args.num is None:
        args.num = len(prompts)
    _check_numbers(args)
    request = table_request(args)
    check_out(args.out)
    launch = None if args.ray is not None else Launch.here()
    placement = _placement(args, launch)
    execution = ExecutionOptions(
        dtype=args.dtype, backend=args.backend, network=args.network, batch=args.batch, invariant=args.invariant
    )
    _check_devices(placement, execution)
    checkpoint = read_checkpoint(args.model, chosen_lora(args) or ())
    job, labels = _job(args, request, checkpoint, prompts)
    config = WorkerConfig(
        job=job,
        out=args.out.absolute(),
        model=checkpoint.address,
        table=request,
        execution=execution,
        threads=args.threads,
        cpu_workers=len(placement.devices) if launch is None else launch.local_world,
        leave_out=args.leave_out_nonfinite,
        lora=checkpoint.lora_addresses,
    )
    report = run(
        config, placement, labels, prompts=prompts, checkpoint=checkpoint, samples=args.npz, quiet=args.quiet
    )
    if not args.quiet:
        print(_summary(args, report) if report else f"rank {placement.rank} is done; others are not yet")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.model is not None or args.out is not None:
        raise ValueError("--verify takes a directory, and no model and no --out")
    job = verify(args.verify)
    if not args.quiet:
        print(f"{args.verify}: {job.num} images in {job.units} shards, every one as it was written")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuse what is missing, out of range or contradictory."""
    for name, value in (("a model", args.model), ("--num", args.num), ("--out", args.out)):
        if value is None:
            raise ValueError(f"{name} is needed, as in: stepfusion generate fashion-mnist --num 1000 --out images")
    limits = {"num": MAX_INDEX, "unit": MAX_INDEX, "batch": 1 << 20, "threads": 1 << 10, "workers": MOST_WORKERS}
    for name, most in limits.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} must be in [1, {most}], got {value}")
    if -(-args.num // args.unit) > MAX_UNITS:
        least = -(-args.num // MAX_UNITS)
        raise ValueError(
            f"--unit must be at least {least} for {args.num} images ({MAX_UNITS} shards), got {args.unit}"
        )
    if not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed must be in [0, 2**64 - 1], got {args.seed}")
    if not 0 <= args.first_index <= MAX_INDEX - args.num:
        most = MAX_INDEX - args.num
        raise ValueError(f"--first-index must be in [0, {most}] for {args.num} images, got {args.first_index}")
    if args.labels is not None and args.labels_file is not None:
        raise ValueError("--labels and --labels-file exclude each other, got both")
    if args.workers is not None and args.ray is None:
        raise ValueError("--workers is an option of --ray")


def _placement(args: argparse.Namespace, launch: Launch | None) -> Placement:
    """The devices, and this process's place among those of a launcher."""
    devices = tuple(name.strip() for name in (args.devices if args.devices is not None else "auto").split(","))
    if "" in devices:
        raise ValueError(f"--devices must be names of devices, separated by commas, got {args.devices!r}")
    if args.ray is not None:
        if len(devices) > 1:
            raise ValueError(f"--devices must be one kind of device with --ray, such as cuda, got {args.devices}")
        return Placement(devices, ray=args.ray, workers=args.workers)
    if launch is None:
        return Placement(devices)
    if args.devices not in (None, "cpu"):
        raise ValueError(f"--devices is chosen by the launcher that set RANK and LOCAL_RANK, got {args.devices}")
    if args.devices is None and torch.cuda.is_available():
        devices = (f"cuda:{launch.local_rank}",)
    return Placement(devices, launch.rank, launch.world)


def _check_devices(placement: Placement, execution: ExecutionOptions) -> None:
    """Refuse what cannot run here; on a cluster, the workers do."""
    if placement.ray is None:
        for device in placement.devices:
            make_plan(device, execution.dtype, execution.backend, execution.network)


def _job(
    args: argparse.Namespace, request: TableRequest, checkpoint: Checkpoint, prompts: Sequence[str] | None
) -> tuple[Job, NDArray[np.int64] | None]:
    """The job that ``args`` describe, and labels int64 [num] if they come from a file."""
    spec = checkpoint.model.spec
    labels = _labels_of_file(spec, args)
    job = make_job(
        checkpoint,
        request,
        num=args.num,
        first_index=args.first_index,
        seed=args.seed,
        classes=None if labels is not None else read_classes(spec, args.labels),
        labels=labels,
        prompts=prompts,
        negative=args.negative,
        guidance=args.guidance,
        format=args.format,
        unit=args.unit,
        mark="--",
    )
    return job, labels


def _labels_of_file(spec: ModelSpec, args: argparse.Namespace) -> NDArray[np.int64] | None:
    """int64 [num], one label for each image; None without ``--labels-file``."""
    if args.labels_file is None:
        return None
    if spec.num_classes is None:
        raise ValueError("--labels-file was given, and this model takes none")
    name = "--labels-file"
    return read_labels_file(
        args.labels_file, args.num, spec.num_classes, partial(read_label, spec, option=name), name=name
    )


def _summary(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """The report in two lines."""
    height, width, channels = report["shape"]
    rate = report["images_per_second"]
    speed = f"{report['images_made_now']} made now, {rate} images/s" if rate else "all were there"
    engine = report["engine"]
    versions = ", ".join(f"{name} {value}" for name, value in engine["versions"].items())
    lines = [
        f"{args.out}: {report['images']} images of {height}x{width}x{channels} in {report['units']} shards, all "
        f"checked, {len(report['non_finite'])} non-finite; {speed}",
        f"{engine['device']}, {engine['dtype']}, network {engine['network']}, step {engine['backend']}; {versions}; "
        f"{args.out / REPORT} has the rest",
    ]
    if "samples" in report:
        lines.append(f"{args.out / report['samples']['file']}")
    return "\n".join(lines)
