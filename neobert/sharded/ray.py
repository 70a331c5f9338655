"""The engine on a Ray cluster: Ray Data feeds numbers of shards to a pool of workers.

What goes through Ray are numbers alone. A worker reads its shards and writes them itself, each
under its name only when it is whole; so when Ray restarts a worker that died, and runs its task
again, finished shards are passed over, and no row is lost or doubled.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from neobert.commands.progress import Progress
from neobert.outputs import OutputError
from neobert.readers import InputError
from neobert.sharded.folder import ShardFolder
from neobert.sharded.job import Job, Run, Summary

MOST_ATTEMPTS = 6  # Ray repeats the task of a dead worker for ever, even one that kills its worker
# Between two tasks a worker has nothing to read ahead, so a task is several shards; but the last
# tasks should end together, so each worker gets a few.
MOST_SHARDS_PER_TASK, TASKS_PER_WORKER = 8, 4


class Worker:
    """An actor with one model."""

    def __init__(self, job: Job, device: str | None, threads: int | None) -> None:
        self._job, self._folder, self._source = job, ShardFolder.open(job.output), job.source()
        self._encoder: Any = None
        self._device, self._threads = device, threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Encode the shards of one row of ``batch``; an error of the user's goes back as text."""
        (numbers,) = batch["shards"]
        shards = [self._folder.plan[int(number)] for number in numbers.split()]
        run, error, kind = Run(), "", ""
        try:
            if self._folder.attempts(shards[0]) > MOST_ATTEMPTS:
                raise OutputError(
                    f"{self._job.output}: gave up on shards {numbers}, whose worker died "
                    f"{MOST_ATTEMPTS} times; finished shards are kept"
                )
            if self._encoder is None:
                self._encoder = self._job.encoder(self._folder, self._device, self._threads)
            run.began()
            for _ in self._job.work(self._encoder, self._source, self._folder, shards, run.add):
                pass
        except (OSError, ValueError) as caught:
            error, kind = str(caught), type(caught).__name__
        return {
            "rows": [sum(shard.rows for shard in shards)],
            "texts": [run.texts],
            "tokens": [run.tokens],
            "seconds": [run.seconds],
            "error": [error],
            "kind": [kind],
        }


def run(job: Job, workers: int | None = None, threads: int | None = None) -> Summary:
    """Encode all shards that are not there yet, on ``RAY_ADDRESS``'s cluster or this machine.

    Args:
        job: What to do; its paths are the same on every machine of the cluster.
        workers: Models that run at a time; default one per GPU, or per ``threads`` CPUs.
        threads: CPU threads of a worker without a GPU; default 1.

    Raises:
        InputError: No Ray; the input, or shards of other options.
        OutputError: The disk is full or fails; finished shards are kept.
    """
    source = job.source()
    with job.prepared(source) as folder:
        run, todo = Run(), folder.unfinished()
        if todo:
            left = sum(folder.plan[n].rows for n in todo)
            with Progress(folder.plan.rows, folder.plan.rows - left, quiet=job.quiet) as progress:
                for row in _results(job, todo, workers, threads or 1):
                    if row["error"]:
                        raise _error(row["kind"], row["error"])
                    progress.began(row["seconds"])
                    progress.update(row["rows"], row["tokens"])
                    run.began(row["seconds"])
                    run.add(row["texts"], row["tokens"])
        return job.finish(source, folder, run)


def _error(kind: str, message: str) -> Exception:
    """What a worker raised, as this process raises it."""
    kinds = {cls.__name__: cls for cls in (InputError, OutputError, ValueError)}
    return kinds.get(kind, OSError)(message)


def _results(
    job: Job, todo: list[int], workers: int | None, threads: int
) -> Iterator[dict[str, Any]]:
    with _cluster() as ray:
        resources = ray.cluster_resources()
        device = job.options.get("device")
        on_gpu = device != "cpu" and resources.get("GPU", 0) >= 1
        if workers is None:
            available = resources["GPU"] if on_gpu else resources.get("CPU", 1) // threads
            workers = max(int(available), 1)
        tasks = _tasks(todo, workers)
        results = ray.data.from_items(
            [{"shards": " ".join(map(str, task))} for task in tasks],
            override_num_blocks=len(tasks),
        ).map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=(job, "cuda" if on_gpu else device, None if on_gpu else threads),
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, len(tasks)), max_tasks_in_flight_per_actor=1
            ),
            **({"num_gpus": 1} if on_gpu else {"num_cpus": threads}),
        )
        yield from results.iter_rows()


def _tasks(todo: list[int], workers: int) -> list[list[int]]:
    """Shards of each task."""
    size = len(todo) // (TASKS_PER_WORKER * workers)
    size = min(max(size, 1), MOST_SHARDS_PER_TASK)
    return [todo[i : i + size] for i in range(0, len(todo), size)]


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected; what is started here is stopped."""
    try:
        # A cluster of our own reports to nobody, and does not explain itself to our users.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        import ray
        import ray.data
    except ImportError:
        raise InputError(
            "engine: expected ray to be installed, got none; pip install 'neobert-kernels[ray]'"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()
