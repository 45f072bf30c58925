"""Engines of a model of four blocks at Qwen-Image's own width: whether they are built and run on this GPU, how near eager they are, how fast.

TensorRT, TensorRT-RTX and ONNX Runtime's CUDA provider, those that are installed, by the project's own export.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.ladder import DTYPE, Pool, Rung, stand
from benchmarks.gpu.measuring import NotRun, Proof, Row, interleaved_ms, reclaim, rows_of, short
from ppclc import plugins
from ppclc.families import Family, Lowered
from ppclc.loading.published import published_config
from ppclc.lowering import parity, quiet
from ppclc.passes.export import export_model

BLOCKS = 4
ROUNDS = 10


@dataclass(frozen=True)
class Subject:
    """The model, lowered, its size in tokens, and inputs on the device that it was not exported with."""

    family: Family
    model: Any
    lowered: Lowered
    size: Mapping[str, int]
    inputs: dict[str, torch.Tensor]
    dtype: str


def engines(proof: Proof) -> list[Row]:
    """A row for each library."""
    libraries: dict[str, Callable[[Proof, Subject], list[Row]]] = {
        "tensorrt": partial(_tensorrt, "tensorrt"),
        "tensorrt_rtx": partial(_tensorrt, "tensorrt_rtx"),
        "onnxruntime": _onnxruntime,
    }
    reasons = {name: _lacks(proof, name) for name in libraries}
    if all(reasons.values()):
        raise NotRun("; ".join(dict.fromkeys(reasons.values())))
    subject = _subject(proof)
    cases = [({"library": name}, partial(_unless, reasons[name], run, proof, subject)) for name, run in libraries.items()]
    return rows_of(proof, cases)


def _unless(reason: str, run: Callable[[Proof, Subject], list[Row]], proof: Proof, subject: Subject) -> Sequence[Row]:
    if reason:
        raise NotRun(reason)
    return run(proof, subject)


def _lacks(proof: Proof, name: str) -> str:
    """Why a library cannot be tried here; empty where it can."""
    if find_spec(name) is None:
        return f"{name} is not installed"
    if not proof.is_cuda:
        return f"{name}: there is no CUDA device"
    if name == "onnxruntime":
        there = import_module(name).get_available_providers()
        if "CUDAExecutionProvider" not in there:
            return f"onnxruntime has no CUDA provider here, it has {', '.join(there)}"
    return ""


def _subject(proof: Proof) -> Subject:
    family: Family = plugins.load("families", "qwen_image")
    config = published_config("Qwen/Qwen-Image")[1] | {"num_layers": BLOCKS}
    size = {"batch": 1, "height": 83, "width": 83, "text": 512}
    if proof.tiny:
        config, size = {**family.tiny_config, "_class_name": family.class_name}, {"batch": 1, "height": 4, "width": 8, "text": 5}
    pool: Pool = {}
    model = stand(family, Rung("", config), pool, proof).model
    lowered = family.lowered(model)
    inputs = {name: tensor.to(proof.device) for name, tensor in lowered.inputs(**size).items()}
    return Subject(family, model, lowered, size, inputs, "float32" if proof.tiny else DTYPE)


def _digest(subject: Subject) -> str:
    return hashlib.sha256(repr((sorted(subject.model.config.items()), subject.dtype)).encode()).hexdigest()


def _tensorrt(name: str, proof: Proof, subject: Subject) -> list[Row]:
    """An engine of this one size, built and run here."""
    proof.needs(70)
    options = {"library": name, "sizes": [dict(subject.size)]}
    return _row(proof, subject, "tensorrt", options, version_of(name))


def _onnxruntime(proof: Proof, subject: Subject) -> list[Row]:
    """The ONNX model by the CUDA provider; its inputs come from the CPU and its output goes there."""
    proof.needs(50)
    return _row(proof, subject, "onnxruntime", {}, version_of("onnxruntime-gpu", "onnxruntime"))


def _row(proof: Proof, subject: Subject, backend: str, options: dict[str, Any], release: str) -> list[Row]:
    plugin = plugins.load("backends", backend)
    row: Row = {"version": release, "dtype": subject.dtype, "blocks": BLOCKS, "size": dict(subject.size)}
    with tempfile.TemporaryDirectory(prefix="ppclc-gpu-") as home:
        start = time.perf_counter()
        model = subject.model.to("cpu")  # exporters and parsers take weights from there
        try:
            with quiet():
                made = export_model(
                    model, subject.family, backend, subject.dtype, Path(home) / "x", _digest(subject), options=options, compared=False
                )
        finally:
            subject.model.to(proof.device)
        row |= {"export_s": time.perf_counter() - start, "bytes": made.bytes, "seconds": dict(made.seconds)}
        row |= {k: made.options[k] for k in ("attention_fused", "attention_total", "float32_products") if k in made.options}
        proof.say(f"{backend}: written in {row['export_s']:.1f} s")
        try:
            start = time.perf_counter()
            session = plugin.load(Path(home) / "x", subject.lowered)
            got = session.run(subject.inputs)
            row["load_and_first_run_s"] = time.perf_counter() - start
        except Exception as error:
            return [row | {"built": True, "not_run": f"built, but does not run: {type(error).__name__}: {short(error, 600)}"}]
        with torch.no_grad():
            wanted = subject.lowered.reference(subject.inputs)
            distance = parity(wanted, got)
            calls = {"engine": partial(session.run, subject.inputs), "eager": partial(subject.lowered.reference, subject.inputs)}
            times = {label: median(ms) for label, ms in interleaved_ms(calls, proof, ROUNDS).items()}
        row |= {"rel_l2": distance.rel_l2, "cosine": distance.cosine, "ms": times["engine"], "eager_ms": times["eager"]}
        del session, got, wanted
        reclaim()
    return [row | {"speedup": times["eager"] / times["engine"]}]


def version_of(*names: str) -> str:
    """The version of the first of these distributions that is installed, else of the module of the first name."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(getattr(import_module(names[0]), "__version__", "unknown"))
