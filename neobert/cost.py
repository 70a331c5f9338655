"""The least a forward pass costs: FLOP of its Linear layers over this machine's GEMM rate.

A CPU encoder in float32 can go no faster than its matrix products. `linear_shapes` counts them for
any module; `GemmMeter` measures how fast this machine multiplies matrices of exactly those shapes,
once with one operation on all threads and once with one single-threaded operation per core, so that
the better of the two is the limit of every way to spread the work.
"""

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = (512, 2048)  # tokens in one product; between them the rate is flat on the CPUs tried


@dataclass(frozen=True)
class LinearShape:
    """``count`` Linear layers from ``inputs`` to ``outputs`` features."""

    inputs: int
    outputs: int
    count: int

    @property
    def flop_per_token(self) -> int:
        """Multiplications and additions, for all ``count`` layers."""
        return 2 * self.inputs * self.outputs * self.count


def linear_shapes(module: nn.Module) -> tuple[LinearShape, ...]:
    """The distinct shapes of every ``nn.Linear`` inside a base model, in order of appearance.

    A pooler is left out: it sees one row per text, not one per token.
    """
    found = Counter(
        (part.in_features, part.out_features)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and "pooler" not in name
    )
    return tuple(LinearShape(*shape, count) for shape, count in found.items())


def flop_per_token(shapes: Iterable[LinearShape]) -> int:
    """FLOP of one token through all Linear layers; attention and elementwise work not counted."""
    return sum(shape.flop_per_token for shape in shapes)


@dataclass
class GemmCase:
    """One way to run the products; ``rates`` are FLOP/s, one for each call of `measure`."""

    rows: int
    parallel: bool
    rates: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        spread = (
            "one single-threaded product per core" if self.parallel else "one product at a time"
        )
        return f"{spread}, {self.rows} rows"

    @property
    def flop_per_second(self) -> float:
        """Mean over the calls, which all took the same time; 0 before the first."""
        return statistics.fmean(self.rates) if self.rates else 0.0


class GemmMeter:
    """Measure the float32 rate of ``F.linear`` at the given shapes, a slice at a time.

    Call `measure` between the slices of the work it is compared with: a noisy machine then disturbs
    both alike. Each call appends one rate to every case; `best` is the case with the highest rate
    over all calls.
    """

    def __init__(
        self, shapes: Iterable[LinearShape], threads: int | None = None, rows: Iterable[int] = ROWS
    ) -> None:
        self.shapes = tuple(shapes)
        self.threads = threads or torch.get_num_threads()
        self.flop_per_token = flop_per_token(self.shapes)
        if not self.flop_per_token:
            raise ValueError("shapes: expected at least one Linear layer, got none")
        modes = (False, True) if self.threads > 1 else (False,)
        self.cases = [GemmCase(n, parallel) for n in rows for parallel in modes]
        generator = torch.Generator().manual_seed(0)
        largest = max(case.rows for case in self.cases)
        self._inputs = {
            width: torch.randn(largest, width, generator=generator)
            for width in {shape.inputs for shape in self.shapes}
        }
        self._weights = [
            torch.randn(shape.outputs, shape.inputs, generator=generator) for shape in self.shapes
        ]
        self._biases = [torch.randn(shape.outputs, generator=generator) for shape in self.shapes]

    def measure(self, seconds: float = 3.0) -> None:
        """Spend about ``seconds`` in all, shared evenly by the cases."""
        for case in self.cases:
            case.rates.append(self._measure(case, seconds / len(self.cases)))

    @property
    def best(self) -> GemmCase:
        """The fastest case so far: the limit."""
        return max(self.cases, key=lambda case: case.flop_per_second)

    def _measure(self, case: GemmCase, seconds: float) -> float:
        """FLOP/s of one case: the sum over workers of each worker's own rate."""
        before = torch.get_num_threads()
        workers = self.threads if case.parallel else 1
        start = threading.Barrier(workers, timeout=60.0)

        def work(_: int) -> float:
            torch.set_num_threads(self.threads // workers)
            with torch.inference_mode():
                self._pass(case.rows)
                start.wait()
                passes, began = 0, time.perf_counter()
                while not passes or time.perf_counter() - began < seconds:
                    self._pass(case.rows)
                    passes += 1
                return passes / (time.perf_counter() - began)

        with ThreadPoolExecutor(workers) as pool:
            passes_per_second = sum(pool.map(work, range(workers)))
        torch.set_num_threads(before)
        return passes_per_second * case.rows * self.flop_per_token

    def _pass(self, rows: int) -> Tensor:
        """Every Linear layer once, on ``rows`` tokens."""
        out = torch.empty(0)
        for shape, weight, bias in zip(self.shapes, self._weights, self._biases, strict=True):
            x = self._inputs[shape.inputs][:rows]
            for _ in range(shape.count):
                out = F.linear(x, weight, bias)
        return out
