"""Model cards: what a student is, what was measured of it, and whose licence it is under. Nothing beyond a run's figures.

Source of the front matter's keys: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppclc import __version__
from ppclc.loading.sources import BUILTIN, Source, json_object
from ppclc.plan import CompressionPlan
from ppclc.publishing.pipelines import INDEX, OURS, pipeline_of
from ppclc.records import Verdict, write_text
from ppclc.screens.words import label, number, percent, plan_words

CARD = "README.md"
RECIPE = "recipe.yaml"
HUB_ID = r"[\w.-]+/[\w.-]+"
RELATION = "finetune"
"""Of the hub's four relations (adapter, merge, quantized, finetune) the one that fits: the student's weights were trained from
the base model's, and its precision is as it was, so that `quantized` would be wrong."""
KEPT = ("license", "license_name", "license_link", "pipeline_tag", "language")
"""Of the teacher's front matter what holds for its student."""
TAGS = ("ppclc", "pruning", "distillation")


@dataclass(frozen=True)
class Card:
    """What a card tells. `teacher` and `student` each give `parameters`, `bytes` and `blocks`; `words`: how this student was made."""

    source: Source
    plan: CompressionPlan
    teacher: dict[str, int]
    student: dict[str, int]
    dtype: str
    words: Sequence[str] = ()
    verdict: Verdict | None = None
    recipe: bool = False


def write_card(card: Card, folder: Path, recipe_text: str | None = None) -> None:
    """`README.md` in a student's folder, and `recipe.yaml` beside it where its text is given; what is so already is left."""
    wanted = {CARD: card_text(card, folder)} | ({} if recipe_text is None else {RECIPE: recipe_text})
    for name, text in wanted.items():
        if not (folder / name).is_file() or (folder / name).read_text("utf-8") != text:
            write_text(folder / name, text)


def card_text(card: Card, folder: Path) -> str:
    """The text of the card of the student in a folder."""
    from huggingface_hub import ModelCardData

    known = front_matter(card.source)
    base = base_model(card.source, known)
    own = [t for t in known.get("tags") or [] if isinstance(t, str) and ":" not in t] if isinstance(known.get("tags"), list) else []
    told: dict[str, Any] = {"base_model": base, "base_model_relation": RELATION} if base else {}
    told |= {key: known[key] for key in KEPT if known.get(key) is not None}
    data = ModelCardData(library_name="diffusers", tags=list(dict.fromkeys([*own, *TAGS])), **told)
    parts = [_head(card, base), _removed(card), _sizes(card), _quality(card.verdict), _loading(card, folder)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(source: Source) -> dict[str, Any]:
    """The teacher's own, from the README in its folder; nothing where there is none that can be read."""
    from huggingface_hub import ModelCard

    root = source.folder.parent if source.folder.is_file() or source.folder.name == OURS else source.folder
    if source.folder.is_file() or not (root / CARD).is_file():  # beside a single file lies whatever else was fetched
        return {}
    try:
        data: Any = ModelCard((root / CARD).read_text("utf-8"), ignore_metadata_errors=True).data
        found: dict[str, Any] = data.to_dict()
    except Exception:  # a parser's many kinds; a card that cannot be read tells nothing
        return {}
    return found


def base_model(source: Source, known: dict[str, Any]) -> str | None:
    """The teacher's id on the hub: as it was given, by the hub's cache that it lies in, or by its own card; None where none of them says."""
    if source.path.startswith(BUILTIN):
        return None
    if not Path(source.path).expanduser().exists():
        return source.path
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", source.folder.absolute().as_posix() + "/"):
        return f"{cached[1]}/{cached[2]}"
    for key in ("base_model", "model_name", "name"):
        value = known.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, str) and re.fullmatch(HUB_ID, first):
            return first
    return None


def _head(card: Card, base: str | None) -> str:
    name = base.rpartition("/")[2] if base else card.source.family.class_name
    gone = 100 * (1 - card.student["parameters"] / card.teacher["parameters"])
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a `{card.source.family.class_name}`"
    parts = "; the other parts of the pipeline are the teacher's" if pipeline_of(card.source) else ""
    recipe = f" Its recipe is [{RECIPE}]({RECIPE})." if card.recipe else ""
    text = f"The transformer of {of} with {percent(gone)} % of its parameters removed by ppclc {__version__}{parts}.{recipe}"
    return "\n\n".join([f"# {name}, compressed", text, *card.words])


def _removed(card: Card) -> str:
    lines = "\n".join(f"- {line}" for line in plan_words(card.plan))
    return f"## What was removed\n\nBlocks count from 0, in the teacher's order.\n\n{lines}"


def _sizes(card: Card) -> str:
    rows = [f"| {key} | {card.teacher[key]:,} | {card.student[key]:,} |" for key in ("parameters", "blocks", "bytes")]
    return "\n".join(["## Size", "", "| transformer | teacher | student |", "|---|---|---|", *rows])


def _quality(verdict: Verdict | None) -> str:
    """The figures of `verify`, and no others."""
    if verdict is None or not verdict.quality:
        return "## Quality\n\nNot measured."
    rows = []
    for name, q in verdict.quality.items():
        interval = f"{percent(q.ci95[0])} to {percent(q.ci95[1])}" if q.ci95 else "–"
        seeds = ", ".join(map(str, q.seeds)) or "–"
        better = f"{q.better} is better" if q.better in ("higher", "lower") else q.better
        figures = [number(q.teacher), number(q.student), percent(q.drop_percent), interval]
        if q.in_decibels:
            figures = ["–", f"{number(q.student)} dB from the teacher's images", "–", "–"]
        rows.append(f"| {label(name)} ({better}) | {' | '.join(figures)} | {q.n:,} | {seeds} |")
    text = [
        "## Quality",
        "",
        "Teacher and student on the same prompts and noise. The drop is in percent of the teacher's figure; worse is positive.",
        "",
        "| metric | teacher | student | drop, % | 95 % interval | n | seeds |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    gates = [f"- {g.name}: {number(g.value)}, limit {number(g.limit)}: {'passed' if g.passed else 'failed'}" for g in verdict.gates]
    return "\n".join([*text, *(["", "Gates:", "", *gates] if gates else [])])


def _loading(card: Card, folder: Path) -> str:
    edited = card.source.family.class_of(card.plan) != card.source.family.class_name
    dtype = f"torch_dtype=torch.{card.dtype}" + (", trust_remote_code=True" if edited else "")
    if (folder / INDEX).is_file() or pipeline_of(card.source):
        name, call = "DiffusionPipeline", f'from_pretrained("PATH_OR_ID", {dtype})'
    else:
        name = "AutoModel" if edited else str(json_object(folder / OURS / "config.json")["_class_name"])
        call = f'from_pretrained("PATH_OR_ID", subfolder="{OURS}", {dtype})'
    result = "pipeline" if name == "DiffusionPipeline" else "transformer"
    note = (
        "\n\nIts class is not in diffusers: the file with it lies in `transformer/`, and runs only with `trust_remote_code=True`."
        if edited
        else ""
    )
    return f"## Loading\n\n```python\nimport torch\nfrom diffusers import {name}\n\n{result} = {name}.{call}\n```{note}"
