"""``neobert finetune``: a model fine-tuned on a benchmark's tasks."""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from neobert import parent
from neobert.commands import contrastive
from neobert.commands.arguments import number, positive, seed, threads, without_errors_option
from neobert.readers import InputError

if TYPE_CHECKING:
    from neobert.finetuning.glue.data import TaskData
    from neobert.finetuning.glue.runs import Run
    from neobert.finetuning.glue.sweep import Sweep
    from neobert.finetuning.glue.tasks import Task

SECONDS_BETWEEN_LOOKS = 5.0  # at points that other processes work on

DESCRIPTION = """\
Fine-tune a model on GLUE's tasks by the paper's protocol, every point of a grid, and keep the
best model of each task.

Data: a folder with TASK/train.tsv, TASK/dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv) and
perhaps TASK/test.tsv in the benchmark's original layout; without --data, nyu-mll/glue from the hub.

Results go to OUTPUT/MODEL/TASK. A killed run is resumed by the same command and loses no more than
the point it was at. The same command in a second process, or several --devices, share the points.
RTE, STS-B, MRPC and QNLI start from the best MNLI model in the output, if there is one: a command
with MNLI among its tasks waits for all of MNLI's points.

    neobert finetune glue --model chandar-lab/NeoBERT --task all --devices cuda:0 cuda:1
    neobert evaluate glue --report --runs OUTPUT

The paper's models, which the report knows by their ids:

{models}
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from neobert.finetuning.glue.paper import NAMES

    parser = subparsers.add_parser("finetune", help="fine-tune a model on a benchmark")
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    glue = kinds.add_parser(
        "glue",
        help="GLUE by the paper's protocol and grid",
        description=DESCRIPTION.format(models="\n".join(f"    {name}" for name in NAMES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    glue.add_argument("--model", required=True, help="a local model folder or a hub id")
    # What --devices gives its processes: the predictions are made once, by the one that began them.
    glue.add_argument("--points-only", action="store_true", help=argparse.SUPPRESS)
    glue.add_argument(
        "--task",
        required=True,
        nargs="+",
        metavar="TASK",
        help="names such as RTE, or all (WNLI left out)",
    )
    glue.add_argument("--data", metavar="DIR", help="a folder of .tsv files (default: the hub)")
    glue.add_argument(
        "--output", metavar="DIR", help="folder of the results (default: glue/GRID here)"
    )
    glue.add_argument("--name", help="the model's name in reports (default: from --model)")
    glue.add_argument("--restart", action="store_true", help="discard earlier results of a task")
    glue.add_argument("--quiet", action="store_true", help="print nothing but errors and scores")
    _add_grid(glue)
    _add_model(glue)
    glue.set_defaults(run=_glue)
    contrastive.add_parser(kinds)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    from neobert.finetuning.glue.grid import GRIDS

    group = parser.add_argument_group("grid")
    listed = "; ".join(f"{name}: {grid.summary}" for name, grid in GRIDS.items())
    group.add_argument("--grid", choices=[*GRIDS], default="paper", help=f"{listed}")
    group.add_argument("--lr", type=number, metavar="RATE", help="this learning rate only")
    group.add_argument("--batch-size", type=positive, metavar="N", help="this batch size only")
    group.add_argument("--weight-decay", type=number, metavar="X", help="this weight decay only")
    group.add_argument("--epochs", type=positive, metavar="N", help="at most (paper: 10)")
    group.add_argument(
        "--seeds", type=seed, nargs="+", default=[0], metavar="N", help="(default: 0)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    from neobert.finetuning.schedule import PRECISIONS

    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="such as cuda:0 cuda:1: one process each (default: a GPU if there is one)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of matrix products; weights are float32 (default: bfloat16 on a GPU)",
    )
    group.add_argument(
        "--max-length", type=positive, metavar="TOKENS", help="truncate texts to fewer tokens"
    )
    group.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads, at most as many as cores"
    )
    group.add_argument("--no-patch", action="store_true", help="run the model's own code, padded")
    group.add_argument(
        "--no-transfer", action="store_true", help="start every task from the model itself"
    )


def run(args: argparse.Namespace) -> int:
    with without_errors_option():
        return int(args.run(args))


def _glue(args: argparse.Namespace) -> int:
    from neobert.finetuning.glue import data, metrics
    from neobert.finetuning.glue.predictions import write_predictions, write_submission
    from neobert.finetuning.glue.runs import Run
    from neobert.finetuning.glue.sweep import is_finished, summary
    from neobert.finetuning.glue.tasks import find_tasks

    tasks = find_tasks(args.task)
    metrics.require()
    job = _Job(args)
    # Everything is read before the first step: a broken file of the last task is found now.
    folder = None if args.data is None else Path(args.data)
    loaded = {task.name: data.load(task, folder) for task in tasks}
    for task in tasks:
        sweep = job.sweep(task, loaded[task.name])
        here = Run.open(job.folder(task.name), sweep.identity(), args.restart)
        job.work(task.name, sweep, here)
        is_start = task.name == "MNLI" and not args.no_transfer
        while is_start and any(t.from_mnli for t in tasks) and not is_finished(here, sweep):
            # Tasks that start from the best model of all points, not of those that are there now.
            job.say(f"{task.name}: waits for the points of other processes")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            job.work(task.name, sweep, here)
        if is_finished(here, sweep) and not args.points_only:
            for path in write_predictions(here, sweep):
                job.say(f"{task.name}: predictions of the test set in {path}")
        print("\n".join(summary(here, sweep)), flush=True)
    if args.points_only:
        return 0
    submission = write_submission(job.folder(tasks[0].name).parent)
    if submission is not None:
        path, missing = submission
        lacks = f" (without {', '.join(missing)})" if missing else ""
        job.say(f"all predictions{lacks} are in {path}")
    return 0


class _Job:
    """What the tasks of one command share."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from neobert.encode import find_device
        from neobert.finetuning.classifier import classifier_config
        from neobert.finetuning.glue.grid import make_grid
        from neobert.finetuning.glue.paper import NAMES
        from neobert.loading import model_folder, model_name

        self.args = args
        self.devices = [find_device(name) for name in args.devices or [None]]
        self.precision = args.precision or (
            "bfloat16" if self.devices[0].type == "cuda" else "float32"
        )
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        self.files = model_folder(args.model, args.revision)
        config = classifier_config(self.files, patched=not args.no_patch)
        self.name = model_name(args.model, args.name or NAMES.get(args.model))
        self.output = Path(args.output or Path("glue") / args.grid)
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output: expected a folder, got the file {self.output}")
        self.grid = make_grid(
            args.grid, config.hidden_size, args.lr, args.batch_size, args.weight_decay, args.epochs
        )

    def folder(self, task: str) -> Path:
        return self.output / self.name.replace("/", "--") / task

    def sweep(self, task: "Task", data: "TaskData") -> "Sweep":
        from neobert.finetuning.glue.sweep import Source, Sweep

        mnli = self.folder("MNLI") / "best"
        transfer = task.from_mnli and not self.args.no_transfer
        if transfer:
            start = mnli if mnli.is_dir() else "the model itself: no MNLI result in the output"
            self.say(f"{task.name}: starts from {start}")
        local = Path(self.args.model)
        source = Source(
            name=self.name,
            model=str(local.resolve()) if local.is_dir() else self.args.model,
            folder=self.files,
            mnli=mnli if transfer and mnli.is_dir() else None,
            patched=not self.args.no_patch,
            max_length=self.args.max_length,
            precision=self.precision,
        )
        grid, seeds = self.grid, sorted(set(self.args.seeds))
        return Sweep(task, data, source, grid, self.args.grid, seeds, self.devices[0])

    def say(self, line: str) -> None:
        if not self.args.quiet:
            print(line, file=sys.stderr, flush=True)

    def work(self, task: str, sweep: "Sweep", run: "Run") -> None:
        """Train the points that are free."""
        if len(self.devices) > 1:
            self.work_in_processes(task)
        else:
            sweep.work(run, self.say)

    def work_in_processes(self, task: str) -> None:
        """One process per device, each taking the next point that is free.

        They end with this one, also where that is killed.

        Raises:
            InputError: One of them failed; it has said why.
        """
        with ExitStack() as stack:
            processes = [
                stack.enter_context(parent.start(self._arguments(task, str(device))))
                for device in self.devices
            ]
            try:
                codes = [process.wait() for process in processes]
            except BaseException:
                for process in processes:
                    process.terminate()
                raise
        failed = [
            str(device) for device, code in zip(self.devices, codes, strict=True) if code != 0
        ]
        if failed:
            raise InputError(f"devices: expected all to finish, got a failure on {failed[0]}")

    def _arguments(self, task: str, device: str) -> list[str]:
        args = self.args
        command = ["finetune", "glue", "--task", task]
        command += ["--model", args.model, "--name", self.name, "--output", str(self.output)]
        command += ["--devices", device, "--grid", args.grid, "--precision", self.precision]
        command += ["--seeds", *map(str, args.seeds), "--points-only"]
        for option in ("data", "revision", "lr", "batch_size", "weight_decay", "epochs"):
            if getattr(args, option) is not None:
                command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        for option in ("max_length", "threads"):
            if getattr(args, option) is not None:
                command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        flags = ("no_patch", "no_transfer", "quiet")
        return command + [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]
