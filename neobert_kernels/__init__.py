"""Fused operators for BERT-class encoders, and `patch` to swap them into Hugging Face models.

Every operator has a Triton kernel or, until it has one, its PyTorch reference; CPU tensors run the
reference. Nothing is imported before it is used: this module loads neither Triton nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neobert_kernels._packed import Packing, unpad
    from neobert_kernels._runtime import implementation
    from neobert_kernels.ops.attention import (
        attention,
        attention_reference,
        qkv_attention,
        qkv_attention_reference,
    )
    from neobert_kernels.ops.fused_linear import fused_linear, fused_linear_reference
    from neobert_kernels.ops.info_nce import info_nce, info_nce_reference
    from neobert_kernels.ops.layer_norm import (
        add_layer_norm,
        add_layer_norm_reference,
        layer_norm,
        layer_norm_reference,
    )
    from neobert_kernels.ops.linear import (
        batch_invariant_linear,
        batch_invariant_linear_reference,
    )
    from neobert_kernels.ops.linear_cross_entropy import (
        linear_cross_entropy,
        linear_cross_entropy_reference,
        linear_cross_entropy_with_stats,
        linear_cross_entropy_with_stats_reference,
    )
    from neobert_kernels.ops.pooling import (
        first_pool,
        first_pool_reference,
        mean_pool,
        mean_pool_reference,
    )
    from neobert_kernels.ops.rms_norm import (
        add_rms_norm,
        add_rms_norm_reference,
        rms_norm,
        rms_norm_reference,
    )
    from neobert_kernels.ops.rope import rope, rope_reference, rope_table, rope_table_reference
    from neobert_kernels.ops.swiglu import (
        geglu,
        geglu_reference,
        gelu_mul,
        gelu_mul_reference,
        silu_mul,
        silu_mul_reference,
        swiglu,
        swiglu_reference,
    )
    from neobert_kernels.patching import PatchReport, patch, patched, unpatch
    from neobert_kernels.patching.interface import register_attention, unregister_attention
    from neobert_kernels.patching.trainer import PatchCallback

__version__ = "0.1.0"

_WHERE = {
    "_packed": ("Packing", "unpad"),
    "_runtime": ("implementation",),
    "ops.attention": ("attention", "qkv_attention"),
    "ops.fused_linear": ("fused_linear",),
    "ops.info_nce": ("info_nce",),
    "ops.layer_norm": ("add_layer_norm", "layer_norm"),
    "ops.linear": ("batch_invariant_linear",),
    "ops.linear_cross_entropy": ("linear_cross_entropy", "linear_cross_entropy_with_stats"),
    "ops.pooling": ("first_pool", "mean_pool"),
    "ops.rms_norm": ("add_rms_norm", "rms_norm"),
    "ops.rope": ("rope", "rope_table"),
    "ops.swiglu": ("geglu", "gelu_mul", "silu_mul", "swiglu"),
    "patching": ("PatchReport", "patch", "patched", "unpatch"),
    "patching.interface": ("register_attention", "unregister_attention"),
    "patching.trainer": ("PatchCallback",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
_MODULE_OF |= {
    f"{name}_reference": module for name, module in _MODULE_OF.items() if module.startswith("ops.")
}

__all__ = [
    "Packing",
    "PatchCallback",
    "PatchReport",
    "add_layer_norm",
    "add_layer_norm_reference",
    "add_rms_norm",
    "add_rms_norm_reference",
    "attention",
    "attention_reference",
    "batch_invariant_linear",
    "batch_invariant_linear_reference",
    "first_pool",
    "first_pool_reference",
    "fused_linear",
    "fused_linear_reference",
    "geglu",
    "geglu_reference",
    "gelu_mul",
    "gelu_mul_reference",
    "implementation",
    "info_nce",
    "info_nce_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_with_stats",
    "linear_cross_entropy_with_stats_reference",
    "mean_pool",
    "mean_pool_reference",
    "patch",
    "patched",
    "qkv_attention",
    "qkv_attention_reference",
    "register_attention",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "rope_table",
    "rope_table_reference",
    "silu_mul",
    "silu_mul_reference",
    "swiglu",
    "swiglu_reference",
    "unpad",
    "unpatch",
    "unregister_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'neobert_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neobert_kernels.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
