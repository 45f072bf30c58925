"""What a run does on a GPU beside training: encoders and VAE on it, models that take turns for the verdict, memory that runs out told in one message."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fake_cuda
from benchmarks.fake_cuda import DEVICE
from ppclc.data import encoding
from ppclc.data import samples as samples_module
from ppclc.data.samples import Samples, open_samples
from ppclc.errors import memory_lacks
from ppclc.families import Family
from ppclc.loading.sources import open_source
from ppclc.machine import devices
from ppclc.passes.verify import VerifySettings, judged_without_task
from tests.contracts.test_families import subject_of
from tests.pipelines import flux2_pipeline, flux_pipeline, qwen_pipeline, sd3_pipeline

PIPELINES = {"flux": flux_pipeline, "flux2": flux2_pipeline, "qwen_image": qwen_pipeline, "sd3": sd3_pipeline}
GRID = (4, 8)
faked = pytest.mark.skipif(bool(fake_cuda.lacks()), reason=fake_cuda.lacks())


@pytest.fixture
def on_fake_gpu(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """A subject, its pipeline with encoders and VAE on a GPU that is none, and latents there."""
    subject = subject_of(request.param)
    pipeline, encoders = PIPELINES[request.param](subject.model), subject.family.encoders
    latents = torch.randn(2, *subject.family.latents(subject.config, *GRID))
    pipeline.transformer = None
    with fake_cuda.fake_cuda(10**10), torch.no_grad():
        for name in (*encoders.text_parts, *encoders.image_parts):
            part = getattr(pipeline, name)
            if isinstance(part, torch.nn.Module):
                part._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))
        yield subject, pipeline, latents.clone().to(DEVICE)


@pytest.mark.slow
@faked
@pytest.mark.parametrize("on_fake_gpu", PIPELINES, indirect=True)
def test_images_are_encoded_and_decoded_where_the_vae_is(on_fake_gpu: tuple[Any, Any, torch.Tensor]) -> None:
    """No operator of theirs has tensors on two devices: a fake one would refuse them."""
    subject, pipeline, latents = on_fake_gpu
    encoders = subject.family.encoders
    images = encoders.decode(pipeline, latents, GRID)
    assert images.device == DEVICE
    again = encoders.encode_images(pipeline, 2 * images - 1)
    assert (again.device, again.shape) == (DEVICE, latents.shape)


@pytest.mark.slow
@faked
@pytest.mark.parametrize("on_fake_gpu", ["flux", "flux2", "sd3"], indirect=True)  # how much text Qwen-Image's mask leaves needs values
def test_prompts_are_encoded_where_the_encoders_are(on_fake_gpu: tuple[Any, Any, torch.Tensor]) -> None:
    subject, pipeline, _ = on_fake_gpu
    found = subject.family.encoders.encode_prompts(pipeline, ["a cat", "two birds"])
    assert {tensor.device for tensor in found.values()} == {DEVICE}


class Moved(torch.nn.Module):
    """A model that notes where it is put and called, and stays on the CPU."""

    def __init__(self, model: Any, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.model, self.name, self.log = model, name, log
        self.dtype, self.device, self.config = model.dtype, model.device, model.config

    def to(self, device: Any) -> Moved:  # type: ignore[override]
        self.log.append((self.name, f"to {device}"))
        return self

    def forward(self, **given: Any) -> Any:
        self.log.append((self.name, f"called on {len(given['hidden_states'])}"))
        return self.model(**given)


@pytest.fixture(scope="module")
def models(make_teacher: Callable[..., Any]) -> tuple[Any, Any]:
    return make_teacher(3), make_teacher(2, seed=1)


@pytest.fixture(scope="module")
def samples(models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("verify") / "teacher"
    models[0].save_pretrained(folder)
    return open_samples("noise", open_source(str(folder)), models[0], "judge")


def decode(latents: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(latents.reshape(1, 3, 16, -1))


@pytest.mark.parametrize("room", [1, 3.5, 1000])
def test_models_take_turns_on_the_gpu_and_the_verdict_is_the_same(
    room: float, models: tuple[Any, Any], samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = VerifySettings(samples=20, images=2, steps=2, judges="none")
    wanted = judged_without_task(*models, samples, settings, decode)
    a_sample = samples_module.STATES * 2 * 32 * (32 + 5)
    monkeypatch.setattr(samples_module, "free_bytes", lambda device: int(2 * room * a_sample) if device == "cuda" else 0)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 10**9)
    log: list[tuple[str, str]] = []
    teacher, student = (Moved(m, n, log) for m, n in zip(models, ("teacher", "student"), strict=True))
    monkeypatch.setattr(devices, "give_back", lambda: log.append(("", "empty")))
    found = judged_without_task(teacher, student, samples, settings, decode, "cuda")
    moves = [entry for entry in log if not entry[1].startswith("called")]
    assert moves == [entry for n in ("teacher", "student") for entry in ((n, "to cuda"), (n, "to cpu"), ("", "empty"))]
    most = max(int(what.rpartition(" ")[2]) for _, what in log if what.startswith("called"))
    assert most == min(16, 1 << int(room).bit_length() - 1)
    calls = [n for n, what in log if what.startswith("called")]
    assert calls == sorted(calls, reverse=True)  # the teacher's before the student's
    for name, quality in wanted.quality.items():
        assert found.quality[name].student == pytest.approx(quality.student, rel=1e-5), name
    assert all(torch.allclose(found.tensors[n], images, atol=1e-5) for n, images in wanted.tensors.items())


def test_a_model_that_fails_on_the_gpu_comes_back(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str]] = []
    monkeypatch.setattr(devices, "free_bytes", lambda device: 10**9)
    model = Moved(models[0], "teacher", log)
    with pytest.raises(RuntimeError, match="broke"), devices.placed(model, "cuda"):
        raise RuntimeError("broke")
    assert log == [("teacher", "to cuda"), ("teacher", "to cpu")]


def test_a_model_that_the_gpu_has_no_room_for_stays_on_the_cpu(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str]] = []
    model = Moved(models[0], "teacher", log)
    weights = sum(p.nbytes for p in model.parameters())
    for free, place in ((int(weights / devices.PLACED_SHARE) - 10, "cpu"), (int(weights / devices.PLACED_SHARE) + 10, "cuda")):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        with devices.placed(model, "cuda") as where:
            assert where == place
    assert log == [("teacher", "to cuda"), ("teacher", "to cpu")]


@pytest.mark.slow
@pytest.mark.parametrize(("free", "place"), [(10**9, "cuda"), (100, "cpu")])
def test_encoders_that_do_not_fit_on_the_gpu_stay_on_the_cpu(
    free: int, place: str, family: Family, make_teacher: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen_pipeline(subject_of("qwen_image").model).save_pretrained(tmp_path)
    put: list[Any] = []
    monkeypatch.setattr(encoding, "free_bytes", lambda device: free)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: put.append(device) or self)
    monkeypatch.setattr(encoding, "give_back", lambda: put.append("emptied"))
    assert family.encoders is not None
    with encoding.pipeline_with(tmp_path, family.encoders, ("vae",), "float32", "cuda") as (pipeline, where):
        assert where == place
        assert pipeline.vae is not None
    assert put == [place, "emptied"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "the GPU has no memory left (CUDA out of memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "the GPU has no memory left (CUDA error: out of memory)"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "the GPU has no memory left"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU has no memory left"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), "the GPU has no memory left"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), ""),
        (MemoryError(), "this machine has no memory left (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "this machine has no memory left"),
        (RuntimeError("shapes do not fit"), ""),
        (ValueError("memory"), ""),
    ],
)
def test_memory_that_could_not_be_had_is_known(error: BaseException, told: str) -> None:
    assert memory_lacks(error).startswith(told)
    assert bool(memory_lacks(error)) == bool(told)


@pytest.mark.slow
def test_memory_that_runs_out_is_one_message_and_exit_code_3() -> None:
    script = """
import sys, torch
from ppclc import cli, commands
def runs_out(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
commands.doctor = runs_out
sys.argv = ["ppclc", "doctor"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("ppclc: the GPU has no memory left (CUDA out of memory. Tried to allocate 2.00 GiB.); wanted")
    assert "Traceback" not in done.stderr
