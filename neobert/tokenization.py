"""The tokenizer of NeoBERT: the WordPiece of google-bert/bert-base-uncased, without token types."""

from typing import Any

from transformers.models.bert.tokenization_bert import BertTokenizer, load_vocab

from neobert.config import NeoBERTConfig


class NeoBERTTokenizer(BertTokenizer):
    """Lower-casing WordPiece; pairs are ``[CLS] A [SEP] B [SEP]``, and no token types come out.

    Where the tokenizer's own files name no ``model_max_length``, it is the model's 4,096 tokens.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        *args: Any,
        model_max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(vocab, str):  # a path, which newer releases of tokenizers no longer read
            vocab = load_vocab(vocab)
        if model_max_length is None:
            model_max_length = NeoBERTConfig.max_length
        super().__init__(vocab, *args, model_max_length=model_max_length, **kwargs)
