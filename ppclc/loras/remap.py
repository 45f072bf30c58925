"""A teacher's LoRA for its student: read, checked, fitted module by module, written whole or not at all.

Only the LoRA and, for a modulation rank, the student's basis are read: nothing here has the size of the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ppclc import __version__, plugins
from ppclc.errors import ModelError, OutputError, PlanError
from ppclc.families import Family
from ppclc.loading.checkpoints import STATES, places_in, read_at
from ppclc.loading.classes import stock_config
from ppclc.loading.sources import Source, check_teacher, open_configuration, open_source
from ppclc.loading.weight_files import WeightFiles, is_finite
from ppclc.loras.keys import Adapter, adapters_in, names_of
from ppclc.loras.parts import STAYS, Basis, Fate, Fitted, Modules
from ppclc.models import quiet_libraries
from ppclc.plan import CompressionPlan
from ppclc.records import STORED_AS, check_writable, digest_of, write_tensors

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What a folder with a LoRA holds, by diffusers and by PEFT."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MARK = "ppclc_plan"
"""Key of the metadata that tells a file of ours, and the plan it was made for."""
SETTINGS = "lora_adapter_metadata"
"""Key of the metadata under which diffusers keeps PEFT's settings."""
PREFIX = "transformer."


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of a LoRA: those in its metadata, else those in `adapter_config.json` beside it, which does not go along."""

    values: Mapping[str, Any]
    beside: bool

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        alpha = self._own("alpha_pattern", module, self.values.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.values.get("use_rslora") else rank)

    def _own(self, pattern: str, module: str, otherwise: Any) -> Any:
        rows = self.values.get(pattern) or {}
        return next((v for k, v in rows.items() if re.match(rf"(.*\.)?({k})$", module)), otherwise)


@dataclass(frozen=True)
class Remapped:
    """One adapter of a file with its tensors, what it is multiplied by, and what it is for the student."""

    adapter: Adapter
    alpha: torch.Tensor | None
    scale: float
    fitted: Fitted | None
    fates: Sequence[Fate]


def remap(lora: Path, plan_file: Path, out: Path | None, model: str | None) -> dict[str, Any]:
    """Write a teacher's LoRA for the student of a plan; what was kept and dropped. `model`: the teacher, its configuration is enough.

    Raises:
        ModelError: the LoRA is damaged, of another kind, or of another model; or nothing of it is left.
        PlanError: no plan, or one that the teacher cannot take.
        OutputError: the file is another's, or cannot be written.
    """
    quiet_libraries()
    plan = CompressionPlan.read(plan_file)
    file = lora_file(lora)
    out = out or file.with_name(f"{file.stem}-student.safetensors")
    check_out(out, file)
    student = student_folder(plan_file, plan)
    tensors, metadata = read_lora(file)
    modules, checked = modules_of(plan, plan_file, student, model)
    basis, mean = read_basis(student, modules) if student and plan.modulation_rank is not None else (None, None)
    with _told(file):
        settings = settings_of(file, metadata)
        adapters = adapters_in(tensors, names_of(modules.family, modules.config, modules.teacher), modules.family, modules.config)
        rows = [_remapped(adapter, tensors, settings, modules, basis) for adapter in adapters]
    if not any(row.fitted for row in rows):
        reasons = ", ".join(sorted({f.outcome for row in rows for f in row.fates}))
        raise ModelError(f"{file}: nothing of it is left in the student ({reasons or 'no module of the transformer'}); nothing was written")
    taken = {key for adapter in adapters for key in adapter.keys.values()}
    passed = {name: tensor for name, tensor in tensors.items() if name not in taken}
    written = spelled(rows, settings) | passed
    if beyond := next((n for n, t in written.items() if not is_finite(t)), None):
        raise ModelError(f"{file}: {beyond} comes out beyond what {written[beyond].dtype} holds; convert the LoRA to float32 first")
    digest = digest_of(plan.model_dump(mode="json"))
    write_lora(out, written, _moved(metadata, modules, any(_has_peft_bias(r) for r in rows)) | {MARK: digest, "ppclc": __version__})
    found = {"lora": str(file), "out": str(out), "plan": str(plan_file), "plan_digest": digest, "family": plan.family}
    return found | {"checked_against": checked, "passed_tensors": len(passed)} | summary(rows, mean if basis else None)


# -- what is read -----------------------------------------------------------------------------------------------------


def lora_file(path: Path) -> Path:
    """The safetensors file of a LoRA: the path itself, or the file of a known name in it. Raises ModelError when there is none."""
    path = path.expanduser()
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise ModelError(f"{path}: holds no LoRA, wanted {' or '.join(FILES)} in it; or give the file itself")
        return found
    if path.suffix in PICKLES:
        raise ModelError(f"{path}: is a pickle, which is never loaded; convert it to safetensors")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; wanted a LoRA's .safetensors, or the folder that holds it")
    return path


def read_lora(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA. Raises ModelError for a file that is damaged, not finite, or made for a student already."""
    places = places_in(file, STATES)
    metadata = _metadata(file)
    if MARK in metadata:
        raise ModelError(f"{file}: was made for a student already (plan {metadata[MARK]}); give the teacher's LoRA")
    tensors = {name: read_at(place) for name, place in places.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ModelError(f"{file}: tensor {name} holds NaN or infinite values, wanted finite ones")
    return tensors, metadata


def settings_of(file: Path, metadata: Mapping[str, str]) -> Settings:
    """PEFT's settings, empty where there are none. Raises ModelError for what cannot be read as such, and for DoRA."""
    beside = file.with_name("adapter_config.json")
    text, found = metadata.get(SETTINGS), False
    if text is None and file.name == FILES[1] and beside.is_file():
        text, found = beside.read_text("utf-8", errors="replace"), True
    if text is None:
        return Settings({}, False)
    where = beside.name if found else f"metadata {SETTINGS}"
    try:
        values = {k.removeprefix(PREFIX): v for k, v in json.loads(text).items()}
        settings = Settings(values, found)
        numbers = [settings.scale("", 1)]
        for pattern, number in (values.get("alpha_pattern") or {}).items():
            re.compile(pattern)
            numbers.append(float(number))
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"alphas {numbers}")
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"{where}: cannot be read as PEFT's settings ({error}); wanted r, lora_alpha and the like") from None
    if values.get("use_dora"):
        raise ModelError(f"{where}: use_dora = true: is DoRA, which is not supported; wanted a LoRA of two factors")
    return settings


