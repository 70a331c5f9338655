"""Small pre-training runs, also in processes of their own, which can be killed."""

import functools
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from neobert import files
from neobert.pretraining import log
from neobert.pretraining.prepare import prepare
from neobert.pretraining.ranks import open_ranks
from neobert.pretraining.recipe import Batch, Data, Model, Recipe, Saving, Train, Watching
from neobert.pretraining.run import train
from neobert.pretraining.schedule import Schedule
from neobert.pretraining.store import Store
from neobert.pretraining.trainer import DivergedError, StoppedError, Trainer

DIVERGED = 3  # exit code
_processes = multiprocessing.get_context("forkserver")


def counting_texts(count: int = 400, seed: int = 0) -> list[str]:
    """Documents that count upwards modulo 95: what a masked word is, its neighbours say."""
    draw = np.random.default_rng(seed)
    starts, lengths = draw.integers(0, 95, count), draw.integers(5, 40, count)
    return [
        " ".join(f"w{(start + i) % 95}" for i in range(length))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def counting_store(folder: Path, tokenizer: Path) -> Store:
    (folder / "in.txt").write_text("\n".join(counting_texts()))
    data = Data(path=str(folder / "in.txt"), tokenizer=str(tokenizer), store=str(folder / "store"))
    return prepare(data, quiet=True)


def recipe_of(store: Store, tokenizer: Path, run: Path, **changes: Mapping[str, Any]) -> Recipe:
    """12 steps of a tiny model in float32; ``changes`` by section."""
    data = Data(path="in", tokenizer=str(tokenizer), store=str(store.folder), held_out=20)
    recipe = Recipe(
        data,
        Batch(max_length=40, tokens=128, bins=4, workers=0),
        Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        schedule=Schedule(lr=3e-3, warmup=2, steps=12),
        train=Train(run=str(run), precision="float32"),
        checkpoint=Saving(every=3, keep_last=2, keep_every=0),
        log=Watching(every=2, evaluate=4),
    )
    sections = {name: replace(getattr(recipe, name), **new) for name, new in changes.items()}
    return replace(recipe, **sections)


def records(run: Path | str, *kinds: str) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    clock = {"time", "tokens_per_s", "masked_per_s"}
    return [
        {key: value for key, value in record.items() if key not in clock}
        for record in log.read(Path(run))
        if record["kind"] in (kinds or ("train", "eval"))
    ]


def weights(folder: Path | str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


@functools.cache
def _serve() -> None:
    """Let processes begin with the imports done: a start costs milliseconds then."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    _processes.set_forkserver_preload(["training_runs", "neobert.heads", "transformers"])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def start(target: Callable[..., None], *arguments: Any) -> Any:
    _serve()
    process = _processes.Process(target=_alone, args=(target, *arguments))
    process.start()
    return process


def finish(process: Any) -> int:
    """Its exit code; negative: the signal that ended it."""
    process.join(180)  # a busy machine is slow, not stuck
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _alone(target: Callable[..., None], *arguments: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a run of its own
    torch.set_num_threads(1)
    target(*arguments)


def run(recipe: Recipe, resume: bool = False) -> None:
    train(recipe, resume=resume, quiet=True)


def die_at_call(recipe: Recipe, number: int, resume: bool = False) -> None:
    """Killed at its call of this number, of Python's or C's functions in any thread."""
    calls = itertools.count(1)

    def called(frame: Any, event: str, argument: Any) -> None:
        if event.endswith("call") and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(called)
    sys.setprofile(called)
    run(recipe, resume)
    sys.setprofile(None)
    (Path(recipe.train.run) / "calls").write_text(str(next(calls)))


def die_at_fsync(recipe: Recipe, number: int) -> None:
    """Killed in the middle of writing: before the call with this number takes effect."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    run(recipe)


def die_at_rename(recipe: Recipe, number: int) -> None:
    """Killed before the rename with this number, of folders and files."""
    real, calls = os.replace, 0

    def rename(old: Any, new: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(old, new)

    files.os.replace = rename
    run(recipe)


def signal_at(
    recipe: Recipe, step: int, number: int = signal.SIGTERM, resume: bool = False
) -> None:
    """Sends itself a signal in this step, and exits with what the run raised."""
    before_step(step, lambda trainer: os.kill(os.getpid(), number))
    try:
        run(recipe, resume)
    except StoppedError as stop:
        sys.exit(128 + stop.number)


def signal_all_at(recipe: Recipe, workers: int, own: int) -> None:
    """A SIGTERM for the workers before one step, for the process itself before another."""

    def to_workers(_: Trainer) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()

    before_step(workers, to_workers)
    signal_at(recipe, own)


def before_step(step: int, act: Callable[[Trainer], None]) -> None:
    """Let every trainer of this process do something before the step with this 0-based number."""
    real = Trainer._step

    def step_of(self: Trainer, batches: Any) -> None:
        if self.done == step:
            act(self)
        real(self, batches)

    Trainer._step = step_of  # type: ignore[method-assign]


def poison(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.decoder.bias.fill_(float("nan"))


def on_ranks(
    world: int,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    stop: int = -1,
    poisoned: int = -1,
    code: int = 0,
) -> None:
    """A run of several gloo processes; the last gets a SIGTERM in step ``stop``."""
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    settings = (world, recipe, meeting, resume, stop, poisoned)
    processes = [start(_one_rank, rank, *settings) for rank in range(world)]
    assert [finish(process) for process in processes] == [code] * world


def _one_rank(
    rank: int, world: int, recipe: Recipe, meeting: Path, resume: bool, stop: int, poisoned: int
) -> None:
    store = dist.FileStore(str(meeting), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if poisoned >= 0:
        before_step(poisoned, poison)
    try:
        signal_at(recipe, stop if rank == world - 1 else -1, signal.SIGTERM, resume)
    except DivergedError:
        sys.exit(DIVERGED)
    finally:
        dist.destroy_process_group()


def outlive_the_group(meeting: Path) -> None:
    """Fails if the group ended with its last user: gloo's threads are gone then."""
    store = dist.FileStore(str(meeting), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with open_ranks():
        pass
    dist.destroy_process_group()
    gc.collect()
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    assert any("gloo" in name for name in names)
