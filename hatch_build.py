"""With ``COMPRESSM_PREBUILD=1`` a wheel brings the compiled C++ kernels for this platform and torch.

The torch is that of the Python which builds the wheel, not another one in an isolated environment: such an environment is
made by pip through ``PYTHONPATH``, which the process that compiles does without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILE = "import sys, pathlib; from compressm.kernels.core import cpp; print(cpp.prebuild(pathlib.Path(sys.argv[1])))"


class PrebuiltKernels(BuildHookInterface):
    """Compiles ``csrc/`` into ``compressm/_prebuilt/`` of the wheel."""

    folder: tempfile.TemporaryDirectory | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("COMPRESSM_PREBUILD", "0") != "1" or version == "editable":
            return
        self.folder = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, self.folder.name], cwd=self.root, env=environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            self.folder.cleanup()
            raise RuntimeError(
                "COMPRESSM_PREBUILD=1: the C++ kernels were not compiled, see above. They need torch, ninja and a C++20 "
                f"compiler where {sys.executable} runs; pip wheel --no-deps . finds them in its own environment"
            )
        library = Path(done.stdout.splitlines()[-1])
        build_data["force_include"][str(library)] = f"compressm/_prebuilt/{library.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder is not None:
            self.folder.cleanup()
