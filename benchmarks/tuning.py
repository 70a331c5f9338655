"""Launch choices as something to vary: where they stand, and which values lie near each one.

A knob is a function or a constant of an operator's module. Its candidates are the default with one
number doubled or halved, a bound on registers changed, or a flag turned, which is how far a choice
argued on paper may be off. What the shape decides (`FIXED`) stays.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neobert_kernels.ops.attention import tiles

FIXED = {"tail", "half", "per_lane", "chunk", "CHUNK", "search"}
REGISTERS = (None, 96, 128, 168, 255)
MOST_WARPS, MOST_STAGES = 16, 6
OPS = "neobert_kernels.ops"


@dataclass(frozen=True)
class Knob:
    """``module.name``: a launch choice of ``operators``.

    Attributes:
        fixed: Fields that stay, besides `FIXED`.
        free: Fields that vary although they are in `FIXED`.
        part: The one field that varies, where a choice has one for each kernel.
    """

    module: str
    name: str
    operators: tuple[str, ...]
    fixed: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()
    part: str = ""

    @property
    def title(self) -> str:
        return f"{self.module}.{self.name}" + f", {self.part}" * bool(self.part)

    @property
    def owner(self) -> Any:
        return importlib.import_module(f"{OPS}.{self.module}")


_NORMS = ("add_rms_norm", "add_layer_norm", "rms_norm", "layer_norm")
_UNITS = ("swiglu", "geglu", "silu_mul", "gelu_mul")
_ATTENTION = ("attention", "qkv_attention")
KNOBS: tuple[Knob, ...] = (
    Knob("attention.tiles", "choose", _ATTENTION, part="forward"),
    Knob("attention.tiles", "choose", _ATTENTION, part="dq"),
    Knob("attention.tiles", "choose", _ATTENTION, part="dkv"),
    Knob("attention.tiles", "choose", _ATTENTION, frozenset({"forward", "dq", "dkv"})),
    Knob("_norms", "forward_plan", _NORMS, frozenset({"programs_per_sm", "stages"})),
    Knob("_norms", "backward_plan", _NORMS),
    Knob("_norms", "TOTAL_TILE", _NORMS),
    Knob("swiglu", "choice", _UNITS),
    Knob("rope", "choice", ("rope",)),
    Knob(
        "linear_cross_entropy.kernels", "plan", ("linear_cross_entropy",), free=frozenset({"chunk"})
    ),
    Knob("linear_cross_entropy.kernels", "SOFTMAX", ("linear_cross_entropy",)),
    Knob("linear_cross_entropy.kernels", "COLUMN_SUM", ("linear_cross_entropy",)),
    Knob("linear_cross_entropy.kernels", "tile", ("linear_cross_entropy",)),
    Knob("linear", "choice", ("batch_invariant_linear",)),
    Knob("fused_linear.launch", "choice", ("fused_linear",)),
    Knob("info_nce", "choice", ("info_nce",), free=frozenset({"chunk"})),
    Knob("info_nce", "PROGRAMS_PER_SM", ("info_nce",)),
    Knob("pooling", "tile", ("mean_pool", "first_pool")),
    Knob("pooling", "PART", ("mean_pool",)),
    Knob("pooling", "SPAN", ("mean_pool", "first_pool")),
    Knob("pooling", "WARPS", ("mean_pool", "first_pool")),
)


# Tiles of attention that several changes lie between: cuDNN's cut of the forward on Hopper (64 x
# 128 for 4 warps), others with as many registers a lane, and warps of two kinds.
FAR: dict[str, tuple[tiles.Tile, ...]] = {
    "forward": (
        *(
            tiles.Tile(outer, inner, warps, 2, tma=tma)
            for outer, inner, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
            for tma in (False, True)
        ),
        tiles.SPECIALIZED,
        tiles.Tile(64, 128, 4, 2, tma=True, specialized=True),
    ),
    "dq": (tiles.Tile(64, 64, 4, 2), tiles.Tile(64, 128, 4, 1), tiles.Tile(128, 32, 8, 3)),
    "dkv": (tiles.Tile(64, 64, 4, 2), tiles.Tile(64, 32, 4, 3), tiles.Tile(128, 32, 8, 3)),
}


@contextlib.contextmanager
def recorded(knob: Knob) -> Iterator[dict[tuple[Any, ...], Any]]:
    """What the knob says, by its arguments, while the block runs; a constant under ``()``."""
    original = getattr(knob.owner, knob.name)
    seen: dict[tuple[Any, ...], Any] = {}
    if not callable(original):
        seen[()] = original
        yield seen
        return

    def spy(*args: Any, **options: Any) -> Any:
        value = original(*args, **options)
        seen[(*args, *sorted(options.items()))] = value
        return value

    with replaced(knob, spy):
        yield seen


@contextlib.contextmanager
def replaced(knob: Knob, value: Any) -> Iterator[None]:
    """The knob is ``value`` while the block runs."""
    owner, original = knob.owner, getattr(knob.owner, knob.name)
    setattr(owner, knob.name, value)
    try:
        yield
    finally:
        setattr(owner, knob.name, original)


def answering(knob: Knob, arguments: tuple[Any, ...], value: Any) -> Any:
    """What the knob is replaced by so that it says ``value`` at ``arguments`` alone."""
    original = getattr(knob.owner, knob.name)
    if not callable(original):
        return value

    def answer(*args: Any, **options: Any) -> Any:
        same = (*args, *sorted(options.items())) == arguments
        return value if same else original(*args, **options)

    return answer


def candidates(knob: Knob, value: Any) -> dict[str, Any]:
    """Values near ``value``, by what differs."""
    fixed = (FIXED | knob.fixed) - knob.free
    if not knob.part:
        return dict(_near(value, "", fixed))
    near = dict(_near(getattr(value, knob.part), knob.part, fixed))
    for tile in FAR.get(knob.part, ()):
        if tile != getattr(value, knob.part) and tile not in near.values():
            label = f"{tile.outer} x {tile.inner}, {tile.warps} warps, {tile.stages} stages"
            label += ", TMA" * tile.tma + ", specialized" * tile.specialized
            near[f"{knob.part}={label}"] = tile
    return {label: dataclasses.replace(value, **{knob.part: part}) for label, part in near.items()}


def _near(value: Any, path: str, fixed: frozenset[str] | set[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield f"{path}={not value}", not value
    elif isinstance(value, int):
        yield from ((f"{path}={n}", n) for n in _numbers(path, value))
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in fixed:
                for label, near in _near(part, _join(path, key), fixed):
                    yield label, {**value, key: near}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name in fixed:
                continue
            part = getattr(value, field.name)
            where = _join(path, field.name)
            options = (
                [(f"{where}={n}", n) for n in REGISTERS if n != part]
                if field.name in ("registers", "maxnreg")
                else _near(part, where, fixed)
            )
            for label, near in options:
                with contextlib.suppress(AssertionError):  # flags that exclude each other
                    yield label, dataclasses.replace(value, **{field.name: near})
        yield from _scaled(value, path)


def _scaled(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """An outer tile and its warps together: the rows of a warp stay."""
    if isinstance(value, tiles.Tile):
        for outer, warps in (
            (value.outer * 2, value.warps * 2),
            (value.outer // 2, value.warps // 2),
        ):
            if 16 <= outer <= 256 and 1 <= warps <= MOST_WARPS:
                with contextlib.suppress(AssertionError):
                    near = dataclasses.replace(value, outer=outer, warps=warps)
                    yield f"{path}.outer={outer} {path}.warps={warps}", near


def _numbers(path: str, value: int) -> list[int]:
    name = path.rpartition(".")[2]
    most = MOST_WARPS if "warps" in name.lower() else MOST_STAGES if "stages" in name else 1 << 30
    near = (
        [value + 1, value - 1] if "stages" in name or "per_sm" in name else [value * 2, value // 2]
    )
    return [n for n in near if 1 <= n <= most and n != value]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def changed(default: Any, value: Any) -> str:
    """How a person would write the difference down."""
    return f"{default!r} -> {value!r}"
