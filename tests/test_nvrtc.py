"""Compiling the kernels: for every kind of GPU, within a budget of instructions; kept on disk; clear where it cannot be."""

from __future__ import annotations

import sys
import threading
from itertools import product
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError, KernelError
from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.cuda import nvrtc
from compress.formats import LowRank, parse
from tests import emulator
from tests.conftest import ROOT, covered, rare
from tests.test_kernel import CASES, GRID

sys.path.insert(0, str(ROOT / "benchmarks"))
import kernels_budget as budget

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
SAMPLE = ("int3:g64:asym", "lut4:g128")  # the last asks for the most shared memory
# instructions a weight at 8 tokens, in fp16 and bf16, that sm_90 code is held to; the kernels of products say what there are
BUDGET = {"int2:g128": 1.7, "int2:g64:asym": 2.2, "int3:g128:asym": 2.1, "int4:g128:asym": 2.0, "int4:channel": 1.8,
          "int8:g128": 3.1, "nf2:g64": 2.1, "nf3:g64": 2.2, "nf4:g64": 2.2,
          "tcq2": 5.4, "tcq2.5": 5.4, "tcq3": 5.4, "tcq4": 5.4}  # fmt: skip
CODED = ("tcq2:r64", "tcq2.5:r64", "tcq3:r64", "tcq4:r64", "tcq5:r64", "ecq4:r64")
SMALL = ("low_rank", nvrtc.defines(bf16=True))


def has_nvrtc() -> bool:
    try:
        nvrtc._nvrtc()
    except CompressError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(budget.shutil.which("nvcc") is None, reason="no nvcc, which says what is spilled")
needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    return tmp_path / "cubin"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, nvrtc.Defines, str]]:
    """A compiler that makes a text of what it was asked, and the list of it."""
    asked: list[tuple[str, nvrtc.Defines, str]] = []

    def compile_cubin(*what: object) -> bytes:
        asked.append(what)  # type: ignore[arg-type]
        return repr(what).encode()

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setattr(nvrtc, "_version", lambda: "13.0")
    return asked


def compiles_without_spills(arch: str, variants: set[emulator.Variant]) -> None:
    for name, defines in sorted(variants):
        code = budget.build(name, defines, arch)
        assert code.spilled == 0, f"{name} {dict(defines)} for {arch} spills {code.spilled} bytes"
        assert not any("LDL" in text or "STL" in text for _, text in code.lines), (
            f"{name} {dict(defines)} for {arch} uses local memory"
        )


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("whole", [False, rare(True)])
@pytest.mark.parametrize("arch", covered(ARCHS, ARCHS[0]))
def test_kernels_compile_without_spills(arch: str, whole: bool) -> None:
    """In part: a product of packed weights for each kind of GPU, and one other kernel, so that each kernel has its turn."""
    needs = [
        (LowRank(parse(text), 8), (16, 256), dtype) for text, dtype in zip(SAMPLE, (torch.bfloat16, torch.float16), strict=True)
    ]  # type: ignore[arg-type]
    turn = ARCHS.index(arch)  # another number of token tiles for each
    found = sorted(emulator.variants(needs, (8 << turn,)))
    others, products = ([v for v in found if (v[0] == "packed_linear") == packed] for packed in (False, True))
    part = {products[turn % len(products)], [others[0], others[3], *others[4:]][turn]}
    compiles_without_spills(arch, set(found) if whole else part)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", covered(ARCHS, "sm_90"))
def test_a_product_with_a_trellis_code_compiles_without_spills(arch: str) -> None:
    found = emulator.variants([(parse(CODED[0]), (64, 256), torch.bfloat16)], (8,))
    compiles_without_spills(arch, {variant for variant in found if variant[0] == "trellis_linear"})


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "text"), list(product(ARCHS, CODED)))
def test_kernels_of_coded_and_rotated_matrices_compile_without_spills(arch: str, text: str) -> None:
    compiles_without_spills(arch, emulator.variants([(parse(text), (64, 256), torch.bfloat16)], (8, 16)))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "text"), list(product(ARCHS, GRID)))
