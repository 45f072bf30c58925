"""Pipelines around students: links where they can be, copies where not, nothing followed in circles, nothing from outside."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ppclc.errors import ModelError
from ppclc.loading.sources import BUILTIN, Source, open_source
from ppclc.publishing.pipelines import components, files_below, names_in, pipeline_of, surround

CONFIG = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2}
INDEX: dict[str, Any] = {
    "_class_name": "QwenImagePipeline",
    "_name_or_path": "/home/someone/models",
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "image_encoder": [None, None],
    "is_distilled": False,
}


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A teacher's pipeline, of parts that nobody opens."""
    folder = tmp_path / "teacher"
    write(folder / "model_index.json", json.dumps(INDEX))
    write(folder / "transformer" / "config.json", json.dumps(CONFIG))
    write(folder / "vae" / "config.json")
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", "weights")
    write(folder / "scheduler" / "scheduler_config.json")
    write(folder / "LICENSE", "mine")
    write(folder / "README.md", "theirs")
    write(folder / "flux1-dev.safetensors", "the same once more")
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    write(tmp_path / "student" / "transformer" / "config.json", json.dumps(CONFIG | {"num_layers": 1}))
    return tmp_path / "student"


def source(root: Path) -> Source:
    return open_source(str(root))


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


WHOLE = [
    "LICENSE",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_the_rest_is_linked_and_the_index_keeps_all_but_a_path(root: Path, student: Path) -> None:
    assert surround(source(root), student) == []
    assert names(student) == WHOLE
    assert all((student / name).samefile(root / name) for name in WHOLE if name not in ("model_index.json", "transformer/config.json"))
    index = json.loads((student / "model_index.json").read_text("utf-8"))
    assert index == {k: v for k, v in INDEX.items() if k != "_name_or_path"}
    assert names_in(student) == {"model_index.json", "vae", "scheduler", "LICENSE"}


def test_a_second_time_changes_nothing(root: Path, student: Path) -> None:
    surround(source(root), student)
    before = {name: (student / name).stat().st_mtime_ns for name in names(student)}
    inode = (student / "vae").stat().st_ino
    surround(source(root), student)
    assert before == {name: (student / name).stat().st_mtime_ns for name in names(student)}
    assert (student / "vae").stat().st_ino == inode


def test_a_class_that_travels_is_named_by_its_module(root: Path, student: Path) -> None:
    config = CONFIG | {"_class_name": "Pruned", "auto_map": {"AutoModel": "ppclc_x_123.Pruned"}}
    write(student / "transformer" / "config.json", json.dumps(config))
    surround(source(root), student)
    assert json.loads((student / "model_index.json").read_text("utf-8"))["transformer"] == ["ppclc_x_123", "Pruned"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_links_are_refused_there_are_copies(root: Path, student: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    surround(source(root), student)
    assert names(student) == WHOLE
    assert not (student / "vae" / "config.json").samefile(root / "vae" / "config.json")
    assert (student / "vae" / "diffusion_pytorch_model.safetensors").read_text("utf-8") == "weights"
    inode = (student / "vae" / "config.json").stat().st_ino
    surround(source(root), student)  # a copy is known again by size and time
    assert (student / "vae" / "config.json").stat().st_ino == inode


def test_snapshots_of_the_hubs_cache_are_followed_to_their_blobs(tmp_path: Path, root: Path, student: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for n, name in enumerate(names(root)):
        blob = tmp_path / "models--a--b" / "blobs" / str(n)
        write(blob, (root / name).read_text("utf-8"))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    surround(source(snapshot), student)
    assert names(student) == WHOLE
    assert not any(p.is_symlink() for p in student.rglob("*"))
    assert (student / "vae" / "config.json").samefile(snapshot / "vae" / "config.json")
    assert (student / "LICENSE").samefile(snapshot / "LICENSE")


def test_circles_and_links_to_nowhere_are_left_out(root: Path) -> None:
    (root / "vae" / "again").symlink_to(root / "vae")
    (root / "vae" / "up").symlink_to(root)
    (root / "vae" / "self").symlink_to("self")
    (root / "vae" / "gone.json").symlink_to("/no/such/file")
    write(root / "elsewhere" / "a.json")
    (root / "vae" / "more").symlink_to(root / "elsewhere")
    assert files_below(root / "vae").keys() == {"config.json", "diffusion_pytorch_model.safetensors", "more/a.json"}


def test_pickles_beside_safetensors_and_hidden_files_stay_behind(root: Path) -> None:
    write(root / "vae" / "diffusion_pytorch_model.bin")
    write(root / "vae" / ".cache" / "x.json")
    write(root / "old" / "pytorch_model.bin")
    assert files_below(root / "vae").keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files_below(root / "old").keys() == {"pytorch_model.bin"}


def test_a_component_that_is_a_link_to_itself_is_told(root: Path, student: Path) -> None:
    (root / "scheduler" / "scheduler_config.json").unlink()
    (root / "scheduler").rmdir()
    (root / "scheduler").symlink_to("scheduler")
    [told] = surround(source(root), student)
    assert told.startswith("warning: scheduler: not there")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/etc", "a\\b", ""])
def test_parts_outside_of_the_folder_are_refused(root: Path, student: Path, name: str) -> None:
    write(root / "model_index.json", json.dumps(INDEX | {name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ModelError, match="wanted the name of a folder beside it") as caught:
        surround(source(root), student)
    assert repr(name) in str(caught.value)
    assert names(student) == ["transformer/config.json"]


@pytest.mark.parametrize("lack", ["folder", "weights", "shard"])
def test_a_partial_download_is_told_and_mended_later(root: Path, student: Path, lack: str) -> None:
    weights = root / "vae" / "diffusion_pytorch_model.safetensors"
    if lack == "shard":
        write(root / "vae" / "diffusion_pytorch_model.safetensors.index.json", json.dumps({"weight_map": {"a": "1.safetensors"}}))
    weights.unlink()
    if lack == "folder":
        (root / "vae" / "config.json").unlink()
        (root / "vae").rmdir()
    [told] = surround(source(root), student)
    assert told.startswith("warning: vae: not there, or not whole, in the teacher's folder")
    assert names(student) == [n for n in WHOLE if not n.startswith("vae")]
    write(root / "vae" / "config.json")
    write(weights, "weights")
    write(root / "vae" / "1.safetensors")
    assert surround(source(root), student) == []
    assert set(WHOLE) <= set(names(student))


def test_bare_transformers_builtins_and_files_have_no_pipeline_around(root: Path, student: Path) -> None:
    assert pipeline_of(source(root)) == root
    (root / "model_index.json").unlink()
    assert pipeline_of(source(root)) is None
    assert surround(source(root), student) == []
    assert surround(open_source(BUILTIN + "two-digits"), student) == []
    assert names(student) == ["transformer/config.json"]


def test_parts_that_a_pipeline_goes_without_are_none_of_its_parts(root: Path) -> None:
    assert components(root).keys() == {"vae", "scheduler"}
