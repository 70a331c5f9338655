"""Configuration of NeoBERT: the fields of the published ``config.json``, and whatever else it has.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587; chandar-lab/NeoBERT.
"""

import copy
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from neobert_kernels import _check

FEED_FORWARD_MULTIPLE = 8
_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "max_length")
_RANGES = ("embedding_init_range", "decoder_init_range", "classifier_init_range")
_LEAST: tuple[tuple[tuple[str, ...], Any, int], ...] = (
    (_SIZES, int, 1),
    (("intermediate_size",), int, 2),
    (("num_hidden_layers",), int, 0),
    (("norm_eps", "rope_theta", "classifier_dropout", *_RANGES), (int, float), 0),
)


class NeoBERTConfig(PreTrainedConfig):
    """Shape and settings of a NeoBERT model; the defaults are the released 250M model.

    Fields of a ``config.json`` that are not listed here are kept as they are and saved again.

    Args:
        vocab_size: Rows of the token embedding and of the masked-language-model head.
        hidden_size: Width C; ``num_attention_heads * dim_head``.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads H.
        dim_head: Head size D, even; None means ``hidden_size / num_attention_heads``.
        intermediate_size: Nominal feed-forward width; see `feed_forward_size` for the real one.
        norm_eps: Added to the mean square in every RMSNorm.
        max_length: Longest document in tokens; also readable as ``max_position_embeddings``.
        rope_theta: Base of the rotary angles.
        pad_token_id: Token whose embedding gets no gradient.
        embedding_init_range: Token embeddings start in U(-range, range).
        decoder_init_range: So do all other weights, except those of
        classifier_init_range: the classification and question-answering heads.
        classifier_dropout: Dropout probability in the classification heads, in training.

    Raises:
        ValueError: Sizes do not fit together, or a size or range is out of bounds.
    """

    model_type = "neobert"
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "max_length",
        "head_dim": "dim_head",
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    dim_head: int | None = None
    intermediate_size: int = 3072
    norm_eps: float = 1e-5
    max_length: int = 4096
    rope_theta: float = 10000.0
    pad_token_id: int | None = 0
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02
    classifier_init_range: float = 0.02
    classifier_dropout: float = 0.1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for names, kind, least in _LEAST:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or value < least:
                    a = "an integer" if kind is int else "a number"
                    raise _check.error(name, f"{a} of at least {least}", repr(value))
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise _check.error("pad_token_id", f"0 to {self.vocab_size - 1}", self.pad_token_id)
        if self.dim_head is None:
            self.dim_head = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads * self.dim_head != self.hidden_size:
            rule = f"num_attention_heads * dim_head = {self.num_attention_heads} * {self.dim_head}"
            raise _check.error("hidden_size", rule, self.hidden_size)
        if self.dim_head % 2:
            raise _check.error("dim_head", "an even size", self.dim_head)
        if self.tie_word_embeddings:
            raise _check.error("tie_word_embeddings", "False (the decoder is untied)", True)
        super().__post_init__(**kwargs)

    @property
    def feed_forward_size(self) -> int:
        """Width F of the SwiGLU: two thirds of ``intermediate_size``, up to a multiple of 8."""
        width = 2 * self.intermediate_size // 3
        return -(-width // FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE

    def to_dict(self) -> dict[str, Any]:
        """All fields; with the ``kwargs`` the published file has, which transformers would drop."""
        output = super().to_dict()
        if "kwargs" in self.__dict__:
            output["kwargs"] = copy.deepcopy(self.__dict__["kwargs"])
        return output
