"""What `ppclc bench` is asked to time: model folders, exports, configurations with random weights, or the newest run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppclc.analysis.budget import even_plan
from ppclc.artefacts.receipts import RECORD, model_digest_of, read_export
from ppclc.errors import RecipeError, UnavailableError
from ppclc.families import Family, Lowered
from ppclc.loading.classes import DTYPES, Pool, model_outline, random_model, student_config
from ppclc.loading.published import open_outline, published
from ppclc.loading.sources import Source, open_configuration, open_source
from ppclc.machine.devices import free_bytes
from ppclc.passes.bench import Benched
from ppclc.recipe import find_recipe, read_recipe
from ppclc.records import digest_of
from ppclc.run import newest_out


@dataclass(frozen=True)
class Asked:
    """By label what is timed, in a dtype.

    whole: models with weights. bare: configurations that get random ones. exports: folders of artefacts. sources: of all, those of artefacts alone
    included.
    """

    dtype: str
    whole: Mapping[str, Source]
    bare: Mapping[str, Source]
    exports: Mapping[str, list[Path]]
    sources: Mapping[str, Source]
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The family of all."""
        return next(iter(self.sources.values())).family

    @property
    def teachers(self) -> list[Source]:
        """Those that plans are made for, each configuration once; of a recipe's pair the teacher."""
        found: dict[str, Source] = {}
        for source in [*self.whole.values(), *list(self.bare.values())[:1]]:
            if not source.family.is_edited(source.config):
                found.setdefault(digest_of(source.config), source)
        return list(found.values())


def asked_for(targets: list[str], against: str | None, random_weights: str | None, dtype: str | None) -> Asked:
    """What a command line names; without targets, the newest student against its own teacher, with its exports.

    Raises:
        RecipeError: a dtype that there is not, or models of several families.
        ModelError, OutputError: what a target names is not there, or is no model.
    """
    artefacts = {t: read_export(Path(t)) for t in targets if (Path(t) / RECORD).is_file()}
    dtype = dtype or next((e.dtype for e in artefacts.values() if len(artefacts) == len(targets) and not against), "float32")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: wanted one of {', '.join(DTYPES)}")
    exports: dict[str, list[Path]] = {t: [Path(t)] for t in artefacts}
    labels = ({"teacher": against} if against else {}) | {t: t for t in targets}
    if not targets and not random_weights:
        newest = newest_out()
        labels = {"teacher": against or read_recipe(newest / "recipe.yaml").model.path, "student": str(newest / "model")}
        exports = {
            "teacher": [] if against else [p.parent for p in newest.glob("records/teacher-*/export.json")],
            "student": [p.parent for p in newest.glob("export/*/export.json")],
        }
    whole = {label: open_source(path) for label, path in labels.items() if label not in artefacts}
    sources = {label: whole.get(label) or open_configuration(str(Path(labels[label]) / "transformer")) for label in labels}
    bare = _bare(random_weights, dtype) if random_weights else {}
    notes = [] if targets or random_weights else _left_out(exports, whole)
    asked = Asked(dtype, whole, bare, exports, sources | bare, tuple(notes))
    if others := [label for label, source in asked.sources.items() if source.family is not asked.family]:
        raise RecipeError(f"bench: {others[0]} is of {asked.sources[others[0]].family.name}, wanted {asked.family.name} as the others are")
    return asked


def _left_out(exports: dict[str, list[Path]], whole: Mapping[str, Source]) -> list[str]:
    """Take exports of another model than the one that lies in OUT now out of the newest run's, and say so."""
    told = []
    for label, folders in exports.items():
        now = whole[label].digest() if folders else ""
        for folder in [f for f in folders if model_digest_of(f) != now]:
            folders.remove(folder)
            told.append(f"{folder} was not timed: it is of an earlier {label}; ppclc compress makes it again")
    return told


def _bare(name: str, dtype: str) -> dict[str, Source]:
    """What is to be timed with random weights: a configuration by its own name, or a recipe's teacher and student.

    Raises:
        ModelError, RecipeError: there is no such configuration, published model or recipe.
    """
    if Path(name).expanduser().exists() and not name.endswith((".yaml", ".yml")):
        return {name: open_configuration(name)}
    if name in published():
        return {name: open_outline(name)}
    recipe = read_recipe(find_recipe(name))
    teacher = open_outline(*recipe.model.place)
    cut = even_plan(teacher, recipe.target, recipe.plan, dtype)
    student = replace(teacher, path=name, config=student_config(teacher.family, teacher.config, cut), notes=())
    return {"teacher": teacher, "student": student}


def random_models(asked: Asked, device: str) -> dict[str, Any]:
    """Models of the bare configurations on a device, which take the memory of one. Raises UnavailableError when they do not fit there."""
    pool: Pool = {}
    return {label: _random_weights(source, asked.dtype, pool, device) for label, source in asked.bare.items()}


def _random_weights(source: Source, dtype: str, pool: Pool, device: str) -> Any:
    outline = model_outline(source.family, source.config).state_dict()
    need = sum(t.numel() for n, t in outline.items() if (n, tuple(t.shape)) not in pool) * DTYPES[dtype].itemsize
    free = free_bytes(device)
    if need > free:
        raise UnavailableError(
            f"{source.path}: {free / 1e9:.1f} GB of memory are free{' on the GPU' * (device != 'cpu')}, wanted {need / 1e9:.1f} GB more for its weights; "
            "what its blocks cost was measured and kept all the same"
        )
    return random_model(source.family, source.config, dtype, pool, device)


def subjects_of(asked: Asked, models: Mapping[str, Any]) -> list[Benched]:
    """What is timed, with the models that are there; of an artefact alone its inputs."""
    return [
        Benched(label, source.config, models.get(label), _lowered(source, models.get(label), asked.dtype), asked.exports.get(label, []))
        for label, source in asked.sources.items()
    ]


def _lowered(source: Source, model: Any, dtype: str) -> Lowered:
    return source.family.lowered(model_outline(source.family, source.config).to(DTYPES[dtype]) if model is None else model)
