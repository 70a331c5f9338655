"""Every operator once, forward and backward, on small shapes: what compute-sanitizer watches.

Where the CUDA extension is built, its operators once more.

compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py
"""

import os
import sys

import torch
from operator_cases import CASES, TINY, outputs, sample

from neobert_kernels import cuda


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In the interpreter float16 stands in for bfloat16, whose products it gets wrong.
    half = torch.bfloat16 if device == "cuda" else torch.float16
    cases = [(operator, case, "") for operator, case in CASES]
    if device == "cuda":
        cuda.use()
        if cuda.find() is not None:
            cases += [(operator, "", "CUDA extension") for operator in cuda.OPERATORS]
    for operator, case, extension in cases:
        if extension:
            cuda.use(operator)
        for dtype in (torch.float32, half):
            found = outputs(operator, sample(operator, case, TINY, device, dtype))
            assert all(bool(x.isfinite().all()) for x in found), (operator, case, dtype)
        print(f"{operator} {case} {extension}".strip(), flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    # Every allocation its own, so that a read past the end of one is not inside another.
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    sys.exit(main())