def student_folder(plan_file: Path, plan: CompressionPlan) -> Path | None:
    """Where the plan's student lies, as seen from the plan: beside it, or below as in OUT; None where none does."""
    home = plan_file.parent
    for folder in (home, home / "transformer", home / "model" / "transformer"):
        if (folder / "config.json").is_file() and (folder / "plan.json").is_file():
            try:
                if CompressionPlan.read(folder / "plan.json") == plan:
                    return folder
            except PlanError:
                continue
    return None


def modules_of(plan: CompressionPlan, plan_file: Path, student: Path | None, model: str | None) -> tuple[Modules, str | None]:
    """Teacher's and student's modules, and what shapes are checked against: `teacher`, `student` or nothing.

    Raises:
        PlanError: of another model, of a family that is not known, or with blocks of groups that only a configuration tells.
    """
    family = next((f for n in plugins.names("families") if (f := plugins.load("families", n)).name == plan.family), None)
    if family is None:
        raise PlanError(f"{plan_file}: family = {plan.family!r}: wanted one of {', '.join(plugins.names('families'))}")
    if model is not None:
        source = open_configuration(model)
        check_teacher(source)
        if source.family is not family:
            raise PlanError(f"{plan_file}: family = {plan.family!r}, but {model} is of {source.family.name!r}")
        return Modules.of(family, source.config, plan, "all"), "teacher"
    if student is not None:
        return Modules.of(family, teacher_config(open_source(str(student)), family, plan), plan, "left"), "student"
    if len(family.groups) > 1:
        names = " and which of ".join(g.name for g in family.groups)
        raise PlanError(
            f"{plan_file}: does not tell which blocks are of {names}; give the plan.json in the student's own folder, or the teacher with --model"
        )
    config = {**stock_config(family), "_class_name": family.class_name, family.groups[0].count_key: plan.num_blocks}
    return Modules.of(family, config | family.restored({}, plan), plan, "none"), None


def teacher_config(source: Source, family: Family, plan: CompressionPlan) -> dict[str, Any]:
    """A student's teacher's configuration, as far as the student's tells it. Raises PlanError when it is another plan's student."""
    sizes = family.sizes(source.config) if source.family is family else []
    if sum(sizes) != len(plan.kept):
        raise PlanError(
            f"{source.folder}: has {sum(sizes)} blocks of {family.name}, but its plan.json keeps {len(plan.kept)}; give --model"
        )
    ends = [plan.kept[n] if n < len(plan.kept) else plan.num_blocks for n in (sum(sizes[: i + 1]) for i in range(len(sizes)))]
    counts = {g.count_key: end - first for g, first, end in zip(family.groups, [0, *ends], ends, strict=False)}
    known = stock_config(family)
    own = {k: v for k, v in source.config.items() if k in known}
    return known | own | counts | family.restored(source.config, plan) | {"_class_name": family.class_name}


