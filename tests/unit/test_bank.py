"""The bank and the sizes cut from it: bit for bit what the plan says, at or under the target, refused with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppclc import bank as bank_module
from ppclc import cli, compiler, distilling, sizes
from ppclc.analysis.budget import PlanSettings
from ppclc.analysis.closed_forms import closed_form_bank
from ppclc.bank import EditBank, considered, interval_job, intervals_to_distill, needed, width_job
from ppclc.costs.predictions import predict
from ppclc.errors import OutputError, PlanError, RecipeError
from ppclc.families import Family
from ppclc.forecast import disk as run_disk
from ppclc.forecast import memory as run_bytes
from ppclc.forecast import work as run_work
from ppclc.forecast.speeds import Speeds
from ppclc.forecast.work import Work
from ppclc.loading.classes import predicted_parameters
from ppclc.models import apply_plan, load_model
from ppclc.passes import report
from ppclc.passes.distill import DistillSettings
from ppclc.plan import CompressionPlan, Interval
from ppclc.recipe import Recipe, parse_recipe, read_recipe
from ppclc.records import Distilled, Job, Record, StoredTensors, read_record
from ppclc.run import Run
from ppclc.screens.display import Display

SMALL: dict[str, Any] = {
    "calibrate": {"samples": 64, "longest": 4},
    "analyze": {"probes": 16, "trials": 0, "supernet_steps": 0},
    "target": {"parameters": 0.6},
    "distill": {"steps": 2, "finetune_steps": 3, "batch": 4, "bank": "all"},
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def compress(folder: Path, out: Path, **changes: Any) -> Run:
    recipe = parse_recipe({"model": {"path": str(folder)}, **{k: {**SMALL.get(k, {}), **changes.get(k, {})} for k in SMALL | changes}}, "r")
    return compiler.compress(recipe, "small", out, Display(4, -1), until="slice")


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose bank holds every interval that was considered. Read only."""
    out: Path = tmp_path_factory.mktemp("bank") / "whole"
    compress(teacher_folder, out)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to cut from."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def lose(out: Path, *kept: str) -> None:
    """Take every edit out of a bank but those."""
    for folder in [f for kind in ("interval", "text", "ffn") for f in (out / "records").glob(f"{kind}-*")]:
        if folder.name.rpartition("-")[0] not in kept:
            shutil.rmtree(folder)


def cut(out: Path, parameters: float | None = None, plan: Path | None = None, folder: Path | None = None, *changes: str) -> dict[str, Any]:
    return sizes.slice_size(out, parameters, plan, folder, list(changes), -1)


def opened(out: Path) -> tuple[Run, EditBank]:
    run = compiler.reopen(read_recipe(out / "recipe.yaml"), "small", out, Display(1, -1))
    return run, sizes._open_bank(run)


def by_hand(run: Run, plan: CompressionPlan) -> dict[str, Any]:
    """The bank of a plan, put together from the folders without `ppclc.bank`."""
    bank = dict(closed_form_bank(run.stats, run.recipe.analyze.ridge, plan))  # type: ignore[arg-type]
    for key in needed(plan, run.source.family):
        for folder in (run.out / "records").glob(f"{key}-{'[0-9a-f]' * 16}"):
            bank[key] = load_file(folder / "tensors.safetensors")
    return bank


def equal(a: Any, b: Any) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())


def edited(out: Path, name: str = "plan.json", **edits: Any) -> Path:
    path = out.parent / name
    path.write_text(CompressionPlan.of("qwen_image", 6, **edits).to_json())
    return path


# -- what a slice is ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.95, 0.75, 0.6, 0.5, 0.4])
def test_a_size_is_its_plan_applied_to_the_bank_bit_for_bit(share: float, out: Path, family: Family) -> None:
    document = cut(out, share)
    home = out / "sizes" / f"p{share:.2f}"
    run, _ = opened(out)
    plan = CompressionPlan.model_validate(document["plan"])
    student = load_model(home)
    assert equal(student, apply_plan(run.teacher, plan, by_hand(run, plan)))
    assert CompressionPlan.read(home / "transformer" / "plan.json") == plan
    count = sum(p.numel() for p in student.parameters())
    limit = share * sum(p.numel() for p in run.teacher.parameters())
    assert document["student"] == {"parameters": count, "bytes": (home / WEIGHTS).stat().st_size, "blocks": len(plan.kept)}
    assert count <= limit
    for edit in plan.edits():
        try:
            larger = plan.without(edit)
        except PlanError:
            continue
        assert predicted_parameters(family, run.source.config, larger) > limit, edit
    assert json.loads((home / "size.json").read_text()) == document
    assert document["gates"] == []
    assert document["finetune_steps"] == 0
    assert {*document["pluggable"], *document["closed_form"]} == set(needed(plan, family))
    assert document["pluggable"][: len(plan.intervals)] == [i.key for i in plan.intervals]


