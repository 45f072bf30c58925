"""The recipe: the source program. A strict YAML file, one section a pass; each section stands beside its pass."""

from __future__ import annotations

import re
import types
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ppclc.analysis.budget import PlanSettings, TargetSettings
from ppclc.analysis.search import AnalyzeSettings
from ppclc.errors import RecipeError
from ppclc.kernels import Kernels
from ppclc.passes.bench import BenchSettings
from ppclc.passes.calibrate import CalibrateSettings
from ppclc.passes.distill import DistillSettings
from ppclc.passes.verify import VerifySettings

SHIPPED = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """Base of the sections that belong to no single pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Section `model`: the teacher. A folder, a hub id with an optional revision, a file for ComfyUI, or `builtin:two-digits`.

    variant: which weights of several that lie beside each other, `fp16` for `diffusion_pytorch_model.fp16.safetensors`.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    variant: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def place(self) -> tuple[str, str | None, str | None]:
        """Path, revision and variant."""
        return self.path, self.revision, self.variant


class ExportTarget(Section):
    """One entry of section `export`. options: the back end's own, as `{opset: 20}`. force: as `ppclc export --force`."""

    backend: str
    dtype: str = "float32"
    options: dict[str, Any] = {}
    force: bool = False


class Recipe(Section):
    """Everything that a run is told. Every key has a default but `model.path`.

    kernels: on a GPU, `auto` takes Triton kernels where they were measured to be faster, `triton` wherever they can run, `torch` never. They
    change results by rounding alone, and what was made with others is kept.
    """

    model: ModelSettings
    calibrate: CalibrateSettings = CalibrateSettings()
    analyze: AnalyzeSettings = AnalyzeSettings()
    target: TargetSettings = TargetSettings()
    plan: PlanSettings = PlanSettings()
    distill: DistillSettings = DistillSettings()
    verify: VerifySettings = VerifySettings()
    export: list[ExportTarget] = []
    bench: BenchSettings = BenchSettings()
    kernels: Kernels = "auto"

    @field_validator("export")
    @classmethod
    def _each_once(cls, targets: list[ExportTarget]) -> list[ExportTarget]:
        named = [(t.backend, t.dtype) for t in targets]
        if len(set(named)) < len(named):
            raise ValueError("each back end once in a dtype")
        return targets

    @property
    def analysis(self) -> AnalyzeSettings:
        """Section `analyze` as the teacher allows it: a streamed one is never trained, which the supernet and trials would."""
        return self.analyze.untrained() if self.distill.teacher == "streamed" else self.analyze

    def to_yaml(self) -> str:
        """The recipe with every default filled in."""
        out = StringIO()
        writer = YAML()
        writer.default_flow_style = None
        writer.dump(self.model_dump(mode="json"), out)
        return out.getvalue()


MOST, MOST_SHOWN = 2**53, 120
"""The largest whole number that a recipe may hold; characters of a change that a message repeats."""


def find_recipe(name: str) -> Path:
    """The recipe of that path, or the shipped one of that name. Raises RecipeError when there is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
    what = "is a folder" if path.is_dir() else "no such file"
    raise RecipeError(f"{name}: {what}; wanted a recipe file, or a shipped recipe: {names}")


def read_recipe(path: Path, changes: list[str] | None = None) -> Recipe:
    """The recipe in a file, with `section.key=value` changes on top.

    Raises:
        RecipeError: not YAML 1.2, an unknown key, a wrong type, a value out of range.
    """
    try:
        data = _yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); wanted a YAML file") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: got {_kind(data)}, wanted sections such as 'model:' and 'target:'")
    for change in changes or []:
        _apply_change(data, change)
    return parse_recipe(data, str(path))


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """The recipe that a mapping holds. Raises RecipeError naming the first key that is wrong."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None


def bench_settings(changes: list[str]) -> BenchSettings:
    """Section `bench` with `--set bench.key=value` changes. Raises RecipeError for another section, or a value that it cannot have."""
    data: dict[str, Any] = {}
    for change in changes:
        _apply_change(data, change)
    if others := sorted(data.keys() - {"bench"}):
        raise RecipeError(f"--set {others[0]}: wanted a key of section bench, e.g. bench.runs=100")
    return parse_recipe({"model": {"path": "-"}, **data}, "--set").bench


