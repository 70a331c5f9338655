"""A run from its recipe to a model that others can load.

RUN/recipe.yaml      the settings, all of them
RUN/log.jsonl        what was measured (neobert.pretraining.log)
RUN/checkpoints/     what a stopped run goes on from (neobert.pretraining.checkpoint)
RUN/final/           the model in the end, with its tokenizer: `from_pretrained` loads it
RUN/stopped/         where the guard stopped a run: the state then, and the batches' documents
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml

from neobert import files
from neobert.heads import NeoBERTForMaskedLM
from neobert.loading import quiet_loading
from neobert.pretraining import batches, log, start, state, stream
from neobert.pretraining.checkpoint import OPTIMIZER, Saved, read, writing
from neobert.pretraining.evaluation import Scores
from neobert.pretraining.prepare import require_chosen
from neobert.pretraining.ranks import Ranks, open_ranks
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.rules import error
from neobert.pretraining.signals import Signals
from neobert.pretraining.store import Corpus, Store
from neobert.pretraining.stream import Stream
from neobert.pretraining.trainer import Trainer, checkpoints_of
from neobert.pretraining.watch import Watch, open_trackers
from neobert.readers import InputError

RECIPE = "recipe.yaml"
PATIENCE_SECONDS = 15.0  # torch's workers look for their parent every five


class Result(NamedTuple):
    """A finished run: where its model is, its last scores where documents are held out, and
    whether this process is rank 0."""

    final: Path
    scores: Scores | None
    main: bool


def train(
    recipe: Recipe, *, resume: bool = False, allow_change: bool = False, quiet: bool = False
) -> Result:
    """Train what a recipe describes, from its finished store (or its texts, on the fly) to its
    last step.

    Args:
        recipe: With ``train.run``.
        resume: Go on from the run's newest whole checkpoint, or from the start if it has none.
        allow_change: Of settings that leave shape and data as they are.
        quiet: Nothing on stderr.

    Raises:
        InputError: The recipe, the store, the weights to start from, or a run that is not as the
            recipe says; nothing was changed.
        OutputError: The disk is full or fails; earlier checkpoints are kept.
        DivergedError: A loss that is not finite, or far too high.
        StoppedError: By SIGTERM or Ctrl-C; the run was saved.
    """
    if not recipe.train.run:
        raise error("train.run", "a folder for the run", "none")
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(open_ranks())
        signals = stack.enter_context(Signals())
        store, tokenizer, notes = _open(recipe, ranks)
        saved = None
        if ranks.main:
            stack.enter_context(_locked(Path(recipe.train.run), resume))
            saved = checkpoints_of(recipe).newest(notes.append) if resume else None
        # The other ranks take the same checkpoint, and need not read all of it to check it.
        folder = ranks.from_main(None if saved is None else saved.folder)
        if folder is not None and saved is None:
            saved = read(folder, verify=False)
        position = None
        if saved is None:
            model, origin = _begin(recipe, store, tokenizer, notes)
            if resume:
                notes.append("no whole checkpoint to resume from")
            notes.append(origin)
        else:
            changes = start.require_same(saved.state["settings"], recipe, allow_change)
            model, position = start.resumed_model(recipe, store, saved), saved.state["data"]
            notes += [f"changed: {change}" for change in changes]
            notes.append(f"resumed from {saved.folder} on {ranks.world} rank(s)")
        share: dict[str, Any] = {"world": ranks.world, "rank": ranks.rank}
        share |= {"state": position, "allow_change": allow_change}
        if isinstance(store, Stream):
            steps = stream.steps(store, recipe, **share)
        else:
            steps = batches.steps(store, recipe, **share)
        stack.callback(steps.close)
        watch = None
        if ranks.main:
            watch = stack.enter_context(_watching(recipe, saved, quiet))
            for text in notes:
                watch.note(0 if saved is None else saved.step, text)
        trainer = Trainer(recipe, store, model, ranks, signals, watch)
        if saved is not None:
            trainer.restore(saved.step, saved.state, saved.tensors(OPTIMIZER))
        trainer.run(steps)
        final = Path(recipe.train.run) / start.FINAL
        _publish(trainer.model, tokenizer, recipe, final, ranks)
        if watch is not None:
            watch.say(f"the model is in {final}")
        return Result(final, trainer.scores, ranks.main)


def _open(recipe: Recipe, ranks: Ranks) -> tuple[Store | Stream, Any, list[str]]:
    """The documents, their tokenizer, and what a reader of the log has to know of them."""
    if recipe.data.on_the_fly:
        texts = Stream(recipe)
        return texts, texts.tokenizer.fast, []
    store = Store.open(recipe.data.store)
    tokenizer = start.store_tokenizer(recipe, store)
    changed = require_chosen(store, recipe.data) if ranks.main else None
    return store, tokenizer, [] if changed is None else [changed]


@contextlib.contextmanager
def _locked(run: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder, new or to be resumed; a new one goes if nothing came into it."""
    if run.exists() and not run.is_dir():
        raise error("train.run", "a folder", f"the file {run}")
    begun = [name for name in (start.CHECKPOINTS, log.NAME, start.FINAL) if (run / name).exists()]
    if begun and not resume:
        got = f"{run}, which has {begun[0]} (--resume goes on with it)"
        raise error("train.run", "a new folder", got)
    run.mkdir(parents=True, exist_ok=True)
    held = _lock(run, PATIENCE_SECONDS if resume else 0.0)
    try:
        yield
    finally:
        held.close()
        if [path.name for path in run.iterdir()] == ["lock"]:
            shutil.rmtree(run)


