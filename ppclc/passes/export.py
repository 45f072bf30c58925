"""export: lower a model to a back end, run what was written beside eager, and publish it when both agree."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import ppclc
from ppclc import plugins
from ppclc.artefacts.receipts import RECORD, export_json, is_intact, read_export
from ppclc.artefacts.triage import block_paths, first_divergence, overflow
from ppclc.backends import Backend, ExportRequest, Profile
from ppclc.errors import OutputError, PpclcError, RecipeError, UnavailableError, VerificationError, first_line
from ppclc.families import Family, Lowered
from ppclc.loading.classes import DTYPES
from ppclc.loading.float8 import ARITHMETIC, in_float8
from ppclc.loading.mapped import can_be_mapped, mapped_model, store
from ppclc.loading.sources import Source
from ppclc.lowering import MAX_ABS, REL_L2, parity, passes, worst
from ppclc.models import load_source, require_library
from ppclc.records import Export, Parity, digest_of, disk_errors, file_digest, whole_folder, write_text

VERSION = 3
LARGE = 10**9
"""Bytes of weights beyond which they are not read into memory."""
TOO_LARGE = "weights beyond 1 GB: options.compare = true runs it beside eager, which takes the memory of both"
LOUD = 30
"""How many times louder some channels of text are made than the others."""
FLOAT8 = "float8"
OWN_OPTIONS = ("compare",)
"""Options of this pass, which every back end may be given."""
SAMPLES, RANDOM = "samples of the run", "random inputs"
"""What float8 found its scales on."""
Progress = Callable[[float, str], None]
Calibration = Callable[[Lowered], Iterable[Mapping[str, Any]]]
"""Batches of a lowered module's inputs, in its dtype."""


