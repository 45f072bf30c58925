"""What every family must keep, over all that are there: a new file in `ppclc/families` is picked up by its being there."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.families import Family
from ppclc.models import (
    StandIn,
    apply_plan,
    block_state,
    blocks_of,
    count_parameters,
    empty_model,
    linear_ffns,
    load_model,
    predicted_parameters,
    replaced,
    run_block,
    save_model,
    trace,
)
from ppclc.plan import CompressionPlan

FAMILIES = plugins.names("families")


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> tuple[Family, Any, dict[str, Any]]:
    """A family, a tiny model of it with random weights, and inputs."""
    import diffusers

    family: Family = plugins.load("families", request.param)
    model = getattr(diffusers, family.class_name)(**family.tiny_config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return family, model, family.example_inputs(dict(model.config), batch=2, generator=generator)


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def test_an_empty_plan_is_the_teacher(subject: tuple[Family, Any, dict[str, Any]]) -> None:
    family, model, inputs = subject
    plan = CompressionPlan.of(family.name, len(blocks_of(model, family)))
    assert torch.equal(run(apply_plan(model, plan), inputs), run(model, inputs))


def test_depth_slicing_is_deletion(subject: tuple[Family, Any, dict[str, Any]]) -> None:
    family, model, inputs = subject
    plan = CompressionPlan.of(family.name, len(blocks_of(model, family)), [(1, 2)])
    student = apply_plan(model, plan)
    del model.get_submodule(family.groups[0].path)[2]
    assert type(student) is type(model)
    assert torch.equal(run(student, inputs), run(model, inputs))


def test_width_edits_survive_the_disk_and_are_counted(subject: tuple[Family, Any, dict[str, Any]], tmp_path: Path) -> None:
    family, model, inputs = subject
    seen = trace(model, family, inputs)
    assert seen.temb is not None
    width = seen.temb.shape[-1]
    ffn = [(0, stream) for stream in family.ffn_inputs]
    plan = CompressionPlan.of(family.name, len(blocks_of(model, family)), [(0, 1)], [3], 4, True, ffn)
    maps = {
        f"{n}.{k}": torch.randn(width, width) if k == "weight" else torch.zeros(width)
        for n in ("text_in", "text_out")
        for k in ("weight", "bias")
    }
    bank = {"modulation": {"basis": torch.eye(width), "mean": torch.zeros(width)}, family.text_key(plan, 3): maps}
    bank |= {plan.ffn_key(*place): {"weight": torch.randn(width, width) / width, "bias": torch.ones(width)} for place in ffn}
    student = apply_plan(model, plan, bank)
    config = {"_class_name": family.class_name, **model.config}
    assert count_parameters(student) == predicted_parameters(family, config, plan) < count_parameters(model)
    save_model(student, plan, tmp_path)
    assert torch.equal(run(load_model(tmp_path), inputs), run(student, inputs))


def test_linear_networks_in_the_teacher_are_the_student_s(subject: tuple[Family, Any, dict[str, Any]]) -> None:
    """Where the states after attention are read is data of the family; the student says whether it is right."""
    family, model, inputs = subject
    length, width = len(blocks_of(model, family)), trace(model, family, inputs).states["image"][0].shape[-1]
    for place in [(block, stream) for stream in family.ffn_inputs for block in (0, length - 2)]:
        weight, bias = torch.randn(width, width) / width, torch.randn(width)
        plan = CompressionPlan.of(family.name, length, ffn=[place])
        student = apply_plan(model, plan, {plan.ffn_key(*place): {"weight": weight, "bias": bias}})
        with linear_ffns(model, family, {place: (weight, bias)}):
            assert (run(model, inputs) - run(student, inputs)).abs().max() <= 1e-5 * run(student, inputs).abs().max()
        assert not torch.equal(run(model, inputs), run(student, inputs))


def adapters_of(family: Family, width: int) -> dict[str, torch.Tensor]:
    """Random adapters of one block, as the bank holds them."""
    weights = {f"{s}_adapter.weight": torch.eye(width) + torch.randn(width, width) / width for s in family.groups[0].streams}
    return weights | {f"{s}_adapter.bias": torch.randn(width) / 10 for s in family.groups[0].streams}


def test_adapters_are_linear_maps_in_front_of_the_block(subject: tuple[Family, Any, dict[str, Any]], tmp_path: Path) -> None:
    """The teacher with the maps and one block in an interval's place says what the student is."""
    family, model, inputs = subject
    seen = trace(model, family, inputs)
    length, width = len(blocks_of(model, family)), seen.states["image"][0].shape[-1]
    for first in (0, length - 2):
        span = (first, first + 1)
        plan = CompressionPlan.of(family.name, length, [span], adapters=[span])
        block, maps = blocks_of(model, family)[first + 1], adapters_of(family, width)
        student = apply_plan(model, plan, {plan.interval_key(plan.intervals[0]): block_state(block) | maps})

        def mapped(states: dict[str, torch.Tensor], block: Any = block, maps: Any = maps) -> dict[str, torch.Tensor]:
            given = {s: x @ maps[f"{s}_adapter.weight"].T + maps[f"{s}_adapter.bias"] for s, x in states.items()}
            return run_block(block, family, given, seen.shared)

        with replaced(model, family, {first: StandIn(family, mapped), first + 1: None}):
            wanted = run(model, inputs)
        assert (run(student, inputs) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        config = {"_class_name": family.class_name, **model.config}
        assert count_parameters(student) == predicted_parameters(family, config, plan)
        save_model(student, plan, tmp_path / str(first))
        assert torch.equal(run(load_model(tmp_path / str(first)), inputs), run(student, inputs))
        # A bank without the record gives the first block and the identity.
        plain = run(apply_plan(model, CompressionPlan.of(family.name, length, [span])), inputs)
        assert (run(apply_plan(model, plan), inputs) - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_the_lowered_module_equals_eager(subject: tuple[Family, Any, dict[str, Any]]) -> None:
    family, model, _ = subject
    lowered = family.lowered(model)
    for size in lowered.sizes:
        inputs = lowered.inputs(**size)
        assert set(lowered.dynamic) == set(inputs)
        with torch.no_grad():
            assert (lowered.module(**inputs) - lowered.reference(inputs)).abs().max() <= 1e-5


def test_counts_come_from_the_configuration(subject: tuple[Family, Any, dict[str, Any]]) -> None:
    family, model, _ = subject
    assert count_parameters(empty_model(family, {"_class_name": family.class_name, **model.config})) == count_parameters(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_s_class_stands_alone(name: str) -> None:
    """It is copied into folders that are opened without ppclc, so it imports torch, diffusers and the standard library."""
    family: Family = plugins.load("families", name)
    source = Path(str(import_module(family.student_class.partition(":")[0]).__file__)).read_text("utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"torch", "diffusers"}
