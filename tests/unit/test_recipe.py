"""The recipe: what it means, and how it says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppclc.errors import RecipeError
from ppclc.recipe import SHIPPED, Recipe, export_options, find_recipe, parse_recipe, read_recipe

MODEL = "model: {path: some/model}\n"

FULL = """
model: {path: some/model, revision: main, dtype: bfloat16}
calibrate: {source: noise, samples: 64, longest: 4, seed: 3}
analyze: {reading: caption, ridge: 1e-3, strategy: ppcl, probes: 32}
target: {bytes: 1e9}
plan: {intervals: [[1, 2], [4, 6]], text_stream: [3], ffn: none, modulation_rank: 8, dead_code: false, protect: [0]}
distill: {steps: 0, finetune_steps: 7, learning_rate: 2, batch: 1, magnitude: 0}
verify: {scenes: 10, seeds: [4], guidance: [1, 2.5], gates: {scene_accuracy_g1: {drop_percent: 1.5, upper_percent: 3}}}
export: [{backend: onnx, dtype: float16}, {backend: onnx}]
bench: {runs: 3, batch: 2}
"""


def read(tmp_path: Path, text: str, changes: list[str] | None = None) -> Recipe:
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    return read_recipe(tmp_path / "mine.yaml", changes)


def test_values_mean_what_yaml_1_2_says(tmp_path: Path) -> None:
    recipe = read(tmp_path, FULL)
    assert recipe.analyze.ridge == 0.001
    assert recipe.target.bytes == 1e9
    assert recipe.plan.intervals == [[1, 2], [4, 6]]
    assert recipe.plan.dead_code is False
    assert recipe.verify.guidance == (1.0, 2.5)
    assert recipe.verify.gates["scene_accuracy_g1"].drop_percent == 1.5
    assert [(e.backend, e.dtype) for e in recipe.export] == [("onnx", "float16"), ("onnx", "float32")]
    words = read(tmp_path, "model: {path: on, revision: no}\n")  # words in YAML 1.2, truth values in 1.1
    assert (words.model.path, words.model.revision) == ("on", "no")


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("5e-1", 0.5), ("1500.5", 1500.5), ("7000", 7000), ("1", 1.0), ("1.0", 1.0)])
def test_targets_keep_their_kind(tmp_path: Path, text: str, value: float) -> None:
    """Up to 1 is a share, a whole number above it a count."""
    got = read(tmp_path, f"{MODEL}target: {{parameters: {text}}}").target.parameters
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("distill.steps=1" + "0" * 400, "a number of 401 digits"),
        ("distill.steps=1" + "0" * 5001, "Exceeds the limit"),
        ("bench=" + "[" * 3000, "nested too deep"),
        ("verify.seeds=[0, 1, 0]", "each once"),
        ("verify.guidance=[1, 1]", "each once"),
    ],
)
def test_what_no_recipe_means_is_one_short_message(change: str, wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted) as told:
        read_recipe(find_recipe("two_digits"), [change])
    assert len(str(told.value)) < 500
    with pytest.raises(RecipeError, match=r"--set export = 3: wanted an option"):
        export_options(["export=3"])


@pytest.mark.parametrize("text", [MODEL, FULL])
def test_a_resolved_recipe_reads_as_the_same(tmp_path: Path, text: str) -> None:
    recipe = read(tmp_path, text)
    again = read(tmp_path, recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    for section in Recipe.model_fields:
        assert f"{section}:" in recipe.to_yaml()


def test_shipped_recipes_parse_and_round_trip(tmp_path: Path) -> None:
    shipped = sorted(SHIPPED.glob("*.yaml"))
    assert "two_digits" in [p.stem for p in shipped]
    for path in shipped:
        recipe = read_recipe(find_recipe(path.stem))
        assert read(tmp_path, recipe.to_yaml()) == recipe
    demo = read_recipe(find_recipe("two_digits"))
    assert isinstance(demo.target.parameters, float)
    assert demo.target.parameters <= 0.5, "the demo promises to remove at least half of the parameters"


def test_changes_go_on_top(tmp_path: Path) -> None:
    changes = [
        "distill.steps=3",
        "target.parameters=0.25",
        "plan.intervals=[[1, 2]]",
        "model.path=builtin:two-digits",
        "analyze.ridge=1e-2",
    ]
    changes += ["verify.gates.flow_loss.drop_percent=2", "distill.steps=4"]
    recipe = read(tmp_path, MODEL, changes)
    assert (recipe.distill.steps, recipe.target.parameters, recipe.plan.intervals) == (4, 0.25, [[1, 2]])
    assert (recipe.model.path, recipe.analyze.ridge) == ("builtin:two-digits", 0.01)
    assert recipe.verify.gates["flow_loss"].drop_percent == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # no recipe at all
        ("", ["an empty file", "wanted sections such as 'model:'"]),
        ("- a\n- b\n", ["a list", "wanted sections"]),
        ("just words", ["a str", "wanted sections"]),
        ("model: [", ["line 1", "wanted YAML"]),
        (MODEL + "distill:\n\t- 3", ["line 3", "wanted YAML"]),
        (MODEL + MODEL, ["line 2", "duplicate key", "model"]),
        ("model: !!python/object:os.system x", ["line 1", "wanted YAML"]),
        # keys
        ("target: {parameters: 0.5}", ["model: missing"]),
        ("model: {}", ["model.path: missing"]),
        (MODEL + "targets: {}", ["targets = {}", "unknown key", "wanted one of model, calibrate"]),
        (MODEL + "distill: {step: 3}", ["distill.step = 3", "unknown key", "wanted one of accumulate, schedule"]),
        (MODEL + "target: {latency: 3}", ["target.latency = 3", "unknown key", "parameters, bytes, vram_gb, latency_ms"]),
        (MODEL + "export: [{backend: onnx, dtyp: x}]", ["export.0.dtyp = 'x'", "unknown key", "backend, dtype"]),
        (MODEL + "export: [{dtype: float32}]", ["export.0.backend: missing"]),
        (MODEL + "verify: {gates: {flow_loss: {drop: 1}}}", ["verify.gates.flow_loss.drop = 1", "drop_percent, upper_percent"]),
        (MODEL + "1: 2", ["1", "strings"]),
        # sections
        (MODEL + "target: 0.5", ["target = 0.5", "wanted dictionary"]),
        (MODEL + "calibrate:", ["calibrate = None", "wanted dictionary"]),
        (MODEL + "export: onnx", ["export = 'onnx'", "wanted list"]),
        # kinds
        ("model: {path: 5}", ["model.path = 5", "wanted string"]),
        ("model: {path: ''}", ["model.path = ''", "at least 1 character"]),
        ("model: {path: x, dtype: int8}", ["model.dtype = 'int8'", "'float32', 'bfloat16' or 'float16'"]),
        (MODEL + "distill: {learning_rate: fast}", ["distill.learning_rate = 'fast'", "wanted number"]),
        (MODEL + "distill: {learning_rate: '1e-4'}", ["distill.learning_rate = '1e-4'", "wanted number"]),
        (MODEL + "distill: {steps: 1.5}", ["distill.steps = 1.5", "wanted integer"]),
        (MODEL + "distill: {steps: true}", ["distill.steps = True", "wanted integer"]),
        (MODEL + "plan: {dead_code: on}", ["plan.dead_code = 'on'", "wanted boolean"]),
        (MODEL + "plan: {dead_code: 1}", ["plan.dead_code = 1", "wanted boolean"]),
        (MODEL + "plan: {intervals: some}", ["plan.intervals = 'some'", "'auto'", "'none'", "list"]),
        (MODEL + "plan: {intervals: [3, 4]}\nexport: [{dtype: float32}]", ["plan.intervals.0 = 3", "wanted list"]),
        (MODEL + "plan: {ffn: [{block: 2}]}", ["plan.ffn.0.stream: missing"]),
        (MODEL + "plan: {intervals: [[3]]}", ["plan.intervals", "[[3]]", "pairs of blocks, the first and the last"]),
        (MODEL + "plan: {adapters: all}", ["plan.adapters = 'all'", "'auto'", "'none'", "list"]),
        (MODEL + "plan: {adapters: [[3]]}", ["plan.adapters", "[[3]]", "pairs of blocks, the first and the last"]),
        (MODEL + "plan: {text_stream: [x]}", ["plan.text_stream", "'x'", "integer"]),
        (MODEL + "plan: {protect: 3}", ["plan.protect = 3", "wanted list"]),
        (MODEL + "calibrate: {source: photos}", ["calibrate.source = 'photos'", "'images'"]),
        (MODEL + "verify: {seeds: 3}", ["verify.seeds = 3", "tuple"]),
        (MODEL + "verify: {guidance: ['2']}", ["verify.guidance", "'2'", "number"]),
        (MODEL + "verify: {guidance: [true]}", ["verify.guidance", "True", "number"]),
        # ranges
        (MODEL + "distill: {learning_rate: 0}", ["distill.learning_rate = 0", "greater than 0"]),
        (MODEL + "distill: {steps: -1}", ["distill.steps = -1", "greater than or equal to 0"]),
        (MODEL + "calibrate: {samples: 1}", ["calibrate.samples = 1", "greater than or equal to 2"]),
        (MODEL + "analyze: {ridge: 1}", ["analyze.ridge = 1", "less than 1"]),
        (MODEL + "plan: {modulation_rank: 0}", ["plan.modulation_rank = 0", "greater than or equal to 1"]),
        (MODEL + "target: {parameters: 0}", ["target.parameters = 0", "greater than 0"]),
        (MODEL + "target: {parameters: -0.5}", ["target.parameters = -0.5", "greater than 0"]),
        (MODEL + "target: {parameters: .nan}", ["target.parameters = nan", "finite number"]),
        (MODEL + "target: {parameters: half}", ["target.parameters = 'half'", "wanted number"]),
        (MODEL + "target: {parameters: true}", ["target.parameters = True", "wanted number"]),
        (MODEL + "verify: {seeds: []}", ["verify.seeds = []", "at least 1 item"]),
        (MODEL + "verify: {guidance: []}", ["verify.guidance = []", "at least 1 item"]),
        (MODEL + "bench: {runs: 1}", ["bench.runs = 1", "greater than or equal to 2"]),
    ],
)
def test_bad_recipes_name_file_key_value_and_what_is_wanted(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in [str(tmp_path / "mine.yaml") + ": ", *words]:
        assert word in message, message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps", ["--set 'steps'", "wanted section.key=value, e.g. target.parameters=0.5"]),
        ("=3", ["--set '=3'", "wanted section.key=value"]),
        ("distill..steps=3", ["wanted section.key=value"]),
        ("distill.steps=many", ["distill.steps = 'many'", "wanted integer"]),
        ("distill.steps=", ["distill.steps = None", "wanted integer"]),
        ("distill.pace=3", ["distill.pace = 3", "unknown key", "wanted one of accumulate"]),
        ("model.path.x=3", ["path holds 'some/model', wanted a section"]),
        ("target.parameters=[", ["--set 'target.parameters=['", "wanted YAML"]),
        ("model=3", ["model = 3", "wanted dictionary"]),
    ],
)
def test_bad_changes_say_which(tmp_path: Path, change: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, MODEL, [change])
    for word in words:
        assert word in str(caught.value)


def test_recipes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"gone\.yaml: no such file; wanted a recipe file, or a shipped recipe: .*two_digits"):
        find_recipe("gone.yaml")
    with pytest.raises(RecipeError, match="is a folder; wanted a recipe file"):
        find_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read"):
        read_recipe(tmp_path / "gone.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match=r"bytes\.yaml: cannot be read"):
        read_recipe(tmp_path / "bytes.yaml")
    (tmp_path / "two_digits").write_text(MODEL, "utf-8")
    assert find_recipe("two_digits") == Path("two_digits")  # a file at hand goes before a shipped one


def test_defaults_are_filled_in_without_a_file() -> None:
    recipe = parse_recipe({"model": {"path": "x"}}, "here")
    assert recipe == Recipe.model_validate({"model": {"path": "x"}, "target": {}, "distill": {"steps": recipe.distill.steps}})
    with pytest.raises(RecipeError, match=r"^here: model: missing"):
        parse_recipe({}, "here")
