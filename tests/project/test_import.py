"""``import neobert_kernels`` is light, and works where Triton or transformers are missing."""

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""

USE = """
import torch
import neobert_kernels as nk
from neobert_kernels import _runtime

x, weight = torch.randn(3, 8), torch.ones(8)
torch.testing.assert_close(nk.rms_norm(x, weight), torch.nn.functional.rms_norm(x, (8,), eps=1e-5))
assert nk.unpad(torch.ones(2, 3, dtype=torch.long)).max_seqlen == 3
operators = _runtime.load_operators()
assert {"rms_norm", "qkv_attention", "info_nce"} <= operators.keys()
assert all(nk.implementation(name, "cpu") == "reference" for name in operators)
"""

IMPORT = """
import sys
import torch
before = set(sys.modules)
import neobert_kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(added & {"triton", "transformers", "numpy", "neobert", "sentence_transformers"}))
"""


def python(source: str) -> str:
    """What a fresh interpreter prints; its errors fail the test."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    assert python(IMPORT) == ""


@pytest.mark.parametrize(
    "names", [["triton"], ["transformers"], ["triton", "transformers"]], ids="+".join
)
def test_operators_work_without(names: list[str]) -> None:
    python(BLOCK.format(names=names) + USE)


def test_no_operator_loads_the_compiler() -> None:
    """It takes seconds, and a decorator of torch.compiler is enough to load it."""
    python(
        "import sys\nfrom neobert_kernels import _runtime\n_runtime.load_operators()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )


def test_every_public_name_resolves() -> None:
    python("import neobert_kernels as nk; [getattr(nk, name) for name in nk.__all__]")
