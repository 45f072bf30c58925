"""Export: what is written runs elsewhere as it does here, and nothing is written that does not."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc import commands, lowering, plugins
from ppclc.artefacts.receipts import read_export
from ppclc.backends import Backend, ExportRequest, Written, aotinductor
from ppclc.errors import OutputError, RecipeError, UnavailableError, VerificationError
from ppclc.families import Family, Lowered
from ppclc.loading.classes import model_class
from ppclc.models import apply_plan, block_state
from ppclc.passes import bench, export
from ppclc.passes.export import check_backend, export_digest, export_model
from ppclc.plan import CompressionPlan
from ppclc.records import Export, Parity, file_digest
from ppclc.screens.display import Display

FAMILY: Family = plugins.load("families", "qwen_image")
INPUTS = ["hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids"]
# Depth with adapters, text stream, modulation rank, linear networks and dead code at once: in the fewest blocks, and with a full block behind a mapped one.
SHORT_PLAN = CompressionPlan.of(FAMILY.name, 3, [(0, 1)], [2], 8, True, [(2, "image")], [(0, 1)])
LONG_PLAN = CompressionPlan.of(
    FAMILY.name, 7, [(0, 1), (4, 5)], [2, 4], 8, True, [(0, "text"), (3, "image"), (3, "text"), (4, "image")], [(0, 1), (4, 5)]
)


def a_teacher(layers: int) -> Any:
    torch.manual_seed(0)
    config = {**FAMILY.tiny_config, "num_layers": layers}
    return model_class(FAMILY, config).from_config(config).eval().requires_grad_(False)


def a_student(plan: CompressionPlan) -> Any:
    teacher = a_teacher(plan.num_blocks)
    width = teacher.inner_dim
    square = {f"{name}.weight": torch.randn(width, width) / width**0.5 for name in ("text_in", "text_out")}
    offset = {f"{name}.bias": torch.randn(width) / 10 for name in ("text_in", "text_out")}
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    bank = {"modulation": {"basis": basis, "mean": torch.randn(width) / 10}}
    bank |= dict.fromkeys((plan.text_key(e.block) for e in plan.text_stream), square | offset)
    bank |= {plan.ffn_key(e.block, e.stream): {"weight": torch.randn(width, width) / width, "bias": torch.ones(width)} for e in plan.ffn}
    for interval in plan.adapters:
        adapters = {f"{s}_adapter.weight": torch.randn(width, width) / width**0.5 for s in ("image", "text")}
        adapters |= {f"{s}_adapter.bias": torch.randn(width) / 10 for s in ("image", "text")}
        bank[plan.interval_key(interval)] = block_state(teacher.transformer_blocks[interval.first]) | adapters
    return apply_plan(teacher, plan, bank)


def fingerprint(model: Any) -> dict[str, Any]:
    state = {name: (tensor.data_ptr(), tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}
    processors = {name: id(part.processor) for name, part in model.named_modules() if hasattr(part, "processor")}
    return {"state": state, "processors": processors, "training": model.training, "config": dict(model.config)}


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    assert before["processors"]
    assert {k: v for k, v in after.items() if k != "state"} == {k: v for k, v in before.items() if k != "state"}
    assert after["state"].keys() == before["state"].keys()
    for name, (place, tensor, grad) in before["state"].items():
        assert after["state"][name][0] == place
        assert after["state"][name][2] == grad
        assert torch.equal(after["state"][name][1], tensor)


@dataclasses.dataclass(frozen=True)
class Exported:
    model: Any
    before: dict[str, Any]
    folder: Path
    export: Export
    stdout: str


def exported(model: Any, folder: Path, capsys_text: Any, **options: Any) -> Exported:
    before = fingerprint(model)
    export = export_model(model, FAMILY, "onnx", "float32", folder, "abc", options=options)
    return Exported(model, before, folder, export, capsys_text())


@pytest.fixture(scope="module", params=["teacher", "student"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A stock teacher with its weights inside the model file, a width-edited student with them beside it."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    capture = request.config.pluginmanager.getplugin("capturemanager")
    model, external = (a_teacher(1), False) if request.param == "teacher" else (a_student(SHORT_PLAN), True)
    return exported(model, folder, lambda: capture.read_global_capture()[0], external_data=external)


@pytest.mark.slow
def test_the_artefact_equals_eager_at_three_shapes(made: Exported) -> None:
    lowered = FAMILY.lowered(made.model)
    session = plugins.load("backends", "onnxruntime").load(made.folder, lowered)
    distances = []
    for size in lowered.sizes:
        inputs = lowered.inputs(**size)
        with torch.no_grad():
            distances.append(lowering.parity(lowered.reference(inputs), session.run(inputs)))
    assert len(distances) == 3
    assert max(d.max_abs for d in distances) <= 1e-4
    assert made.export.parity == lowering.worst(distances)
    assert made.export.shapes == [dict(size) for size in lowered.sizes]


@pytest.mark.slow
def test_the_artefact_takes_sizes_that_no_one_tried(made: Exported) -> None:
    lowered = FAMILY.lowered(made.model)
    session = plugins.load("backends", "onnxruntime").load(made.folder, lowered)
    for size in ({"batch": 1, "height": 1, "width": 1, "text": 1}, {"batch": 4, "height": 5, "width": 7, "text": 17}):
        inputs = lowered.inputs(**size)
        with torch.no_grad():
            assert lowering.parity(lowered.reference(inputs), session.run(inputs)).max_abs <= 1e-4


def test_what_is_lowered_equals_eager_for_every_role_of_a_block() -> None:
    model = a_student(LONG_PLAN)
    before, lowered = fingerprint(model), FAMILY.lowered(model)
    for size in lowered.sizes:
        inputs = lowered.inputs(**size)
        with torch.no_grad():
            assert lowering.parity(lowered.reference(inputs), lowered.module(**inputs)).max_abs <= 1e-5
    assert_unchanged(model, before)


@pytest.mark.slow
def test_the_model_is_left_as_it_was(made: Exported) -> None:
    assert_unchanged(made.model, made.before)


@pytest.mark.slow
def test_standard_output_stays_clean(made: Exported) -> None:
    assert made.stdout == ""


@pytest.mark.slow
def test_the_record_says_what_lies_there(made: Exported) -> None:
    record = made.export
    on_disk = {p.relative_to(made.folder).as_posix(): p for p in made.folder.rglob("*") if p.is_file()}
    assert record.files == {name: file_digest(path) for name, path in on_disk.items() if name != "export.json"}
    assert record.bytes == sum(on_disk[name].stat().st_size for name in record.files)
    weights = {"transformer/model.onnx.data"} if record.options["external_data"] else set()
    assert set(record.files) == {"transformer/config.json", "transformer/model.onnx"} | weights
    assert record.inputs == INPUTS
    assert record.options["opset"] == 23
    assert record.options["session"]["providers"] == ["CPUExecutionProvider"]
    assert record.versions.keys() == {"ppclc", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime"}
    assert record.seconds.keys() == {"prepare", "lower", "export", "check", "compare"}
    assert read_export(made.folder) == record
    assert json.loads((made.folder / "export.json").read_text("utf-8"))["model_digest"] == "abc"
    assert record.digest == export_digest("abc", "onnx", "float32", {"external_data": record.options["external_data"]})


@pytest.mark.slow
def test_the_graph_carries_names_and_no_paths(made: Exported) -> None:
    import onnx

    path = made.folder / "transformer" / "model.onnx"
    graph = onnx.load(str(path), load_external_data=False).graph
    assert [value.name for value in graph.input] == INPUTS
    assert [value.name for value in graph.output] == ["out_hidden_states"]
    axes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    assert axes["hidden_states"][:2] == ["batch", "image_tokens"]
    assert axes["encoder_hidden_states"][:2] == ["batch", "text_tokens"]
    assert axes["img_ids"] == ["image_tokens", 3]
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b".py" not in content


@pytest.mark.slow
def test_the_configuration_travels_along(made: Exported) -> None:
    config = json.loads((made.folder / "transformer" / "config.json").read_text("utf-8"))
    assert config["_class_name"] == type(made.model).__name__
    assert config["num_layers"] == len(made.model.transformer_blocks)
    assert not {"_name_or_path", "auto_map"} & config.keys()


@dataclasses.dataclass(frozen=True)
class Echo:
    """A session of the reference, `shift` away from it."""

    reference: Any
    shift: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.reference(inputs) + self.shift  # type: ignore[no-any-return]


def write_a_byte(request: ExportRequest) -> Written:
    (request.out / "model.bin").write_bytes(b"1")
    return Written(dict(request.options), {"write": 0.0})


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    names, load = plugins.names, plugins.load
    monkeypatch.setattr(plugins, "names", lambda kind: sorted([*names(kind), *([backend.name] if kind == "backends" else [])]))
    monkeypatch.setattr(plugins, "load", lambda kind, name: backend if (kind, name) == ("backends", backend.name) else load(kind, name))


def an_echo(shift: float = 0.0, **more: Any) -> Backend:
    return Backend(name="echo", load=lambda folder, subject: Echo(subject.reference, shift), export=write_a_byte, **more)


def export_echo(folder: Path, family: Family = FAMILY, digest: str = "abc", **options: Any) -> Export:
    return export_model(a_teacher(1), family, "echo", "float32", folder, digest, options=options)


@pytest.mark.parametrize(("shift", "figure"), [(2e-3, "max_abs = 0.002"), (float("nan"), "max_abs = nan")])
def test_nothing_is_left_behind_when_parity_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, figure: str) -> None:
    use_backend(monkeypatch, an_echo(shift))
    with pytest.raises(VerificationError, match=rf"echo: differs from eager by {figure}.*at most 0.0001"):
        export_echo(tmp_path / "echo")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered(model: Any) -> Lowered:
        true = FAMILY.lowered(model)
        return dataclasses.replace(true, reference=lambda inputs: true.reference(inputs) * 1.01)

    use_backend(monkeypatch, dataclasses.replace(an_echo(), load=lambda folder, subject: Echo(FAMILY.lowered(a_teacher(1)).reference, 0.0)))
    with pytest.raises(VerificationError, match="max_abs"):
        export_echo(tmp_path / "echo", dataclasses.replace(FAMILY, lowered=lowered))
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_that_does_not_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Echo):
        def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            raise RuntimeError("no kernel")

    use_backend(monkeypatch, dataclasses.replace(an_echo(), load=lambda folder, subject: Broken(subject.reference, 0.0)))
    with pytest.raises(VerificationError, match=r"echo: does not run at .*'hidden_states': \[2, 32, 12\].*no kernel"):
        export_echo(tmp_path / "echo")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, an_echo())
    first = export_echo(tmp_path / "echo")
    assert export_echo(tmp_path / "echo").files == first.files
    use_backend(monkeypatch, an_echo(1.0))
    with pytest.raises(VerificationError):
        export_echo(tmp_path / "echo", digest="def")
    assert read_export(tmp_path / "echo").files == first.files


def test_what_has_not_changed_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def write(request: ExportRequest) -> Written:
        made.append(dict(request.options))
        return write_a_byte(request)

    use_backend(monkeypatch, dataclasses.replace(an_echo(), export=write, options={"side": 1}))
    folder = tmp_path / "echo"
    first = export_echo(folder)
    assert (export_echo(folder), len(made)) == (first, 1)
    export_echo(folder, digest="def")  # another model
    export_echo(folder, digest="def", side=2)
    (folder / "model.bin").write_bytes(b"2")  # no longer whole
    export_echo(folder, digest="def", side=2)
    assert made == [{"side": 1}, {"side": 1}, {"side": 2}, {"side": 2}]
    monkeypatch.setattr(export, "versions", lambda backend: {"torch": "another"})
    export_echo(folder, digest="def", side=2)
    assert len(made) == 5


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, an_echo())
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"no export\.json"):
        export_echo(tmp_path)
    assert (tmp_path / "photo.png").read_bytes() == b"x"


def test_another_dtype_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, an_echo())
    export_echo(tmp_path / "echo")
    assert commands._free_folder(tmp_path / "echo", "float32") == tmp_path / "echo"
    assert commands._free_folder(tmp_path / "echo", "bfloat16") == tmp_path / "echo-bfloat16"
    assert commands._free_folder(tmp_path / "none", "bfloat16") == tmp_path / "none"


def test_progress_ends_at_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, an_echo())
    seen: list[float] = []
    export_model(a_teacher(1), FAMILY, "echo", "float32", tmp_path / "echo", "abc", lambda done, what: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_an_unknown_back_end_is_told_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'onix': no such back end; there are .*eager.*onnx.*onnxruntime"):
        check_backend("onix", "float32")


def test_a_back_end_that_writes_nothing_cannot_be_exported_to() -> None:
    with pytest.raises(RecipeError, match=r"'eager': writes no model.*onnx"):
        check_backend("eager", "float32")


def test_onnxruntime_exports_what_onnx_writes() -> None:
    assert check_backend("onnxruntime", "float32").name == "onnx"


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(RecipeError, match=rf"export\.dtype = '{dtype}': wanted float32 or bfloat16 or float16"):
        check_backend("onnx", dtype)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"export\.opsett: onnx has no such option; it has opset, external_data"):
        check_backend("onnx", "float32", {"opsett": 20})


@pytest.mark.parametrize(("option", "value"), [("opset", 17), ("opset", "23"), ("external_data", "maybe")])
def test_unfit_options_are_refused_before_any_work(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"export\.{option} = "):
        export_model(a_teacher(1), FAMILY, "onnx", "float32", tmp_path / "onnx", "abc", options={option: value})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dtype = 'float32', of a model in bfloat16: wanted the same"):
        export_model(a_teacher(1).bfloat16(), FAMILY, "onnx", "float32", tmp_path / "onnx", "abc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "extra"), [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnxruntime")])
def test_a_missing_library_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnavailableError, match=rf"{module} is not installed here: pip install 'ppclc\[{extra}\]'") as raised:
        check_backend("onnx", "float32")
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"model_digest": "abc"}'])
def test_a_folder_without_an_export_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "export.json").write_text(text)
    with pytest.raises(OutputError, match=r"no readable export\.json"):
        read_export(tmp_path)


def test_the_digest_knows_all_that_it_depends_on() -> None:
    same = export_digest("abc", "onnx", "float32")
    assert export_digest("abc", "onnx", "float32", {"opset": 23}) == same
    assert len({same, export_digest("abd", "onnx", "float32"), export_digest("abc", "onnx", "float32", {"opset": 20})}) == 3


def test_parity_in_numbers() -> None:
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    got = torch.tensor([[3.0, 0.5], [0.0, 4.0]])
    distance = lowering.parity(reference, got)
    assert distance.max_abs == 0.5
    assert distance.rel_l2 == pytest.approx(0.1, abs=1e-15)
    assert distance.cosine == pytest.approx(25 / (5 * 25.25**0.5), abs=1e-15)
    assert lowering.parity(reference, reference) == Parity(max_abs=0.0, rel_l2=0.0, cosine=1.0)
    with pytest.raises(VerificationError, match=r"shape \[2\], wanted \[2, 2\]"):
        lowering.parity(reference, torch.zeros(2))


def test_the_worst_of_several_takes_each_figure_by_itself() -> None:
    one, two = Parity(max_abs=1.0, rel_l2=0.1, cosine=0.9), Parity(max_abs=0.5, rel_l2=0.2, cosine=0.99)
    assert lowering.worst([one, two]) == Parity(max_abs=1.0, rel_l2=0.2, cosine=0.9)
    nan = Parity(max_abs=float("nan"), rel_l2=0.0, cosine=1.0)
    assert lowering.worst([one, nan]).max_abs != lowering.worst([one, nan]).max_abs


def test_an_example_of_size_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x: axis 0 \(batch\) has size 1"):
        lowering.exported_program(torch.nn.Linear(2, 2), {"x": torch.zeros(1, 2)}, {"x": {0: "batch"}}, {"batch": (1, 8)})


def test_every_axis_of_the_family_is_bounded() -> None:
    lowered = FAMILY.lowered(a_teacher(1))
    assert {label for axes in lowered.dynamic.values() for label in axes.values()} == set(lowered.ranges)
    assert export.MAX_ABS == {"float32": 1e-4}


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_a_package_says_its_device_and_is_timed_beside_eager(tmp_path: Path) -> None:
    model = a_teacher(1)
    made = export_model(model, FAMILY, "aotinductor", "float32", tmp_path / "x", "abc", options={"device": "cpu"})
    assert (made.options["device"], made.options["session"]["device"], made.options["session"]["gpu"]) == ("cpu", "cpu", None)
    one = bench.Benched("student", dict(model.config), model, FAMILY.lowered(model), [tmp_path / "x"])
    settings = bench.BenchSettings(runs=2, steps=1, device="cpu")
    result, _ = bench.bench_models(FAMILY, [one], settings, "float32", lambda *_: None)
    assert [row.backend for row in result.rows] == ["eager", "aotinductor"]
    receipt = tmp_path / "x" / aotinductor.RECEIPT
    receipt.write_text(receipt.read_text("utf-8").replace('"torch": "', '"torch": "older than '), "utf-8")
    with pytest.raises(UnavailableError, match=r"compiled for PyTorch older than .*compile it again"):
        aotinductor.load(tmp_path / "x", FAMILY.lowered(model))


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"export\.device = 'tpu': wanted cpu, cuda or null"):
        aotinductor.device_of("tpu")
    if not torch.cuda.is_available():
        assert aotinductor.device_of(None) == "cpu"
        with pytest.raises(UnavailableError, match="there is no CUDA device here"):
            aotinductor.device_of("cuda")


def test_a_module_that_was_moved_has_its_own_tensors_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the work failed; by copies on the host, since there need be no other device."""
    model = a_teacher(1)
    module, before = FAMILY.lowered(model).module, fingerprint(model)
    own = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone())

    def work() -> None:
        with aotinductor.placed(module, "there"):
            moved = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
            assert not any(moved[name] == own[name] for name in own)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == own
    assert fingerprint(model)["state"].keys() == before["state"].keys()
    assert all(fingerprint(model)["state"][name][0] == place for name, (place, *_) in before["state"].items())


