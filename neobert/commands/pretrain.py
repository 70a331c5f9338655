"""``neobert pretrain``: tokenise the texts of a recipe into a store, and train on them."""

import argparse
import os
import sys
from pathlib import Path

from neobert.cli import EXIT_FAILED
from neobert.pretraining.prepare import prepare
from neobert.pretraining.recipe import Recipe, read_recipe
from neobert.pretraining.store import HISTOGRAM, Store
from neobert.pretraining.watch import described
from neobert.readers import InputError

DESCRIPTION = """\
Tokenise the documents of a recipe into its store (data.store), once, and train on them; the run's
folder is train.run, the trained model is in its final/.

    neobert pretrain recipe.yaml                       one process
    torchrun --nproc-per-node 8 -m neobert pretrain recipe.yaml
    neobert pretrain --resume recipe.yaml              go on after a kill, to the same bits

Settings of the recipe are changed by key=value, with dotted keys and YAML values:
    neobert pretrain recipe.yaml data.path=texts/ data.store=runs/tokens train.run=runs/first

With --plot: loss curves of one or several runs over tokens; a second stage continues the first.
    neobert pretrain --plot runs/stage1 runs/stage2 --output loss.png

With data.on_the_fly=true there is no store: texts are read and tokenised while training.

--prepare only tokenises; a killed one is resumed by the same command. Several processes need a
store that is finished. SIGTERM or Ctrl-C saves and ends; the exit code is then 128 + the signal.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="train NeoBERT on texts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a .yaml file")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--prepare", action="store_true", help="tokenise only")
    parser.add_argument("--resume", action="store_true", help="go on with the run in train.run")
    parser.add_argument(
        "--allow-change", action="store_true", help="resume although harmless settings changed"
    )
    parser.add_argument(
        "--restart", action="store_true", help="discard what an unfinished --prepare left"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the checksums of a finished store"
    )
    parser.add_argument(
        "--plot", nargs="+", metavar="RUN", help="draw the loss curves of run folders, no training"
    )
    parser.add_argument(
        "--output", metavar="PNG", help="the picture of --plot (default: loss.png in the last RUN)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.plot:
        return draw(args)
    if args.output is not None:
        raise InputError(f"output: expected none without --plot, got {args.output}")
    if args.recipe is None:
        raise InputError("pretrain: expected a RECIPE, got none")
    recipe = read_recipe(args.recipe, args.changes)
    if not args.prepare:
        return _train(recipe, args)
    if args.resume or args.allow_change:
        raise InputError("pretrain: expected --resume without --prepare, got both")
    if recipe.data.on_the_fly:
        raise InputError("data.on_the_fly: expected false with --prepare, got true")
    store = prepare(recipe.data, restart=args.restart, quiet=args.quiet)
    if args.verify:
        store = Store.open(store.folder, verify=True)
    if not args.quiet:
        print(counts(store))
        print(lengths(store))
        print(views(store, recipe))
    return 0


def draw(args: argparse.Namespace) -> int:
    """``--plot``: of several runs the picture goes to the last one's folder."""
    from neobert.pretraining.plot import plot

    if args.recipe is not None:
        raise InputError(f"plot: expected run folders only, got RECIPE {args.recipe}")
    picture = plot(args.plot, args.output or Path(args.plot[-1]) / "loss.png")
    if not args.quiet:
        print(picture)
    return 0


def _train(recipe: Recipe, args: argparse.Namespace) -> int:
    from neobert.pretraining.run import train
    from neobert.pretraining.trainer import DivergedError, StoppedError

    if args.restart or args.verify:
        raise InputError("pretrain: expected --restart and --verify only with --prepare, got none")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and not recipe.data.on_the_fly and not Path(recipe.data.store).is_dir():
        prepare(recipe.data, quiet=args.quiet)
    try:
        result = train(recipe, resume=args.resume, allow_change=args.allow_change, quiet=args.quiet)
    except (StoppedError, DivergedError) as stop:
        stopped = isinstance(stop, StoppedError)
        if os.environ.get("RANK", "0") == "0":
            print(f"neobert: {'' if stopped else 'error: '}{stop}", file=sys.stderr)
        return 128 + stop.number if isinstance(stop, StoppedError) else EXIT_FAILED
    if not args.quiet and result.scores is not None and result.main:
        print(described("eval", result.scores._asdict()))
    return 0


def counts(store: Store) -> str:
    index = store.index
    return (
        f"{store.folder}: {store.tokens:,} tokens in {len(store):,} documents "
        f"({index['empty']:,} empty ones left out, {index['split']:,} cuts of long ones), "
        f"{index['dtype']}, {len(index['shards']):,} shard(s)"
    )


def lengths(store: Store) -> str:
    """The share of documents up to each length, [CLS] and [SEP] included."""
    names = [*(f"to {end:,}" for end in HISTOGRAM), f"over {HISTOGRAM[-1]:,}"]
    shares = [
        f"{count / len(store):.1%} {name}"
        for name, count in zip(names, store.index["histogram"], strict=True)
        if count
    ]
    return f"lengths: {', '.join(shares)} tokens; mean {store.tokens / len(store) + 2:,.1f}"


def views(store: Store, recipe: Recipe) -> str:
    from neobert.pretraining.batches import training_documents

    shown = [
        f"{name} {training_documents(store, recipe, name).size:,}" for name in recipe.batch.views
    ]
    return f"documents to train on: {', '.join(shown)}; held out {recipe.data.held_out:,}"
