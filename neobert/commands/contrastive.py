"""``neobert finetune contrastive``: a sentence encoder from pairs of texts."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from neobert.commands.arguments import number, positive, seed
from neobert.readers import InputError, one_line

DESCRIPTION = """\
Train a sentence encoder on pairs by the paper's recipe, on sentence-transformers' trainer: InfoNCE
on cosine similarity with in-batch and hard negatives, every batch from one data set, drawn with
p ~ n^0.5; mean pooling where the model's files say nothing else.

Data: .jsonl files (query, positive, perhaps negative: a text or a list) or .tsv files with these
columns, or data sets of the hub (NAME or NAME:CONFIG, its training split). A killed run is resumed
from its newest checkpoint by the same command. Several GPUs: torchrun --nproc-per-node N -m neobert
finetune contrastive ...; documents of all of them are negatives.

OUTPUT/final is a folder that SentenceTransformer, mteb and neobert encode load.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from neobert.finetuning.contrastive.recipe import Recipe
    from neobert.finetuning.schedule import PRECISIONS

    plain = argparse.RawDescriptionHelpFormatter
    parser = kinds.add_parser(
        "contrastive", help="a sentence encoder", description=DESCRIPTION, formatter_class=plain
    )
    parser.add_argument("--model", required=True, help="a local model folder or a hub id")
    parser.add_argument("--data", required=True, nargs="+", metavar="DATA", help="files or hub ids")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--instructions",
        metavar="JSON",
        help="a file: data set's name to its queries' prefix",
    )
    parser.add_argument("--restart", action="store_true", help="discard an earlier run")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group = parser.add_argument_group("recipe (defaults: the paper's)")
    group.add_argument("--steps", type=positive, default=Recipe.steps, metavar="N")
    group.add_argument("--batch-size", type=positive, default=Recipe.batch_size, metavar="N")
    group.add_argument("--lr", type=number, default=Recipe.lr, metavar="RATE")
    group.add_argument("--temperature", type=number, default=Recipe.temperature, metavar="X")
    group.add_argument("--max-length", type=positive, metavar="TOKENS", help="of a text")
    group.add_argument(
        "--matryoshka",
        type=positive,
        nargs="+",
        default=[],
        metavar="N",
        help="a loss for each of these numbers of leading dimensions, such as 768 512 256",
    )
    group.add_argument("--seed", type=seed, default=Recipe.seed, metavar="N")
    group = parser.add_argument_group("model")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of products (default: bfloat16 on a GPU)"
    )
    group.add_argument(
        "--mini-batch-tokens",
        type=positive,
        default=Recipe.mini_batch_tokens,
        metavar="N",
        help="tokens of one forward pass: memory, not the result",
    )
    group.add_argument("--no-patch", action="store_true", help="run the model's own code")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from neobert.encode import find_device
    from neobert.finetuning.contrastive.data import load_pairs
    from neobert.finetuning.contrastive.recipe import Recipe
    from neobert.finetuning.contrastive.train import train
    from neobert.loading import model_folder, quiet_loading

    device = find_device(args.device)
    instructions = _instructions(args.instructions)
    pairs = [load_pairs(source) for source in args.data]
    recipe = Recipe(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        temperature=args.temperature,
        max_length=args.max_length,
        mini_batch_tokens=args.mini_batch_tokens,
        precision=args.precision or ("bfloat16" if device.type == "cuda" else "float32"),
        seed=args.seed,
        matryoshka=tuple(sorted(set(args.matryoshka), reverse=True)),
    )
    if not args.quiet:
        for each in pairs:
            print(f"{each.name}: {len(each):,} pairs, {', '.join(each.columns)}", file=sys.stderr)
    with quiet_loading() if args.quiet else contextlib.nullcontext():
        final = train(
            model_folder(args.model, args.revision),
            args.model,
            pairs,
            recipe,
            Path(args.output),
            device=args.device,
            patched=not args.no_patch,
            instructions=instructions,
            restart=args.restart,
            quiet=args.quiet,
        )
    if not args.quiet:
        print(f"the model is in {final}")
    return 0


def _instructions(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"instructions: expected JSON, got {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise InputError(f"instructions: expected an object of strings in {path}, got another")
    return content
