"""Compile every registered kernel for GPUs that are not here, and read the machine code.

No GPU and no driver is needed: Triton brings its own assembler and disassembler. For each operator,
launch choice and GPU generation a `Report` holds what a person would look up in the listing:
registers, spilled bytes, shared memory, widths of global accesses, tensor-core and TMA
instructions. `problems` says which of these break a promise. An operator joins by being registered.

Sources: CUDA C++ programming guide, table of technical specifications per compute capability;
CUDA binary utilities, instruction set reference; System V ABI, chapter 4 (sections of an ELF file).
"""

import argparse
import dataclasses
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neobert_kernels import _check, _runtime, _triton

# Shared memory that one block may use, in bytes.
_KIB_PER_BLOCK = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMITS = {sm: kib << 10 for sm, kib in _KIB_PER_BLOCK.items()}
DEFAULT_SMS = (80, 90, 100)
WIDE_BYTES = 16  # the widest access that every generation has
DISASSEMBLED_AT_ONCE = 32  # the disassembler takes longer to start than to read these


@dataclass(frozen=True)
class Report:
    """What one kernel became for one GPU generation. Instruction counts are static.

    Attributes:
        operator, kernel, case: Whose launch this is.
        sm: GPU generation, 90 for compute capability 9.0.
        error: Why it did not compile; every number is 0 then.
        registers: Of one thread.
        spilled_bytes: Stack and local memory of one thread.
        local_loads, local_stores: Instructions on local memory.
        shared_bytes, shared_limit: Shared memory of one block, and the most it may have.
        load_bytes, store_bytes: Widest access to global memory by one thread's instruction.
        wide_loads, narrow_loads, wide_stores, narrow_stores: Global accesses of at least 16 bytes,
            and below. TMA copies count as wide.
        tensor_core, tma: Matrix-multiply and TMA instructions.
        wgmma: Those of the matrix-multiply instructions that a warp group issues together, which
            only sm_90 has.
        warp_specialized: Warps of the compiled kernel have different tasks.
        owes_width: The kernel is bound by memory and all its pointers are aligned.
        narrow_once: Narrow accesses that a program makes once, behind its loop, and does not owe.
        owes_matrix: Its products belong on tensor cores.
        owes_warp_group: They have rows enough for a warp group, which takes 64.
        owes_tma, owes_warp_specialization: The launch asks for them.
        supported: The launch is one that users get, so it must not spill.
    """

    operator: str
    kernel: str
    case: str
    sm: int
    shared_limit: int
    owes_width: bool
    narrow_once: int
    supported: bool
    owes_matrix: bool = False
    owes_warp_group: bool = False
    owes_tma: bool = False
    owes_warp_specialization: bool = False
    error: str = ""
    registers: int = 0
    spilled_bytes: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared_bytes: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    wide_loads: int = 0
    narrow_loads: int = 0
    wide_stores: int = 0
    narrow_stores: int = 0
    tensor_core: int = 0
    wgmma: int = 0
    tma: int = 0
    warp_specialized: bool = False


def problems(report: Report) -> list[str]:
    """Which promises a report breaks; an empty list is good news."""
    if report.error:
        return [f"does not compile: {report.error}"]
    found = []
    local = report.local_loads + report.local_stores
    if report.supported and (report.spilled_bytes or local):
        found.append(f"spills {report.spilled_bytes} bytes, {local} local-memory instructions")
    if report.shared_bytes > report.shared_limit:
        found.append(f"needs {report.shared_bytes} bytes of shared memory of {report.shared_limit}")
    if report.owes_matrix and not report.tensor_core:
        found.append("has no tensor-core instruction")
    if report.owes_warp_group and report.sm == 90 and report.wgmma < report.tensor_core:
        found.append(f"{report.tensor_core - report.wgmma} tensor-core instructions not of sm_90")
    if report.owes_tma and not report.tma:
        found.append("asks for TMA and has no TMA instruction")
    if report.owes_warp_specialization and not report.warp_specialized:
        found.append("asks for warp specialization and all warps do the same")
    if report.owes_width:
        for what, wide, narrow in (
            ("loads", report.wide_loads, report.narrow_loads),
            ("stores", report.wide_stores, report.narrow_stores),
        ):
            if narrow - report.narrow_once > wide:
                found.append(f"{narrow} of {narrow + wide} global {what} under {WIDE_BYTES} bytes")
    return found


