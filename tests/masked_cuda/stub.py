"""stub.cpp, compiled against the PyTorch that is here and loaded before PyTorch asks for CUDA for the first time."""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCE = Path(__file__).with_name("stub.cpp")
# Set in CI: there a stub that can't be built is a failure, not a reason to skip.
REQUIRED = "LOWVRAM_MASKED_CUDA"


class Unavailable(Exception):
    """The mask can't be put on here; the message says why."""


def build() -> Path:
    """The shared library, compiled once for a version of PyTorch and of the source.

    Raises:
        Unavailable: no Linux, no C++ compiler, a PyTorch that has CUDA itself or whose headers want something else.
    """
    if platform.system() != "Linux":
        raise Unavailable(f"the stub is built on Linux alone, not on {platform.system()}")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("Triton is not installed, so there are no kernels to launch")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable("this PyTorch has CUDA itself; the mask is for a CPU build (tests/gpu is for a card)")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("there is no C++ compiler (g++, or CXX)")
    if not (torch / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").exists():
        raise Unavailable("this PyTorch comes without its C++ headers")
    key = hashlib.sha256(f"{version('torch')} {compiler} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lowvram-masked-cuda-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"stub-{key}.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as unfinished:
            made = Path(unfinished.name)
        include = torch / "include"
        done = subprocess.run(
            [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{include}", f"-I{include}/torch/csrc/api/include",
             str(SOURCE), "-o", str(made), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            made.unlink()
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise Unavailable(f"the stub does not compile against PyTorch {version('torch')}: {errors[0].strip()}")
        made.replace(library)  # whoever was faster has made the same
    return library


def load() -> None:
    """Put the stub's answers in place; to be called before torch is imported."""
    ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL)


def why_not() -> str | None:
    """Why the mask can't be put on here; None where it can.

    Raises:
        Unavailable: it can't, and it is required (in CI).
    """
    try:
        build()
    except (Unavailable, PackageNotFoundError, subprocess.SubprocessError, OSError) as error:
        if os.environ.get(REQUIRED) == "required":
            raise
        return str(error)
    return None
