"""`patch` swaps our operators into a Hugging Face encoder; `unpatch` takes them out again.

A patch gives module *instances* a ``forward`` of their own. Classes, parameters, names, state dict
and config stay as they are, so saving, PEFT and the Trainer go on working; `unpatch` deletes the
instance attribute, and what was there before is there again. A padded batch is packed once before
the embedding and unpacked once after the last layer.
"""

import importlib
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from neobert_kernels import _check, _runtime

# Class of the base model: (family, module with `check`, `replacements` and `OPERATORS`).
ADAPTERS = {
    "transformers.models.bert.modeling_bert.BertModel": ("bert", "neobert_kernels.patching.bert"),
    "neobert.model.NeoBERTModel": ("neobert", "neobert_kernels.patching.neobert"),
}


class Entry(NamedTuple):
    """One line of a report: the module's name, what happened to it, and why."""

    name: str
    what: str
    why: str


class Replacement(NamedTuple):
    """A forward for one module instance."""

    name: str
    module: nn.Module
    forward: Callable
    what: str


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Attributes:
        families: The family of each base model found, by module name.
        replaced: Modules with a new forward.
        left: Modules that keep theirs.
        implementations: Operator to "triton", "triton-interpreter" or "reference", on the
            model's device.
    """

    families: dict[str, str]
    replaced: list[Entry]
    left: list[Entry]
    implementations: dict[str, str]

    def __str__(self) -> str:
        found = ", ".join(f"{name or 'the model'} ({f})" for name, f in self.families.items())
        lines = [f"patched {found}"]
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            for (what, why), count in _counted(entries).items():
                lines.append(f"  {title:<9} {count:>3} x {what}: {why}")
        lines += [f"  operator  {name}: {how}" for name, how in self.implementations.items()]
        return "\n".join(lines)


def _counted(entries: list[Entry]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for _, what, why in entries:
        counts[what, why] = counts.get((what, why), 0) + 1
    return counts


def supported_families() -> tuple[str, ...]:
    """Names of the encoder families that `patch` knows."""
    return tuple(sorted({family for family, _ in ADAPTERS.values()}))


def patch(model: nn.Module) -> PatchReport:
    """Let the encoder inside ``model`` run on our operators, with and without padding.

    Args:
        model: A base model, a model with a head, or any module that contains one of a supported
            family (a SentenceTransformer, a PEFT model).

    Returns:
        What was replaced, what was left, and which implementation each operator uses.

    Raises:
        ValueError: No supported encoder is inside, it is already patched, or part of it is not as
            its family builds it. Nothing is changed then, and the unpatched model still works.
    """
    if not isinstance(model, nn.Module):
        raise _check.error("model", "a torch.nn.Module", type(model).__name__)
    if next(_patched(model), None) is not None:
        raise _check.error("model", "an unpatched model (unpatch it first)", "a patched one")
    families: dict[str, str] = {}
    replacements: list[Replacement] = []
    operators: set[str] = set()
    device = torch.device("cpu")
    for name, base, family, adapter in _find(model):
        _check_parameters(name, base)
        adapter.check(base)
        replacements += adapter.replacements(name, base)
        operators |= set(adapter.OPERATORS)
        families[name] = family
        device = next(base.parameters()).device
    if not families:
        raise _check.error(
            "model",
            f"an encoder of a supported family ({', '.join(supported_families())})",
            f"{type(model).__name__}; the unpatched model still works",
        )
    for each in replacements:
        _check_plain_forward(each)
    for each in replacements:
        each.module.forward = types.MethodType(each.forward, each.module)
    _runtime.load_operators()
    return PatchReport(
        families=families,
        replaced=[Entry(r.name, type(r.module).__name__, r.what) for r in replacements],
        left=list(_left(model, families)),
        implementations={name: _runtime.implementation(name, device) for name in sorted(operators)},
    )


def unpatch(model: nn.Module) -> None:
    """Give every patched module inside ``model`` its own forward back.

    Raises:
        ValueError: Nothing inside ``model`` is patched.
    """
    if not isinstance(model, nn.Module):
        raise _check.error("model", "a torch.nn.Module", type(model).__name__)
    patched = list(_patched(model))
    if not patched:
        raise _check.error("model", "a patched model", "one that is not patched")
    for module in patched:
        del module.forward


def replacement(fn: Callable) -> Callable:
    """Mark ``fn`` as ours, so that `unpatch` finds it on a module, also on a deep copy."""
    fn.__dict__["_neobert_kernels"] = True
    return fn


def _patched(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        own = module.__dict__.get("forward")
        if getattr(getattr(own, "__func__", None), "_neobert_kernels", False):
            yield module


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            entry = ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
            # A subclass with a forward of its own computes something that we do not know.
            if entry and type(module).forward is cls.forward:  # type: ignore[attr-defined]
                yield name, module, entry[0], importlib.import_module(entry[1])
                break


def _left(model: nn.Module, bases: Iterable[str]) -> Iterator[Entry]:
    """The children of ``model`` that neither are nor contain a patched base."""
    for name, child in model.named_children():
        if not any(base in ("", name) or base.startswith(f"{name}.") for base in bases):
            yield Entry(name, type(child).__name__, "outside the encoder, unchanged")


def _check_parameters(name: str, base: nn.Module) -> None:
    for key, parameter in base.named_parameters():
        where = f"{name}.{key}" if name else key
        if parameter.is_meta:
            raise _check.error("model", "weights in memory", f"{where} on the meta device")
        if parameter.is_floating_point() and parameter.dtype not in _check.DTYPES:
            raise _check.error(
                "model", "float32, float16 or bfloat16 weights", f"{where} of {parameter.dtype}"
            )


def _check_plain_forward(each: Replacement) -> None:
    if "forward" in each.module.__dict__:
        raise _check.error(
            "model",
            "modules with the forward of their class",
            f"{each.name or 'the model'}, whose forward was already replaced "
            "(an accelerate hook, or another library's patch)",
        )


def expect(module: Any, cls: type, name: str) -> None:
    """An adapter's check that a part is just what its family builds."""
    if type(module) is not cls:
        raise _check.error("model", f"{name} to be {cls.__name__}", type(module).__name__)
