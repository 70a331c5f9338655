"""Pieces that several families' blocks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels.patching.batch import Batch


class Context:
    """What every block of a forward gets beside the hidden states.

    A plain class, no dataclass or tuple: FSDP2 in mixed precision looks into those among a layer's
    arguments and casts every float to its compute dtype, and angles have to stay float32.

    Attributes:
        cu_seqlens: ``[B + 1]`` int32 document boundaries.
        max_seqlen: The longest document.
        cos, sin: ``[T, D / 2]`` float32 where the family has RoPE.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.cos, self.sin = cos, sin


class View:
    """A module of a frozen model as its block reads it: ``parts`` in place of some attributes.

    Modules that stay are looked up once, everything else is the module's own. A plain attribute
    costs less than one of an `nn.Module`.
    """

    def __init__(self, module: nn.Module, parts: dict[str, Any]) -> None:
        self.__dict__.update(module._modules, **parts)
        self._module, self._parts, self._seen = module, parts, dict(module._modules)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def current(self) -> bool:
        """Whether the module still has the children that it had."""
        return self._module._modules == self._seen

    def all(self) -> list["View"]:
        """This view and those among its parts."""
        nested = [part.all() for part in self._parts.values() if isinstance(part, View)]
        return [self, *(view for views in nested for view in views)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has its products made again, by its first forward."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def rotated(batch: Batch, head_size: int, theta: float) -> Context:
    """The context of a family with RoPE: one table for all blocks that share ``theta``."""
    cos, sin = nk.rope_table(batch.positions, head_size, theta)
    return Context(batch.cu_seqlens, batch.max_seqlen, cos, sin)


def expect(module: Any, cls: Any, name: str, *, called: bool = False) -> None:
    """Raise ValueError unless a part is just what its family builds.

    A part that the patched block does not call, only reads weights of, may have no hooks and no
    forward of its own either: they would not run. Hooks that transformers sets to record outputs
    are no loss.
    """
    if type(module) is not cls:
        raise _check.error("model", f"{name} to be {cls.__name__}", type(module).__name__)
    if getattr(module, "elementwise_affine", True) is False:
        raise _check.error("model", f"{name} with a weight", "elementwise_affine=False")
    if called:
        return
    if "forward" in module.__dict__:
        rule = f"{name} with the forward of its class (a patched encoder does not call it)"
        raise _check.error("model", rule, "one whose forward was replaced")
    if has_hooks(module):
        rule = f"{name} without hooks (a patched encoder does not call it)"
        raise _check.error("model", rule, "one that has them")


def has_hooks(module: Any) -> bool:
    """Whether anybody but transformers, which records outputs, hooked it."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    return any(not hook.__module__.startswith("transformers.") for hook in hooks)


# An attribute of the functions that `patch` puts on modules.
MARK = "_neobert_kernels"


def own_forward(module: Any) -> bool:
    """Whether somebody but `patch` gave it a forward that is not its class's."""
    forward = module.__dict__.get("forward")
    plain = getattr(forward, "__func__", forward)
    return plain not in (None, type(module).forward) and not hasattr(plain, MARK)


def is_watched(module: Any) -> bool:
    """Whether it may be more than what its library made: then it has to be called, as it is."""
    library = type(module).__module__.startswith(("transformers.", "torch.nn."))
    own = "forward" in module.__dict__ or has_hooks(module)
    return own or not library or nn.modules.module._has_any_global_hook()


def is_gelu(activation: Any) -> bool:
    """Whether this is transformers' exact GELU, by its function and not by its name."""
    return getattr(activation, "act", None) is nn.functional.gelu


def refuse_attention_dropout(training: bool, probability: float) -> None:
    if training and probability > 0:
        raise _check.error(
            "attention dropout",
            "0 while training a patched model (set it in the config, or unpatch)",
            probability,
        )


def heads_of(x: Tensor, head_size: int) -> Tensor:
    """``[T, H * D]`` to ``[T, H, D]``."""
    return x.unflatten(-1, (-1, head_size))


def projected(
    attention: Any, names: tuple[str, str, str], head_size: int, x: Tensor
) -> tuple[Tensor, ...]:
    """q, k and v ``[T, heads, D]``: three products, or one where a view has them together."""
    if isinstance(attention, View) and attention.qkv is not None:
        return heads_of(attention.qkv(x), head_size).split(attention.counts, 1)
    return tuple(heads_of(getattr(attention, name)(x), head_size) for name in names)


def in_pairs(attention: Any, own: bool) -> bool:
    """Whether RoPE's pairs are neighbours in its q and k: ``own``, unless a view says otherwise."""
    return bool(attention.interleaved) if isinstance(attention, View) else own


def look_up(table: Any, ids: Tensor, name: str) -> Tensor:
    """An embedding of ``ids``; outside of the table they are named, on a CPU."""
    rows = getattr(table, "num_embeddings", None)  # not of every wrapper around an embedding
    if rows is not None:
        _check.within(name, ids, rows)
    return table(ids)


def word_vectors(table: Any, tokens: Tensor) -> Tensor:
    """``[T, C]`` from ids, or the vectors that the caller gave in their place."""
    return tokens if tokens.is_floating_point() else look_up(table, tokens, "input_ids")


def at(rows: Tensor | None, x: Tensor) -> Tensor:
    """``x`` at ``rows``, all of it if they are None."""
    return x if rows is None else x.index_select(0, rows)


def promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, as an addition takes them.

    Under autocast a Linear gives half precision and the residual stream is float32.
    """
    if x.dtype == y.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def layer_norm(norm: Any, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(layer_norm(x + delta), x + delta)``."""
    if delta is None:
        return nk.layer_norm(x, norm.weight, norm.bias, norm.eps), x
    return nk.add_layer_norm(*promoted(delta, x), norm.weight, norm.bias, norm.eps)


def rms_norm(weight: Tensor, eps: float, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + delta), x + delta)``."""
    if delta is None:
        return nk.rms_norm(x, weight, eps), x
    return nk.add_rms_norm(*promoted(delta, x), weight, eps)


def run_post_norm(
    layers: Any, x: Tensor, states: list[Tensor] | None, rows: Tensor | None, context: Context
) -> Tensor:
    """Blocks whose output is the next one's input; ``rows`` only reach the last of them."""
    if states is not None:
        states.append(x)
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        x = layer(x, context, rows if i == last else None)
        if states is not None:
            states.append(x)
    return x


def run_pre_norm(
    layers: Any,
    x: Tensor,
    states: list[Tensor] | None,
    rows: Tensor | None,
    context: Callable[[Any], Context],
    final_norm: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
) -> Tensor:
    """Blocks between which the residual stream travels as ``x`` and the ``delta`` to be added.

    So that each addition is fused with the norm that follows it, across blocks too. The last state
    is the final norm's output, as in the unpatched models.
    """
    if states is not None:
        states.append(x)
    delta = None
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        x, delta = layer(x, delta, context(layer), rows if i == last else None)
        if states is not None:
            states.append(x + delta)
    y, _ = final_norm(x, delta)
    if states is not None:
        states[-1] = y
    return y
