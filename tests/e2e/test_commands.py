"""The other commands and bad input, through the command line's own entry point, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppclc import cli, kernels
from ppclc.errors import UnavailableError

EXPECTED_COMMANDS = {"init", "inspect", "plan", "compress", "slice", "export", "bench", "report", "doctor"}
EXPECTED_GROUPS = {"lora": {"remap"}}


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr("sys.argv", ["ppclc", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def ppclc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *args: run(capsys, monkeypatch, *args)


def test_the_commands_are_these() -> None:
    assert names(cli.app.registered_commands) == EXPECTED_COMMANDS
    assert {g.name: names(g.typer_instance.registered_commands) for g in cli.app.registered_groups if g.typer_instance} == EXPECTED_GROUPS


def names(commands: Any) -> set[str]:
    return {c.name or c.callback.__name__ for c in commands if c.callback}


def test_inspect_counts_what_is_there(ppclc: Any, teacher: Any, teacher_folder: Path) -> None:
    code, out, _ = ppclc("inspect", str(teacher_folder), "--json", "--check")
    document = json.loads(out)
    assert code == 0
    assert document["parameters"] == sum(p.numel() for p in teacher.parameters()) == sum(document["parameters_by_part"].values())
    assert document["groups"] == {"transformer_blocks": 6}
    assert document["blocks"] == 6
    assert document["bytes"] == sum(f.stat().st_size for f in teacher_folder.rglob("*.safetensors"))


def test_the_folder_of_a_run_stands_for_its_student(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(teacher_folder, run / "model")
    (run / "recipe.yaml").write_text("model: {path: elsewhere}\n", "utf-8")
    wanted = json.loads(ppclc("inspect", str(run / "model"), "--json")[1])
    code, out, _ = ppclc("inspect", str(run), "--json", "--check")
    found = json.loads(out)
    assert code == 0
    assert found["parameters_by_part"] == wanted["parameters_by_part"]
    assert found["model"] == str(run / "model")
    (run / "recipe.yaml").unlink()
    code, _, err = ppclc("inspect", str(run))
    assert code == 2
    assert "holds no transformer" in err


@pytest.mark.slow
def test_init_writes_a_recipe_that_plan_reads(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    code, out, _ = ppclc("init", str(teacher_folder))
    assert (code, out.count("recipe.yaml")) == (0, 2)
    code, out, _ = ppclc("plan", "recipe.yaml", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["basis"] == "config"
    assert document["student"]["parameters"] <= 0.5 * document["teacher"]["parameters"]
    assert document["student"]["blocks"] == len(document["plan"]["kept"])
    code, _, err = ppclc("init", str(teacher_folder))
    assert code == 2
    assert "recipe.yaml" in err


@pytest.mark.slow
def test_plan_needs_no_weights(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((teacher_folder / "transformer" / "config.json").read_text())
    (tmp_path / "r.yaml").write_text("model: {path: bare}\nplan: {intervals: [[1, 3]], text_stream: none, modulation_rank: none}\n")
    code, out, _ = ppclc("plan", "r.yaml", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["kept"] == [0, 1, 4, 5]


@pytest.mark.slow
def test_the_paper_s_model_is_planned_from_its_configuration(ppclc: Any, tmp_path: Path) -> None:
    """Qwen-Image's published count and that of its blocks, from config.json alone."""
    bare = tmp_path / "qwen"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", "in_channels": 64, "num_layers": 60}))
    (tmp_path / "r.yaml").write_text(
        "model: {path: qwen, dtype: bfloat16}\nplan: {intervals: [[3, 4], [5, 7]], text_stream: none, modulation_rank: none}\n"
    )
    code, out, _ = ppclc("plan", "r.yaml", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["teacher"]["parameters"] == 20_430_401_088
    assert document["student"]["parameters"] == 20_430_401_088 - 3 * 339_831_296
    # Two bytes a parameter, and the headers of the shards.
    assert 0 < document["student"]["bytes"] - 2 * document["student"]["parameters"] < 1_000_000


@pytest.mark.slow
def test_plan_predicts_what_will_be_written_and_what_it_takes(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {teacher_folder}}}\nplan: {{intervals: [[1, 3]], text_stream: [5], modulation_rank: 4}}\n"
    )
    code, out, _ = ppclc("plan", "r.yaml", "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {"teacher", "student", "plan", "basis", "run"}
    for model in ("teacher", "student"):
        assert set(document[model]) == {"parameters", "bytes", "blocks", "latency_ms", "vram_bytes"}
        assert document[model]["vram_bytes"] > 4 * document[model]["parameters"]
    assert document["teacher"]["bytes"] == sum(f.stat().st_size for f in teacher_folder.rglob("*.safetensors"))
    assert set(document["run"]) == {"peak_bytes", "disk_bytes", "disk_peak_bytes", "seconds"}
    assert list(document["run"]["seconds"]) == ["calibrate", "analyze", "distill", "slice", "verify", "export", "bench", "report"]
    assert all(s >= 0 for s in document["run"]["seconds"].values())
    assert document["run"]["disk_bytes"] > document["student"]["bytes"]
    assert document["run"]["peak_bytes"] > document["student"]["vram_bytes"]


@pytest.mark.slow
def test_plan_draws_every_edit(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {teacher_folder}}}\nplan: {{intervals: [[1, 3]], text_stream: [5], modulation_rank: 4}}\n"
    )
    code, out, err = ppclc("plan", "r.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["block", "0", "1", "2", "3", "4", "5"]
    assert lines[1].split(maxsplit=1) == ["image", "■   ■───┤───┤   ■   ■"]
    assert lines[2].split(maxsplit=1) == ["text", "■   ■───┤───┤   ■   ▒"]
    for words in ("merged into one block: 1-3", "text stream mapped: 5", "modulation of rank 4", "dead code removed", "not measured"):
        assert words in out
    row = next(line for line in lines if line.startswith("blocks"))
    assert row.split() == ["blocks", "6", "4", "66.7", "%"]


@pytest.mark.parametrize(
    ("edits", "wanted"),
    [
        ("intervals: [[1, 2], [2, 3]]", "without overlap"),
        ("intervals: [[4, 6]]", "0..5"),
        ("intervals: none, text_stream: [0]", "block 0"),
        ("intervals: none, modulation_rank: 33", "modulation_rank = 33"),
    ],
)
def test_a_plan_that_the_model_cannot_take_is_refused(edits: str, wanted: str, ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\nplan: {{{edits}}}\n")
    code, out, err = ppclc("plan", "r.yaml")
    assert (code, out) == (2, "")
    assert wanted in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ("export: [{backend: onnx, options: {opset: 3}}]", "export.opset = 3"),
        ("calibrate: {source: prompts, path: words.txt, resolution: 1000}", "calibrate.resolution = 1000: wanted multiples of 16"),
        ("calibrate: {source: prompts, path: nowhere.txt, resolution: 1024}", "nowhere.txt"),
    ],
)
def test_what_compress_would_refuse_at_once_is_refused(section: str, wanted: str, ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    """By a configuration alone: of the pipeline there is what says how many pixels a token stands for."""
    pipeline = tmp_path / "pipeline"
    for part, config in (
        ("transformer", json.loads((teacher_folder / "transformer" / "config.json").read_text())),
        ("vae", {"temperal_downsample": [False, True, True]}),
    ):
        (pipeline / part).mkdir(parents=True)
        (pipeline / part / "config.json").write_text(json.dumps(config))
    (pipeline / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    (tmp_path / "words.txt").write_text("a cat\n")
    (tmp_path / "r.yaml").write_text(f"model: {{path: {pipeline}}}\nplan: {{intervals: [[1, 2]], text_stream: none}}\n{section}\n")
    code, out, err = ppclc("plan", "r.yaml")
    assert (code, out) == (2, "")
    assert wanted in err


@pytest.mark.slow
def test_bench_keeps_block_costs_that_plan_reads(ppclc: Any, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPCLC_CACHE", str(tmp_path / "cache"))
    code, out, err = ppclc("bench", str(teacher_folder), "--runs", "2", "--json")
    assert code == 0
    assert [row["target"] for row in json.loads(out)] == [str(teacher_folder)]
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    assert err.count("kept what a block of") == 1
    assert kept[0].name in err.replace("\n", "")
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\nplan: {{intervals: [[1, 3]], text_stream: none}}\n")
    document = json.loads(ppclc("plan", "r.yaml", "--json")[1])
    costs = json.loads(kept[0].read_text())
    assert document["teacher"]["latency_ms"] == pytest.approx(costs["base_ms"] + 6 * costs["block_ms"]["transformer_blocks"])


@pytest.mark.slow
def test_what_was_measured_is_told_where_its_files_cannot_be_written(
    ppclc: Any, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str) -> None:
        raise UnavailableError(f"{path}: the disk is full")

    monkeypatch.setattr("ppclc.benching.files.write_text", full)
    code, _, err = ppclc("bench", str(teacher_folder), "--runs", "2", "-o", str(tmp_path / "out"))
    assert code == 3
    assert "bench.json: the disk is full" in err
    assert "| target | back end |" in err
    assert f"| {teacher_folder} | eager |" in err


@pytest.mark.slow
@pytest.mark.parametrize("as_file", [True, False])
def test_bench_of_random_weights_needs_a_configuration_alone(as_file: bool, ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((teacher_folder / "transformer" / "config.json").read_text())
    name = "bare/config.json" if as_file else "bare"
    code, out, err = ppclc("bench", "--random-weights", name, "--runs", "2", "--dtype", "bfloat16", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["target"], row["backend"], row["dtype"], row["runs"]) for row in rows] == [(name, "eager", "bfloat16", 2)]
    assert f"kept what a block of {name} costs" in err
    code, out, err = ppclc("bench", "--random-weights", "nowhere")
    assert (code, out) == (2, "")
    assert "nowhere" in err


@pytest.mark.slow
def test_random_weights_beyond_memory_are_refused(ppclc: Any, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppclc.bench_subjects.free_bytes", lambda device: 10)
    code, _, err = ppclc("bench", "--random-weights", str(teacher_folder), "--runs", "2")
    assert code == 3
    assert "0.0 GB of memory are free, wanted 0.0 GB more for its weights; what its blocks cost was measured" in err


@pytest.mark.slow
def test_a_recipe_s_cut_is_priced_without_weights(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((teacher_folder / "transformer" / "config.json").read_text())
    (tmp_path / "cut.yaml").write_text(
        "model: {path: bare}\nplan: {intervals: [[0, 2]], text_stream: none, ffn: none, modulation_rank: 4}\n"
    )
    code, out, _ = ppclc("bench", "--random-weights", "cut.yaml", "--runs", "3", "--set", "bench.steps=1", "--json", "-o", "res")
    rows = json.loads(out)
    assert code == 0
    assert [row["target"] for row in rows] == ["teacher", "student"]
    assert rows[1]["parameters"] < 0.7 * rows[0]["parameters"]
    assert rows[1]["flops"] < rows[0]["flops"]
    assert rows[1]["speedup"] == pytest.approx(rows[0]["p50_ms"] / rows[1]["p50_ms"])  # three calls on a busy machine say no more
    assert (tmp_path / "res" / "bench.png").is_file()


def test_a_dtype_that_is_none_is_refused(ppclc: Any, teacher_folder: Path) -> None:
    code, _, err = ppclc("bench", str(teacher_folder), "--dtype", "int4")
    assert code == 2
    assert "int4" in err


def test_kernels_that_cannot_run_are_refused_before_anything_is_measured(ppclc: Any, tmp_path: Path) -> None:
    if not kernels.lacks():
        pytest.skip("they can run here")
    code, _, err = ppclc("bench", "--random-weights", "qwen_image_12b", "--set", "bench.kernels=triton")
    assert code == 3
    assert "kernels = 'triton'" in err
    assert "block costs" not in err
    code, _, err = ppclc("compress", "two_digits", "-o", str(tmp_path / "out"), "--set", "kernels=triton")
    assert code == 3
    assert "wanted auto or torch here" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_doctor_names_every_back_end(ppclc: Any) -> None:
    code, out, _ = ppclc("doctor", "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document["backends"]) == {"aotinductor", "compile", "eager", "onnx", "onnxruntime", "tensorrt"}
    assert document["versions"]["torch"]
    assert document["backends"]["eager"] == "ready"
    assert document["backends"]["onnx"].startswith(f"ready (onnx {version('onnx')}, onnxscript {version('onnxscript')}")
    assert document["extras"]["report"] == "ready"


def test_doctor_tells_what_mends_what_is_missing(ppclc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = ("onnxruntime", "matplotlib", "tensorrt", "tensorrt_rtx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in gone else find(name, *more))
    monkeypatch.setattr("shutil.which", lambda *_: None)
    document = json.loads(ppclc("doctor", "--json")[1])
    assert document["backends"]["onnxruntime"] == "pip install 'ppclc[onnxruntime]'"
    assert document["backends"]["tensorrt"] == "pip install 'ppclc[tensorrt-rtx]'"
    assert "install g++, or name one in CXX" in document["backends"]["aotinductor"]
    assert document["extras"]["report"] == "pip install 'ppclc[report]'"


BAD_RECIPES = {
    "no such file": (None, "nope.yaml", ["nope.yaml", "two_digits"]),
    "not yaml": ("model: [", "r.yaml", ["r.yaml", "line"]),
    "a list": ("- a\n", "r.yaml", ["r.yaml", "sections"]),
    "empty": ("", "r.yaml", ["r.yaml", "empty"]),
    "unknown section": ("model: {path: x}\nspeed: 3\n", "r.yaml", ["r.yaml", "speed", "calibrate"]),
    "unknown key": ("model: {path: x}\ndistill: {stepz: 3}\n", "r.yaml", ["r.yaml", "distill.stepz", "3", "steps"]),
    "wrong type": ("model: {path: x}\ndistill: {learning_rate: fast}\n", "r.yaml", ["r.yaml", "distill.learning_rate", "'fast'", "number"]),
    "target of 0": ("model: {path: x}\ntarget: {parameters: 0}\n", "r.yaml", ["r.yaml", "target.parameters", "0", "greater than 0"]),
    "negative target": ("model: {path: x}\ntarget: {parameters: -0.5}\n", "r.yaml", ["r.yaml", "target.parameters", "-0.5"]),
    "no model": ("target: {parameters: 0.5}\n", "r.yaml", ["r.yaml", "model"]),
    "no such model": ("model: {path: ./nowhere}\n", "r.yaml", ["./nowhere", "folder"]),
    "no such builtin": ("model: {path: 'builtin:nothing'}\n", "r.yaml", ["builtin:nothing", "builtin:two-digits"]),
    "no such back end": ("model: {path: 'builtin:two-digits'}\nexport: [{backend: tape}]\n", "r.yaml", ["tape", "onnx"]),
    "no such gate": (
        "model: {path: 'builtin:two-digits'}\nverify: {gates: {beauty: {drop_percent: 1}}}\n",
        "r.yaml",
        ["beauty", "flow_loss"],
    ),
    "source without data": ("model: {path: TEACHER}\ncalibrate: {source: images}\n", "r.yaml", ["calibrate.source", "images", "noise"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES, ids=lambda c: c.replace(" ", "-"))
def test_bad_recipes_are_refused_in_one_message(case: str, ppclc: Any, tmp_path: Path, teacher_folder: Path) -> None:
    text, name, words = BAD_RECIPES[case]
    if text is not None:
        (tmp_path / name).write_text(text.replace("TEACHER", str(teacher_folder)))
    code, out, err = ppclc("compress", name)
    assert code == 2
    assert out == ""
    assert err.count("ppclc: ") == 1
    assert "Traceback" not in err
    assert [w for w in words if w not in err] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a file", "below a file", "unwritable"])
def test_folders_that_cannot_be_written_are_refused(place: str, ppclc: Any, tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\ncalibrate: {{samples: 2}}\n")
    (tmp_path / "file").write_text("mine")
    out = {"a file": "file", "below a file": "file/out", "unwritable": "/proc/ppclc"}[place]
    code, _, err = ppclc("compress", "r.yaml", "-o", out)
    assert code == 2
    assert out in err
    assert "-o" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_library_is_exit_code_3(ppclc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher_folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\nexport: [{{backend: onnx}}]\n")
    code, _, err = ppclc("compress", "r.yaml")
    assert code == 3
    assert "pip install 'ppclc[onnx]'" in err
    assert not (tmp_path / "out").exists()


def test_export_and_bench_without_a_student_say_what_to_do(ppclc: Any) -> None:
    for command in ("export", "bench"):
        code, _, err = ppclc(command)
        assert code == 2
        assert "ppclc compress two_digits" in err


TINY = """
calibrate: {samples: 16, longest: 2}
analyze: {probes: 16, trials: 0, supernet_steps: 0}
target: {parameters: 0.8}
plan: {text_stream: none, ffn: none, modulation_rank: none}
distill: {steps: 1, finetune_steps: 1, batch: 4}
"""


@pytest.mark.slow
def test_a_refused_recipe_leaves_an_earlier_run_as_it_is(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    """Also where the refusal comes after the costs were measured: sizes can still be cut, and `plan` tells no old plan for a new recipe."""
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\n{TINY}")
    code, _, err = ppclc("compress", "r.yaml", "--until", "slice")
    assert (code, "earlier plan" in err) == (0, False)
    stored = (tmp_path / "out/r/recipe.yaml").read_text()
    code, _, err = ppclc("compress", "r.yaml", "--until", "slice", "--set", "target.parameters=0.01")
    assert (code, "cannot be reached" in err) == (2, True)
    assert (tmp_path / "out/r/recipe.yaml").read_text() == stored
    assert ppclc("plan", "r.yaml", "--set", "target.parameters=0.01")[0] == 2
    assert ppclc("slice", "out/r", "--parameters", "0.9")[0] == 0
    code, _, err = ppclc("compress", "r.yaml", "--until", "analyze", "--set", "target.parameters=0.9")
    assert (code, "model is still the student of an earlier plan" in " ".join(err.split())) == (0, True)
    assert "parameters: 0.9" in (tmp_path / "out/r/recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ("plan: {protect: [99]}\ntarget: {parameters: 0.5}", "plan.protect = [99]: wanted blocks within 0..5"),
        ("plan: {protect: [2], intervals: [[1, 2]]}", "block 2 is in the interval [1, 2]"),
        ("plan: {modulation_rank: 99}\ntarget: {parameters: 0.5}", "plan.modulation_rank = 99: wanted at most the width"),
        ("plan: {intervals: [], text_stream: [2, 3, 4, 5]}\ncalibrate: {longest: 2}", "calibrate.longest = 2: wanted at least that"),
        ("plan: {intervals: [[4, 9]]}", "within 0..5"),
        ("plan: {intervals: [[3, 9]], text_stream: [5]}", "plan.intervals: got [3, 9], wanted at least two blocks within 0..5"),
        ("plan: {intervals: [[-1, 3]]}", "plan.intervals: got [-1, 3]"),
        ("plan: {intervals: [[1, 2], [3, 4, 5]]}", "or pairs of blocks, the first and the last that become one"),
        ("target: {parameters: 45}", "target.parameters = 45: wanted a share of the teacher's up to 1, or a number of at least 1,000"),
        ("target: {bytes: 1.5}", "target.bytes = 1.5: wanted a share"),
        ("plan: {ffn: [{block: 5, stream: text}], modulation_rank: none}\ntarget: {parameters: 0.5}", "last block that reads text"),
        ("plan: {modulation_rank: none}", "target: got nothing"),
        ("target: {parameters: .inf}", "target.parameters"),
        ("target: {parameters: 0.5}\ndistill: {learning_rate: .nan}", "distill.learning_rate"),
    ],
)
def test_what_is_wrong_by_hand_is_refused_before_anything_is_made(
    edits: str, words: str, ppclc: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    """By `compress` as by `plan`."""
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\n{edits}\n")
    for command in ("compress", "plan"):
        code, _, err = ppclc(command, "r.yaml")
        assert (code, err.count("ppclc: ")) == (2, 1)
        assert words in err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_with_other_files_is_no_size_to_be_replaced(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\n{TINY}")
    assert ppclc("compress", "r.yaml", "--until", "slice")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/size.json").write_text("{}")
    (tmp_path / "mine/notes.txt").write_text("mine")
    code, _, err = ppclc("slice", "out/r", "--parameters", "0.9", "-o", "mine")
    assert (code, "notes.txt" in err) == (2, True)
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_report_reads_and_makes_nothing(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\n{TINY}verify: {{scenes: 8, seeds: [0]}}\nbench: {{runs: 2}}\n")
    assert ppclc("compress", "r.yaml", "--until", "slice")[0] == 0
    code, _, err = ppclc("report", "out/r")
    assert (code, "the run is not finished" in err, "ppclc compress" in err) == (2, True, True)
    assert ppclc("compress", "r.yaml")[0] == 0
    out = tmp_path / "out/r"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    report = (out / "report.json").read_text()
    assert ppclc("report", "out/r")[0] == 0
    changed = {p.name for p in out.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    assert changed == {"report.json", "report.html"}
    own, again = json.loads(report), json.loads((out / "report.json").read_text())
    assert {k: v for k, v in own.items() if k != "stages"} == {k: v for k, v in again.items() if k != "stages"}
    seconds = [{s["name"]: s["seconds"] for s in document["stages"] if s["name"] != "report"} for document in (own, again)]
    assert seconds[1] == pytest.approx(seconds[0])
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(plan | {"modulation_rank": 4}))
    code, _, err = ppclc("report", "out/r")
    assert (code, "the run is not finished" in err) == (2, True)
    assert {p for p in out.rglob("*") if p.is_file()} == set(before)


LATE = [
    ("bench.size={height: 3}", "bench.size = {'height': 3}: wanted height, text, width"),
    ("bench.providers=[cpu]", "bench.providers = ['cpu']: nothing is timed in ONNX Runtime"),
    ("export=[{backend: onnx, options: {sizes: [{height: 3}]}}]", "export.sizes"),
    ("export=[{backend: foo}]", "export.backend = 'foo': no such back end"),
    ("export=[{backend: onnx, dtype: float33}]", "export.dtype = 'float33'"),
]


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(("change", "told"), LATE)
def test_what_the_last_passes_would_refuse_is_refused_first(command: str, change: str, told: str, ppclc: Any, tmp_path: Path) -> None:
    code, _, err = ppclc(command, "two_digits", "-o", str(tmp_path / "out"), "--set", "export=[]", "--set", change)
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [("{opset: 3}", "export.opset = 3: wanted one of"), ("{external_data: 5}", "export.external_data = 5: wanted true, false or null")],
)
def test_values_that_an_export_cannot_take_are_refused_before_the_training(options: str, told: str, ppclc: Any, tmp_path: Path) -> None:
    change = f"export=[{{backend: onnx, options: {options}}}]"
    code, _, err = ppclc("compress", "two_digits", "-o", str(tmp_path / "out"), "--set", change)
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


def test_a_command_to_go_on_with_can_be_pasted(ppclc: Any, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{path: {teacher_folder}}}\n{TINY}")
    out = tmp_path / "my runs" / "one"
    assert ppclc("compress", "r.yaml", "-o", str(out), "--until", "calibrate")[0] == 0
    code, _, err = ppclc("report", str(out))
    assert code == 2
    assert f"ppclc compress '{out}/recipe.yaml' -o '{out}'" in err


@pytest.mark.parametrize("how", ["truncated", "not a number"])
def test_a_broken_teacher_is_told_before_anything_is_encoded(how: str, ppclc: Any, tmp_path: Path) -> None:
    from tests.e2e.test_pipelines import recipe, with_images

    folder = with_images("sd3", tmp_path)
    (file,) = (folder / "pipeline" / "transformer").glob("*.safetensors")
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        tensors["proj_out.bias"][3] = torch.nan
        save_file(tensors, file, {"format": "pt"})
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(folder)))
    code, _, err = ppclc("compress", "r.yaml", "-o", "out", "--until", "calibrate")
    assert code == 2
    assert str(file) in err
    assert "encoding" not in err
    assert not (tmp_path / "out" / "records").exists()