def _lock(run: Path, seconds: float) -> BinaryIO:
    """The lock; workers of a run that was killed keep theirs until they notice."""
    last = time.monotonic() + seconds
    while True:
        try:
            return files.lock(run, "train.run")
        except InputError:
            if time.monotonic() >= last:
                raise
        time.sleep(0.2)


def _begin(
    recipe: Recipe, store: Corpus, tokenizer: Any, notes: list[str]
) -> tuple[NeoBERTForMaskedLM, str]:
    """The model of a new run, and where its weights come from."""
    folder = start.source_folder(recipe, notes.append)
    if folder is None:
        config = start.model_config(recipe, store, None)
        origin = f"new weights of seed {recipe.model.seed}"
    else:
        base = start.config_in(folder)
        start.require_tokenizer(folder, tokenizer)
        config = start.model_config(recipe, store, base)
        origin = f"weights from {folder}"
    model = start.new_model(recipe, config, folder)
    count = sum(p.numel() for p in model.parameters())
    return model, f"{origin}, {count:,} parameters"


@contextlib.contextmanager
def _watching(recipe: Recipe, saved: Saved | None, quiet: bool) -> Iterator[Watch]:
    """Rank 0's log and trackers, from the checkpoint on; what it left unfinished is gone."""
    run = Path(recipe.train.run)
    checkpoints, done = checkpoints_of(recipe), 0 if saved is None else saved.step
    checkpoints.clean()
    checkpoints.drop_after(done)
    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
    with writing(run / RECIPE, checkpoints):
        files.write_atomically(run / RECIPE, text)
    trackers = open_trackers(recipe.log.trackers, run, start.all_settings(recipe))
    with log.Log(run) as records:
        with writing(records.path, checkpoints):
            records.truncate(done)
        watch = Watch(records, recipe.schedule.steps, trackers, quiet)
        try:
            yield watch
        finally:
            watch.close()


def _publish(
    model: NeoBERTForMaskedLM, tokenizer: Any, recipe: Recipe, final: Path, ranks: Ranks
) -> None:
    """``final/``, whole or not at all; every rank calls it."""
    tensors = state.model_tensors(model, ranks.main)
    if not ranks.main:
        return
    partial = final.with_name(f"{final.name}.partial")
    with writing(final, checkpoints_of(recipe)), quiet_loading():
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=tensors)
        start.frame_texts(tokenizer)
        tokenizer.model_max_length = model.config.max_length
        tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        files.replace_folder(partial, final)
