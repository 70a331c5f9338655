"""What pyproject.toml cannot say: the sources of the CUDA extension, and ``NEOBERT_CUDA=1``."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from neobert_kernels import _cuda_build  # noqa: E402  (imports no torch, which a build has not)

SWITCH = os.environ.get("NEOBERT_CUDA", "")
if SWITCH not in ("", "0", "1"):
    sys.exit(f"NEOBERT_CUDA: expected 0 or 1, got {SWITCH!r}")
WANTED = SWITCH == "1"


class BuildWithSources(build_py):
    """Packs ``csrc/`` for `neobert doctor --build`, and where it is wanted what it compiles to."""

    def run(self) -> None:
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        package /= "neobert_kernels"
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        if WANTED:
            try:
                _cuda_build.build(package / _cuda_build.NAME)
            except _cuda_build.BuildError as error:
                sys.exit(f"NEOBERT_CUDA=1: {error}")


class PlatformWheel(bdist_wheel):
    """With the extension a wheel is of one platform, but of no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WANTED else (python, abi, platform)


class MaybeBinary(Distribution):
    def has_ext_modules(self) -> bool:
        return WANTED


setup(distclass=MaybeBinary, cmdclass={"build_py": BuildWithSources, "bdist_wheel": PlatformWheel})