@pytest.mark.slow
def test_depth_is_cut_from_the_bank_where_width_is_forbidden(teacher_folder: Path, tmp_path: Path) -> None:
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none", "protect": [0]}
    compress(teacher_folder, tmp_path / "out", plan=only_depth)
    for share, removed in ((0.9, 1), (0.7, 2), (0.6, 3)):
        document = cut(tmp_path / "out", share)
        plan = CompressionPlan.model_validate(document["plan"])
        assert plan.num_blocks - len(plan.kept) >= removed
        assert not plan.has_width_edits
        assert all(0 not in i for i in plan.intervals)
        assert document["closed_form"] == []
        assert len(document["pluggable"]) == len(plan.intervals) > 0


@pytest.mark.slow
def test_the_run_s_own_plan_is_its_student_before_the_fine_tune_and_after(out: Path) -> None:
    run, _ = opened(out)
    plan = CompressionPlan.read(out / "plan.json")
    bare = cut(out, None, out / "plan.json")
    assert equal(load_model(next((out / "sizes").iterdir())), apply_plan(run.teacher, plan, by_hand(run, plan)))
    assert bare["plan"] == plan.model_dump(mode="json")
    # By its size it is found again: the budget needs all of it.
    assert cut(out, 0.6)["plan"] == bare["plan"]
    # As many steps as the run itself took, and the fine-tune is found in the records.
    before = set((out / "records").glob("finetune-*"))
    tuned = cut(out, None, out / "plan.json", out.parent / "tuned", "distill.finetune_steps=3")
    assert set((out / "records").glob("finetune-*")) == before
    assert equal(load_model(out.parent / "tuned"), load_model(out / "model"))
    assert tuned["finetune_steps"] == 3
    # Fewer steps are another record, kept for the next time.
    cut(out, 0.5, None, None, "distill.finetune_steps=2")
    assert len(set((out / "records").glob("finetune-*")) - before) == 1
    assert not equal(load_model(out / "sizes" / "p0.50-f2"), apply_plan(run.teacher, plan, by_hand(run, plan)))


@pytest.mark.slow
def test_a_second_call_makes_nothing_and_a_damaged_size_is_made_again(out: Path) -> None:
    first = cut(out, 0.6)
    home = out / "sizes" / "p0.60"
    state = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert cut(out, 0.6) == first
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()} == state
    wanted = (home / WEIGHTS).read_bytes()
    for damage in (lambda: (home / WEIGHTS).write_bytes(wanted[:-1]), (home / "size.json").unlink, lambda: shutil.rmtree(home)):
        damage()
        if home.exists() and not (home / "size.json").exists():
            shutil.rmtree(home)  # what lacks it is no longer known to be ours
        assert cut(out, 0.6) == first
        assert (home / WEIGHTS).read_bytes() == wanted
        assert json.loads((home / "size.json").read_text()) == first


# -- what the bank lacks -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_plan_lacks_is_named_at_once(out: Path) -> None:
    lose(out, "interval-1-2")
    with pytest.raises(PlanError) as caught:
        cut(out, None, edited(out, intervals=[(1, 2), (3, 5)]))
    message = str(caught.value)
    assert "lacks interval-3-5; it holds interval-1-2" in message
    assert "--set distill.bank=all" in message
    lose(out)
    with pytest.raises(PlanError, match="lacks interval-1-2, interval-3-5; it holds no interval"):
        cut(out, None, edited(out, intervals=[(1, 2), (3, 5)]))
    # An interval that no analysis considered is not trained with the others.
    with pytest.raises(PlanError, match=r"lacks interval-0-5.*put the plan into"):
        cut(out, None, edited(out, intervals=[(0, 5)]))
    assert not (out / "sizes").exists()