def reports(
    sms: Iterable[int] = DEFAULT_SMS,
    operators: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Report, None, None]:
    """Compile the launches of every operator, or of those named, for every GPU generation.

    Equal launches are compiled once, and Triton's own cache keeps them for the next run. Closing
    the generator stops what is not compiled yet.

    Args:
        sms: GPU generations, 90 for compute capability 9.0.
        operators: Names in `_runtime.OPERATORS`; those without kernels have no reports.
        progress: Called with (compiled, in all) as compilations finish, from their threads.

    Raises:
        ValueError: An operator or generation is unknown, Triton is missing, or its interpreter is
            on, which takes the compiler's place.
    """
    sms = tuple(dict.fromkeys(sms))
    for sm in sms:
        if sm not in SHARED_LIMITS:
            raise _check.error("sm", f"one of {', '.join(map(str, SHARED_LIMITS))}", sm)
    if _runtime.INTERPRET:
        raise _check.error("TRITON_INTERPRET", "unset (it replaces the compiler)", 1)
    if not _triton.AVAILABLE:
        raise _check.error("triton", "an installed package (pip install triton)", "none")
    known = _runtime.load_operators()
    names = tuple(known if operators is None else dict.fromkeys(operators))
    for name in names:
        if name not in known:
            raise _check.error("operator", f"one of {', '.join(known)}", name)
    return _reports(sms, [known[name] for name in names], progress or (lambda done, total: None))


@dataclass(frozen=True)
class _Binary:
    cubin: bytes
    shared_bytes: int
    warp_specialized: bool


def _reports(
    sms: Sequence[int],
    operators: Sequence[_runtime.Operator],
    progress: Callable[[int, int], None],
) -> Generator[Report, None, None]:
    work = [
        (sm, operator.name, launch)
        for sm in sms
        for operator in operators
        if operator.launches
        for launch in operator.launches(sm)
    ]
    keys = [_key(sm, launch) for sm, _, launch in work]
    unique = {key: (sm, launch) for key, (sm, _, launch) in zip(keys, work, strict=True)}
    finished = itertools.count(1)

    def compile_one(item: tuple[int, _runtime.Launch]) -> _Binary | str:
        try:
            return _compile(*item)
        except Exception as error:  # whatever the compiler raises is this report's content
            return f"{type(error).__name__}: {str(error).strip()}"
        finally:
            progress(next(finished), len(unique))

    # Threads, because the compiler releases the interpreter's lock; as many as PyTorch may use.
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        waiting = pool.map(compile_one, unique.values())
        measured: dict[str, dict[str, Any]] = {}
        for (sm, name, launch), key in zip(work, keys, strict=True):
            while key not in measured:
                batch = list(unique)[len(measured) :][:DISASSEMBLED_AT_ONCE]
                batch = [k for k in batch if unique[k][0] == sm]
                results = [next(waiting) for _ in batch]
                measured.update(zip(batch, _measure(sm, results), strict=True))
            yield Report(
                operator=name,
                kernel=launch.name,
                case=launch.case,
                sm=sm,
                shared_limit=SHARED_LIMITS[sm],
                owes_width=launch.memory_bound and _all_pointers_aligned(launch),
                narrow_once=launch.narrow_once,
                supported=launch.supported,
                owes_matrix=launch.matrix,
                owes_warp_group=launch.matrix and not launch.few_rows,
                owes_tma=launch.tma,
                owes_warp_specialization=launch.warp_specialized,
                **measured[key],
            )
    finally:
        pool.shutdown(cancel_futures=True)


