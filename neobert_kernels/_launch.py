"""How a kernel starts: Triton finds its binary once for each form of arguments, then we do.

Triton's own call looks up the binary from the type, alignment and value of every argument, in
Python. `Prepared` keeps the binary that it returned, under all that the choice depends on, and
starts it directly. Both are what Triton documents: ``kernel[grid](...)`` returns the compiled
kernel, which takes ``[grid](...)`` itself.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from neobert_kernels import _driver, _triton

MOST_FORMS = 256  # of one kernel; an option that changes at every call must not fill memory
ALIGNMENT = 16  # bytes; Triton compiles other accesses for pointers that are not so aligned
INT32 = 2**31
MOST_PREPARED = 256  # that a cache of them keeps
NO_CELLS: Mapping[int, Any] = MappingProxyType({})


class Prepared:
    """A kernel with its compile-time values: called with a grid and the other arguments.

    A kernel's parameters are pointers (``*_ptr``, tensors or None), then numbers that it does not
    specialize on, then numbers that it does, then the constexprs.

    Args:
        kernel: Under ``triton.jit``.
        constexprs: By name; their order does not matter.
        options: Of the launch, as ``num_warps``.
    """

    def __init__(self, kernel: Any, constexprs: dict[str, Any], **options: Any) -> None:
        self.kernel, self.named = kernel, constexprs | options
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._interpreted = not hasattr(kernel, "params")
        if self._interpreted:
            return
        kinds = [_kind(parameter) for parameter in kernel.params]
        assert kinds == sorted(kinds), "parameters out of order"
        self._pointers = kinds.count(0)
        self._numbers = self._pointers + kinds.count(1)
        own = [p.name for p in kernel.params if p.is_constexpr]
        assert constexprs.keys() == set(own), "constexprs missing or unknown"
        self._constexprs = tuple(constexprs[name] for name in own)

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current GPU, which is that of the first tensor."""
        form = None if self._interpreted else self._form(args)
        if form is None or self.kernel.pre_run_hooks:
            self.kernel[grid](*args, **self.named)
            return
        found = self._compiled.get(form)
        if found is not None:
            found[grid](*args, *self._constexprs)
            return
        compiled = self.kernel[grid](*args, **self.named)
        if _is_binary(compiled) and len(self._compiled) < MOST_FORMS:
            self._compiled[form] = compiled

    def binary(self, *args: Any) -> Any:
        """Triton's compiled kernel for arguments of this form; None before it has started one."""
        form = None if self._interpreted or self.kernel.pre_run_hooks else self._form(args)
        return None if form is None else self._compiled.get(form)

    def _form(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What Triton chooses the binary by; None for arguments that only it should judge.

        Numbers without specialization count by their type: 32 bits. The others are in the form
        themselves, more of it than is needed, but they are strides, the same in every call.
        """
        bits, types = 0, list[torch.dtype | None]()
        for pointer in args[: self._pointers]:
            if pointer is None:
                types.append(None)
            else:
                bits |= pointer.data_ptr()
                types.append(pointer.dtype)
        if bits % ALIGNMENT:
            return None
        for number in args[self._pointers : self._numbers]:
            if not 0 <= number < INT32:
                return None
        return (args[0].get_device(), *types, *args[self._numbers :])


def row_step(rows: torch.Tensor | None) -> int:
    """From one row of ``[T, C]`` to the next, in elements; 0 where there are none."""
    if rows is None:
        return 0
    T, C = rows.shape
    return C if T == 1 else rows.stride(0)  # of one row it may be anything


class Rows(NamedTuple):
    """How a launch follows from its number of rows.

    Attributes:
        at: Its place among the arguments.
        block: Rows of a program.
        columns: Programs for one block of rows, along the grid's first axis.
    """

    at: int
    block: int
    columns: int = 1

    def programs(self, rows: int) -> int:
        return -(-rows // self.block) * self.columns


class Ready(NamedTuple):
    """A launch: a kernel with its grid and arguments.

    Attributes:
        rows: None: it is for this number of rows alone.
    """

    prepared: Prepared
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    rows: Rows | None = None

    def start(self) -> None:
        """On the current GPU, which is that of the tensors."""
        self.prepared(self.grid, *self.arguments)

    def bound(
        self, queue: _driver.Queue, cells: Mapping[int, Any] = NO_CELLS
    ) -> _driver.Launch | None:
        """For the driver, where Triton has started it before.

        Args:
            cells: In place of tensors, by their ``id``.
        """
        arguments = [cells.get(id(x), x) for x in self.arguments]
        if self.rows is not None:
            arguments[self.rows.at] = queue.rows
        return queue.bind(self.prepared.binary(*self.arguments), self.grid, arguments, self.rows)


def _kind(parameter: Any) -> int:
    if parameter.is_constexpr:
        return 3
    if parameter.name.endswith("_ptr"):
        return 0
    return 1 if parameter.do_not_specialize else 2


def _is_binary(compiled: Any) -> bool:
    """Not of AMD, where Triton looks at the sizes of tensors as well."""
    if torch.version.hip is not None:
        return False
    return isinstance(compiled, _triton.triton.compiler.CompiledKernel)