def test_every_variant_compiles_without_spills(arch: str, text: str) -> None:
    needs = [(parse(text), (16, 256), dtype) for dtype in (torch.bfloat16, torch.float16)]
    compiles_without_spills(arch, emulator.variants(needs, (8, 16, 32, 64)))


@pytest.mark.skipif(budget.missing() is not None, reason=str(budget.missing()))
@pytest.mark.parametrize("text", [t if t in ("int2:g64:asym", "nf4:g64") else rare(t) for t in BUDGET])
def test_the_main_loop_keeps_to_its_budget_of_instructions(text: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert budget.instructions(*budget.variant(text, dtype, 8), "sm_90") <= BUDGET[text]


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_the_kernels_without_an_include_path(arch: str, cache: Path) -> None:
    """Every kernel there is, in one variant or more."""
    needs = [(parse(text), (16, 256), torch.bfloat16) for text in (CASES[0][0], CODED[0])]
    found = emulator.variants(needs, (8,)) | {SMALL}
    assert {name for name, _ in found} == {path.stem for path in nvrtc._KERNELS.glob("*.cu")}
    for name, defines in found:
        assert nvrtc.cubin(name, defines, arch)[:4] == b"\x7fELF"
    assert len(list(cache.iterdir())) == len(found)


@needs_nvrtc
def test_a_compiler_s_words_are_passed_on() -> None:
    with pytest.raises(KernelError, match=r"cannot compile dequantize\.cu for sm_90: .*V_TABLE"):
        nvrtc.compile_cubin("dequantize", (("V_BITS", 3),), "sm_90")


def test_a_cubin_is_compiled_once(cache: Path, compiler: list[object]) -> None:
    first = nvrtc.cubin(*SMALL, "sm_90")
    assert nvrtc.cubin(*SMALL, "sm_90") == first
    assert len(compiler) == 1
    assert [p.read_bytes() for p in cache.iterdir()] == [first]


def test_the_key_is_of_source_macros_architecture_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    places = (("sm_90", "13.0"), ("sm_80", "13.0"), ("sm_90", "12.9"))
    keys = [nvrtc.key(*SMALL, arch, version) for arch, version in places]
    keys += [nvrtc.key("low_rank", nvrtc.defines(bf16=False), *places[0]), nvrtc.key("dequantize", SMALL[1], *places[0])]
    for file in ("tile.cuh", "low_rank.cu"):
        text = nvrtc._text
        with monkeypatch.context() as patch:
            patch.setattr(nvrtc, "_text", lambda name, text=text, file=file: text(name) + b" " * (name == file))
            keys.append(nvrtc.key(*SMALL, "sm_90", "13.0"))
    assert len(set(keys)) == len(keys)
    assert nvrtc.key(*SMALL, "sm_90", "13.0") == keys[0]


def test_a_cubin_appears_whole_whoever_writes_it(cache: Path, compiler: list[object]) -> None:
    threads = [threading.Thread(target=nvrtc.cubin, args=(*SMALL, "sm_90")) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(list(cache.iterdir())) == 1, "no temporary file is left"


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: list[object]) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert nvrtc.cubin(*SMALL, "sm_90") == nvrtc.cubin(*SMALL, "sm_90")
    assert len(compiler) == 2


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", "/own")
    assert nvrtc.cache_folder() == Path("/own/cubin")
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert nvrtc.cache_folder() == Path("/xdg/compress/cubin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_folder() == Path.home() / ".cache/compress/cubin"


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", none)
    for find, words in (
        (nvrtc._nvrtc, "no NVRTC found.*pip install nvidia-cuda-nvrtc"),
        (nvrtc._driver, "no NVIDIA driver.*CPU"),
    ):
        with pytest.raises(KernelError, match=words) as error:
            find.__wrapped__()
        assert "\n" not in str(error.value)


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(KernelError, match=r"compute capability 8\.0 or higher; Tesla T4 has 7\.5"):
        cuda.prepare([(parse("int4:g64"), (16, 64), torch.float16)], "cuda:0")