def read_basis(student: Path, modules: Modules) -> tuple[Basis | None, str | None]:
    """A student's modulation basis, None where no weights lie there, and where the teacher's mean was found: `calibration` or `basis`.

    Raises:
        ModelError: damaged weights, or a basis of another shape.
    """
    source = open_source(str(student))
    if not source.has_weights:
        return None, None
    name = modules.family.basis_module
    files = WeightFiles(source, torch.float64, torch.device("cpu"))
    rank, width = modules.student[name]
    for kind, shape in (("weight", (rank, width)), ("bias", (rank,))):
        place = files.places.get(f"{name}.{kind}")
        if place is None or place.shape != shape:
            raise ModelError(
                f"{student}: {name}.{kind} has shape {list(place.shape) if place else None}, wanted {list(shape)} by plan.json"
            )
    weight, bias = files[f"{name}.weight"], files[f"{name}.bias"]
    means = [m for m in _calibrated_means(student) if m.shape == (width,)]
    # Several calibrations may lie there: the student's is the one that its own basis maps to nothing.
    mean = min(means, key=lambda m: float((weight @ m + bias).norm()), default=None)
    return Basis.of(weight, bias, mean), "basis" if mean is None else "calibration"


def _calibrated_means(student: Path) -> Iterator[torch.Tensor]:
    """The teacher's mean of `SiLU(temb)` by each calibration of the run that the student lies in, `OUT/model` or `OUT/sizes/NAME`."""
    for out in list(student.resolve().parents)[1:3]:
        for record in sorted(out.glob("records/calibrate-*/record.json")):
            try:
                rows = json.loads(record.read_text("utf-8"))["rows"]["temb"]
                total = read_at(places_in(record.with_name("tensors.safetensors"))["temb.sum"])
            except (OSError, ValueError, KeyError, TypeError, ModelError):
                continue
            yield total.double().reshape(-1) / max(1, int(rows))


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Put the file in front of what is said of its content."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from None


# -- what becomes of it -----------------------------------------------------------------------------------------------


def _remapped(adapter: Adapter, tensors: Mapping[str, torch.Tensor], settings: Settings, modules: Modules, basis: Basis | None) -> Remapped:
    down, up, alpha, bias = (tensors.get(adapter.keys.get(role, "")) for role in ("down", "up", "alpha", "bias"))
    assert down is not None
    assert up is not None
    names, key = adapter.name.modules, adapter.keys["down"]
    for role, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ModelError(f"{adapter.keys[role]}: is stored as {tensor.dtype}, wanted floating point")  # type: ignore[index]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or any(n != 1 for n in up.shape[2:]) or not down.numel() * up.numel():
        raise ModelError(f"{key}: factors have shapes {list(down.shape)} and {list(up.shape)}, wanted (rank, inputs) and (outputs, rank)")
    if down.shape[0] != up.shape[1]:
        raise ModelError(f"{key}: has rank {down.shape[0]}, and {adapter.keys['up']} has rank {up.shape[1]}; wanted one rank")
    if alpha is not None and alpha.numel() != 1:
        raise ModelError(f"{adapter.keys['alpha']}: has shape {list(alpha.shape)}, wanted one number")
    if bias is not None and bias.shape != up.shape[:1]:
        raise ModelError(f"{adapter.keys['bias']}: has shape {list(bias.shape)}, wanted {list(up.shape[:1])}")
    modules.check(names, down, up, key)
    scale = settings.scale(names[0], len(down)) if alpha is None else float(alpha.reshape(())) / len(down)
    return Remapped(adapter, alpha, scale, *modules.fit(names, down, up, bias, scale, basis))


