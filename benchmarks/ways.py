"""Ways to run one encoder: as it is under each attention, compiled, with original code, patched.

All share the weights of one model. A way that cannot run here says why; none replaces another.
"""

import copy
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from original_neobert import original_forward
from shapes import VOCABULARY, Model, padded
from timing import Variant, peak_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import neobert_kernels as nk
from neobert_kernels.ops.attention.peers import VARIABLE
from neobert_kernels.patching import direct

PINNED = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
# The patched model with the attention of others, on packed documents as well.
PACKED_PEERS = {"patched_torch_varlen": "torch_varlen", "patched_flash_attn": "flash_attn"}
# The patched model and its forms for inference, which are not in `names`: see bench_latency.
FORMS: dict[str, dict[str, bool]] = {
    "patched": {},
    "frozen": {"inference": True},
    "batch_invariant": {"inference": True, "batch_invariant": True},
    "graphs": {"inference": True, "cuda_graphs": True},
    "invariant_graphs": {"inference": True, "batch_invariant": True, "cuda_graphs": True},
}
# The same with a call of every module, and without the fused products of few tokens.
SWITCHED_OFF = {
    "frozen_by_layer": ("frozen", direct.DIRECT),
    "frozen_as_many": ("frozen", direct.FEW_TOKENS),
    "graphs_by_layer": ("graphs", direct.DIRECT),
    "graphs_as_many": ("graphs", direct.FEW_TOKENS),
}
Result = TypeVar("Result")
Way = Callable[[Tensor, Tensor], Tensor]  # token ids and mask to hidden states, [B, S, C]
FEW = (40, 7, 23)  # tokens of the documents that a way is checked on


class DoesNotFitError(Exception):
    """A batch does not fit; a sweep records it and goes on."""


class Ways:
    """Builds the ways of ``model`` in ``dtype`` on ``device``; ``changes`` make it small."""

    def __init__(self, model: Model, device: str, dtype: torch.dtype, **changes: Any) -> None:
        torch.manual_seed(0)
        self.model, self.device, self.dtype = model, device, dtype
        self.plain = model.make(**changes).to(device, dtype).eval()

    def twin(self, attention: str = "") -> Any:
        """Another model object with the same weights: no way waits for a patch."""
        shared = {id(p): p for p in self.plain.parameters()}
        twin = copy.deepcopy(self.plain, shared)
        if attention:
            twin.set_attn_implementation(attention)
        return twin

    def batch(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and mask."""
        return padded(lengths, self.device, min(self.plain.config.vocab_size, VOCABULARY))

    def build(self, name: str) -> Way:
        """One of `names`. Whatever it raises is why the way is absent."""
        if name in FORMS:
            patched = self.twin()
            nk.patch(patched, **FORMS[name])
            return hidden_of(patched)
        if name in SWITCHED_OFF:
            form, switch = SWITCHED_OFF[name]
            with mock.patch.dict(os.environ, {switch: "0"}):
                return self.build(form)
        if name in PACKED_PEERS:
            return asking(PACKED_PEERS[name], self.build("patched"))
        if name == "sdpa":
            return hidden_of(self.plain)
        if name in PINNED:
            return pinned(hidden_of(self.plain), PINNED[name])
        if name == "compile":
            return hidden_of(torch.compile(self.plain, dynamic=False))
        if name == "compile_max_autotune":
            return hidden_of(torch.compile(self.plain, dynamic=False, mode="max-autotune"))
        if name == "original":
            return original_forward(self.plain)
        if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise ImportError("flash-attn is not installed")
        return hidden_of(self.twin(name))

    def names(self) -> list[str]:
        """The ways that this model has: our NeoBERT knows SDPA alone, others have no original."""
        of_others = ("eager", "flex_attention", "flash_attention_2")
        skipped = of_others if self.model.prefix == "NeoBERT" else ("original",)
        return [name for name in NAMES if name not in skipped]

    def working(self, name: str) -> tuple[Way | None, str]:
        """A way that is right on a small ragged batch, or why it is absent.

        Right is at most twice as far from float64 as the unpatched model in the same dtype.
        """
        try:
            way = self.build(name)
            if name.startswith("compile"):  # compiled for the batch that is timed: see `agrees`
                return way, ""
            ids, mask = self.batch(FEW)
            actual = way(ids, mask)[mask.bool()].double()
        except Exception as error:  # whatever it raises is why it is absent
            return None, f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:120]
        exact, allowed = self.oracle
        apart = float((actual - exact).norm())
        if not apart <= allowed:
            return None, f"error {apart:.1e} over {allowed:.1e}, of {float(exact.norm()):.1e}"
        return way, ""

    def agrees(self, way: Way, ids: Tensor, mask: Tensor) -> bool:
        """Whether a way that was not checked is right on a batch: near the unpatched model."""
        exact, allowed = self.oracle
        actual, plain = (f(ids, mask)[mask.bool()].double() for f in (way, hidden_of(self.plain)))
        return bool((actual - plain).norm() <= 2 * allowed / exact.norm() * plain.norm())

    @functools.cached_property
    def oracle(self) -> tuple[Tensor, float]:
        """Hidden states of the small batch in float64, and how far from them a way may be."""
        ids, mask = self.batch(FEW)
        exact = hidden_of(copy.deepcopy(self.plain).double())(ids, mask)[mask.bool()]
        rounded = hidden_of(self.plain)(ids, mask)[mask.bool()].double()
        floor = 4 * torch.finfo(self.dtype).eps * float(exact.norm())
        return exact, 2 * float((rounded - exact).norm()) + floor


NAMES = (
    "patched",
    "sdpa",
    *PACKED_PEERS,
    *PINNED,
    "eager",
    "original",
    "flash_attention_2",
    "flex_attention",
    "compile",
    "compile_max_autotune",
)


def hidden_of(model: Any) -> Way:
    @torch.inference_mode()
    def call(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    call.model = model  # type: ignore[attr-defined]
    return call


def asking(peer: str, way: Way) -> Way:
    def call(ids: Tensor, mask: Tensor) -> Tensor:
        os.environ[VARIABLE] = peer
        try:
            return way(ids, mask)
        finally:
            del os.environ[VARIABLE]

    return call


def pinned(way: Way, backend: SDPBackend) -> Way:
    def call(ids: Tensor, mask: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return way(ids, mask)

    return call


def fitting_peak(variant: Variant, device: str) -> int | None:
    """`peak_memory` of a call; raises as `fits` does."""
    return fits(lambda: peak_memory(variant, device))


def fits(function: Callable[[], Result]) -> Result:
    """What ``function`` returns.

    Raises:
        DoesNotFitError: The memory does not suffice; what it took is free again.
    """
    try:
        return function()
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = str(error)
    except RuntimeError as error:
        message = str(error)
        if "out of memory" not in message and "allocate memory" not in message:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise DoesNotFitError(message.partition("\n")[0])