def export_options(changes: list[str]) -> dict[str, Any]:
    """A back end's options as `--set export.name=value` gives them. Raises RecipeError for a key of another section."""
    data: dict[str, Any] = {"export": {}}
    for change in changes:
        _apply_change(data, change)
    if others := sorted(data.keys() - {"export"}):
        raise RecipeError(f"--set {others[0]}: wanted an option of the back end, e.g. export.opset=20")
    if not isinstance(data["export"], dict):
        raise RecipeError(f"--set export = {data['export']!r}: wanted an option of the back end, e.g. export.opset=20")
    return dict(data["export"])


def _yaml(text: str, where: str) -> Any:
    try:
        found = YAML(typ="safe", pure=True).load(text)
        _check_numbers(found, where)
        return found
    except RecursionError:
        raise RecipeError(f"{where}: nested too deep; wanted sections of keys") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits
        raise RecipeError(f"{where}: {error}; wanted YAML") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{where}: {line}{getattr(error, 'problem', None) or error}; wanted YAML") from None


def _check_numbers(value: Any, where: str) -> None:
    """Raise RecipeError for a whole number that no count is."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_numbers(inner, where)
    elif isinstance(value, int) and abs(value) > MOST:
        raise RecipeError(f"{where}: a number of {len(str(value))} digits; wanted at most {MOST:,}")


def _apply_change(data: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    change = change if len(change) <= MOST_SHOWN else f"{change[:MOST_SHOWN]}..."
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {change!r}: wanted section.key=value, e.g. target.parameters=0.5")
    inner = data
    for part in parts[:-1]:
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change!r}: {part} holds {inner!r}, wanted a section")
    inner[parts[-1]] = _yaml(value, f"--set {change!r}")


def _explain(error: ValidationError) -> str:
    """The first fault as `section.key = value: wanted ...`; alternatives of one key are told together."""
    faults = error.errors(include_url=False)
    first = faults[0]
    path = _path(first)
    if isinstance(first["input"], list | dict):  # of several kinds that it may be the one that it is, and what is wrong within
        kinds = ("list_type", "model_type", "missing")
        first = next(
            (f for f in faults if _path(f)[: len(path)] == path and len(f["loc"]) > len(first["loc"]) and f["type"] in kinds), first
        )
        path = _path(first)
    key = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return f"{key} = {first['input']!r}: unknown key; wanted one of {', '.join(_siblings(path[:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing; wanted a value"
    same = [f for f in faults if _path(f)[: len(path)] == path]
    wanted = list(dict.fromkeys(_plain(f["msg"]) for f in same if f["type"] != "missing"))
    return f"{key} = {first['input']!r}: wanted {' or '.join(wanted)}"


def _path(fault: Any) -> list[Any]:
    """Keys and numbers that lead to a fault."""
    return [p for p in fault["loc"] if isinstance(p, int) or not _is_alternative(str(p))]


def _plain(message: str) -> str:
    """What a validator says, in words of a recipe."""
    message = re.sub(r"^\w+ should (be|have) ", "", message).removesuffix(" after validation, not 0")
    for start in ("a valid ", "Value error, "):
        message = message.removeprefix(start)
    return "dictionary: keys with values" if message.startswith("dictionary") else message


def _is_alternative(part: str) -> bool:
    """Whether a part of an error's path names a branch of a union and not a key."""
    return (
        "[" in part
        or part in ("float", "int", "str", "bool", "none")
        or part.startswith(("list", "literal", "constrained", "lax", "strict", "function"))
    )


def _siblings(path: list[Any]) -> list[str]:
    kind: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        field = kind.model_fields.get(part) if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if field is None:
            return [*VerifySettings.model_fields["gates"].annotation.__args__[1].model_fields]  # type: ignore[union-attr]
        kind = field.annotation
        if isinstance(kind, types.GenericAlias):
            kind = kind.__args__[-1]
    return list(kind.model_fields)


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"
