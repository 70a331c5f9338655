"""Pre-train a small NeoBERT on a CPU, both stages, in minutes: texts to a model that embeds.

    python recipes/cpu_smoke/run.py                  # the Python standard library's code
    python recipes/cpu_smoke/run.py --texts FOLDER   # your .txt, .jsonl or .parquet files

It cuts the texts into passages, trains a WordPiece tokenizer on them, and then runs the commands
that it prints: ``neobert pretrain`` for the store, both stages and the loss curves. Interrupted,
it goes on where it was. Exit code 1 if the held-out accuracy is under 1.5 times the baseline's.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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
# Seconds instead of minutes: does it run, and does the loss fall.
QUICK = {
    "texts": 400,
    "both": ["model.hidden_size=64", "model.num_attention_heads=2", "model.intermediate_size=192",
             "model.num_hidden_layers=2", "data.held_out=40", "batch.workers=0"],
    "stage1": ["schedule.steps=60", "schedule.warmup=5", "batch.tokens=2048"],
    "stage2": ["schedule.steps=10"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=Path, help="a file or folder (default: Python's own code)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/cpu_smoke"), help="(default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="seconds: does it run at all")
    args = parser.parse_args()
    began = time.perf_counter()
    args.run.mkdir(parents=True, exist_ok=True)
    texts = args.run / "texts.jsonl"
    if not texts.exists():
        found = list(passages(args.texts))[: QUICK["texts"] if args.quick else None]
        write_atomically(texts, "".join(json.dumps({"text": text}) + "\n" for text in found))
    if not (args.run / "tokenizer" / "tokenizer_config.json").exists():
        train_tokenizer(texts, args.run / "tokenizer")
    settings = [
        f"data.path={texts}",
        f"data.tokenizer={args.run / 'tokenizer'}",
        f"data.store={args.run / 'tokens'}",
        *(QUICK["both"] if args.quick else []),
    ]
    neobert("pretrain", "--prepare", HERE / "stage1.yaml", *settings)
    for stage in ("stage1", "stage2"):
        begin = [f"model.init_from={args.run / 'stage1'}"] if stage == "stage2" else []
        quick = QUICK[stage] if args.quick else []
        run = f"train.run={args.run / stage}"
        neobert("pretrain", HERE / f"{stage}.yaml", "--resume", run, *begin, *settings, *quick)
    picture = args.run / "loss.png"
    neobert("pretrain", "--plot", args.run / "stage1", args.run / "stage2", "--output", picture)
    return verdict(args.run / "stage2", time.perf_counter() - began)


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
    NeoBERTTokenizer(vocab=tokenizer.get_vocab(), model_max_length=512).save_pretrained(folder)


def neobert(*arguments: object) -> None:
    """Run and show one command."""
    words = ["neobert", *map(str, arguments)]
    print("$", " ".join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words])
    if done.returncode:
        sys.exit(done.returncode)


def verdict(run: Path, seconds: float) -> int:
    last = [record for record in log.read(run) if record["kind"] == "eval"][-1]
    ratio = last["accuracy"] / last["unigram_accuracy"]
    print(
        f"held-out masked tokens predicted: {last['accuracy']:.1%}, "
        f"by always saying the most frequent token {last['unigram_accuracy']:.1%}: "
        f"{ratio:.1f} x (goal: {GOAL} x), after {seconds / 60:.1f} minutes\n"
        f"the model: {run / 'final'}; its loss: {run.parent / 'loss.png'}"
    )
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