def test_headers_are_found_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/p/nvidia/cu13/include/cuda.h")] if "nvidia/*" in pattern else [])
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    with aotinductor.headers("cuda"):
        assert os.environ["CPLUS_INCLUDE_PATH"] == f"/mine{os.pathsep}/p/nvidia/cu13/include"
    with aotinductor.headers("cpu"):
        assert os.environ["CPLUS_INCLUDE_PATH"] == "/mine"
    assert os.environ["CPLUS_INCLUDE_PATH"] == "/mine"


def test_a_file_is_no_folder_to_export_to(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    with pytest.raises(OutputError, match="is a file; give another folder with -o"):
        export._check_folder(notes)
    assert notes.read_text() == "precious"


def test_another_models_export_is_not_replaced_unasked(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models' folders may have one name, `model` for example."""
    monkeypatch.chdir(tmp_path)
    one, other = (SimpleNamespace(digest=lambda letter=letter: 64 * letter) for letter in "ab")
    home, screen = Path("export/model"), Display(1, 0)
    assert commands._own_home("mine/model", one, screen) == home
    (home / "onnx").mkdir(parents=True)
    (home / "onnx" / "export.json").write_text('{"model_digest": "' + 64 * "a" + '"}')
    assert commands._own_home("mine/model", one, screen) == home
    assert "of another model" not in capsys.readouterr().err
    assert commands._own_home("theirs/model/", other, screen) == home.with_name("model-bbbbbbbb")
    told = " ".join(capsys.readouterr().err.split())
    assert "export/model/onnx is of another model, and stays; this one goes to export/model-bbbbbbbb" in told
    (home / "onnx" / "export.json").write_text("damaged")
    assert commands._own_home("theirs/model", other, screen) == home