def check_backend(name: str, dtype: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The back end that writes what `name` runs, when it can do so here.

    Raises:
        RecipeError: no such back end, one that writes nothing, a dtype or an option that it has not, a value that an option cannot have.
        UnavailableError: a library that it needs is not installed.
    """
    writer = named_backend(name, dtype, options)
    for modules, extra in {**dict(writer.requires), **dict(plugins.load("backends", name).requires)}.items():
        require_library(modules, extra)
    if reason := writer.lacks():
        raise UnavailableError(f"export.backend = {name!r}: {reason}")
    _check_values(writer, options)
    return writer


def named_backend(name: str, dtype: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The back end that writes what `name` runs, whatever the machine. Raises RecipeError as `check_backend` does."""
    if name not in plugins.names("backends"):
        raise RecipeError(f"export.backend = {name!r}: no such back end; there are {', '.join(plugins.names('backends'))}")
    writer = _writer(name)
    if writer.export is None:
        raise RecipeError(f"export.backend = {name!r}: writes no model, it runs the one in memory; wanted {', '.join(writers())}")
    if dtype not in writer.dtypes:
        raise RecipeError(f"export.dtype = {dtype!r}: wanted {' or '.join(writer.dtypes)}; {name} writes no other in this version")
    for option in options or {}:
        if option not in (*writer.options, *OWN_OPTIONS):
            raise RecipeError(f"export.{option}: {name} has no such option; it has {', '.join(writer.options) or 'none'}")
    with suppress(UnavailableError):
        _check_values(writer, options)
    return writer


def _check_values(writer: Backend, options: Mapping[str, Any] | None) -> None:
    own = {option: value for option, value in (options or {}).items() if option not in OWN_OPTIONS}
    writer.check({**writer.options, **own})


def writers() -> list[str]:
    """Names of the back ends that a model can be exported to."""
    return [name for name in plugins.names("backends") if _writer(name).export]


def _writer(name: str) -> Backend:
    backend: Backend = plugins.load("backends", name)
    return _writer(backend.artefact) if backend.artefact else backend


def export_digest(model_digest: str, backend_name: str, dtype: str, options: Mapping[str, Any] | None = None) -> str:
    """Digest of the export that these would make; `read_export` gives the one that is there."""
    return digest_of(["export", VERSION, model_digest, backend_name, dtype, {**_writer(backend_name).options, **(options or {})}])


def export_model(
    model: Any,
    family: Family,
    backend_name: str,
    dtype: str,
    folder: Path,
    model_digest: str,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    store: Callable[[Path], Mapping[str, tuple[int, int]]] | None = None,
    compared: bool = True,
    calibration: Calibration | None = None,
) -> Export:
    """Write the model, whose dtype is `dtype` (bfloat16 for float8), to a folder for a back end and compare it with eager at the family's sizes.

    The model is left as it is. The folder appears whole or not at all; an earlier export there is replaced, but one of the
    same model, options and library versions is kept as it is where `kept_export` finds it whole. Where this machine cannot run what was
    written, nothing is compared and the record says why. force: write float16 of a family that overflows in it, and what overflows here.
    store: as in `ExportRequest`. compared: whether to run what was written beside eager, which takes the memory of both. calibration: what float8 finds
    its scales on; without it the inputs that artefacts are compared on.

    Raises:
        RecipeError, UnavailableError: as `check_backend` and `check_float16` do.
        OutputError: the folder holds something else, or cannot be written.
        VerificationError: what was written does not run, or differs from eager by more than its dtype may, where it says.
    """
    writer, runner = check_backend(backend_name, dtype, options), plugins.load("backends", backend_name)
    _check_folder(folder)
    tell = progress or (lambda done, what: None)
    kept = kept_export(folder, model_digest, backend_name, dtype, options)
    if kept and not (calibration and dtype == FLOAT8 and kept.options["float8"]["scales"] != SAMPLES):
        tell(1.0, "")
        return kept
    check_float16(family, dtype, force)
    given, seconds = {**writer.options, **(options or {})}, Seconds()
    lowered = family.lowered(model)
    check_sizes(lowered, given)
    arithmetic: str = dtype
    more: dict[str, Any] = {}
    if dtype == FLOAT8:
        arithmetic = ARITHMETIC
        lowered, more = _quantized(lowered, family, model, calibration)
    if dtype == "float16" and not force:  # of a large model too, which reads its files once for every case
        check_range(lowered, f"{folder}: {backend_name}")
    with whole_folder(folder) as draft:
        tell(0.0, "lower")
        with seconds.of("prepare"):
            write_text(draft / "transformer" / "config.json", config_json(model))
            request = _request(lowered, arithmetic, draft, given, model_digest, store, dtype)
        assert writer.export is not None
        written = writer.export(request)
        tell(0.8, "compare")
        reason = runner.cannot_run() or ("" if compared else TOO_LARGE)
        outcome = Compared(None, {"not_run": reason})
        if not reason:
            with seconds.of("compare"):
                outcome = compare(runner, draft, lowered, arithmetic, tell, sizes_of(lowered, given))
            limit = _quantized_limit(more["float8"]["rel_l2_to_bfloat16"]) if more else None
            if outcome.parity and not passes(outcome.parity, arithmetic, limit):
                where = _triage(writer, runner, lowered, (family, model.config), outcome.worst, arithmetic, given)
                raise VerificationError(
                    f"{folder}: {backend_name}: {_differs(outcome.parity, arithmetic, limit)}{where}; nothing was written"
                )
        files = {p.relative_to(draft).as_posix(): p for p in sorted(draft.rglob("*")) if p.is_file()}
        export = Export(
            digest=export_digest(model_digest, backend_name, dtype, options),
            backend=backend_name,
            folder=str(folder),
            files={name: file_digest(path) for name, path in files.items()},
            bytes=sum(path.stat().st_size for path in files.values()),
            dtype=dtype,
            shapes=[dict(size) for size in sizes_of(lowered, given)],
            parity=outcome.parity,
            inputs=list(request.inputs),
            options=written.options | more | {"session": outcome.session},
            versions=versions(writer),
            seconds={**written.seconds, **seconds.by_phase},
        )
        write_text(draft / RECORD, export_json(export, model_digest))
    tell(1.0, "")
    return export


def _quantized(lowered: Lowered, family: Family, model: Any, calibration: Calibration | None) -> tuple[Lowered, dict[str, Any]]:
    """The same in float8 by scales found on the calibration, else on the inputs that artefacts are compared on; and what is told of it."""
    plain, batches = lowered.reference, calibration or (lambda lowered: _cases(lowered, ARITHMETIC, lowered.sizes))
    lowered, told = in_float8(lowered, family, model.config, batches(lowered))
    scales = SAMPLES if calibration else RANDOM
    return lowered, {"float8": told | {"scales": scales, "rel_l2_to_bfloat16": _loss(plain, lowered)}}


def _quantized_limit(loss: float) -> float:
    """How far an artefact in float8 may lie from eager that rounds the same way, of which the rounding itself takes so much.

    A rounding of bfloat16 on the other side of a step of float8 is a whole step; where many are, both lie from bfloat16 in directions of their own.
    """
    return max(REL_L2[ARITHMETIC], math.sqrt(2) * loss)


def _request(
    lowered: Lowered,
    arithmetic: str,
    draft: Path,
    given: Mapping[str, Any],
    model_digest: str,
    store: Callable[[Path], Mapping[str, tuple[int, int]]] | None,
    label: str,
) -> ExportRequest:
    """What a back end is asked to write."""
    example = lowered.inputs(**lowered.sizes[0])
    return ExportRequest(
        lowered.module,
        example,
        lowered.dynamic,
        lowered.ranges,
        arithmetic,
        draft,
        given,
        profiles(lowered, given),
        model_digest=model_digest,
        store=store,
        label=label,
    )


def check_sizes(lowered: Lowered, options: Mapping[str, Any]) -> None:
    """Raise RecipeError for sizes that are none; a back end without the option has none to check."""
    wanted = "wanted a list of {batch, height, width, text}, whole numbers above 0, image sides in tokens"
    sizes = options.get("sizes")
    if sizes is None:
        return
    keys = set(lowered.usual)
    if not isinstance(sizes, list) or not sizes or not all(isinstance(s, dict) and set(s) == keys for s in sizes):
        raise RecipeError(f"export.sizes = {sizes!r}: {wanted}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for size in sizes for n in size.values()):
        raise RecipeError(f"export.sizes = {sizes!r}: {wanted}")


def profiles(lowered: Lowered, options: Mapping[str, Any]) -> list[Profile]:
    """Shapes to build for: of each size its own, with any text up to its length; or, where `dynamic`, of all of them one."""
    if "sizes" not in options:
        return []
    sizes = [dict(size) for size in options["sizes"] or [lowered.usual]]
    if not options["dynamic"]:
        return [_profile(lowered, {**size, "text": 1}, size, size) for size in sizes]
    largest = {key: max(size[key] for size in sizes) for key in sizes[0]}
    return [_profile(lowered, dict.fromkeys(largest, 1), sizes[0], largest)]


def _profile(lowered: Lowered, least: Mapping[str, int], usual: Mapping[str, int], greatest: Mapping[str, int]) -> Profile:
    a, b, c = (lowered.inputs(**size) for size in (least, usual, greatest))
    return {name: (tuple(a[name].shape), tuple(b[name].shape), tuple(c[name].shape)) for name in a}


def export_source(
    source: Source,
    backend_name: str,
    dtype: str,
    folder: Path,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    model: Callable[[], Any] | None = None,
    calibration: Calibration | None = None,
) -> Export:
    """As `export_model`, of a model where it lies; `model` gives it where it is in memory already.

    Beyond `LARGE` bytes a back end that can takes weights from their files: a tensor at most is in memory, and what was written is
    not compared with eager unless `compare` is among the options.
    """
    given = dict(options or {})
    compared = given.pop("compare", None)
    if compared not in (None, True, False):
        raise RecipeError(f"export.compare = {compared!r}: wanted true, false or null")
    writer = check_backend(backend_name, dtype, given)
    check_float16(source.family, dtype, force)
    rest = (source.family, backend_name, dtype, folder)
    kept_in = ARITHMETIC if dtype == FLOAT8 else dtype  # what the weights are loaded in
    size = (
        sum(place.bytes // place.dtype.itemsize for place in source.places().values()) * DTYPES[kept_in].itemsize
        if can_be_mapped(source)
        else 0
    )
    if size <= LARGE or not writer.from_files or dtype == FLOAT8:
        loaded = load_source(source, kept_in) if model is None else model()
        return export_model(loaded, *rest, source.digest(), progress, given, force, None, compared is not False, calibration)
    if kept := kept_export(folder, source.digest(), backend_name, dtype, given):
        return kept
    _check_folder(folder)
    with _scratch(folder) as scratch:
        mapped, places = mapped_model(source, dtype, scratch / "cast.safetensors")

        def stored(path: Path) -> dict[str, tuple[int, int]]:
            return {f"model.{name}": where for name, where in store(places, path).items()}

        return export_model(mapped, *rest, source.digest(), progress, given, force, stored, compared is True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside another, gone at the end; what a run that was killed left there goes first."""
    scratch = folder.with_name(f".{folder.name}.weights")
    shutil.rmtree(scratch, ignore_errors=True)
    with disk_errors(scratch):
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def told(export: Export) -> list[str]:
    """What a person wants to know of an export, a line each."""
    lines = []
    if quantized := export.options.get("float8"):
        lines.append(f"float8: scales from {quantized['scales']}, relative L2 {quantized['rel_l2_to_bfloat16']:.1e} from bfloat16")
    if (total := export.options.get("attention_total")) is not None:
        way = "--dtype bfloat16 or float16 has it fused" if export.dtype == "float32" else "opset 23 has it fused"
        lines.append(f"attention fused: {export.options['attention_fused']} of {total}" if total else f"attention is not fused; {way}")
    if export.parity is None:
        return [*lines, f"not compared with eager: {export.options['session']['not_run']}"]
    arithmetic = export.options["session"].get("arithmetic")
    shown = f"largest difference from eager {export.parity.max_abs:.1e}, relative L2 {export.parity.rel_l2:.1e}"
    return [*lines, f"{shown}, at {len(export.shapes)} sizes{f' (run in {arithmetic})' if arithmetic else ''}"]


def _loss(plain: Callable[[dict[str, Any]], Any], quantized: Lowered) -> float:
    """The largest relative distance of a quantized model from the one that it was, on usual inputs."""
    with torch.no_grad():
        given = [quantized.inputs(**size) for size in quantized.sizes]
        return max(parity(plain(inputs), quantized.reference(inputs)).rel_l2 for inputs in given)


def check_float16(family: Family, dtype: str, force: bool) -> None:
    """Raise RecipeError for float16 of a family whose trained models are known to overflow in it, unless it is forced."""
    if dtype == "float16" and family.float16_overflow and not force:
        raise RecipeError(
            f"export.dtype = 'float16': {family.name} is known to overflow in it ({family.float16_overflow}); "
            "wanted bfloat16 or float32, or --force"
        )


def check_range(lowered: Lowered, where: str) -> None:
    """Raise VerificationError where the model itself overflows in its dtype, on usual inputs or on ones with loud channels."""
    for inputs in _cases(lowered, "float16", lowered.sizes):
        if place := overflow(lowered, inputs):
            raise VerificationError(
                f"{where}: the model overflows in float16: {place} is the first that is not finite; "
                "wanted bfloat16 or float32, or --force; nothing was written"
            )


def sizes_of(lowered: Lowered, options: Mapping[str, Any]) -> Sequence[Mapping[str, int]]:
    """Sizes that an artefact is compared at: those that it is built for, where its back end builds for some, else the family's."""
    return options["sizes"] or [lowered.usual] if "sizes" in options else lowered.sizes


def _cases(lowered: Lowered, dtype: str, sizes: Sequence[Mapping[str, int]]) -> Iterator[dict[str, Any]]:
    """Inputs to compare on: one for each size, and in 16 bits one with loud channels."""
    for size in sizes:
        yield lowered.inputs(**size)
    if dtype != "float32":
        yield with_outliers(lowered.inputs(**sizes[0]))


def with_outliers(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose every seventh channel of text is `LOUD` times as large, as trained encoders have some."""
    text = inputs["encoder_hidden_states"].clone()
    text[..., ::7] *= LOUD
    return inputs | {"encoder_hidden_states": text}


@dataclass(frozen=True)
class Compared:
    """How far an artefact is from eager at worst, how its session ran, and the inputs of the worst case."""

    parity: Parity | None
    session: dict[str, Any]
    worst: dict[str, Any] = field(default_factory=dict)


def compare(
    backend: Backend, folder: Path, lowered: Lowered, dtype: str, progress: Progress, sizes: Sequence[Mapping[str, int]] = ()
) -> Compared:
    """The worst distance from eager over sizes, the family's where none are given, and in 16 bits over loud channels too.

    Raises:
        VerificationError: the artefact does not load or run.
    """
    distances: list[Parity] = []
    cases = list(_cases(lowered, dtype, sizes or lowered.sizes))
    with torch.no_grad():
        with _failures(f"{backend.name}: cannot load what was written"):
            session = backend.load(folder, lowered)
        for inputs in cases:
            with _failures(f"{backend.name}: does not run at { ({n: list(t.shape) for n, t in inputs.items()}) }"):
                got = session.run(inputs)
            distances.append(parity(lowered.reference(inputs), got))
            progress(0.8 + 0.2 * len(distances) / len(cases), "compare")
    failed = next((i for i, d in enumerate(distances) if not passes(d, dtype)), 0)
    return Compared(worst(distances), session.options, cases[failed])


def _differs(distance: Parity, dtype: str, rel_l2: float | None = None) -> str:
    limit = f"max_abs of at most {MAX_ABS[dtype]:g}" if dtype in MAX_ABS else f"rel_l2 of at most {rel_l2 or REL_L2[dtype]:.3g}"
    figures = f"max_abs = {distance.max_abs:.3g}, rel_l2 = {distance.rel_l2:.3g}, cosine {distance.cosine:.6f}"
    return f"differs from eager by {figures}, wanted {limit} in {dtype}"


def _triage(
    writer: Backend,
    runner: Backend,
    lowered: Lowered,
    place: tuple[Family, Mapping[str, Any]],
    inputs: dict[str, Any],
    dtype: str,
    options: Mapping[str, Any],
) -> str:
    """Where an artefact leaves eager, for a message, or that it could not be told."""

    def run(module: torch.nn.Module, given: dict[str, Any], taps: Sequence[str]) -> list[torch.Tensor]:
        with TemporaryDirectory(prefix="ppclc-triage-") as home:
            out = Path(home)
            example = lowered.inputs(**lowered.sizes[0])
            chosen = {**options, **({"graph": None} if "graph" in options else {})}  # a graph that is there has no taps
            shapes = profiles(lowered, options)
            assert writer.export is not None
            writer.export(ExportRequest(module, example, lowered.dynamic, lowered.ranges, dtype, out, chosen, shapes, taps=taps))
            return runner.load(out, lowered).outputs(given)

    try:
        found = first_divergence(lowered, block_paths(*place), inputs, dtype, run)
    except Exception as error:
        return f"; where could not be told ({first_line(error)})"
    return f"; {found}" if found else "; no block differs: what comes behind them does"


def _check_folder(folder: Path) -> None:
    """Raise OutputError for a folder whose content is not an export, so that none of it is replaced, and for a file."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give another folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise OutputError(f"{folder}: holds files but no {RECORD}; wanted an empty folder or an earlier export, give another with -o")


class Seconds:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.by_phase: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.by_phase[phase] = time.perf_counter() - start


def config_json(model: Any) -> str:
    """The model's configuration as diffusers writes it, without what speaks of the folder it came from."""
    # Not by the model's own to_json_string, which adds keys to the live configuration.
    config = {k: v for k, v in model.config.items() if not k.startswith("_") and k != "auto_map"}
    config |= {"_class_name": type(model).__name__, "_diffusers_version": import_module("diffusers").__version__}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Tell a runtime's own errors, of whatever class, as VerificationError."""
    try:
        yield
    except PpclcError:
        raise
    except Exception as error:
        raise VerificationError(f"{what}: {error}") from error


def versions(backend: Backend) -> dict[str, str]:
    """Versions of ppclc and of every library that had a part in it."""
    modules = [m for names, _ in backend.requires for m in names.split("|") if find_spec(m) is not None]
    return {"ppclc": ppclc.__version__} | {m: str(import_module(m).__version__) for m in ("torch", "diffusers", *modules)}


def kept_export(folder: Path, model_digest: str, backend_name: str, dtype: str, options: Mapping[str, Any] | None = None) -> Export | None:
    """The export in `folder` where it is whole, and is what exporting the same model again would make here."""
    try:
        export = read_export(folder)
    except OutputError:
        return None
    same = export.digest == export_digest(model_digest, backend_name, dtype, options) and export.backend == backend_name
    return export if same and export.versions == versions(_writer(backend_name)) and is_intact(export, folder) else None
