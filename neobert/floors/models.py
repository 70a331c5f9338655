"""Every call of a model's forward, of its backward, and of a training step, with its cost.

The model is what `patch` makes of it: no padding, a sum with the residual fused into the norm
behind it, RoPE inside attention, a loss at labelled rows, and behind the last attention these rows
alone. Products are counted as Linear layers of
the shapes that the classes have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neobert.floors import operators
from neobert.floors.operators import Cost
from neobert_kernels import _check

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Architecture:
    """Sizes of an encoder and what its blocks are made of.

    Attributes:
        name: As in `ARCHITECTURES`.
        layers, width, heads, kv_heads, head_size: L, C, H, heads of k and v, D.
        inner: F, the width behind the gated unit or GELU.
        vocabulary: Rows of the embedding and of the masked-LM head.
        norm: "rms" or "layer".
        norm_bias, linear_bias: Whether these have one.
        unit: "swiglu", "geglu" or "gelu".
        rotary: RoPE; otherwise ``positions`` learned rows.
        types: Rows of a token-type table.
        window: Inclusive radius of local attention, in layers that are not global.
        global_every: Every so many layers one is global, the first one among them.
        transform: The masked-LM head has a Linear, an activation and a norm before the decoder.
        transform_bias, decoder_bias: Whether these have one.
        tied: The decoder's weight is the embedding's.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    norm: str = "layer"
    norm_bias: bool = True
    linear_bias: bool = True
    unit: str = "gelu"
    rotary: bool = False
    positions: int = 0
    types: int = 0
    window: int | None = None
    global_every: int = 1
    transform: bool = True
    transform_bias: bool = True
    decoder_bias: bool = True
    tied: bool = True

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one block: name, (inputs, outputs)."""
        C, F, D = self.width, self.inner, self.head_size
        return {
            "qkv": (C, (self.heads + 2 * self.kv_heads) * D),
            "attention output": (self.heads * D, C),
            "feed-forward in": (C, F if self.unit == "gelu" else 2 * F),
            "feed-forward out": (F, C),
        }

    @property
    def global_layers(self) -> int:
        return self.layers if self.window is None else -(-self.layers // self.global_every)

    def parameters(self, head: bool = False) -> int:
        """Weights of the encoder, or with its masked-LM head."""
        C, V = self.width, self.vocabulary
        total = (V + self.positions + self.types) * C
        for inputs, outputs in self.linears.values():
            total += self.layers * (inputs * outputs + outputs * self.linear_bias)
        total += self._norms * C * (1 + self.norm_bias)
        if head:
            total += self.transform * (C * C + C * (1 + self.norm_bias) + C * self.transform_bias)
            total += V * C * (not self.tied) + V * self.decoder_bias
        return total

    @property
    def _norms(self) -> int:
        """Two for each block and one more: before the first block, or behind the last.

        ModernBERT has one at either end, and none before its first attention.
        """
        return 2 * self.layers + 1


@dataclass(frozen=True)
class Part:
    """``calls`` calls of one operator, their cost summed."""

    operator: str
    calls: int
    cost: Cost
    backward: bool = False

    @property
    def name(self) -> str:
        return f"{self.operator}, backward" if self.backward else self.operator


def forward(
    model: Architecture, lengths: Sequence[int], dtype: str = "bfloat16", labelled: int = 0
) -> list[Part]:
    """All operators from token ids to hidden states, and to the loss of ``labelled`` rows if any.

    Raises:
        ValueError: A length is negative, or more rows are labelled than there are.
    """
    return _parts(model, lengths, dtype, labelled, backward=False)


def backward(
    model: Architecture, lengths: Sequence[int], dtype: str = "bfloat16", labelled: int = 0
) -> list[Part]:
    """All operators from the loss, or the hidden states' gradient, to every weight's gradient."""
    return _parts(model, lengths, dtype, labelled, backward=True)


def training_step(
    model: Architecture,
    lengths: Sequence[int],
    dtype: str = "bfloat16",
    labelled: int | None = None,
) -> list[Part]:
    """Forward, backward and AdamW of masked-LM training; a fifth of the tokens has a label."""
    if labelled is None:
        labelled = round(0.2 * sum(lengths))
    return [
        *forward(model, lengths, dtype, labelled),
        *backward(model, lengths, dtype, labelled),
        Part("AdamW", 1, operators.adamw(model.parameters(head=labelled > 0))),
    ]


def _parts(
    model: Architecture, lengths: Sequence[int], dtype: str, labelled: int, backward: bool
) -> list[Part]:
    T = sum(lengths)
    if any(n < 0 for n in lengths):
        raise _check.error("lengths", "no negative number", min(lengths))
    if not 0 <= labelled <= T:
        raise _check.error("labelled", f"0 to {T} (the tokens)", labelled)
    if dtype not in ITEMSIZES:
        raise _check.error("dtype", f"one of {', '.join(ITEMSIZES)}", repr(dtype))
    e, C, F, L = ITEMSIZES[dtype], model.width, model.inner, model.layers
    # Behind the last attention only the labelled rows go on to the loss.
    last = labelled or T
    found: dict[str, Part] = {}

    def add(name: str, calls: int, cost: Cost) -> None:
        cost = cost.times(calls)
        if name in found:
            cost, calls = cost.plus(found[name].cost), calls + found[name].calls
        if calls:
            found[name] = Part(name, calls, cost, backward)

    linear = operators.linear_backward if backward else operators.linear
    norm = operators.norm_backward if backward else operators.norm
    attention = operators.attention_backward if backward else operators.attention
    if backward:
        add("embedding", 1, operators.embedding_backward(T, C, e))
    else:
        tables = (model.positions > 0) + (model.types > 0)
        longest = min(max(lengths, default=0), model.positions)
        add("embedding", 1, operators.embedding(T, C, e, tables, longest, model.types))
        if model.rotary:
            add("rope_table", 1, operators.rope_table(T, model.head_size))
    kind = f"{model.norm}_norm"
    style: dict[str, Any] = {"centered": model.norm == "layer", "bias": model.norm_bias}
    add(kind, 1, norm(T, C, e, added=False, **style))
    behind = 2 if L else 0  # norms behind the last attention
    add(f"add_{kind}", 2 * L - behind, norm(T, C, e, added=True, **style))
    add(f"add_{kind}", behind, norm(last, C, e, added=True, **style))
    for name, (inputs, outputs) in model.linears.items():
        for rows, calls in ((T, L - 1), (T if name == "qkv" else last, 1)):
            cost = linear(rows, inputs, outputs, e, model.linear_bias)
            add(f"Linear, {name}", calls if L else 0, cost)
    options: dict[str, Any] = {"kv_heads": model.kv_heads, "rotary": model.rotary}
    H, D, everywhere = model.heads, model.head_size, model.global_layers
    add("attention", everywhere, attention(lengths, H, D, e, **options))
    if everywhere < L:
        local = attention(lengths, H, D, e, window=model.window, **options)
        add("attention, local", L - everywhere, local)
    if model.unit == "gelu":
        unit = operators.gelu_backward if backward else operators.gelu
    else:
        unit = operators.gated_unit_backward if backward else operators.gated_unit
    name = "GELU" if model.unit == "gelu" else model.unit
    for rows, calls in ((T, L - 1), (last, 1)):
        add(name, calls if L else 0, unit(rows, F, e))
    if labelled:
        if model.transform:
            add("Linear, head", 1, linear(labelled, C, C, e, model.transform_bias))
            gelu = operators.gelu_backward if backward else operators.gelu
            add("GELU, head", 1, gelu(labelled, C, e))
            add(f"{kind}, head", 1, norm(labelled, C, e, added=False, **style))
        loss = operators.linear_cross_entropy
        if backward:
            loss = operators.linear_cross_entropy_backward
        cost = loss(labelled, labelled, C, model.vocabulary, e, model.decoder_bias)
        add("linear_cross_entropy", 1, cost)
    return list(found.values())


_BERT = Architecture(
    "bert-base", 12, 768, 12, 12, 64, 3072, 30_522, positions=512, types=2
)  # fmt: skip
_ROBERTA = replace(_BERT, name="roberta-base", vocabulary=50_265, positions=514, types=1)
_LARGE: dict[str, Any] = {"layers": 24, "width": 1024, "heads": 16, "kv_heads": 16, "inner": 4096}
_BARE: dict[str, Any] = {"norm_bias": False, "linear_bias": False, "rotary": True}
_MODERNBERT = Architecture(
    "modernbert-base", 22, 768, 12, 12, 64, 1152, 50_368, **_BARE, unit="geglu", window=64,
    global_every=3, transform_bias=False,
)  # fmt: skip
_EUROBERT = Architecture(
    "eurobert-210m", 12, 768, 12, 12, 64, 3072, 128_256, **_BARE, norm="rms", unit="swiglu",
    transform=False, decoder_bias=False, tied=False,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    model.name: model
    for model in (
        Architecture(
            "neobert-250m", 28, 768, 12, 12, 64, 2048, 30_522, **_BARE, norm="rms", unit="swiglu",
            transform=False, tied=False,
        ),
        _BERT,
        replace(_BERT, name="bert-large", **_LARGE),
        _ROBERTA,
        replace(_ROBERTA, name="roberta-large", **_LARGE),
        Architecture(
            "nomic-bert-base", 12, 768, 12, 12, 64, 3072, 30_528, linear_bias=False, unit="swiglu",
            rotary=True, types=2,
        ),
        _MODERNBERT,
        replace(
            _MODERNBERT, name="modernbert-large", layers=28, width=1024, heads=16, kv_heads=16,
            inner=2624,
        ),
        _EUROBERT,
        replace(
            _EUROBERT, name="eurobert-2.1b", layers=32, width=2304, heads=18, kv_heads=6,
            head_size=128, inner=6144,
        ),
    )
}  # fmt: skip


def architecture(name: str) -> Architecture:
    """The model called ``name`` in `ARCHITECTURES`.

    Raises:
        ValueError: There is none; the message lists those that are known.
    """
    if name not in ARCHITECTURES:
        raise _check.error("model", f"one of {', '.join(ARCHITECTURES)}", repr(name))
    return ARCHITECTURES[name]


def of_config(config: Any) -> Architecture:
    """The architecture that a transformers config describes, of a family that `patch` knows.

    Raises:
        ValueError: Another family.
    """
    kinds = {
        "neobert": "neobert-250m",
        "bert": "bert-base",
        "roberta": "roberta-base",
        "xlm-roberta": "roberta-base",
        "nomic_bert": "nomic-bert-base",
        "modernbert": "modernbert-base",
        "eurobert": "eurobert-210m",
    }
    kind = config.model_type
    if kind not in kinds:
        raise _check.error("config", f"a model_type of {', '.join(kinds)}", repr(kind))
    base = ARCHITECTURES[kinds[kind]]
    heads = config.num_attention_heads
    changes: dict[str, Any] = {
        "name": kind,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "inner": getattr(config, "feed_forward_size", None) or config.intermediate_size,
        "vocabulary": config.vocab_size,
        "tied": getattr(config, "tie_word_embeddings", base.tied),
    }
    if base.positions:
        changes["positions"] = config.max_position_embeddings
    if base.types:
        changes["types"] = config.type_vocab_size
    if kind == "modernbert":
        changes["window"] = config.local_attention // 2
        kinds_of_layers = config.layer_types
        apart = [i for i, name in enumerate(kinds_of_layers) if name == "full_attention"][:2]
        changes["global_every"] = apart[1] if len(apart) > 1 else max(len(kinds_of_layers), 1)
    return replace(base, **changes)
