"""Pre-train a small NeoBERT on a CPU, both stages, in minutes: texts to a model that embeds.

    python recipes/cpu_smoke/run.py                  # the Python standard library's code
    python recipes/cpu_smoke/run.py --texts FOLDER   # your .txt, .jsonl or .parquet files

It cuts the texts into passages, trains a WordPiece tokenizer on them, and then runs the commands
that it prints: ``neobert pretrain`` for the store, both stages and the loss curves. Interrupted, it
goes on where it was. Exit code 1 if the held-out accuracy is under 1.5 times the baseline's.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from neobert.cli import main as command
from neobert.files import write_atomically
from neobert.inputs import open_source
from neobert.passages import standard_library_code
from neobert.pretraining import log
from neobert.pretraining.sources import pieces
from neobert.readers import ReadOptions

HERE = Path(__file__).resolve().parent
GOAL = 1.5  # times the accuracy of always saying the most frequent token
VOCABULARY = 8192
PASSAGE_CHARACTERS = 1500  # some 500 tokens of code, stage 2's length
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# --quick: does it run, and does the loss fall.
QUICK_TEXTS = 300
QUICK = (
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.intermediate_size=192", "data.held_out=30", "batch.tokens=1024",
)  # fmt: skip
QUICK_STAGES = {
    "stage1": ("schedule.steps=40", "schedule.warmup=4", "log.every=1"),
    "stage2": ("schedule.steps=8", "log.every=1"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--texts", type=Path, help="a file or folder (default: the standard library's code)"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/cpu_smoke"), help="(default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="does it run at all, in seconds")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("plot: expected matplotlib to be installed, got none; pip install '.[plot]'")
    began = time.perf_counter()
    args.run.mkdir(parents=True, exist_ok=True)
    texts, tokenizer = args.run / "texts.jsonl", args.run / "tokenizer"
    if not texts.exists():
        found = islice(passages(args.texts), QUICK_TEXTS if args.quick else None)
        write_atomically(texts, "".join(json.dumps({"text": text}) + "\n" for text in found))
    if not tokenizer.exists():
        train_tokenizer(texts, tokenizer)
    both = [f"data.path={texts}", f"data.tokenizer={tokenizer}", f"data.store={args.run}/tokens"]
    both += QUICK if args.quick else ()
    # Stage 2's views need long documents: without any it says so here.
    neobert("pretrain", "--prepare", HERE / "stage2.yaml", *both)
    for stage in ("stage1", "stage2"):
        changes = [f"train.run={args.run / stage}", *both]
        if stage == "stage2":
            changes.append(f"model.init_from={args.run / 'stage1'}")
        if args.quick:
            changes += QUICK_STAGES[stage]
        # Without a checkpoint it begins, so an interrupted run goes on by the same command.
        neobert("pretrain", "--resume", HERE / f"{stage}.yaml", *changes)
    runs, picture = [args.run / "stage1", args.run / "stage2"], args.run / "loss.png"
    neobert("pretrain", "--plot", *runs, "--output", picture)
    reached = verdict(args.run / "stage2", time.perf_counter() - began)
    return 0 if reached or args.quick else 1


def passages(folder: Path | None) -> Iterator[str]:
    """The texts, cut at white space where they are longer than a document should be."""
    if folder is None:
        whole = (passage.text for passage in standard_library_code())
    else:
        whole = (row.text for row in open_source(str(folder), ReadOptions()).rows())
    for text in whole:
        yield from pieces(text, PASSAGE_CHARACTERS)


def train_tokenizer(texts: Path, folder: Path) -> None:
    """BERT's kind: lower-casing WordPiece."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    from neobert.tokenization import NeoBERTTokenizer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False
    )
    with texts.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    partial = folder.with_name("tokenizer.partial")
    NeoBERTTokenizer(vocab=tokenizer.get_vocab(), model_max_length=512).save_pretrained(partial)
    partial.replace(folder)


def neobert(*arguments: object) -> None:
    """Show and run one command."""
    words = list(map(str, arguments))
    print("$ neobert", " ".join(words), flush=True)
    if code := command(words):
        sys.exit(code)


def verdict(run: Path, seconds: float) -> bool:
    """Whether the goal is reached; says so."""
    last = [record for record in log.read(run) if record["kind"] == "eval"][-1]
    ratio = last["accuracy"] / last["unigram_accuracy"]
    print(
        f"held-out masked tokens predicted: {last['accuracy']:.1%}, "
        f"by always saying the most frequent token {last['unigram_accuracy']:.1%}: "
        f"{ratio:.1f} x (goal: {GOAL} x), after {seconds / 60:.1f} minutes\n"
        f"the model: {run / 'final'}; its loss: {run.parent / 'loss.png'}"
    )
    return ratio >= GOAL


if __name__ == "__main__":
    sys.exit(main())
