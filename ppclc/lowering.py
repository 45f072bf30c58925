"""What export passes and back ends share: torch.export with named axes, and the distance of an artefact from eager."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

import torch
from torch.export import Dim, ExportedProgram

from ppclc.errors import VerificationError
from ppclc.records import Parity

MAX_ABS = {"float32": 1e-4}
"""Largest difference from eager by dtype, and `REL_L2` the largest relative one, against eager in the same dtype."""
REL_L2 = {"bfloat16": 2e-2, "float16": 2e-2}
CHATTY = ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")


def exported_program(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    ranges: Mapping[str, tuple[int, int]],
) -> ExportedProgram:
    """The module as torch.export captures it, with dynamic axes by name, one symbol a name.

    Named dims and never `Dim.AUTO`, which freezes an axis without a word. A name may be a multiple of another, as `2*height`.

    Raises:
        ValueError: a dynamic axis has size 1 in the example, which torch would take for a constant.
    """
    for name, axes in dynamic.items():
        for axis, label in axes.items():
            if inputs[name].shape[axis] == 1:
                raise ValueError(f"{name}: axis {axis} ({label}) has size 1 in the example inputs; wanted 2 or more")
    dims = {label: Dim(label, min=least, max=greatest) for label, (least, greatest) in ranges.items()}
    for label in {label for axes in dynamic.values() for label in axes.values()} - dims.keys():
        times, _, base = label.partition("*")
        dims[label] = int(times) * dims[base]
    shapes = {name: {axis: dims[label] for axis, label in dynamic.get(name, {}).items()} for name in inputs}
    with torch.no_grad():
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes)


def dtype_name(module: torch.nn.Module) -> str:
    """Name of the dtype of a module's parameters, as `float32`; `mixed` where they have several."""
    names = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    return names.pop() if len(names) == 1 else "mixed"


def gpu() -> str | None:
    """The current CUDA device with its compute capability and driver, as artefacts depend on it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"
    return f"{about.name}, compute capability {about.major}.{about.minor}, driver {driver}"


def parity(reference: torch.Tensor, got: torch.Tensor) -> Parity:
    """Distance of an output from eager's, in float64.

    `rel_l2` is the norm of the difference over the reference's, `cosine` that of the angle between both.

    Raises:
        VerificationError: the shapes differ.
    """
    if reference.shape != got.shape:
        raise VerificationError(f"output has shape {list(got.shape)}, wanted {list(reference.shape)} as eager gives it")
    a, b = (t.detach().cpu().double().flatten() for t in (reference, got))
    norm_a, norm_b, difference = a.norm().item(), b.norm().item(), (b - a).norm().item()
    both = norm_a * norm_b
    return Parity(
        max_abs=(b - a).abs().max().item(),
        rel_l2=difference / norm_a if norm_a else math.inf if difference else 0.0,
        cosine=(a @ b).item() / both if both else float(norm_a == norm_b),
    )


def passes(distance: Parity, dtype: str, rel_l2: float | None = None) -> bool:
    """Whether a distance is within its dtype's limit, or within a relative one that is given; NaN is not."""
    if rel_l2 is None and dtype in MAX_ABS:
        return distance.max_abs <= MAX_ABS[dtype]
    return distance.rel_l2 <= (rel_l2 or REL_L2[dtype])


def worst(parities: Iterable[Parity]) -> Parity:
    """The largest distances and the smallest cosine of several; NaN is worse than any number."""
    all_of = list(parities)
    return Parity(
        max_abs=max((p.max_abs for p in all_of), key=_nan_last),
        rel_l2=max((p.rel_l2 for p in all_of), key=_nan_last),
        cosine=-max((-p.cosine for p in all_of), key=_nan_last),
    )


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which exporters print nothing, warn of nothing and log errors only."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