@pytest.mark.slow
def test_a_size_below_the_bank_tells_the_smallest_and_what_would_reach_further(out: Path, family: Family) -> None:
    lose(out, "interval-1-2")
    _, bank = opened(out)
    with pytest.raises(PlanError) as caught:
        cut(out, 0.25)
    message = str(caught.value)
    assert "out of the bank's reach" in message
    assert "interval-" in message
    assert "--set distill.bank=all" in message
    share = float(message.split("wanted --parameters ")[1].split(" ")[0])
    document = cut(out, share)
    assert f"{document['student']['parameters']:,} parameters" in message
    assert CompressionPlan.model_validate(document["plan"]).intervals == (Interval(first=1, last=2),)
    assert bank.intervals() == [(1, 2)]
    with pytest.raises(PlanError, match="out of the bank's reach"):
        cut(out, share - 0.01)
    # The edits that it names do reach it.
    named = [w.strip(",") for w in message.split(" or more, or ")[1].split(" in the bank")[0].split()]
    assert named
    assert all(set(k) <= set("interval-0123456789") for k in named)


@pytest.mark.slow
def test_edits_of_other_settings_are_not_held(out: Path) -> None:
    _, bank = opened(out)
    assert len(bank.intervals()) == 12
    text = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(
        text.replace("steps: 2", "steps: 5", 1) if "{steps: 2" not in text else text.replace("{steps: 2", "{steps: 5")
    )
    assert read_recipe(out / "recipe.yaml").distill.steps == 5
    _, bank = opened(out)
    assert bank.intervals() == []
    assert not [
        k for k in bank.folders if (m := bank_module.WIDTH.fullmatch(k)) and m["last"] not in (None, m["first"])
    ]  # what stands on an interval goes with it