def _all_pointers_aligned(launch: _runtime.Launch) -> bool:
    pointers = {name for name, kind in launch.signature.items() if kind.startswith("*")}
    return pointers <= set(launch.aligned)


def _key(sm: int, launch: _runtime.Launch) -> str:
    """Equal for launches that compile to the same code."""
    options = (launch.num_warps, launch.num_stages, launch.maxnreg)
    parts = (launch.signature, launch.constexprs, sorted(launch.aligned))
    return repr((sm, id(launch.kernel), options, parts))


def _compile(sm: int, launch: _runtime.Launch) -> _Binary:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constexprs,
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg is not None:
        options["maxnreg"] = launch.maxnreg
    compiled = _triton.triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options=options | _runtime.FP_FUSION
    )
    specialized = "ttg.warp_specialize" in compiled.asm["ttgir"]
    return _Binary(compiled.asm["cubin"], compiled.metadata.shared, specialized)


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)")
_TENSOR_CORE = re.compile(r"[BDHIOQ]G?MMA|UTC\w*MMA")
_WGMMA = re.compile(r"[BHIQ]GMMA")
_TMA = re.compile(r"UTMA(?:LDG|STG|REDG)|UBLKCP|UBLKRED")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _measure(sm: int, results: Sequence[_Binary | str]) -> list[dict[str, Any]]:
    """The measured fields of a `Report` for each compiled kernel, or why there are none."""
    binaries = [result for result in results if isinstance(result, _Binary)]
    with tempfile.TemporaryDirectory() as folder:
        listings = iter(_disassemble(sm, [b.cubin for b in binaries], Path(folder)))
        usages = iter([_resources(b.cubin, Path(folder)) for b in binaries])
    return [
        {"error": result}
        if isinstance(result, str)
        else {
            "shared_bytes": result.shared_bytes,
            "warp_specialized": result.warp_specialized,
            **next(usages),
            **_count(next(listings)),
        }
        for result in results
    ]


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = _run("cuobjdump", "-res-usage", path)
    most = {what: max(map(int, re.findall(rf"{what}:(\d+)", text))) for what in ("REG", "STACK")}
    local = max(map(int, re.findall(r"LOCAL:(\d+)", text)))
    return {"registers": most["REG"], "spilled_bytes": most["STACK"] + local}


def _disassemble(sm: int, cubins: Sequence[bytes], folder: Path) -> list[list[str]]:
    """The instructions of each cubin; their code is laid end to end for one disassembler run."""
    codes = [_code(cubin) for cubin in cubins]
    path = folder / "code.bin"
    path.write_bytes(b"".join(codes))
    text = _run("nvdisasm", "--binary", f"SM{sm}{'a' * (sm >= 90)}", path) if cubins else ""
    found = iter(_INSTRUCTION.findall(text))
    address, name = next(found, (None, ""))
    listings, end = [], 0
    for code in codes:
        end += len(code)
        listing: list[str] = []
        while address is not None and int(address, 16) < end:
            listing.append(name)
            address, name = next(found, (None, ""))
        listings.append(listing)
    return listings


