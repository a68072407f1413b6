"""The loops of ``kernels.cpp``, compiled at first use for this very processor.

The library lies in ``$XDG_CACHE_HOME/twotower`` (``~/.cache/twotower``) under a name that depends on the source, the
compiler and the processor; its last bytes are the digest of what is before them. Built by hand and not by
``torch.utils.cpp_extension``: that needs ninja, and torch's headers take half a minute to compile where this takes a
second; nothing here needs them.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from trainer.model.kernels.interface import DTYPES, Factors, Norm

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


class KernelError(Exception):
    """There are no compiled kernels; says why."""


class CppKernels:
    """:class:`.interface.Kernels` of CPU tensors.

    Rows and elements are independent: any number of threads gives the same bits.

    Args:
        library: ``kernels.cpp``, compiled and loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.norm_forward.argtypes = (number, pointer, pointer, ctypes.POINTER(Norm), number)
        library.norm_backward.argtypes = (number, *[pointer] * 3, ctypes.POINTER(Norm), number)
        library.sgd_update.argtypes = (number, *[pointer] * 3, count, *[ctypes.c_double] * 3, number)
        for function in (library.norm_forward, library.norm_backward, library.sgd_update):
            function.restype = None

    def norm_forward(self, x: Tensor, norm: Norm) -> Tensor:
        """See :class:`.interface.Kernels`."""
        y = torch.empty_like(x)
        self._library.norm_forward(DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), norm, torch.get_num_threads())
        return y

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """See :class:`.interface.Kernels`."""
        dx, threads = torch.empty_like(x), torch.get_num_threads()
        pointers = x.data_ptr(), gradient.data_ptr(), dx.data_ptr()
        self._library.norm_backward(DTYPES[x.dtype], *pointers, norm, threads)
        return dx

    def update(self, w: Tensor, v: Tensor, g: Tensor, factors: Factors, guard: Tensor | None) -> None:
        """See :class:`.interface.Kernels`."""
        if guard is None or guard:
            pointers = w.data_ptr(), v.data_ptr(), g.data_ptr()
            self._library.sgd_update(DTYPES[w.dtype], *pointers, w.numel(), *factors, torch.get_num_threads())


def cache_folder() -> Path:
    """Where compiled libraries lie; the user's own."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "twotower"


def open_library() -> ctypes.CDLL:
    """Compiles where the cache has no complete library of this name, and loads it.

    Raises:
        KernelError: it cannot be had.
    """
    command = _compiler()
    before = openmp_runtimes()
    try:
        library = _cached_or_built(command)
    except OSError as error:
        raise KernelError(f"the compiled library does not load ({error})") from None
    if more := openmp_runtimes() - before:
        raise KernelError(f"a second OpenMP runtime would be loaded, {', '.join(sorted(more))}")
    return library


def _cached_or_built(command: list[str]) -> ctypes.CDLL:
    """The library from the cache, or a new one, which is left in the cache where that can be written."""
    name = f"kernels-{_fingerprint(command)}.so"
    try:
        cached = cache_folder() / name
    except RuntimeError:  # no home folder
        cached = None
    if cached and _is_complete(cached):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(cached))
    with tempfile.TemporaryDirectory(prefix="twotower-") as folder:
        built = Path(folder) / name
        _build(command, built)
        with contextlib.suppress(OSError):
            if cached:
                _publish(built, cached)
                if _is_complete(cached):  # else others may write there
                    return ctypes.CDLL(str(cached))
        return ctypes.CDLL(str(built))


def _compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, or the first of ``COMPILERS`` there is."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise KernelError(f"no C++ compiler: {named[0] if named else ', '.join(COMPILERS)} not found")


def _fingerprint(command: list[str]) -> str:
    """Names what a compiled library depends on: source, flags, compiler, processor."""
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} does not run ({error})") from None
    processor = platform.processor() + platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = (SOURCE.read_bytes(), version, processor.encode(), " ".join([*command, *FLAGS]).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _build(command: list[str], path: Path) -> None:
    """Compiles ``kernels.cpp`` and appends the digest.

    Raises:
        KernelError: with the compiler's first words.
    """
    try:
        whole = [*command, *FLAGS, str(SOURCE), "-o", str(path)]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} does not run ({error})") from None
    if done.returncode or not path.is_file():
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise KernelError(f"{command[0]} ends with status {done.returncode}: {said}")
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _is_complete(path: Path) -> bool:
    """Whether a library is this user's alone and ends with the digest of the rest: it is code that will run.

    No link, and neither file nor folder may be written by others; a truncated one could end the process.
    """
    try:
        for place, kind in ((path.parent.stat(), stat.S_ISDIR), (path.lstat(), stat.S_ISREG)):
            if place.st_uid != os.getuid() or place.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not kind(place.st_mode):
                return False
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _publish(built: Path, cached: Path) -> None:
    """Copies a library into the cache under a name of its own, then renames it: two towers may do so at once."""
    cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cached.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(built.read_bytes())
        Path(temporary).chmod(0o700)
        Path(temporary).replace(cached)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def openmp_runtimes() -> set[str]:
    """Files of the OpenMP runtimes in this process; two of them would fight over the cores."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    return {path for line in lines if OPENMP.search(path := line.split(maxsplit=5)[-1])}