@pytest.mark.slow
def test_a_wider_bank_is_made_without_doing_anything_twice(teacher_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = compress(teacher_folder, out, distill={"bank": "plan"}, plan={"text_stream": "none", "ffn": "none", "modulation_rank": "none"})
    files = {p: p.stat().st_mtime_ns for p in (out / "records").rglob("*.safetensors")}
    assert len(list((out / "records").glob("interval-*"))) == len(first.edits) - 1
    second = compress(teacher_folder, out, plan={"text_stream": "none", "ffn": "none", "modulation_rank": "none"})
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert len(list((out / "records").glob("finetune-*"))) == 1
    assert len(list((out / "records").glob("interval-*"))) == len(second.edits) - 1 == 12
    own = {i.key for i in second.plan.intervals}  # type: ignore[union-attr]
    assert {e.edit for e in second.edits} > own | {"finetune"}
    assert all(isinstance(e.tensors, StoredTensors) for e in second.edits)  # in memory when asked for, and not before


@pytest.mark.slow
def test_a_bank_with_adapters_is_cut_with_adapters(teacher_folder: Path, tmp_path: Path) -> None:
    """As the recipe has them: every interval in its adapted form, to any size, and no plain one taken for it."""
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none", "adapters": "auto"}
    out = tmp_path / "out"
    compress(teacher_folder, out, plan=only_depth)
    _, bank = opened(out)
    assert bank.intervals() == []
    assert len(bank.intervals(None)) == 12
    for share in (0.85, 0.7):
        plan = CompressionPlan.model_validate(cut(out, share)["plan"])
        assert plan.intervals
        assert plan.adapters == plan.intervals
        assert bank.lacking(plan) == []
    plain = tmp_path / "plain.json"
    plain.write_text(CompressionPlan.of("qwen_image", 6, [(1, 2)]).to_json())
    with pytest.raises(PlanError, match=r"lacks interval-1-2; it holds interval-0-1-adapted.* put the plan into"):
        sizes.slice_size(out, None, plain, None, [], -1)


@pytest.mark.slow
def test_width_edits_on_an_adapted_block_and_on_a_plain_one_are_two(teacher_folder: Path, tmp_path: Path) -> None:
    """One folder that has held both: a plan gets the maps that were trained on its own block."""
    by_hand = {"intervals": [[1, 2]], "text_stream": "none", "ffn": [{"block": 1, "stream": "image"}], "modulation_rank": "none"}
    out, maps = tmp_path / "out", {}
    for adapters in ("none", "auto"):
        run = compress(teacher_folder, out, plan={**by_hand, "adapters": adapters}, distill={"bank": "plan"}, target={"parameters": 1.0})
        maps[adapters] = next(e for e in run.edits if e.edit.startswith("ffn"))
        (out / "plan.json").unlink()
    assert [m.edit for m in maps.values()] == ["ffn-1-2-image", "ffn-1-2a-image"]
    assert not torch.equal(maps["none"].tensors["weight"], maps["auto"].tensors["weight"])
    _, bank = opened(out)
    assert {"ffn-1-2-image", "ffn-1-2a-image", "interval-1-2", "interval-1-2-adapted"} <= set(bank.folders)
    for key, made in (("ffn-1-2-image", maps["none"]), ("ffn-1-2a-image", maps["auto"])):
        assert torch.equal(read_record(Distilled, bank.folders[key]).tensors["weight"], made.tensors["weight"])


@pytest.mark.slow
def test_what_another_rule_picked_is_in_a_whole_bank(teacher_folder: Path, tmp_path: Path) -> None:
    """Intervals that were picked and not measured are candidates as well."""
    only_depth = {"text_stream": "none", "ffn": "none", "modulation_rank": "none"}
    run = compress(teacher_folder, tmp_path / "out", plan=only_depth, analyze={"strategy": "even"})
    assert run.analysis
    _, bank = opened(tmp_path / "out")
    assert set(bank.intervals()) == set(considered(run.analysis)) > {(i.first, i.last) for i in run.analysis.plan.intervals}


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_an_edit_s_record_depends_on_its_start_its_training_and_the_teacher() -> None:
    settings, base, stats = DistillSettings(), Record(digest="a"), Record(digest="s")

    def job(key: str = "interval-1-2", start: int = 1, source: str = "noise", base: Record = base, **changed: Any) -> Job:
        given = settings.model_copy(update={k: v for k, v in changed.items() if k in DistillSettings.model_fields})
        return interval_job(key, start, given, source, base, changed.get("stats", stats), changed.get("ridge", 1e-4))

    assert job() not in [job("interval-1-3"), job(start=2), job(steps=3), job(source="images"), job(base=Record(digest="b"))]
    assert job(finetune_steps=1, bank="all", finetune_learning_rate=0.5, width_steps=7, map_weight=0.5) == job()
    assert job(stats=Record(digest="t"), ridge=0.5) == job()
    adapted = job("interval-1-2-adapted")  # which start in closed form
    assert adapted not in [job("interval-1-2-adapted", stats=Record(digest="t")), job("interval-1-2-adapted", ridge=0.5)]


def test_a_network_s_record_does_not_depend_on_weights_of_streams() -> None:
    """Its loss has its own stream alone; that of a text stream has both."""
    base, stats = Record(digest="a"), Record(digest="s")
    for key, equal in (("ffn-1-image", True), ("text-3-3-1-1", False)):
        jobs = [width_job(key, DistillSettings(text_weight=w), "noise", base, stats, 1e-4, []) for w in (1.0, 0.5)]
        assert (jobs[0] == jobs[1]) is equal


@pytest.mark.slow
def test_the_plan_s_intervals_are_distilled_first_and_each_once(whole: Path) -> None:
    run, _ = opened(whole)
    assert run.analysis
    plan = CompressionPlan.of("qwen_image", 6, [(2, 3)])
    adapted = CompressionPlan.of("qwen_image", 6, [(2, 3)], adapters=[(2, 3)])
    for own, wanted, form in ((plan, PlanSettings(), ""), (adapted, PlanSettings(adapters="auto"), "-adapted")):
        chosen = intervals_to_distill(run.analysis, own, DistillSettings(bank="all"), wanted)
        keys = [p.interval_key(p.intervals[0]) for p in chosen]
        assert keys[0] == f"interval-2-3{form}"
        assert set(keys) == {f"{key}{form}" for key in run.analysis.starts}
        assert len(keys) == 12
        (only,) = intervals_to_distill(run.analysis, own, DistillSettings(), wanted)
        assert only.interval_key(only.intervals[0]) == f"interval-2-3{form}"


@pytest.mark.slow
@pytest.mark.parametrize("budget", [16384, 300])
def test_what_is_predicted_of_a_whole_bank_is_what_is_distilled(
    budget: int, whole: Path, family: Family, teacher_folder: Path, tmp_path: Path
) -> None:
    run = compress(teacher_folder, tmp_path, analyze={"budget": budget}, distill={"steps": 0, "finetune_steps": 0})
    assert run.plan
    assert run.analysis
    config = run.source.config
    model = predict(family, config, CompressionPlan.of(family.name, 6), "float32")
    work = Work(run.recipe, run.source, run.plan, model, model, Speeds(1e-3, 1e-3, 1e-3, 1e-3, 3, 1, 1e11, 1), 1)
    chosen = intervals_to_distill(run.analysis, run.plan, run.recipe.distill, run.recipe.plan)
    wanted = {(i.first, i.last) for alone in chosen for i in alone.intervals}
    assert set(run_work.distilled_spans(work)) == wanted
    assert len(wanted) == (12 if budget == 16384 else len(wanted)) <= 12
    few = Work(_planned(run.recipe), run.source, run.plan, model, model, work.speeds, 1)
    assert run_disk.disk_bytes(work) - run_disk.disk_bytes(few) == (len(wanted) - len(run.plan.intervals)) * run_bytes.block_bytes(work)[0]


def _planned(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"bank": "plan"})})


