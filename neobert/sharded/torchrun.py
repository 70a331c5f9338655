"""The engine of processes that torchrun starts: each takes the next shard that nobody has.

They share torchrun's key-value store and no process group: there is nothing to compute together,
and a rank that is late holds up nobody. A rank that dies is torchrun's to restart (--max-restarts);
what it had not finished is then taken by whoever is next.
"""

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from neobert.commands.progress import Progress
from neobert.readers import InputError
from neobert.sharded.folder import ShardFolder
from neobert.sharded.job import Job, Run, Summary
from neobert.sharded.plan import Shard

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONG = timedelta(days=30)  # a rank that fails is seen by torchrun, not by a timeout

SECONDS_BETWEEN_COUNTS = 1.0


class StoppedError(Exception):
    """The first rank has said why."""


def run(job: Job) -> Summary | None:
    """Encode what no other rank does; the first rank prepares, and returns a summary at the end.

    Raises:
        InputError: Not started by torchrun; the input, or shards of other options.
        OutputError: The disk is full or fails; finished shards are kept.
        StoppedError: On all ranks but the first, if that one could not begin.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            f"engine: expected to be started by torchrun, got no {missing[0]}; "
            "torchrun --nproc-per-node GPUS -m neobert encode --engine torchrun ..."
        )
    from torch.distributed import PrefixStore, rendezvous

    # torchrun may start all ranks again, and its store outlives them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, world = next(rendezvous("env://", timeout=LONG))
    store = PrefixStore(f"neobert encode {attempt}", store)
    if rank > 0:
        _follow(job, store, world)
        return None
    try:
        source = job.source()
        with job.prepared(source, first=attempt == "0") as folder:
            run, todo = Run(), folder.unfinished()
            store.set("begun", "work" if todo else "nothing")
            if todo:
                left = sum(folder.plan[n].rows for n in todo)
                encoder = job.encoder(folder, _device(job))
                run.began()
                with Progress(folder.plan.rows, folder.plan.rows - left, quiet=job.quiet) as shown:
                    _work(job, encoder, store, world, folder, _Counts(store, shown))
                    store.wait(["all done"], LONG)
                run.add(store.add("texts", 0), store.add("tokens", 0))
            return job.finish(source, folder, run)
    except BaseException:
        store.set("begun", "failed")
        raise


def _follow(job: Job, store: Any, world: int) -> None:
    store.wait(["begun"], LONG)
    begun = store.get("begun").decode()
    if begun == "failed":
        raise StoppedError
    if begun == "work":
        folder = ShardFolder.open(job.output)
        _work(job, job.encoder(folder, _device(job)), store, world, folder, _Counts(store))


def _work(
    job: Job, encoder: Any, store: Any, world: int, folder: ShardFolder, counts: "_Counts"
) -> None:
    def claims() -> Iterator[Shard]:
        while (number := store.add("claimed", 1) - 1) < len(folder.plan):
            yield folder.plan[number]

    for _ in job.work(encoder, job.source(), folder, claims(), counts.add):
        pass
    counts.send()
    if store.add("done", 1) == world:
        store.set("all done", "")


class _Counts:
    """Texts and tokens of all ranks, in the store; shown by the first rank as its own come in."""

    def __init__(self, store: Any, shown: Progress | None = None) -> None:
        self._store, self._shown = store, shown
        self._lock = threading.Lock()
        self._own, self._seen, self._sent = [0, 0], [0, 0], time.monotonic()

    def add(self, texts: int, tokens: int) -> None:
        with self._lock:
            self._own[0] += texts
            self._own[1] += tokens
            if time.monotonic() - self._sent > SECONDS_BETWEEN_COUNTS:
                self._send()

    def send(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        texts, tokens = map(self._store.add, ("texts", "tokens"), self._own)
        if self._shown is not None:
            self._shown.update(texts - self._seen[0], tokens - self._seen[1])
        self._own, self._seen, self._sent = [0, 0], [texts, tokens], time.monotonic()


def _device(job: Job) -> str | None:
    """A rank's own GPU, unless the user named a device."""
    import torch

    if job.options.get("device") is None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return None
