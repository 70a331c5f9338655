"""Our attention under transformers' ``attn_implementation``, for models that are not patched.

`register_attention` adds two names to transformers' registry. Both run the same function; the
second contains "flash", which is what sentence-transformers looks for before it packs texts end to
end. transformers calls an attention function once per layer and tells it nothing about other
layers, so a padded batch is unpadded again in each of them; `patch` does that once per forward.
"""

import functools
import inspect
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import neobert_kernels as nk
from neobert_kernels import _check
from neobert_kernels._packed import Packing, full, unpad
from neobert_kernels.patching.batch import boundaries

ATTENTION = "neobert_kernels"
FLASH_ATTENTION = "neobert_kernels_flash"

# Arguments of transformers' attention functions that change the result and that we do not compute.
_REFUSED = (
    "block_table",
    "cache",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "learnable_sink",
    "output_attentions",
    "past_key_values",
    "position_bias",
    "s_aux",
    "score_mod",
    "softcap",
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        module: The attention module; tells whether it is causal, and its config.
        query, key, value: ``[B, H, S, D]``; key and value may have fewer heads.
        attention_mask: ``[B, S]``, zero at padding; None: no padding.
        dropout: Must be 0.
        scaling: Of the scores; ``D ** -0.5`` by default.
        sliding_window: One more than the distance up to which tokens attend.
        is_causal: Must be False, or None where ``module.is_causal`` is.
        kwargs: ``cu_seq_lens_q`` and ``max_length_q`` of a packed row, or ``position_ids`` that
            restart; other arguments that would change the result are refused.

    Returns:
        ``[B, S, H, D]``, zeros at the padding, and None for the weights.

    Raises:
        ValueError: An argument asks for something else than bidirectional attention within
            documents, or does not fit the others.
    """
    _check_call(module, query, key, dropout, is_causal, kwargs)
    window = _radius(sliding_window)
    attend = functools.partial(nk.attention, window=window, scale=scaling)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    bounds = _documents(q, attention_mask, kwargs)
    if bounds is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        return attend(q, k, v, *bounds).unsqueeze(0), None
    packing = _packing(q, attention_mask, window)
    q, k, v = (packing.pack(x) for x in (q, k, v))
    return packing.unpack(attend(q, k, v, packing.cu_seqlens, packing.max_seqlen)), None


def _check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    for name, x in (("query", query), ("key", key)):
        _check.tensor(name, x, ndim=4)
    # A cache, a prefix or another text's keys.
    if key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2]:
        rule = f"the {query.shape[2]} tokens of query in each of {query.shape[0]} rows"
        raise _check.error("key", rule, f"shape {tuple(key.shape)}")
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        raise _check.error("is_causal", "False (attention is bidirectional here)", True)
    if dropout:
        rule = "0 while training (set the model's attention dropout to 0)"
        raise _check.error("attention dropout", rule, dropout)
    config = getattr(module, "config", None)
    for name in ("add_cross_attention", "is_encoder_decoder", "output_attentions"):
        if getattr(config, name, False):
            raise _check.error(f"config.{name}", f"False with attention {ATTENTION!r}", True)
    for name in _REFUSED:
        given = kwargs.get(name)
        if given is not None and given is not False:
            got = given if isinstance(given, (int, float)) else type(given).__name__
            raise _check.error(name, f"None with attention {ATTENTION!r}", got)


def _radius(sliding_window: int | None) -> int | None:
    """The distance up to which tokens attend, of a window that counts the token itself too."""
    if sliding_window is None:
        return None
    if not isinstance(sliding_window, int) or sliding_window < 1:
        raise _check.error("sliding_window", "None or an int of at least 1", sliding_window)
    return sliding_window - 1


def _documents(
    q: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, int] | None:
    """``(cu_seqlens, max_seqlen)`` of a packed row ``[1, T, H, D]``, else None."""
    position_ids, first = kwargs.get("position_ids"), 0
    named = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens"))
    if named or len(q) > 1 or attention_mask is not None:
        position_ids = None
    if position_ids is not None:
        _check.tensor("position_ids", position_ids, ndim=2)
        _check.shape("position_ids", position_ids, q.shape[:2])
        first = int(position_ids.min()) if position_ids.numel() else 0
    bounds = boundaries(q, attention_mask, position_ids, kwargs, first)
    if bounds is None and position_ids is None and kwargs.get("seq_idx") is not None:
        rule = "the documents' boundaries beside seq_idx, which is not read"
        raise _check.error("cu_seq_lens_q", rule, None)
    return bounds


def _packing(q: Tensor, attention_mask: Tensor | None, window: int | None) -> Packing:
    rows, length = q.shape[:2]
    if attention_mask is None:
        return full(rows, length, q.device)
    _check.tensor("attention_mask", attention_mask, ndim=2)
    _check.shape("attention_mask", attention_mask, (rows, length))
    _check.device("attention_mask", attention_mask, q.device)
    packing = unpad(attention_mask)
    if window is not None and q.device.type == "cpu":
        real = attention_mask != 0
        if ((real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0] > 1).any():
            rule = "padding before or after a row's tokens, not between them, where a window counts"
            raise _check.error("attention_mask", rule, "padding between tokens")
    return packing


def padding_mask(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """A mask function as transformers calls it: the padding mask ``[B, S]``, None without padding.

    Raises:
        ValueError: The model adds a mask of its own, which packed attention cannot see.
    """
    if use_vmap:
        rule = f"no mask besides padding and a window with attention {ATTENTION!r}"
        raise _check.error("attention_mask", rule, "a mask function of the model's own")
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    # One look per forward here saves two per layer, and the copies of unpadding.
    return None if attention_mask.all() else attention_mask


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """Packed attention with the parameter names that transformers looks for in a signature.

    ``q [T, H, D]``; ``window_size`` is the distance to the left and to the right, -1 for no limit.
    The result is the same on every run, asked for or not.
    """
    if dropout_p:
        raise _check.error("dropout_p", "0", dropout_p)
    if causal:
        raise _check.error("causal", "False (attention is bidirectional here)", True)
    left, right = window_size
    if left != right:
        raise _check.error("window_size", "the same distance on both sides", window_size)
    _check.shape("k", k, (len(q), *k.shape[1:]))
    lengths: dict[str, Any] = {"cu_seq_lens_q": cu_seqlens_q, "cu_seq_lens_k": cu_seqlens_k}
    lengths |= {"max_length_q": max_seqlen_q, "max_length_k": max_seqlen_k}
    bounds = boundaries(q[None], None, None, lengths, 0)
    assert bounds is not None
    window = None if left < 0 else left
    return nk.attention(q, k, v, *bounds, window=window, scale=softmax_scale)


# --- transformers' registries

# Name to what takes it out of transformers again.
_undo: dict[str, Callable[[], None]] = {}


def register_attention(*, flash_alias: bool = True) -> None:
    """Let transformers' models use our attention: ``attn_implementation="neobert_kernels"``.

    It changes transformers' registries for the whole process, and nothing else. Registering again
    changes nothing.

    Args:
        flash_alias: Register ``"neobert_kernels_flash"`` too: the same attention under a name that
            makes sentence-transformers pack texts instead of padding them. It wraps a private
            function of transformers, which then knows this name; other names go through unchanged.

    Raises:
        ValueError: This version of transformers has not the private functions that the alias needs.
    """
    if not isinstance(flash_alias, bool):
        raise _check.error("flash_alias", "True or False", repr(flash_alias))
    hooks = _flash_hooks() if flash_alias and FLASH_ATTENTION not in _undo else None
    for name in (ATTENTION, FLASH_ATTENTION) if flash_alias else (ATTENTION,):
        if name not in _undo:
            _undo[name] = _register(name, hooks if name == FLASH_ATTENTION else None)


def unregister_attention() -> None:
    """Take out what `register_attention` put into transformers; what was there before is back.

    Models that were loaded with our attention cannot run until another is set. Does nothing if
    nothing is registered.

    Raises:
        ValueError: Someone replaced the private function after us; nothing is changed then.
    """
    if FLASH_ATTENTION in _undo:  # the one that may refuse comes first
        _undo[FLASH_ATTENTION]()
        del _undo[FLASH_ATTENTION]
    if ATTENTION in _undo:
        _undo[ATTENTION]()
        del _undo[ATTENTION]


def _register(name: str, hooks: ModuleType | None) -> Callable[[], None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    unhook = _know_flash_name(hooks) if hooks is not None else None
    forget = [
        _put(interface._global_mapping, name, function)
        for interface, function in (
            (AttentionInterface, attention_forward),
            (AttentionMaskInterface, padding_mask),
        )
    ]

    def undo() -> None:
        for each in (*([unhook] if unhook else []), *forget):
            each()

    return undo


def _put(mapping: MutableMapping[str, Any], name: str, value: Any) -> Callable[[], None]:
    """``mapping[name] = value``; returns what undoes it."""
    had, before = name in mapping, mapping.get(name)
    mapping[name] = value

    def undo() -> None:
        if had:
            mapping[name] = before
        else:
            mapping.pop(name, None)

    return undo


def _flash_hooks() -> ModuleType:
    """transformers' module that loads attention by name, if it is as `_know_flash_name` needs."""
    import transformers
    from transformers import modeling_flash_attention_utils as flash

    load = getattr(flash, "lazy_import_flash_attention", None)
    by_name = getattr(flash, "_lazy_imports", None)
    parameters = list(inspect.signature(by_name).parameters) if callable(by_name) else []
    if (
        parameters[:1] != ["implementation"]
        or "_lazy_imports" not in getattr(getattr(load, "__code__", None), "co_names", ())
        or not all(callable(getattr(flash, n, None)) for n in ("_pad_input", "_unpad_input"))
        or not hasattr(flash, "_loaded_implementation")
    ):
        raise _check.error(
            "transformers",
            f"a version that loads attention through _lazy_imports, for {FLASH_ATTENTION!r} "
            "(register_attention(flash_alias=False) works without)",
            transformers.__version__,
        )
    return flash


def _know_flash_name(flash: Any) -> Callable[[], None]:
    """Let ``flash._lazy_imports`` answer for our name; returns what undoes it."""
    before = flash._lazy_imports
    # What transformers caches of the implementation loaded last.
    cache = {n: v for n, v in vars(flash).items() if n.startswith("_") and n.endswith("_fn")}
    cache["_loaded_implementation"] = flash._loaded_implementation

    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != FLASH_ATTENTION:
            return before(implementation, *args, **kwargs)
        return None, varlen_attention, None, flash._pad_input, flash._unpad_input

    flash._lazy_imports = lazy_imports

    def undo() -> None:
        if flash._lazy_imports is not lazy_imports:
            raise _check.error(
                "transformers.modeling_flash_attention_utils._lazy_imports",
                "the function that register_attention put there (undo later replacements first)",
                flash._lazy_imports,
            )
        flash._lazy_imports = before
        if flash._loaded_implementation == FLASH_ATTENTION:
            vars(flash).update(cache)

    return undo