@pytest.mark.slow
def test_lists_by_hand_mean_any_part_of_them(whole: Path) -> None:
    run, bank = opened(whole)
    assert run.analysis
    wanted = PlanSettings(intervals=[[1, 2], [3, 4]], text_stream=[5], ffn="none", modulation_rank="none")
    choice = sizes.Choice.of(run.source, run.analysis, wanted, bank.intervals(), 4)
    assert {s for chains in choice.options[0].chains.values() for _, spans in chains for s in spans} == {(1, 2), (3, 4)}
    assert [o.text_blocks for o in choice.options] == [None, [5]]
    budget = sizes.budget_of(run.source, sizes.target_of(0.83), "float32")
    assert budget
    plan = choice.best(budget)
    assert plan
    assert len(plan.intervals) + len(plan.text_stream) >= 1
    smallest = choice.smallest(budget)
    assert [(i.first, i.last) for i in smallest.intervals] == [(1, 2), (3, 4)]
    assert [e.block for e in smallest.text_stream] == [5]
    nothing = sizes.Choice.of(
        run.source, run.analysis, PlanSettings(intervals="none", text_stream="none", ffn="none", modulation_rank="none"), [], 4
    )
    assert nothing.smallest(budget).is_empty
    assert nothing.best(budget) is None


@pytest.mark.slow
def test_intervals_by_hand_are_weighed_too(teacher_folder: Path, tmp_path: Path) -> None:
    run = compress(
        teacher_folder, tmp_path / "out", plan={"intervals": [[1, 2], [3, 4]], "text_stream": "none", "ffn": "none", "modulation_rank": "none"},
        target={"parameters": 0.8},
    )  # fmt: skip
    assert run.analysis
    costs = {(c.first, c.last): c.cost for c in run.analysis.candidates}
    assert costs.keys() == {(1, 2), (3, 4)}
    document = cut(tmp_path / "out", 0.9)
    assert document["pluggable"] == [Interval(first=a, last=b).key for a, b in [min(costs, key=lambda s: costs[s])]]


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_s_rows_are_the_bank_and_the_sizes(out: Path) -> None:
    cut(out, 0.9)
    cut(out, 0.5)
    (out / "sizes" / "odd").mkdir()
    (out / "sizes" / "odd" / "size.json").write_text("{}")
    _, bank = opened(out)
    plan = CompressionPlan.of("qwen_image", 6, [(1, 2)])
    rows = report.pluggable(bank.folders, needed(plan, bank.family))
    assert [(r.key, r.steps) for r in rows if r.chosen] == [("interval-1-2", 2)]
    assert {r.key for r in rows} == set(bank.folders)
    record = read_record(Distilled, bank.folders["interval-1-2"])
    (row,) = [r for r in rows if r.key == "interval-1-2"]
    assert row.bytes > sum(t.nbytes for t in record.tensors.values())
    found = report.sizes(out)
    assert [s.folder for s in found] == ["sizes/p0.90", "sizes/p0.50"]
    assert [s.parameters for s in found] == [sum(p.numel() for p in load_model(out / s.folder).parameters()) for s in found]
    assert all(s.finetune_steps == 0 for s in found)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ppclc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of `ppclc slice`."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ppclc", "slice", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_slice_prints_the_head_of_a_report(ppclc: Any, out: Path) -> None:
    code, printed, _ = ppclc("out", "--parameters", "0.7", "--json", "-q")
    assert code == 0
    assert list(json.loads(printed)) == ["teacher", "student", "plan", "gates"]
    code, printed, err = ppclc("out", "--plan", "out/plan.json", "-o", "mine")
    assert (code, printed) == (0, "")
    words = " ".join(err.split())
    assert "not fine-tuned" in words
    assert "wrote mine; next: ppclc bench mine --against" in words
    assert (Path("mine") / WEIGHTS).is_file()


