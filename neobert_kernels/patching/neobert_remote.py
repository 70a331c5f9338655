"""NeoBERT's published classes, where a user has loaded them as remote code.

Their module is made at run time, so a class is known by its name and by what its instances are made
of: everything that a block computes from is checked, because another revision may compute something
else. Nothing of it is imported here. Forwards keep the published signature, in which
``attention_mask`` is not second, and the published ``hidden_states``: each block's output, neither
the embedding's nor the final norm's.

Source: Le Breton, Fournier, El Mezouar and Chandar 2025, arXiv:2502.19587; chandar-lab/NeoBERT.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from neobert_kernels import _check
from neobert_kernels.patching import heads, neobert
from neobert_kernels.patching.batch import Batch
from neobert_kernels.patching.blocks import expect, rms_norm, rotated, run_pre_norm
from neobert_kernels.patching.family import Family, Packed

INPUTS = (
    "input_ids", "position_ids", "max_seqlen", "cu_seqlens", "attention_mask", "inputs_embeds",
    "output_hidden_states", "output_attentions",
)  # fmt: skip
ROPE_THETA = 10000.0  # the published config has no field for it


def check(base: Any) -> None:
    """Raise ValueError unless a base model has the published structure."""
    inputs = tuple(inspect.signature(type(base).forward).parameters)[1:]
    if inputs[: len(INPUTS)] != INPUTS:
        rule = f"NeoBERT.forward to begin with ({', '.join(INPUTS)})"
        raise _check.error("model", rule, f"({', '.join(inputs)})")
    if not getattr(base.config, "rope", True):
        raise _check.error("model", "rotary positions (config.rope)", "learned ones")
    width, count = base.config.hidden_size, base.config.num_attention_heads
    if width != count * getattr(base.config, "dim_head", width // count):
        rule = f"{count} heads that share hidden_size ({width})"
        raise _check.error("model", rule, f"config.dim_head {base.config.dim_head}")
    _expect_parts(base, "the model", ("encoder", "transformer_encoder", "layer_norm"))
    if type(base.encoder) is not nn.Embedding:
        raise _check.error("model", "encoder to be Embedding", type(base.encoder).__name__)
    _expect_norm(base.layer_norm, "layer_norm", width)
    for name, layer in neobert.layers(base):
        _expect_parts(layer, name, ("qkv", "wo", "ffn", "attention_norm", "ffn_norm"))
        _expect_linear(layer.qkv, f"{name}.qkv", width, 3 * width)
        _expect_linear(layer.wo, f"{name}.wo", width, width)
        _expect_norm(layer.attention_norm, f"{name}.attention_norm", width)
        _expect_norm(layer.ffn_norm, f"{name}.ffn_norm", width)
        _expect_feed_forward(layer.ffn, f"{name}.ffn", width)


def check_head(head: Any) -> None:
    """Raise ValueError unless a head model has the published structure."""
    if hasattr(head, "decoder"):
        _expect_parts(head, "the model", ("model", "decoder"))
        return
    _expect_parts(head, "the model", ("model", "dense", "classifier", "dropout"))
    if type(head.dropout) is not nn.Dropout:
        raise _check.error("model", "dropout to be Dropout", type(head.dropout).__name__)


def _expect_parts(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Just ``parts``, no parameter beside them, and otherwise what computes nothing."""
    children = dict(module.named_children())
    idle = {
        child
        for child, part in children.items()
        if type(part) is nn.Identity or (type(part) is nn.Dropout and part.p == 0)
    }
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if not set(parts) <= set(children) or (set(children) | own) - idle - set(parts):
        rule = f"{name} to have the parts {', '.join(parts)}"
        raise _check.error("model", rule, ", ".join([*children, *own]) or "none")


def _expect_linear(module: Any, name: str, inner: int, outer: int) -> None:
    # LoRA puts a layer of its own in this place; it is called, so it may.
    weight = getattr(module, "weight", None)
    if weight is None or tuple(weight.shape) != (outer, inner):
        got = type(module).__name__ if weight is None else f"weight {tuple(weight.shape)}"
        raise _check.error("model", f"{name} to have a weight ({outer}, {inner})", got)


def _expect_norm(module: Any, name: str, width: int) -> None:
    """torch's RMSNorm or another of this name, with nothing but a weight and an eps."""
    cls = type(module)
    eps = getattr(module, "eps", None)
    alike = cls.__name__ == "RMSNorm" and isinstance(eps, float)
    parameters = {key: tuple(p.shape) for key, p in module.named_parameters()}
    if not alike or parameters != {"weight": (width,)}:
        rule = f"{name} to be an RMSNorm with eps and a weight ({width},)"
        raise _check.error("model", rule, f"{cls.__name__}, eps {eps}, parameters {parameters}")
    expect(module, cls, name)


def _expect_feed_forward(module: Any, name: str, width: int) -> None:
    """xformers' SwiGLU or another of this name, gate and value in one projection."""
    cls = type(module)
    if cls.__name__ != "SwiGLU":
        raise _check.error("model", f"{name} to be SwiGLU", cls.__name__)
    _expect_parts(module, name, ("w12", "w3"))
    inner = getattr(getattr(module.w3, "weight", None), "shape", (0, 0))[-1]
    _expect_linear(module.w12, f"{name}.w12", width, 2 * inner)
    _expect_linear(module.w3, f"{name}.w3", inner, width)
    expect(module, cls, name)


def run(
    base: Any, x: Tensor, batch: Batch, states: list[Tensor] | None, rows: Tensor | None
) -> Tensor:
    head_size = base.config.hidden_size // base.config.num_attention_heads
    context = rotated(batch, head_size, ROPE_THETA)
    unnormalized = []

    def final_norm(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total = rms_norm(base.layer_norm.weight, base.layer_norm.eps, x, delta)
        unnormalized.append(total)
        return y, total

    y = run_pre_norm(base.transformer_encoder, x, states, rows, lambda layer: context, final_norm)
    if states is not None:
        states[:] = [*states[1:-1], *unnormalized]
    return y


def classify(self: Any, packed: Packed) -> Tensor:
    x = self.dense(self.dropout(heads.first_pooled(packed)))
    return self.classifier(self.dropout(x.tanh()))


FAMILY = Family(
    name="neobert_remote",
    operators=neobert.OPERATORS,
    check=check,
    layers=neobert.layers,
    layer_forward=neobert.layer_forward,
    view=neobert.view,
    stack=lambda base: neobert.stack_with(base, lambda: ROPE_THETA),
    what=neobert.FAMILY.what,
    embed=neobert.embed,
    run=run,
    output="BaseModelOutput",
    longest=lambda base: getattr(base.config, "max_length", None),
    heads={
        "NeoBERTLMHead": heads.masked_lm(lambda self, x: x, lambda self: self.decoder),
        "NeoBERTForSequenceClassification": heads.sequence_classification(classify),
    },
    check_head=check_head,
)
