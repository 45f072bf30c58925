"""Model folders that are not what they claim to be: told in one message with the way out, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppclc.errors import ModelError
from ppclc.loading.checkpoints import WEIGHTS
from ppclc.loading.sources import open_source
from ppclc.models import load_model
from ppclc.slicing import check_weights

INDEX = f"{WEIGHTS}.index.json"
SHARDS = tuple(WEIGHTS.replace(".safetensors", f"-0000{n}-of-00002.safetensors") for n in (1, 2))
BLOCK = "transformer_blocks.5.attn.to_q.weight"


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may break."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


def set_config(**changes: Any) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        config = json.loads((home / "config.json").read_text("utf-8")) | changes
        (home / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")

    return edit


def config_text(text: str) -> Callable[[Path], None]:
    return lambda home: (home / "config.json").write_text(text, "utf-8") and None


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        tensors = load_file(home / WEIGHTS)
        change(tensors)
        save_file(tensors, home / WEIGHTS, metadata={"format": "pt"})

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda home: (home / WEIGHTS).write_bytes(change((home / WEIGHTS).read_bytes())) and None


def index(content: Any, *, keep: bool = True) -> Callable[[Path], None]:
    def edit(home: Path) -> None:
        (home / INDEX).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        shutil.copy(home / WEIGHTS, home.parent / "outside.safetensors")
        if not keep:
            (home / WEIGHTS).unlink()

    return edit


def only_pickle(home: Path) -> None:
    torch.save(load_file(home / WEIGHTS), home / "diffusion_pytorch_model.bin")
    (home / WEIGHTS).unlink()


def without_block(block: int) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"transformer_blocks.{block}.")]:
            del tensors[name]

    return edit_tensors(change)


def huge_tensor(home: Path) -> None:
    header = json.dumps({BLOCK: {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (home / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def relink(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def loop(home: Path) -> None:
    relink(home / WEIGHTS)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def sharded(break_it: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Two shards and their index in the place of one file, then broken."""

    def edit(home: Path) -> None:
        tensors = load_file(home / WEIGHTS)
        names = sorted(tensors)
        parts = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
        for file, held in parts.items():
            save_file({n: tensors[n] for n in held}, home / file, metadata={"format": "pt"})
        (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, held in parts.items() for n in held}}), "utf-8")
        (home / WEIGHTS).unlink()
        break_it(home)

    return edit


