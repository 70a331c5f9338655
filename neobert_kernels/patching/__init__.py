"""`patch` swaps our operators into a Hugging Face encoder; `unpatch` takes them out again.

A patch gives module *instances* a ``forward`` of their own. Classes, parameters, names, state dict
and config stay as they are, so saving, PEFT and the Trainer go on working; `unpatch` deletes the
instance attribute, and what was there before is there again. A padded batch is packed once before
the embedding and unpacked once after the last layer.
"""

import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from neobert_kernels import _check, _runtime
from neobert_kernels.patching import direct
from neobert_kernels.patching.family import (
    OPTIONS,
    Family,
    Options,
    base_forward,
    frozen_layer_forward,
    new_graphs,
    replacement,
    replacement_on,
)
from neobert_kernels.patching.frozen import PREPARED, ROWS, Frozen, freeze
from neobert_kernels.patching.graphs import GRAPHS
from neobert_kernels.patching.invariant import INVARIANT, linear_forward, linears

_MODELS = "transformers.models"
# Class of the base model: the module whose ``FAMILY`` describes it.
ADAPTERS = {
    f"{_MODELS}.bert.modeling_bert.BertModel": "bert",
    f"{_MODELS}.modernbert.modeling_modernbert.ModernBertModel": "modernbert",
    f"{_MODELS}.roberta.modeling_roberta.RobertaModel": "roberta",
    f"{_MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": "xlm_roberta",
    f"{_MODELS}.nomic_bert.modeling_nomic_bert.NomicBertModel": "nomic_bert",
    f"{_MODELS}.eurobert.modeling_eurobert.EuroBertModel": "eurobert",
    "neobert.model.NeoBERTModel": "neobert",
}
# The same for classes that transformers loaded from a model's repository, by their name alone.
REMOTE_ADAPTERS = {"NeoBERT": "neobert_remote"}


