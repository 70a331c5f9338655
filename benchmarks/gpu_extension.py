"""Build the CUDA extension, then run the operators' tests with it: a stage of `gpu_test`.

python benchmarks/gpu_extension.py [arguments of pytest]
"""

import os
import subprocess
import sys

from neobert_kernels import _cuda_build, cuda

TESTS = ["cuda_kernels", "rms_norm", "layer_norm", "swiglu", "rope", "pooling", "every_operator"]


def main(arguments: list[str]) -> int:
    try:
        print(cuda.build())
    except _cuda_build.BuildError as error:
        print(f"CUDA extension: {error}")
        return 1
    command = [sys.executable, "-m", "pytest", *arguments]
    command += [f"tests/kernels/test_{name}.py" for name in TESTS]
    return subprocess.call(command, env=os.environ | {cuda.SWITCH: "1"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
