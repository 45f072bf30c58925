"""Every kernel in every configuration, compiled without a GPU for three generations of them, within bounds on what it takes."""

from __future__ import annotations

import re
import subprocess
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc import kernels

if find_spec("triton") is None or kernels.interpreted():
    pytest.skip("compiling takes Triton, and not its interpreter", allow_module_level=True)

MODULES = sorted(p.stem for p in Path(kernels.__file__).parent.glob("*_triton.py"))
REGISTERS = {
    "moments-hopper-fp32": 255,
    "moments": 240,
    "difference": 220,
    "prepare": 40,
    "loss": 104,
    "total": 40,
    "scale": 168,
    "layer_norm_modulate_backward": 253,
    "layer_norm_modulate": 112,
    "gated_residual": 56,
    "qk_norm_rope": 96,
}
"""Of a thread, by the beginning of a variant's name: what Triton 3.7 needs and a tenth more; 255 is all there are."""
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a program may have. Source: CUDA C++ programming guide, technical specifications by compute capability."""
ALIGNED = ("width", "width_x", "width_y", "count", "stride", "stride_x", "stride_y", "stride_s", "stride_t", "stride_before")
ALIGNED += ("x_b", "x_t", "y_b", "y_t", "grad_b", "grad_t", "scale_b", "shift_b", "gate_b")
"""Numbers that are multiples of 16 where it counts, which Triton sees for itself when it runs."""
ALONE = {"hopper": (90,), "blackwell": (100,), "-early": (90, 100), "-late": (80,)}
"""Configurations of some generations."""


def _is_for(name: str, capability: int) -> bool:
    return all(word not in name or capability in only for word, only in ALONE.items())


@cache
def variants() -> dict[str, tuple[Any, ...]]:
    return {row[0]: row for module in MODULES for row in import_module(f"ppclc.kernels.{module}").variants()}


def compiled(name: str, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, signature, constants, options = variants()[name]
    names = list(kernel.arg_names)
    kinds = {n: "constexpr" if n in constants else signature[n] for n in names}
    aligned = [n for n, kind in kinds.items() if kind.startswith("*") or (n in ALIGNED and kind != "constexpr")]
    source = ASTSource(
        kernel,
        kinds,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers_and_spills(made: Any, capability: int, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that go through memory, as the assembler that Triton brings tells."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if capability >= 100 and (tools / "ptxas-blackwell").exists() else "ptxas")
    (folder / "kernel.ptx").write_text(made.asm["ptx"])
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    done = subprocess.run(
        [assembler, "-v", f"-arch={arch}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    return int(re.findall(r"Used (\d+) registers", done.stderr)[0]), sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_what_bfloat16_takes_compiles_within_its_bounds(module: str, tmp_path: Path) -> None:
    names = [name for name in _names(module, 90) if "bf16" in name or not re.search(r"-fp(16|32)", name) or name.startswith("total")]
    _check_bounds(names, 90, tmp_path)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("module", MODULES)
def test_every_variant_compiles_within_its_bounds(module: str, capability: int, tmp_path: Path) -> None:
    _check_bounds(_names(module, capability), capability, tmp_path)


def _names(module: str, capability: int) -> list[str]:
    return [row[0] for row in import_module(f"ppclc.kernels.{module}").variants() if _is_for(row[0], capability)]


def _check_bounds(names: list[str], capability: int, tmp_path: Path) -> None:
    assert names
    for name in names:
        made = compiled(name, capability)
        assert made.metadata.shared <= SHARED_BYTES[capability], name
        assert len(made.asm["cubin"]) > 1000, name
        registers, spilled = registers_and_spills(made, capability, tmp_path)
        assert registers <= next(bound for kind, bound in REGISTERS.items() if name.startswith(kind)), (name, registers)
        assert spilled == 0, name


@pytest.mark.slow
def test_on_hopper_moments_are_made_by_its_own_instructions() -> None:
    ptx = compiled("moments-hopper-bf16", 90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert re.search(r"(red|atom)\.(global|relaxed)[\w.:]*\.v4", ptx)  # sums leave four at a time


@pytest.mark.slow
def test_losses_are_added_up_by_a_kernel_that_starts_early_and_waits() -> None:
    """What follows the loss's kernel is started beside it, and reads nothing before it is done; older GPUs have no such thing."""
    ptx = {name: compiled(name, 90).asm["ptx"] for name in ("loss-bf16-4096-False-early", "total-fp32-1024-early")}
    assert all(("griddepcontrol.launch_dependents" in code) == name.startswith("loss") for name, code in ptx.items())
    before_waiting, after = ptx["total-fp32-1024-early"].split("griddepcontrol.wait")
    assert "ld.global" not in before_waiting
    assert "ld.global" in after
    assert "griddepcontrol" not in compiled("total-fp32-1024-late", 80).asm["ptx"]


@pytest.mark.parametrize(("lies_on", "wanted"), [(0, []), (1, [1])])
def test_kernels_run_where_their_tensors_lie(lies_on: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Device 0 is the current one; a tensor on the CPU, which the interpreter takes, asks for nothing."""
    from ppclc.kernels import tuning

    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device.index) or nullcontext())
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", lies_on))
    with tuning.on_device_of(tensor), tuning.on_device_of(torch.zeros(1)):
        pass
    assert made == wanted
