"""Compiles the kernels of kernels/*.cu where they are used, keeps the machine code on disk, and starts them.

NVRTC comes with torch's CUDA wheels, so a user needs neither nvcc nor a C compiler. A variant takes about half a second once per
machine; its cubin is kept under a hash of everything that it was made from. Kernels are started by the driver's own interface, on
torch's current stream, in torch's context of the device. All of it by ctypes.

    $COMPRESS_CACHE/cubin, or $XDG_CACHE_HOME/compress/cubin, or ~/.cache/compress/cubin

A file appears there whole or not at all, so processes may share the folder; where it cannot be written, each compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import KernelError

THREADS = 256  # of a block, in all kernels; tile.cuh
_KERNELS = Path(__file__).parent / "kernels"
_HEADERS = ("tile.cuh", "trellis.cuh", "turn.cuh")
_LEAST = (8, 0)  # compute capability: the kernels use bf16 tensor cores
_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_OVERLAP_SINCE = (9, 0)
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_USUAL_SHARED = 48 << 10  # more is asked for

Defines = tuple[tuple[str, int], ...]
Argument = Tensor | int | None  # None is a null pointer


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15)]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("count", c_uint),
    ]


def compile_cubin(name: str, defines: Defines, arch: str) -> bytes:
    """The machine code of kernels/<name>.cu for `arch` ("sm_90"), by NVRTC; KernelError with the compiler's words if it fails."""
    library, program = _nvrtc(), c_void_p()
    count, texts = len(_HEADERS), [_text(header) for header in _HEADERS]
    headers = (c_char_p * count)(*texts), (c_char_p * count)(*(header.encode() for header in _HEADERS))
    _check(library.nvrtcCreateProgram(byref(program), _text(f"{name}.cu"), f"{name}.cu".encode(), count, *headers))
    try:
        options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device", *(f"-D{key}={value}" for key, value in defines)]
        encoded = (c_char_p * len(options))(*(o.encode() for o in options))
        if library.nvrtcCompileProgram(program, len(options), encoded):
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
            raise KernelError(f"NVRTC {_version()} cannot compile {name}.cu for {arch}: {' | '.join(log.split(chr(10)))}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def cubin(name: str, defines: Defines, arch: str) -> bytes:
    """As `compile_cubin`, from the cache where it has been compiled before."""
    path = cache_folder() / f"{key(name, defines, arch, _version())}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    image = compile_cubin(name, defines, arch)
    _keep(path, image)
    return image


def cache_folder() -> Path:
    """Where cubins are kept."""
    if own := os.environ.get("COMPRESS_CACHE"):
        return Path(own) / "cubin"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress" / "cubin"


def key(name: str, defines: Defines, arch: str, version: str) -> str:
    """The sha256 of all that a cubin depends on."""
    parts = [*map(_text, _HEADERS), _text(f"{name}.cu"), repr((name, sorted(defines), arch, version)).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


_loaded: dict[tuple[str, Defines, int], c_void_p] = {}
_lock = threading.Lock()


def load(name: str, defines: Defines, device: torch.device) -> c_void_p:
    """The function <name>_kernel of kernels/<name>.cu, compiled and loaded on `device`; once a process and device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    found = _loaded.get((name, defines, index))
    if found is None:
        with _lock:
            found = _loaded.get((name, defines, index)) or _load(name, defines, index)
            _loaded[name, defines, index] = found
    return found


def _load(name: str, defines: Defines, index: int) -> c_void_p:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < _LEAST:
        name_of = torch.cuda.get_device_name(index)
        raise KernelError(f"the kernels need compute capability {_LEAST[0]}.{_LEAST[1]} or higher; {name_of} has {major}.{minor}")
    image, module, function = cubin(name, defines, f"sm_{major}{minor}"), c_void_p(), c_void_p()
    with torch.cuda.device(index):  # torch's current device is again what it was
        _enter(index)
        _driver_check(_driver().cuModuleLoadData(byref(module), image), f"load {name}")
        _driver_check(_driver().cuModuleGetFunction(byref(function), module, f"{name}_kernel".encode()), f"find {name}")
    return function


def launch(
    name: str, defines: Defines, grid: tuple[int, int], shared: int, args: Sequence[Argument], device: torch.device
) -> None:
    """Start a kernel on torch's current stream of `device`; `shared`: bytes of dynamic shared memory.

    It may begin before the kernel in front of it ends (programmatic dependent launch, from compute capability 9.0); it waits
    itself before it reads what that one wrote.
    """
    function = load(name, defines, device)
    values = [c_int(a) if isinstance(a, int) else c_void_p(None if a is None else a.data_ptr()) for a in args]
    pointers = (c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    overlap = _Attribute(id=_OVERLAP, value=1)
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        _enter(index)
        if shared > _USUAL_SHARED:
            _driver_check(_driver().cuFuncSetAttribute(function, _MOST_SHARED, shared), f"give {name} its shared memory")
        stream = torch.cuda.current_stream().cuda_stream
        count = int(_capability(index) >= _OVERLAP_SINCE)
        config = _Launch(grid[0], grid[1], 1, THREADS, 1, 1, shared, stream, ctypes.pointer(overlap), count)
        _driver_check(_driver().cuLaunchKernelEx(byref(config), function, pointers, None), f"start {name}")


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _enter(index: int) -> None:
    """Make torch's context of the device current on this thread; a thread that did nothing on the GPU yet has none."""
    _driver_check(_driver().cuCtxSetCurrent(_context(index)), "enter the context")


@cache
def _context(index: int) -> c_void_p:
    device, context = c_int(), c_void_p()
    _driver_check(_driver().cuDeviceGet(byref(device), index), "find the device")
    _driver_check(_driver().cuDevicePrimaryCtxRetain(byref(context), device), "find the context")
    return context


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise KernelError(
            "no NVIDIA driver: libcuda.so.1 cannot be loaded; install the driver, or run the model on the CPU"
        ) from None
    _driver_check(library.cuInit(0), "start the driver", library)
    return library


def _driver_check(code: int, what: str, library: ctypes.CDLL | None = None) -> None:
    if code:
        name = c_char_p()
        (library or _driver()).cuGetErrorName(code, byref(name))
        reason = name.value.decode() if name.value else str(code)
        raise KernelError(f"CUDA cannot {what}: {reason}; if torch works on this GPU, clear {cache_folder()} and try again")


@cache
def _nvrtc() -> ctypes.CDLL:
    tried = list(_candidates())
    for path in tried:
        try:
            # its builtins are opened by bare name, which finds them only if they are loaded already
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if "/" in path else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return _typed(ctypes.CDLL(path))
        except OSError:
            continue
    raise KernelError("no NVRTC found, which compiles the kernels; install torch with CUDA, or `pip install nvidia-cuda-nvrtc`")


def _candidates() -> list[str]:
    """Where libnvrtc may lie: in the wheels that torch depends on, beside torch, in a toolkit, on the loader's path."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = [p for folder in folders for p in folder.glob("*/lib/libnvrtc.so.*")]
    found += (Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*")
    if home := os.environ.get("CUDA_HOME"):
        found += Path(home).glob("lib64/libnvrtc.so.*")
    major = (torch.version.cuda or "").partition(".")[0]
    usable = [str(p) for p in found if "builtins" not in p.name and ".alt." not in p.name]
    usable.sort(key=lambda p: (f".so.{major}" not in p, p))  # first that of torch's own CUDA: the driver is known to serve it
    return [*usable, *(f"libnvrtc.so.{n}" for n in (major, "13", "12") if n)]


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    text, texts = c_char_p, POINTER(c_char_p)
    library.nvrtcCreateProgram.argtypes = [POINTER(c_void_p), text, text, c_int, texts, texts]
    library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, texts]
    for query in (library.nvrtcGetProgramLogSize, library.nvrtcGetCUBINSize):
        query.argtypes = [c_void_p, POINTER(c_size_t)]
    for get in (library.nvrtcGetProgramLog, library.nvrtcGetCUBIN):
        get.argtypes = [c_void_p, c_void_p]
    library.nvrtcGetErrorString.restype = text
    return library


@cache
def _version() -> str:
    major, minor = c_int(), c_int()
    _check(_nvrtc().nvrtcVersion(byref(major), byref(minor)))
    return f"{major.value}.{minor.value}"


def _check(code: int) -> None:
    if code:
        raise KernelError(f"NVRTC failed: {_nvrtc().nvrtcGetErrorString(code).decode()}")


def _read(size: object, get: object, program: c_void_p) -> bytes:
    count = c_size_t()
    _check(size(program, byref(count)))  # type: ignore[operator]
    buffer = ctypes.create_string_buffer(count.value)
    _check(get(program, buffer))  # type: ignore[operator]
    return buffer.raw


def _keep(path: Path, image: bytes) -> None:
    """Write a file that appears whole. A cache that cannot be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(image)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
    except OSError:
        pass


@cache
def _text(file: str) -> bytes:
    return (_KERNELS / file).read_bytes()


def defines(**values: int) -> Defines:
    """The macros of a variant, as V_<NAME>=value."""
    return tuple((f"V_{name.upper()}", int(value)) for name, value in values.items())