def relist(home: Path, change: Callable[[dict[str, str]], Any]) -> None:
    listed = json.loads((home / INDEX).read_text("utf-8"))
    change(listed["weight_map"])
    (home / INDEX).write_text(json.dumps(listed), "utf-8")


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no transformer": (lambda home: (home / "config.json").unlink(), ["holds no transformer", "wanted transformer/config.json"]),
    "unknown class": (set_config(_class_name="UNet2DModel"), ["config.json", "_class_name = 'UNet2DModel'", "QwenImageTransformer2DModel"]),
    "no class": (set_config(_class_name=None), ["config.json", "_class_name = None", "known are"]),
    "config not JSON": (config_text("{not json"), ["config.json", "cannot be read as JSON", "fetch the model again"]),
    "config empty": (config_text(""), ["config.json", "cannot be read as JSON"]),
    "config a list": (config_text("[1]"), ["config.json", "got a list, wanted a JSON object"]),
    "blocks zero": (set_config(num_layers=0), ["config.json", "num_layers = 0", "a whole number above 0"]),
    "blocks text": (set_config(num_layers="6"), ["config.json", "num_layers = '6'", "a whole number above 0"]),
    "blocks too many": (set_config(num_layers=7), ["config.json: num_layers = 7", "the weights hold 6 blocks", "set it to 6"]),
    "blocks too few": (set_config(num_layers=5), ["config.json: num_layers = 5", "the weights hold 6 blocks", "set it to 6"]),
    "blocks with a gap": (without_block(3), ["transformer_blocks has blocks up to 5 but no 3", "without gaps"]),
    "last block gone": (without_block(5), ["config.json: num_layers = 6", "the weights hold 5 blocks"]),
    "two dtypes": (
        edit_tensors(lambda t: t.update({BLOCK: t[BLOCK].to(torch.bfloat16)})),
        ["several dtypes", f"bfloat16 ({BLOCK})", "float32 (", "wanted one"],
    ),
    "width": (set_config(num_attention_heads=3), ["has shape [", "wanted [", "by config.json"]),
    "width text": (set_config(num_attention_heads="two"), ["config.json: cannot be built as a model of qwen_image"]),
    "truncated": (edit_bytes(lambda b: b[: len(b) // 2]), [WEIGHTS, "not a whole safetensors file", "fetch it again"]),
    "one byte short": (edit_bytes(lambda b: b[:-1]), [WEIGHTS, "not a whole safetensors file"]),
    "empty weights": (edit_bytes(lambda b: b""), [WEIGHTS, "not a whole safetensors file"]),
    "corrupt header": (edit_bytes(lambda b: b[:8] + b"\xff" * 64 + b[72:]), [WEIGHTS, "not a whole safetensors file"]),
    "huge header": (edit_bytes(lambda b: b"\xff" * 8 + b[8:]), [WEIGHTS, "not a whole safetensors file"]),
    "missing tensor": (edit_tensors(lambda t: t.pop(BLOCK)), ["1 tensors are missing", BLOCK, "wanted all that config.json calls for"]),
    "extra tensor": (
        edit_tensors(lambda t: t.update({"lora.up": torch.ones(2)})),
        ["1 tensors are not in the class", "lora.up", "does config.json fit?"],
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({BLOCK: torch.ones(32, 31)})), [BLOCK, "shape [32, 31]", "wanted [32, 32]"]),
    "NaN": (set_value(BLOCK, float("nan")), [BLOCK, "NaN or infinite", "fetch the model again"]),
    "infinite": (set_value("proj_out.bias", float("-inf")), ["proj_out.bias", "NaN or infinite"]),
    "pickle only": (only_pickle, ["no weights", ".bin is a pickle, which is never loaded", "convert it to safetensors"]),
    "no weights": (lambda home: (home / WEIGHTS).unlink(), ["no weights", f"wanted {WEIGHTS} or its index"]),
    "header of gigabytes": (edit_bytes(lambda b: (60 << 30).to_bytes(8, "little") + b[8:]), [WEIGHTS, "not a whole safetensors file"]),
    "tensor of gigabytes": (huge_tensor, [WEIGHTS, "not a whole safetensors file"]),
    "weights a loop": (loop, ["no weights"]),
    "shard truncated": (sharded(lambda home: truncate(home / SHARDS[1])), [SHARDS[1], "not a whole safetensors file"]),
    "shard gone": (sharded(lambda home: (home / SHARDS[1]).unlink()), [INDEX, SHARDS[1], "fetch the model again"]),
    "shard a loop": (sharded(lambda home: relink(home / SHARDS[1])), [INDEX, SHARDS[1], "fetch the model again"]),
    "shard twice": (
        sharded(lambda home: shutil.copy(home / SHARDS[0], home / SHARDS[1]) and None),
        [SHARDS[1], "is in", SHARDS[0], "each tensor once"],
    ),
    "index names a tensor that is not there": (
        sharded(lambda home: relist(home, lambda w: w.update({"ghost.weight": SHARDS[0]}))),
        [INDEX, f"ghost.weight in {SHARDS[0]}", "does not hold it"],
    ),
    "index names the other shard": (
        sharded(lambda home: relist(home, lambda w: w.update({BLOCK: next(s for s in SHARDS if s != w[BLOCK])}))),
        [INDEX, BLOCK, "does not hold it"],
    ),
    "index without shards": (index({"weight_map": {"a": "x-1.safetensors"}}), [INDEX, "x-1.safetensors", "fetch the model again"]),
    "index leads out": (index({"weight_map": {"a": "../outside.safetensors"}}), [INDEX, "../outside.safetensors", "lie beside it"]),
    "index empty": (index({"weight_map": {}}), [INDEX, "no shards"]),
    "index without map": (index({}), [INDEX, "no shards"]),
    "index not JSON": (index("{"), [INDEX, "cannot be read as JSON"]),
    "index map a list": (index({"weight_map": [WEIGHTS]}), [INDEX, "wanted"]),
    "index shard a number": (index({"weight_map": {"a": 1}}), [INDEX, "1", "wanted"]),
}


def test_the_unbroken_copy_loads(folder: Path, teacher: Any) -> None:
    again = load_model(folder).state_dict()
    assert all(torch.equal(again[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_say_where_what_and_the_way_out(name: str, folder: Path) -> None:
    break_it, words = BROKEN[name]
    break_it(folder / "transformer")
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in [str(folder), *words]:
        assert word in message, message
    with pytest.raises(ModelError) as streamed:  # read a tensor at a time, the same is found
        check_weights(open_source(str(folder)))
    assert all(word in str(streamed.value) for word in [str(folder), *words])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone", ["no such model folder", "wanted a folder, a hub id"]),
        ("./gone", ["no such model folder"]),
        ("a/b/c", ["no such model folder"]),
        ("builtin:gone", ["no such model", "builtin:two-digits"]),
    ],
)
def test_paths_that_lead_nowhere(path: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    for word in [path, *words]:
        assert word in str(caught.value)


def test_a_file_and_an_empty_folder_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", "utf-8")
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: holds no transformer: wanted transformer/config\.json or config\.json"):
        load_model(tmp_path / "empty")


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("the network is down\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelError, match=r"nobody/nothing: no such folder, and not to be had from the hub \(the network is down\)"):
        load_model("nobody/nothing")
