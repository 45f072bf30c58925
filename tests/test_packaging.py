"""What a user installs: the wheel and the sdist, built from a copy of the tree and looked into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "README.md", "LICENSE", "ppclc", "backends", "recipes")
HEAVY = {"onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "tensorboard", "matplotlib", "triton"}


def _build(kind: str, source: Path, out: Path) -> Path:
    """The one file that building `source` as a wheel or an sdist gives."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads, symlinks kept, so that no build leaves its traces in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (name,) = [name for name in _names(wheel) if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def _expected() -> set[str]:
    """What the wheel must hold of ppclc: its sources, its data, and no more."""
    found = {path.relative_to(ROOT) for path in (ROOT / "ppclc").glob("*.py")} | {Path("ppclc/py.typed")}
    for folder in sorted(path for path in (ROOT / "ppclc").iterdir() if path.is_dir() and path.name != "__pycache__"):
        found |= {path.relative_to(ROOT) for path in folder.glob("*.py")}
    for folder, suffixes in (("passes", ("css", "html", "jinja")), ("recipes", ("yaml",))):
        found |= {path.relative_to(ROOT) for suffix in suffixes for path in (ROOT / "ppclc" / folder).glob(f"*.{suffix}")}
    readme = Path("ppclc/recipes/README.md")
    weights = ROOT / "ppclc/scenes/weights"
    kept = {".json", ".jsonl", ".md", ".safetensors"}
    data = {path.relative_to(ROOT) for path in weights.rglob("*") if path.suffix in kept}
    return {path.as_posix() for path in found | data | ({readme} if (ROOT / readme).exists() else set())}


@pytest.mark.parametrize("name", ["backends", "recipes"])
def test_the_two_folders_are_symlinks(name: str) -> None:
    link = ROOT / "ppclc" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


def test_the_list_of_packages_is_whole(wheel: Path) -> None:
    """Every folder with sources is named in pyproject.toml, and everything in them that matters is packed."""
    packed = {name for name in _names(wheel) if name.startswith("ppclc/")}
    assert packed == _expected()


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in _names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ppclc"}
    assert len(tops) == 2


def test_the_wheel_carries_back_ends_recipes_and_types(wheel: Path) -> None:
    names = set(_names(wheel))
    assert "ppclc/py.typed" in names
    for folder, pattern in (("backends", "*.py"), ("recipes", "*.yaml")):
        files = {f"ppclc/{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert files, f"{folder}/ holds no {pattern}"
        assert files <= names


def test_the_wheel_carries_no_pickle(wheel: Path) -> None:
    assert not [name for name in _names(wheel) if Path(name).suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"}]


def test_the_sdist_rebuilds_the_same_wheel(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    again = _build("wheel", unpacked, tmp_path)
    assert _names(again) == _names(wheel)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        changed = [name for name in _names(wheel) if first.read(name) != second.read(name)]
    assert changed == []


def test_requirements_leave_torch_and_the_back_ends_alone(metadata: Message) -> None:
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = {re.split(r"[^\w.-]", line)[0].lower() for line in core}
    assert [line for line in core if re.match(r"torch\b", line)] == ["torch>=2.9"]
    assert not [line for line in core if "<" in line or "==" in line], "only lower bounds: an upper one replaces what a user has"
    assert not names & HEAVY


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "ppclc"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "train", "adamw8bit", "report", "test"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_the_version_is_the_packages_own(metadata: Message) -> None:
    import ppclc

    assert metadata["Version"] == ppclc.__version__


def test_an_unpacked_wheel_imports_alone(wheel: Path, tmp_path: Path) -> None:
    """From a folder with a `backends` of its own, which must not be taken for ours."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("raise RuntimeError('the user's own')\n")
    code = "import ppclc, ppclc.backends, ppclc.recipes; from ppclc import plugins; print(ppclc.__file__, *plugins.names('backends'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file, *backends = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert {path.stem for path in (ROOT / "backends").glob("*.py") if not path.stem.startswith("_")} <= set(backends)


def test_every_constraint_is_exact_and_torch_comes_first() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert lines[0].startswith("torch==")
    assert len({line.split("==")[0].lower() for line in lines}) == len(lines)