LINEAR_FORWARD = replacement(linear_forward)
LINEAR_WHAT = "a row has its bits in any batch, where kernels run"


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
        prepared: How many matrix products of each base model have weights of their own
            (``inference=True``), and the memory that these take.
    """

    families: dict[str, str]
    replaced: list[Entry]
    left: list[Entry]
    implementations: dict[str, str]
    prepared: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        found = ", ".join(f"{name or 'the model'} ({f})" for name, f in self.families.items())
        lines = [f"patched {found}"]
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            for (what, why), count in _counted(entries).items():
                lines.append(f"  {title:<9} {count:>3} x {what}: {why}")
        lines += [f"  prepared  {what}: {memory}" for _, what, memory in self.prepared]
        lines += [f"  operator  {name}: {how}" for name, how in self.implementations.items()]
        return "\n".join(lines)


def _counted(entries: list[Entry]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for _, what, why in entries:
        counts[what, why] = counts.get((what, why), 0) + 1
    return counts


def supported_families() -> tuple[str, ...]:
    """Names of the encoder families that `patch` knows."""
    return tuple(sorted(set(ADAPTERS.values())))


def patch(
    model: nn.Module,
    *,
    packed_output: bool = False,
    mlm_logits: bool | None = None,
    labelled_rows_only: bool = False,
    inference: bool = False,
    batch_invariant: bool = False,
    cuda_graphs: bool = False,
) -> PatchReport:
    """Let the encoder inside ``model`` run on our operators, with and without padding.

    Args:
        model: A base model, a model with a head, or any module that contains one of a supported
            family (a SentenceTransformer, a PEFT model).
        packed_output: Return hidden states and token logits of a padded batch as ``[1, T, ...]``,
            the real tokens only (`unpad` of the mask says which), instead of ``[B, S, ...]``.
        mlm_logits: Whether a masked-LM head that gets labels also returns logits. Without them the
            vocabulary is only touched at labelled tokens, and ``logits`` is None. Default: no in
            training mode, yes in evaluation mode.
        labelled_rows_only: Where a masked-LM head returns no logits, let the last layer's output
            projection and feed-forward, too, run at labelled tokens only.
        inference: Prepare the layers' weights once, for forwards without gradients (see
            docs/patching.md). The weights stay as they are, so memory holds second copies of those
            that were prepared; a forward after one of them changed raises.
        batch_invariant: Give a text the same bits whatever else is in its batch: on a GPU without
            gradients by products with fixed tiles, elsewhere by running every document by itself
            (see docs/patching.md for what that costs).
        cuda_graphs: Record a forward once for each size of batch, then replay it, on a GPU and
            without gradients (see docs/patching.md). Beside ``batch_invariant`` a replay has the
            bits of the forward without a graph.

    Returns:
        What was replaced, what was left, and which implementation each operator uses.

    Raises:
        ValueError: No supported encoder is inside, it is already patched, or part of it is not as
            its family builds it. Nothing is changed then, and the unpatched model still works.
    """
    options = checked_options(
        packed_output=packed_output,
        mlm_logits=mlm_logits,
        labelled_rows_only=labelled_rows_only,
        inference=inference,
        batch_invariant=batch_invariant,
        cuda_graphs=cuda_graphs,
    )
    return _patch(model, options)


def patch_for_good(model: nn.Module, rows: int) -> PatchReport:
    """``patch(model, inference=True)`` with prepared weights in place of the model's own.

    Layer by layer, so that it takes no more memory than the model did. Such a model only encodes:
    it can be neither unpatched nor copied nor saved.

    Args:
        model: As `patch`.
        rows: Tokens of a batch.
    """
    return _patch(model, Options(inference=True), rows, keep=False)


def _patch(model: nn.Module, options: Options, rows: int = ROWS, keep: bool = True) -> PatchReport:
    inference = options.inference
    if inference:
        for switch in (direct.DIRECT, direct.FEW_TOKENS):
            direct.wanted(switch)  # a wrong value is refused before anything changes
    if not isinstance(model, nn.Module):
        raise _check.error("model", "a torch.nn.Module", type(model).__name__)
    if is_patched(model):
        raise _check.error("model", "an unpatched model (unpatch it first)", "a patched one")
    _check_readers(model)
    families: dict[str, str] = {}
    replacements: list[Replacement] = []
    operators: set[str] = set()
    device = torch.device("cpu")
    found = list(_find(model))
    for name, base, family in found:
        _check_parameters(name, base, inference)
        family.check(base)
        replacements += _in_base(name, base, family, inference)
        replacements += _heads_over(model, base, family)
        operators |= set(family.operators)
        families[name] = family.name
        device = next(base.parameters()).device
    if not families:
        raise _check.error(
            "model",
            f"an encoder of a supported family ({', '.join(supported_families())})",
            f"{type(model).__name__}; the unpatched model still works",
        )
    if options.batch_invariant:
        replacements += _products(replacements)
    for each in replacements:
        _check_plain_forward(each)
    _runtime.load_operators()
    for each in replacements:
        if replacement_on(each.module) is None:  # else a wrapper kept it through `unpatch`
            each.module.forward = types.MethodType(each.forward, each.module)
        each.module.__dict__[OPTIONS] = options
    try:
        for _, base, family in found:
            if options.cuda_graphs:
                base.__dict__[GRAPHS] = new_graphs(base, family)
            if inference:
                freeze(
                    base, family.layers, family.view, family.stack, rows, keep,
                    options.batch_invariant,
                )  # fmt: skip
    except BaseException:  # as where memory does not suffice for second copies
        unpatch(model)
        raise
    return PatchReport(
        families=families,
        replaced=[Entry(r.name, type(r.module).__name__, r.what) for r in replacements],
        left=list(_left(model, {r.name for r in replacements})),
        implementations={name: _runtime.implementation(name, device) for name in sorted(operators)},
        prepared=[
            Entry(name, *_prepared(base.__dict__[PREPARED])) for name, base, _ in found if inference
        ],
    )


def _prepared(frozen: Frozen) -> tuple[str, str]:
    kind = "in place of the model's" if frozen.released else "of second copies"
    return f"{len(frozen.products)} products", f"{frozen.nbytes / 2**20:.1f} MiB {kind}"


def unpatch(model: nn.Module) -> None:
    """Give every patched module inside ``model`` its own forward back.

    Where someone wrapped our forward after `patch`, as accelerate does for mixed precision, the
    wrapper stays, around the module's own forward.

    Raises:
        ValueError: Nothing inside ``model`` is patched.
    """
    if not isinstance(model, nn.Module):
        raise _check.error("model", "a torch.nn.Module", type(model).__name__)
    patched_modules = list(_patched(model))
    if not patched_modules:
        raise _check.error("model", "a patched model", "one that is not patched")
    for module in patched_modules:
        if getattr(module.__dict__.get(PREPARED), "released", False):
            raise _check.error("model", "one that kept its weights", "one frozen for good")
    for module in patched_modules:
        for name in (PREPARED, GRAPHS, INVARIANT):
            module.__dict__.pop(name, None)
        if module.__dict__["forward"].__func__ is replacement_on(module):
            del module.forward
        del module.__dict__[OPTIONS]


@contextmanager
def patched(model: nn.Module, **options: bool | None) -> Iterator[PatchReport]:
    """`patch` for the length of a with statement; takes what `patch` takes."""
    report = patch(model, **options)  # type: ignore[arg-type]
    try:
        yield report
    finally:
        if is_patched(model):
            unpatch(model)


def is_patched(model: nn.Module) -> bool:
    return next(_patched(model), None) is not None


def checked_options(**values: bool | None) -> Options:
    """The keyword arguments of `patch`, checked."""
    options = Options(**values)  # type: ignore[arg-type]
    for name, value in vars(options).items():
        if not isinstance(value, bool) and not (name == "mlm_logits" and value is None):
            raise _check.error(name, "True or False", repr(value))
    if options.labelled_rows_only and options.mlm_logits:
        rule = "False where mlm_logits are wanted at every token"
        raise _check.error("labelled_rows_only", rule, True)
    return options


def _patched(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if OPTIONS in module.__dict__ and replacement_on(module) is not None:
            yield module


def _find(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            adapter = _adapter(cls)
            # A subclass with a forward of its own computes something that we do not know.
            if adapter and type(module).forward is cls.forward:  # type: ignore[attr-defined]
                yield name, module, importlib.import_module(f"{__name__}.{adapter}").FAMILY
                break


def _adapter(cls: type) -> str | None:
    if cls.__module__.startswith("transformers_modules."):
        return REMOTE_ADAPTERS.get(cls.__qualname__)
    return ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")


def _in_base(name: str, base: nn.Module, family: Family, inference: bool) -> Iterator[Replacement]:
    forward = base_forward(type(base), family)  # type: ignore[arg-type]
    yield Replacement(name, base, forward, "packs once, unpacks once")
    prefix = f"{name}." if name else ""
    layer_forward = family.layer_forward
    if inference:
        layer_forward = frozen_layer_forward(layer_forward)
    for layer_name, layer in family.layers(base):
        yield Replacement(prefix + layer_name, layer, layer_forward, family.what)


def _heads_over(model: nn.Module, base: nn.Module, family: Family) -> Iterator[Replacement]:
    """The head model around ``base``, if it is one whose forward we know."""
    for name, module in model.named_modules():
        if getattr(module, getattr(module, "base_model_prefix", ""), None) is not base:
            continue
        for cls in type(module).__mro__:
            maker = family.heads.get(cls.__name__)
            same_package = cls.__module__.split(".")[:-1] == type(base).__module__.split(".")[:-1]
            if maker and same_package and type(module).forward is cls.forward:  # type: ignore[attr-defined]
                if family.check_head is not None:
                    family.check_head(module)
                yield Replacement(name, module, maker(cls), "reads packed output")
                break


def _products(replacements: list[Replacement]) -> list[Replacement]:
    """Linear layers of the encoders and heads among ``replacements``."""
    found = {}
    for each in replacements:
        prefix = f"{each.name}." if each.name else ""
        for name, linear in linears(each.module):
            found[id(linear)] = Replacement(prefix + name, linear, LINEAR_FORWARD, LINEAR_WHAT)
    return list(found.values())


def _left(model: nn.Module, replaced: set[str]) -> Iterator[Entry]:
    """Head models that keep their forward, and children outside every encoder."""
    for name, module in model.named_modules():
        inside = any(name == r or not r or name.startswith(f"{r}.") for r in replaced)
        if inside:
            continue
        contains = any(not name or r.startswith(f"{name}.") for r in replaced)
        parent = name.rpartition(".")[0]
        parent_contains = any(not parent or r.startswith(f"{parent}.") for r in replaced)
        if contains:
            if hasattr(module, "base_model_prefix"):
                why = "its own forward, on the layout that the caller sent"
                yield Entry(name, type(module).__name__, why)
        elif parent_contains:
            yield Entry(name, type(module).__name__, "outside the encoder, unchanged")


def _check_readers(model: nn.Module) -> None:
    """sentence-transformers' query expansion may read outputs at positions that the mask hides."""
    for name, module in model.named_modules():
        expansion = getattr(module, "query_expansion", None)
        if isinstance(expansion, dict) and expansion.get("attend") is False:
            rule = "None or attend=True (a patched model computes nothing where the mask is 0)"
            raise _check.error(f"{name}.query_expansion", rule, "attend=False")


def _check_parameters(name: str, base: nn.Module, inference: bool) -> None:
    for key, parameter in base.named_parameters():
        where = f"{name}.{key}" if name else key
        if parameter.is_meta:
            raise _check.error("model", "weights in memory", f"{where} on the meta device")
        if inference and parameter.is_inference():  # nothing would tell that they change
            rule = "weights made outside of torch.inference_mode() with inference=True"
            raise _check.error("model", rule, f"{where} made inside")
        if parameter.is_floating_point() and parameter.dtype not in _check.DTYPES:
            raise _check.error(
                "model", "float32, float16 or bfloat16 weights", f"{where} of {parameter.dtype}"
            )


def _check_plain_forward(each: Replacement) -> None:
    own = each.module.__dict__.get("forward")
    plain = getattr(own, "__func__", None) is type(each.module).forward  # from a pickle
    if own is not None and not plain and replacement_on(each.module) is not each.forward:
        raise _check.error(
            "model",
            "modules with the forward of their class",
            f"{each.name or 'the model'}, whose forward was already replaced "
            "(an accelerate hook, or another library's patch)",
        )