BAD: dict[str, tuple[list[str], list[str]]] = {
    "neither": (["out"], ["no size", "--parameters", "--plan"]),
    "both": (["out", "--parameters", "0.5", "--plan", "p.json"], ["both"]),
    "no run": (["nowhere", "--parameters", "0.5"], ["nowhere", "holds no run", "ppclc compress"]),
    "no such plan": (["out", "--plan", "nope.json"], ["nope.json"]),
    "zero": (["out", "--parameters", "0"], ["--parameters 0", "up to 1.0"]),
    "nan": (["out", "--parameters", "nan"], ["--parameters nan"]),
    "more than the teacher": (["out", "--parameters", "1e12"], ["at most the teacher's"]),
    "another section": (["out", "--parameters", "0.5", "--set", "analyze.probes=17"], ["--set analyze", "ppclc compress"]),
    "other edits": (["out", "--parameters", "0.5", "--set", "distill.steps=9"], ["--set distill.steps", "finetune_steps"]),
    "a wider bank": (["out", "--parameters", "0.5", "--set", "distill.bank=plan"], ["--set distill.bank", "ppclc compress"]),
    "no steps": (["out", "--parameters", "0.5", "--set", "distill.checkpoint_every=7"], ["finetune_steps above 0"]),
    "someone's folder": (["out", "--parameters", "0.5", "-o", "out"], ["out", "-o"]),
    "a file": (["out", "--parameters", "0.5", "-o", "out/recipe.yaml"], ["recipe.yaml", "is a file", "-o"]),
}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_what_cannot_be_cut_is_refused_in_one_message(case: str, ppclc: Any, out: Path) -> None:
    args, words = BAD[case]
    code, printed, err = ppclc(*args)
    assert (code, printed) == (2, "")
    assert err.count("ppclc: ") == 1
    assert "Traceback" not in err
    assert [w for w in words if w not in err] == []
    assert not (out / "sizes").exists()
    assert (out / "model" / WEIGHTS).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["analyze", "calibrate", "interval"])
def test_an_unfinished_run_is_told_how_to_go_on(lost: str, out: Path) -> None:
    for folder in (out / "records").glob(f"{lost}-*"):
        shutil.rmtree(folder)
    if lost == "interval":
        lose(out)
    shutil.rmtree(out / "model")
    records = sorted((out / "records").iterdir())
    with pytest.raises(OutputError, match=r"not finished.*go on with: ppclc compress .*recipe.yaml -o"):
        cut(out, 0.6)
    assert sorted((out / "records").iterdir()) == records


def test_a_changed_teacher_is_refused(out: Path) -> None:
    mark = out / "records" / "teacher"
    mark.write_text("0123456789abcdef elsewhere\n")
    with pytest.raises(OutputError, match="another teacher, elsewhere"):
        cut(out, 0.6)


def test_a_plan_of_another_model_is_refused(out: Path) -> None:
    path = out.parent / "other.json"
    path.write_text(CompressionPlan.of("qwen_image", 12, [(3, 4)]).to_json())
    with pytest.raises(PlanError, match="12, but the model has 6 blocks"):
        cut(out, None, path)


def test_a_name_tells_the_size() -> None:
    plan = CompressionPlan.of("qwen_image", 6, [(1, 2)])
    names = [sizes.size_name(plan, p, n) for p, n in ((0.6, 0), (0.605, 0), (900_000.0, 0), (0.5, 200))]
    assert names == ["p0.60", "p0.605", "p900000", "p0.50-f200"]
    assert sizes.size_name(plan, None, 0).startswith("plan-")
    with pytest.raises(RecipeError):
        sizes.target_of(-1)


@pytest.mark.slow
def test_a_run_that_is_read_again_fits_and_draws_nothing(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network on an interval's block is fitted anew before it is trained, and not where its record is there."""
    by_hand = {"intervals": [[0, 1], [2, 3], [4, 5]], "text_stream": "none", "ffn": [{"block": 2, "stream": "image"}]}
    fitted: list[int] = []
    own = distilling.refitted
    monkeypatch.setattr(distilling, "refitted", lambda *given: (fitted.append(1), own(*given))[1])
    first = compress(teacher_folder, tmp_path / "out", distill={"bank": "plan"}, plan=by_hand)
    assert fitted == [1]
    assert "ffn-2-3-image" in {e.edit for e in first.edits}
    compress(teacher_folder, tmp_path / "out", distill={"bank": "plan"}, plan=by_hand)
    assert fitted == [1]