def _code(cubin: bytes) -> bytes:
    """The executable sections of a little-endian 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    code = b""
    for i in range(count):
        flags, _, offset, length = struct.unpack_from("<4Q", cubin, table + i * size + 8)
        if flags & 4:  # SHF_EXECINSTR
            code += cubin[offset : offset + length]
    return code


def _count(instructions: Iterable[str]) -> dict[str, int]:
    opcodes: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction in instructions:
        opcode, *modifiers = instruction.split(".")
        opcodes[opcode] += 1
        kind = {"LDGSTS": "LDG", "UTMALDG": "LDG", "UTMASTG": "STG"}.get(opcode, opcode)
        if kind in widths:
            default = WIDE_BYTES if opcode.startswith("UTMA") else 4
            widths[kind][max((_WIDTHS.get(m, 0) for m in modifiers), default=0) or default] += 1
    measured = {
        "local_loads": opcodes["LDL"],
        "local_stores": opcodes["STL"],
        "tensor_core": sum(n for name, n in opcodes.items() if _TENSOR_CORE.fullmatch(name)),
        "wgmma": sum(n for name, n in opcodes.items() if _WGMMA.fullmatch(name)),
        "tma": sum(n for name, n in opcodes.items() if _TMA.fullmatch(name)),
    }
    for kind, what in (("LDG", "load"), ("STG", "store")):
        measured[f"{what}_bytes"] = max(widths[kind], default=0)
        measured[f"wide_{what}s"] = sum(n for w, n in widths[kind].items() if w >= WIDE_BYTES)
        measured[f"narrow_{what}s"] = sum(n for w, n in widths[kind].items() if w < WIDE_BYTES)
    return measured


def _run(tool: str, *arguments: str | Path) -> str:
    from triton import knobs

    try:
        path = getattr(knobs.nvidia, tool).path
    except RuntimeError as error:
        raise _check.error(tool, "the program that Triton's wheel contains", error) from None
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


_COLUMNS = (
    ("kernel", "kernel"),
    ("case", "case"),
    ("sm", "sm"),
    ("registers", "regs"),
    ("spilled_bytes", "spill"),
    ("shared_bytes", "shared"),
    ("load_bytes", "load"),
    ("store_bytes", "store"),
    ("tensor_core", "tensor"),
    ("wgmma", "wgmma"),
    ("tma", "tma"),
)


def table(rows: Sequence[Report]) -> str:
    """Plain text: one line a report, then what is wrong with it."""
    cells = [tuple(title for _, title in _COLUMNS)]
    cells += [tuple(str(getattr(row, field)) for field, _ in _COLUMNS) for row in rows]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(size) if i < 2 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
        ).rstrip()
        for line in cells
    ]
    marked = [lines[0]]
    for row, line in zip(rows, lines[1:], strict=True):
        marked += [line, *(f"  problem: {problem}" for problem in problems(row))]
    return "\n".join(marked)


def add_parser(subparsers: Any) -> None:
    """Add ``neobert aot`` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "aot",
        help="compile every kernel for GPUs that are not here, and report on the machine code",
        description=(
            "Compile every kernel and launch choice without a GPU. Bytes are of one thread "
            "(spill, load, store: the widest access) or one block (shared); tensor and tma count "
            "instructions. Exits with 1 if a kernel spills or breaks another promise."
        ),
    )
    parser.add_argument(
        "--sm", type=int, action="append", metavar="N",
        help=f"GPU generation, may be repeated (default: {', '.join(map(str, DEFAULT_SMS))})",
    )  # fmt: skip
    parser.add_argument(
        "--operator", action="append", metavar="NAME",
        help="operator, may be repeated (default: all that have kernels)",
    )  # fmt: skip
    parser.add_argument(
        "--extension", action="store_true",
        help="report on the CUDA extension instead, built first where it is not (needs nvcc)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the reports; 1 if any has a problem."""
    if args.extension:
        from neobert_kernels import _cuda_aot  # reads with the functions of this module

        if args.operator:
            raise _check.error("--operator", "none with --extension", args.operator)
        rows = list(_cuda_aot.reports(_cuda_aot.built(), args.sm))
    else:
        rows = list(reports(args.sm or DEFAULT_SMS, args.operator, _show_progress))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    broken = sum(bool(problems(row)) for row in rows)
    if args.json:
        print(json.dumps([{**dataclasses.asdict(r), "problems": problems(r)} for r in rows]))
    else:
        print(table(rows))
        print(f"\n{len(rows)} kernels, {broken} with problems")
    return 1 if broken else 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {total}", end="", file=sys.stderr, flush=True)
    elif done == total or done % 50 == 0:
        print(f"compiled {done} of {total}", file=sys.stderr, flush=True)