def spelled(rows: Sequence[Remapped], settings: Settings) -> dict[str, torch.Tensor]:
    """Tensors by key, spelled as the file spells them.

    What the second factor's bias goes with has no alpha, which diffusers would not read beside it: it is multiplied into the factor, as
    is what stood in `adapter_config.json`. PEFT gives a bias to all adapters of a file or to none, so that others get zeros.
    """
    found: dict[str, torch.Tensor] = {}
    with_bias = any(_has_peft_bias(row) for row in rows)
    for row in rows:
        adapter, fitted = row.adapter, row.fitted
        if fitted is None:
            continue
        number, up, bias = fitted.number, fitted.up, fitted.bias
        folded = (with_bias and adapter.peft_bias) if row.alpha is not None else settings.beside
        if folded:
            # What the settings within the file say is still read from there.
            factor = row.scale if settings.beside else row.scale / (settings.scale(adapter.name.modules[0], len(fitted.down)) or 1.0)
            up, bias = _scaled(up, factor), None if bias is None else _scaled(bias, factor)
        if bias is not None and not adapter.peft_bias:
            bias = _scaled(bias, row.scale)
        if bias is None and with_bias and adapter.peft_bias:
            bias = torch.zeros(len(up), dtype=up.dtype)
        found[adapter.key("down", number)], found[adapter.key("up", number)] = fitted.down, up
        if row.alpha is not None and not folded:
            found[adapter.key("alpha", number)] = row.alpha
        if bias is not None:
            found[adapter.bias_key(number)] = bias
    return found


def _has_peft_bias(row: Remapped) -> bool:
    return row.fitted is not None and row.fitted.bias is not None and row.adapter.peft_bias


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else (scale * x.double()).to(x.dtype)


def _moved(metadata: Mapping[str, str], modules: Modules, has_bias: bool) -> dict[str, str]:
    """A file's metadata with PEFT's settings told of the student's modules; what names no module of the teacher stays."""
    if SETTINGS not in metadata:
        return {"format": "pt"} | dict(metadata)
    values = json.loads(metadata[SETTINGS])

    def moved(name: str) -> str | None:
        if name not in modules.teacher:
            return name
        own, _, outcome = modules.place(name)
        return own if outcome in STAYS else None

    for key, value in values.items():
        if isinstance(value, dict) and key.endswith("_pattern"):
            values[key] = {n: v for k, v in value.items() if (n := moved(k)) is not None}
        elif isinstance(value, list) and key.endswith("_modules"):
            values[key] = [n for k in value if (n := moved(str(k))) is not None]
    if has_bias:
        values[f"{PREFIX if any(k.startswith(PREFIX) for k in values) else ''}lora_bias"] = True
    return {"format": "pt", **metadata, SETTINGS: json.dumps(values, indent=2, sort_keys=True)}


def summary(rows: Sequence[Remapped], mean: str | None) -> dict[str, Any]:
    """Counts of modules and shares of the change's squared Frobenius norm, by outcome; shares are None where the change is nothing or without bounds."""
    fates = [fate for row in rows for fate in row.fates]
    whole = sum(f.whole for f in fates)

    def share(norm: float) -> float | None:
        found = norm / whole if whole else math.nan
        return found if math.isfinite(found) else None

    def counted(some: Sequence[Fate]) -> dict[str, Any]:
        return {"modules": len(some), "norm_share": share(sum(f.whole for f in some)), "norm_kept": share(sum(f.kept for f in some))}

    outcomes = {o: counted([f for f in fates if f.outcome == o]) for o in dict.fromkeys(f.outcome for f in fates)}
    return {
        "schemes": sorted({row.adapter.scheme.name for row in rows}),
        "modules": len(fates),
        "kept": sum(f.outcome in STAYS for f in fates),
        "dropped": sum(f.outcome not in STAYS for f in fates),
        "norm_kept": share(sum(f.kept for f in fates)),
        "outcomes": dict(sorted(outcomes.items(), key=lambda o: (o[0] not in STAYS, -o[1]["modules"]))),
        "on_intervals": counted([f for f in fates if f.merged]),
        "biases": sum(row.fitted is not None and row.fitted.bias is not None for row in rows),
        "modulation_mean": mean,
    }


# -- what is written --------------------------------------------------------------------------------------------------


def check_out(out: Path, file: Path) -> None:
    """Raise OutputError for what is no safetensors file's path, for the LoRA itself, and for a file that was not written by `remap`."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise OutputError(f"{out}: wanted a file whose name ends with .safetensors; give one with -o")
    if out.exists():
        if out.samefile(file):
            raise OutputError(f"{out}: is the teacher's LoRA itself; give another file with -o")
        if MARK not in _metadata(out):
            raise OutputError(f"{out}: is there already, and not made by this command; give another file with -o")
    check_writable(out.parent)


def _metadata(file: Path) -> dict[str, str]:
    """A safetensors file's metadata, empty for one that is not whole."""
    try:
        with safe_open(file, "pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def write_lora(out: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write the file whole or not at all. Raises OutputError when it cannot be."""
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in STORED_AS:
            raise OutputError(f"{out}: tensor {name} is of {tensor.dtype}, which is not written")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, tensors, metadata)
