"""Tiny teachers with random weights, on which every claim can be checked in milliseconds."""

from __future__ import annotations

import gc
import os
import signal

# Before numpy and torch are there: two threads on two busy cores are many times slower than one.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import tempfile

# What tests measure of a busy machine is not for its user to plan with.
os.environ["PPCLC_CACHE"] = tempfile.mkdtemp(prefix="ppclc-cache-")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from ppclc import plugins
from ppclc.families import Family
from ppclc.models import block_state
from ppclc.plan import CompressionPlan

torch.set_num_threads(1)
gc.freeze()  # the libraries, which stay: to walk them again and again is a twentieth of the tests' time
gc.set_threshold(50_000, 20, 20)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, which would hand that on to every command under test
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "ppclc", deadline=None, max_examples=60, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("ppclc")

Tensors = dict[str, torch.Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes many minutes, unless it was asked for."""
    if os.environ.get("PPCLC_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes many minutes; PPCLC_LONG=1 runs it"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def family() -> Family:
    loaded: Family = plugins.load("families", "qwen_image")
    return loaded


@pytest.fixture(scope="session")
def make_teacher(family: Family) -> Callable[..., Any]:
    """`make_teacher(num_layers, seed, **config)`: a stock model whose modulation and gates matter in every block."""
    from diffusers import QwenImageTransformer2DModel

    def make(num_layers: int = 6, seed: int = 0, **config: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = QwenImageTransformer2DModel(**{**family.tiny_config, "num_layers": num_layers, **config})
            for name, parameter in model.named_parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
                if "_mod.1.bias" in name:
                    parameter.data += 0.5 * torch.randn_like(parameter)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher: Callable[..., Any]) -> Any:
    """Six blocks. Shared: tests that change weights make their own."""
    return make_teacher(6)


@pytest.fixture(scope="session")
def teacher_folder(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared teacher as a diffusers folder. Read only: tests that break it copy it."""
    folder: Path = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def inputs(family: Family, teacher: Any) -> dict[str, Any]:
    """Keyword arguments of forward, two samples."""
    return family.example_inputs(teacher.config, batch=2, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def random_bank(family: Family) -> Callable[[Any, CompressionPlan], dict[str, Tensors]]:
    """A bank with everything a plan may ask for: an orthogonal basis, and random maps for its text and ffn edits and adapters."""

    def make(model: Any, plan: CompressionPlan) -> dict[str, Tensors]:
        g = torch.Generator().manual_seed(5)
        width = model.inner_dim
        basis = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
        bank: dict[str, Tensors] = {"modulation": {"basis": basis, "mean": 0.1 * torch.randn(width, generator=g)}}
        for edit in plan.text_stream:
            bank[plan.text_key(edit.block)] = {
                f"{name}.{part}": torch.randn(*shape, generator=g) / width**0.5
                for name in ("text_in", "text_out")
                for part, shape in (("weight", (width, width)), ("bias", (width,)))
            }
        for ffn in plan.ffn:
            weight = torch.randn(width, width, generator=g) / width**0.5
            bank[plan.ffn_key(ffn.block, ffn.stream)] = {"weight": weight, "bias": torch.randn(width, generator=g) / width**0.5}
        for interval in plan.adapters:
            adapters = {
                f"{stream}_adapter.{part}": torch.randn(*shape, generator=g) / width**0.5
                for stream in ("image", "text")
                for part, shape in (("weight", (width, width)), ("bias", (width,)))
            }
            bank[plan.interval_key(interval)] = block_state(model.transformer_blocks[interval.first]) | adapters
        return bank

    return make
