"""Who may import whom, what may never be imported, and what must stay light: the house plan, held by syntax trees."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ppclc"

# Lowest first. A module imports from lower layers, and from its own as long as no cycle comes of it.
# A new module or package of ppclc has to be placed here before it passes.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("",),  # ppclc/__init__.py: the version, and public names on first use
    ("errors",),
    ("kernels",),
    ("machine", "plan"),
    ("records",),
    ("plugins",),
    ("students",),
    ("families", "judges"),
    ("lowering", "screens", "student_tensors"),
    ("backends", "loading"),
    ("artefacts", "models", "publishing"),
    ("benching", "environment", "loras", "slicing"),
    ("costs",),
    ("data",),
    ("quality", "teachers"),
    ("training",),
    ("analysis", "scenes"),
    ("passes",),
    ("recipes",),
    ("bank", "recipe"),
    ("data_size",),
    ("room",),
    ("forecast", "run"),
    ("bench_subjects", "distilling"),
    ("compiler",),
    ("sizes",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
BACKENDS_MAY_IMPORT = {"backends", "lowering", "records", "errors"}
FORBIDDEN_NAMES = {"utils", "common", "core", "base", "manager", "factory", "registry"}
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
ASKING = {"startswith", "endswith", "removeprefix", "removesuffix", "find", "index", "get", "count", "match", "search", "fullmatch"}
HEAVY_MODULES = {"accelerate", "diffusers", "numpy", "onnx", "onnxruntime", "scipy", "sklearn", "torch", "transformers"}


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the symlinked folders count as what they are imported as."""
    found = {}
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix == ".py":
                parts = ("ppclc", *path.relative_to(PACKAGE).with_suffix("").parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one but for what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield other
                yield from _nodes(other)
            continue
        yield child
        yield from _nodes(child)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The dotted name that a `from` import starts at."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, node.module] if node.module else above)


def _imports(module: str) -> set[str]:
    """Dotted names that a module imports, at its top or inside a function, by statement or by a literal `import_module`."""
    found = set()
    for node in _nodes(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = _absolute(module, node)
            found |= {f"{start}.{a.name}" if f"{start}.{a.name}" in MODULES else start for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}:
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


IMPORTS = {module: _imports(module) for module in MODULES}
OWN_IMPORTS = {module: {i for i in found if i.split(".")[0] == "ppclc"} for module, found in IMPORTS.items()}


def _part(module: str) -> str:
    """The piece of ppclc a module belongs to: `passes` for `ppclc.passes.slice`, nothing for `ppclc` itself."""
    return module.split(".")[1] if "." in module else ""


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


every_module = pytest.mark.parametrize("module", sorted(MODULES))


@every_module
def test_a_module_imports_lower_layers_only(module: str) -> None:
    assert _part(module) in RANK, f"{module} has no place in LAYERS: say where it stands"
    rank = RANK[_part(module)]
    unknown = {target for target in OWN_IMPORTS[module] if _part(target) not in RANK}
    assert not unknown, f"{module} imports {sorted(unknown)}, which has no place in LAYERS"
    above = {target for target in OWN_IMPORTS[module] if RANK[_part(target)] > rank}
    assert not above, f"{module} imports from a layer above it: {sorted(above)}"


def test_no_imports_go_in_a_circle() -> None:
    state: dict[str, str] = {}
    trail: list[str] = []

    def visit(module: str) -> None:
        trail.append(module)
        state[module] = "open"
        for target in sorted(OWN_IMPORTS[module] & MODULES.keys() - {module}):
            assert state.get(target) != "open", "imports in a circle: " + " -> ".join([*trail[trail.index(target) :], target])
            if target not in state:
                visit(target)
        state[module] = "done"
        trail.pop()

    for module in sorted(MODULES):
        if module not in state:
            visit(module)


def test_the_package_itself_imports_nothing() -> None:
    assert not OWN_IMPORTS["ppclc"]
    assert IMPORTS["ppclc"] <= {"__future__", "importlib", "typing"}


@every_module
def test_passes_do_not_import_one_another(module: str) -> None:
    if _part(module) == "passes":
        others = {target for target in OWN_IMPORTS[module] if _within(target, "ppclc.passes") and target not in {module, "ppclc.passes"}}
        assert not others, f"{module} imports {sorted(others)}: share through a module with a noun for a name"


@every_module
def test_back_ends_import_their_four_modules_only(module: str) -> None:
    if _part(module) == "backends":
        others = {target for target in OWN_IMPORTS[module] if _part(target) not in BACKENDS_MAY_IMPORT}
        assert not others, f"{module} imports {sorted(others)}; a back end may import {sorted(BACKENDS_MAY_IMPORT)}"


@every_module
def test_plug_ins_are_loaded_by_name_only(module: str) -> None:
    """One family, back end or student class is never imported from outside its own package; the roles that students share may be."""
    allowed = {"families": {"families"}, "backends": {"backends"}, "students": {"students", "families"}}
    for kind, parts in allowed.items():
        if _part(module) not in parts:
            wrong = {target for target in OWN_IMPORTS[module] if target.startswith(f"ppclc.{kind}.")} - {"ppclc.students.parts"}
            assert not wrong, f"{module} imports {sorted(wrong)}: load it with plugins.load({kind!r}, name)"


@every_module
def test_scenes_leak_nowhere(module: str) -> None:
    if _part(module) != "scenes":
        assert not {target for target in OWN_IMPORTS[module] if _within(target, "ppclc.scenes")}


@every_module
def test_student_classes_stand_alone(module: str) -> None:
    """They are copied beside a student's weights, where there is no ppclc; what they share goes with them (`parts.Travelling`)."""
    if _part(module) == "students":
        own = IMPORTS[module] - {"ppclc.students.parts"}
        roots = {target.split(".")[0] for target in own} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "diffusers"}, f"{module} imports {sorted(roots)}"


def test_the_plan_knows_no_arrays() -> None:
    roots = {target.split(".")[0] for target in IMPORTS["ppclc.plan"]}
    assert not roots & {"torch", "numpy"}


@every_module
def test_names_say_something(module: str) -> None:
    assert not FORBIDDEN_NAMES & set(module.split("."))


def test_top_level_folders_say_something() -> None:
    for folder in ("backends", "recipes", "tests", "benchmarks"):
        stems = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert not FORBIDDEN_NAMES & stems


@every_module
def test_nothing_is_unpickled(module: str) -> None:
    roots = {target.split(".")[0] for target in IMPORTS[module]}
    assert not roots & UNSAFE_MODULES, f"{module} imports {sorted(roots & UNSAFE_MODULES)}"
    for node in _nodes(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.serialization.load"}, f"{module}:{node.lineno}: use safetensors"
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}:
            assert "load" not in {alias.name for alias in node.names}, f"{module}:{node.lineno}: use safetensors"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"{module}: allow_pickle must not be open"
            assert node.value.value is False, f"{module}: allow_pickle must stay off"


def _words(text: str) -> list[str]:
    """Lower-case words of a name in any spelling: `QwenImageTransformer2DModel`, `qwen-image` and `qwen_image` begin alike."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


FAMILY_WORDS = {m.rpartition(".")[2]: _words(m.rpartition(".")[2]) for m in MODULES if m.startswith("ppclc.families.")}


def _names_family(text: str) -> bool:
    words = _words(text)
    for family in FAMILY_WORDS.values():
        inside = any(words[i : i + len(family)] == family for i in range(len(words) - len(family) + 1))
        if words and (inside or words == family[: len(words)]):
            return True
    return False


def _deciding_strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """String literals that a decision hangs on: compared, matched, looked up, or asked for as a beginning or an end."""
    for node in _nodes(tree):
        roots: list[ast.AST] = []
        if isinstance(node, ast.Compare | ast.MatchValue | ast.Subscript):
            roots = [node]
        elif isinstance(node, ast.Dict):
            roots = [key for key in node.keys if key]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ASKING:
            roots = list(node.args)
        for root in roots:
            yield from (n for n in ast.walk(root) if isinstance(n, ast.Constant) and isinstance(n.value, str))


@every_module
def test_families_are_asked_not_named(module: str) -> None:
    if _part(module) in {"families", "students", "scenes"}:
        return
    for node in _deciding_strings(TREES[module]):
        assert not _names_family(node.value), f"{module}:{node.lineno}: {node.value!r} names a family; ask the family instead"
    for node in _nodes(TREES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers"):
            named = [alias.name for alias in node.names if _names_family(alias.name)]
            assert not named, f"{module}:{node.lineno}: {named} belongs in ppclc/families"


def test_the_rule_for_family_names_bites() -> None:
    """A rule that finds nothing proves nothing: each way of asking a name is caught, and plain words are not."""
    spelled = [" ".join(words).title().replace(" ", "") + "Transformer2DModel" for words in FAMILY_WORDS.values()]
    assert FAMILY_WORDS
    assert all(_names_family(name) for name in [*FAMILY_WORDS, *spelled])
    assert not _names_family("hidden_states")
    assert not _names_family("influx")
    name = next(iter(FAMILY_WORDS))
    for source in (f'if "{name}" in x: pass', f'x.startswith("{name}")', f'{{"{name}": 1}}[x]', f'match x:\n case "{name}": pass'):
        assert any(_names_family(node.value) for node in _deciding_strings(ast.parse(source))), source


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["ppclc", "ppclc.errors", "ppclc.plan", "ppclc.cli"])
def test_importing_stays_light(module: str) -> None:
    done = _python(f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert not HEAVY_MODULES & set(json.loads(done.stdout.splitlines()[-1]))


def test_help_loads_nothing_heavy() -> None:
    done = _python(
        "import json, runpy, sys\n"
        "sys.argv = ['ppclc', '--help']\n"
        "try:\n"
        "    runpy.run_module('ppclc', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    assert done.returncode == 0, done.stderr
    assert not HEAVY_MODULES & set(json.loads(done.stdout.splitlines()[-1]))


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ppclc", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "compress" in done.stdout
    assert min(seconds) < 0.5, f"best of 3: {min(seconds):.2f} s"
