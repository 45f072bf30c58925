"""Where samples come from: a real, tiny pipeline encodes prompts and images, and what is drawn is what was encoded."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ppclc import commands
from ppclc.compiler import compress
from ppclc.data import encoding, flow
from ppclc.data.cache import Cache, open_cache
from ppclc.data.datasets import pixels, read_pictures
from ppclc.data.encoding import Unencoded, cached, find_data, kind_at
from ppclc.data.samples import TRAJECTORY_STEPS, Samples, open_samples
from ppclc.errors import ModelError, PpclcError, RecipeError
from ppclc.families import Family
from ppclc.loading.sources import Source, open_source
from ppclc.passes.calibrate import CalibrateSettings, calibrate
from ppclc.recipe import parse_recipe
from ppclc.run import Run
from ppclc.screens.display import Display
from ppclc.teachers import ResidentTeacher
from tests.pipelines import MEAN, STD, qwen_pipeline, qwen_text_encoder

PROMPTS = [
    "a cat",
    "a very long red dog on a blue mat",
    "two green birds",
    "rain",
    "a house by the sea at night",
    "snow",
    "a ship",
    "tea",
    "x",
]
SIZE = [16, 32]
GRID = (4, 8)


@pytest.fixture(scope="module")
def pipeline(make_teacher: Callable[..., Any]) -> Any:
    """A whole Qwen-Image pipeline of a few thousand parameters."""
    return qwen_pipeline(make_teacher(4))


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline on disk. Read only: tests that break it copy it."""
    where: Path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return open_source(str(folder))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0], "", *PROMPTS, "  "]), "utf-8")  # a double and empty lines
    return file


def picture(seed: int, height: int = 16, width: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned images of the calibration's own size."""
    where: Path = tmp_path_factory.mktemp("images")
    for i in range(6):
        picture(i).save(where / f"{i:03d}.png")
        (where / f"{i:03d}.txt").write_text(PROMPTS[i] + "\n", "utf-8")
    return where


def quiet(*_: Any) -> None:
    """Words that nobody reads."""


def encoded(source: Source, kind: str, path: Path, records: Path, dtype: str = "float32") -> Cache:
    found = find_data(kind, str(path), SIZE, source)
    made = cached(found, records, dtype, quiet)
    assert made is not None
    return made


def same(a: Cache, b: Cache) -> bool:
    one, other = (c.read(list(range(c.rows))) for c in (a, b))
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_are_what_the_pipeline_encodes(pipeline: Any, source: Source, prompts_file: Path, tmp_path: Path) -> None:
    made = encoded(source, "prompts", prompts_file, tmp_path)
    assert (made.rows, made.grid, made.has_latents, made.kind) == (len(PROMPTS), GRID, False, "prompts")
    for start in (0, 8):  # those that were encoded together
        with torch.no_grad():
            states, mask = pipeline.encode_prompt(PROMPTS[start : start + 8])
        mask = torch.ones(states.shape[:2]) if mask is None else mask
        batch = made.read(list(range(start, start + len(states))))
        assert torch.equal(batch["encoder_hidden_states"], states)
        assert torch.equal(batch.get("encoder_hidden_states_mask", torch.ones(states.shape[:2])), mask)
        for i, row in enumerate(states):
            alone = made.read([start + i])
            assert alone.keys() == {"encoder_hidden_states"}
            assert torch.equal(alone["encoder_hidden_states"][0], row[mask[i].bool()])


@pytest.mark.slow
def test_images_are_encoded_normalised_and_packed(pipeline: Any, source: Source, images: Path, tmp_path: Path) -> None:
    made = encoded(source, "images", images, tmp_path)
    found = made.read(list(range(6)))
    raw = np.stack([np.asarray(picture(i)) for i in range(6)])
    x = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 127.5 - 1
    for start in (0, 4):
        with torch.no_grad():
            z = pipeline.vae.encode(x[start : start + 4, :, None]).latent_dist.mode()[:, :, 0]
        assert z.shape[1:] == (3, 8, 16)
        for b in range(len(z)):
            for token in range(32):
                top, left = 2 * (token // 8), 2 * (token % 8)
                wanted = [
                    (z[b, c, top + i, left + j] - MEAN[c]) / torch.tensor(STD[c]) for c in range(3) for i in range(2) for j in range(2)
                ]
                assert torch.allclose(found["latents"][start + b, token], torch.stack(wanted), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        states, _ = pipeline.encode_prompt(PROMPTS[:6])
    assert torch.equal(found["encoder_hidden_states"], states)


@pytest.mark.slow
def test_latents_decode_to_the_image_by_the_samplers_own_way(pipeline: Any, source: Source, images: Path, tmp_path: Path) -> None:
    """Unpacked and denormalised as the pipeline does at its end, they are the VAE's latents again."""
    latents = encoded(source, "images", images, tmp_path).read([0])["latents"]
    z = pipeline._unpack_latents(latents, *SIZE, 2)
    z = z / (1 / torch.tensor(STD).view(1, 3, 1, 1, 1)) + torch.tensor(MEAN).view(1, 3, 1, 1, 1)
    x = torch.from_numpy(np.asarray(picture(0)).copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(z, pipeline.vae.encode(x).latent_dist.mode(), atol=1e-5)


def pack(tar: Path, images: Path, caption: Callable[[str], tuple[str, bytes]]) -> None:
    with tarfile.open(tar, "w") as out:
        for file in sorted(images.glob("*.png")):
            name, text = caption(file.with_suffix(".txt").read_text("utf-8"))
            for member, data in ((file.name, file.read_bytes()), (file.stem + name, text)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_folder_table_and_shards_of_the_same_images_are_one(source: Source, images: Path, tmp_path: Path) -> None:
    first = encoded(source, "images", images, tmp_path / "a")
    shards, table = tmp_path / "shards", tmp_path / "table"
    shards.mkdir()
    pack(shards / "text.tar", images, lambda t: (".txt", t.encode()))
    pack(tmp_path / "json.tar", images, lambda t: (".json", json.dumps({"caption": t, "other": 1}).encode()))
    shutil.copytree(images, table, ignore=shutil.ignore_patterns("*.txt"))
    rows = [{"file_name": f.name, "text": f.with_suffix(".txt").read_text("utf-8")} for f in sorted(images.glob("*.png"))]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for n, path in enumerate((shards, shards / "text.tar", shards / "te*.tar", tmp_path / "json.tar", table)):
        other = encoded(source, "images", path, tmp_path / f"b{n}")
        assert other.digest == first.digest
        assert same(other, first)
    assert [kind_at(str(p)) for p in (images, shards, table, shards / "*.tar")] == ["images"] * 4


def test_images_are_turned_covered_and_cropped(tmp_path: Path) -> None:
    wide = picture(1, 16, 96)
    wide.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    picture(2, 32, 16).save(tmp_path / "b.png", exif=exif)
    Image.new("RGBA", (64, 32), (255, 0, 0, 51)).save(tmp_path / "c.png")
    Image.new("L", (5, 7), 51).save(tmp_path / "d.webp", lossless=True)
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("x", "utf-8")
    a, b, c, d = ((pixels(p, 16, 32, "here") + 1) * 127.5 for p in read_pictures(str(tmp_path)))
    whole = torch.from_numpy(np.asarray(wide).copy()).permute(2, 0, 1).float()
    assert torch.allclose(a, whole[:, :, 32:64], atol=1e-3)
    upright = torch.from_numpy(np.asarray(picture(2, 32, 16)).copy()).permute(2, 0, 1).float()
    assert torch.allclose(b, upright.rot90(-1, (1, 2)), atol=1e-3)
    assert torch.allclose(c[:, 0, 0], torch.tensor([255.0, 204.0, 204.0]), atol=1e-3)  # a fifth of red over white
    assert torch.allclose(d, torch.full((3, 16, 32), 51.0), atol=1e-3)


@pytest.mark.slow
def test_the_recipes_dtype_is_the_encoders(pipeline: Any, source: Source, prompts_file: Path, tmp_path: Path) -> None:
    half, full = (encoded(source, "prompts", prompts_file, tmp_path, d).read([1])["encoder_hidden_states"] for d in ("bfloat16", "float32"))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (half.float() - full).abs().max() < 0.2


@pytest.mark.slow
def test_what_is_encoded_is_encoded_once(source: Source, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoded(source, "images", images, tmp_path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(images, moved)

    def never(*_: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoding, "load_part", never)
    assert encoded(source, "images", moved, tmp_path).digest == first.digest  # by content, not by place
    (moved / "000.txt").write_text("another caption", "utf-8")
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        encoded(source, "images", moved, tmp_path)
    assert [p.name for p in tmp_path.glob("samples-*")] == [f"samples-{first.digest}"]


@pytest.mark.slow
def test_parts_are_loaded_one_kind_at_a_time_images_first(
    source: Source, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from ppclc.models import load_part

    loaded: list[tuple[str, Any]] = []

    def watched(root: Path, part: str, dtype: str) -> Any:
        alive = [name for name, model in loaded if model() is not None]
        assert alive == (["text_encoder"] if part == "tokenizer" else [])
        made = load_part(root, part, dtype)
        loaded.append((part, weakref.ref(made)))
        return made

    monkeypatch.setattr(encoding, "load_part", watched)
    encoded(source, "images", images, tmp_path)
    assert [name for name, _ in loaded] == ["vae", "text_encoder", "tokenizer"]
    assert all(model() is None for _, model in loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "images"])
def test_a_stopped_encoding_goes_on_and_is_never_read_half(
    source: Source, images: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = images if kind == "images" else prompts_file
    monkeypatch.setattr(encoding, "SHARD_ROWS", 2)
    monkeypatch.setattr(encoding, "PROMPTS_AT_ONCE", 1)
    whole = encoded(source, kind, path, tmp_path / "whole")
    calls = []

    def counting(limit: int) -> Callable[..., Any]:
        def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            calls.append(len(parts))
            if len(calls) > limit:
                raise KeyboardInterrupt
            return real(parts)

        return joined

    real = encoding.joined
    monkeypatch.setattr(encoding, "joined", counting(2))
    with pytest.raises(KeyboardInterrupt):
        encoded(source, kind, path, tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("samples-*"))
    calls.clear()
    monkeypatch.setattr(encoding, "joined", counting(99))
    again = encoded(source, kind, path, tmp_path / "cut")
    assert len(calls) == -(-whole.rows // 2) - 2
    assert same(again, whole)
    files = [sorted(f.name for f in p.glob("*/*")) for p in (tmp_path / "cut", tmp_path / "whole")]
    assert files[0] == files[1] == [f"samples-{i:05d}.safetensors" for i in range(-(-whole.rows // 2))]
    assert not list((tmp_path / "cut").glob(".*"))


# -- drawing -----------------------------------------------------------------------------------------------------------


def write_cache(
    path: Path, rows: int, latents: bool | torch.Tensor = True, text: int = 5, metadata: dict[str, str] | None = None, **more: Any
) -> Path:
    g = torch.Generator().manual_seed(rows)
    tensors = {"encoder_hidden_states": torch.randn(rows, text, 16, generator=g)}
    if latents is not False:
        numbers = torch.arange(rows).float()[:, None, None] + torch.zeros(rows, 32, 12)
        tensors["latents"] = latents if isinstance(latents, torch.Tensor) else numbers
    tensors = {k: v for k, v in (tensors | more).items() if v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"height": "4", "width": "8"} if metadata is None else metadata)
    return path


@pytest.mark.parametrize("rows", [30, 31, 64, 500])
def test_splits_share_no_row_and_leave_none_out(source: Source, tmp_path: Path, rows: int) -> None:
    made = open_cache(str(write_cache(tmp_path / "a.safetensors", rows)), source)
    splits = {name: made.split(name) for name in ("train", "choose", "judge")}
    assert sorted(r for s in splits.values() for r in s) == list(range(rows))
    assert all(splits.values())
    assert len(splits["train"]) > rows * 0.45
    # A row's split does not hang on how many there are.
    fewer = open_cache(str(write_cache(tmp_path / "b.safetensors", 30)), source)
    assert all(fewer.split(n) == [r for r in s if r < 30] for n, s in splits.items())
    for name in splits:
        samples = open_samples("cached", source, None, name, made)
        seen = set()
        for seed in range(6):
            x, t, _ = samples.draw(32, torch.Generator().manual_seed(seed))
            noise_free = t < 0.2  # the row's number is the mean of its latents
            numbers = (x.mean((1, 2)) / (1 - t))[noise_free]
            seen |= {round(n.item()) for n in numbers}
        assert seen <= set(splits[name])


def test_few_rows_are_shared(source: Source, tmp_path: Path) -> None:
    made = open_cache(str(write_cache(tmp_path / "a.safetensors", 29)), source)
    assert made.shares_rows
    assert made.split("train") == made.split("judge") == list(range(29))


def test_clean_latents_are_pushed_along_the_flow(source: Source, tmp_path: Path) -> None:
    write_cache(tmp_path / "a" / "1.safetensors", 3)
    write_cache(tmp_path / "a" / "2.safetensors", 4, text=7)
    samples = open_samples("cached", source, None, "choose", open_cache(str(tmp_path / "a"), source))
    x, t, conditioning = samples.draw(10, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    order = torch.cat([torch.randperm(7, generator=g), torch.randperm(7, generator=g)])[:10]
    noise = torch.randn(10, 32, 12, generator=g)
    text = [load_file(tmp_path / "a" / f"{n}.safetensors")["encoder_hidden_states"] for n in (1, 2)]
    clean = torch.tensor([0.0, 1, 2, 0, 1, 2, 3])[order][:, None, None].expand(10, 32, 12)
    assert torch.equal(x, flow.interpolate(clean, noise, t))
    assert t.min() >= 0
    assert t.max() <= 1
    assert conditioning["img_shapes"] == [[(1, 4, 8)]] * 10
    for i, row in enumerate(order.tolist()):
        states, mask = conditioning["encoder_hidden_states"][i], conditioning["encoder_hidden_states_mask"][i]
        wanted = text[0][row] if row < 3 else text[1][row - 3]
        assert mask.tolist() == [True] * len(wanted) + [False] * (7 - len(wanted))
        assert torch.equal(states[: len(wanted)], wanted)
        assert not states[len(wanted) :].any()


def test_prompts_alone_give_points_of_the_teachers_own_trajectories(pipeline: Any, source: Source, tmp_path: Path) -> None:
    made = open_cache(str(write_cache(tmp_path / "a.safetensors", 6, latents=False)), source)
    teacher = pipeline.transformer
    x, t, conditioning = open_samples("cached", source, teacher, "train", made).draw(6, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(6, generator=g).tolist()
    noise = torch.randn(6, 32, 12, generator=g)
    text = load_file(tmp_path / "a.safetensors")["encoder_hidden_states"]
    assert torch.equal(conditioning["encoder_hidden_states"], text[order])
    for i in range(6):
        at = noise[i : i + 1]
        steps = round((1 - t[i].item()) * TRAJECTORY_STEPS)
        alone = {"encoder_hidden_states": text[order[i]][None], "img_shapes": [[(1, 4, 8)]]}
        for step in range(steps):
            with torch.no_grad():
                velocity = teacher(hidden_states=at, timestep=torch.tensor([1 - step / TRAJECTORY_STEPS]), **alone, return_dict=False)[0]
            at = at - velocity / TRAJECTORY_STEPS
        assert torch.allclose(x[i], at[0], atol=1e-4)
    assert len(set(t.tolist())) > 1


@pytest.mark.parametrize("latents", [True, False])
def test_draws_hang_on_the_generator_alone(pipeline: Any, source: Source, tmp_path: Path, latents: bool) -> None:
    made = open_cache(str(write_cache(tmp_path / "a.safetensors", 40, latents)), source)
    samples = open_samples("cached", source, pipeline.transformer, "train", made)
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        drawn.append(samples.draw(5, torch.Generator().manual_seed(7)))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(drawn[0][2]["encoder_hidden_states"], drawn[1][2]["encoder_hidden_states"])
    assert samples.identity == f"cached-{made.digest}"
    assert open_samples("noise", source, None, "train").identity == "noise"


class Watched:
    """A safetensors handle that notes which rows are read, and reads nothing whole."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.rows = handle, []

    def get_slice(self, name: str) -> Any:
        part, rows = self.handle.get_slice(name), self.rows

        class Part:
            def __getitem__(self, key: slice) -> Any:
                rows.append((name, key.start, key.stop))
                return part[key]

        return Part()


def test_rows_are_read_as_they_are_drawn(source: Source, tmp_path: Path) -> None:
    made = open_cache(str(write_cache(tmp_path / "a.safetensors", 50)), source)
    assert not made.handles
    made.read([0])
    ((file, handle),) = made.handles.items()
    made.handles[file] = watched = Watched(handle)
    made.read([7, 31])
    assert sorted(watched.rows) == [(n, r, r + 1) for n in ("encoder_hidden_states", "latents") for r in (7, 31)]


# -- masks -------------------------------------------------------------------------------------------------------------


def padded(folder: Path, fill: float) -> Path:
    """Forty rows of one to six text tokens, what is padded filled with a number."""
    lengths = torch.arange(40) % 6 + 1
    mask = torch.arange(6) < lengths[:, None]
    text = torch.randn(40, 6, 16, generator=torch.Generator().manual_seed(0))
    text = torch.where(mask[:, :, None], text, torch.tensor(fill))
    return write_cache(folder / "a.safetensors", 40, text=6, encoder_hidden_states=text, encoder_hidden_states_mask=mask.to(torch.uint8))


def test_padded_text_enters_no_moment(pipeline: Any, source: Source, family: Family, tmp_path: Path) -> None:
    stats = []
    settings = CalibrateSettings(samples=48, longest=2)
    caches = [open_cache(str(padded(tmp_path / str(fill), fill)), source) for fill in (0.0, 1e8)]
    for made in caches:
        samples = open_samples("cached", source, pipeline.transformer, "train", made)
        stats.append(calibrate(ResidentTeacher(pipeline.transformer, family), samples, settings, quiet))
    assert stats[0].tensors.keys() == stats[1].tensors.keys()
    assert all(torch.equal(v, stats[1].tensors[k]) for k, v in stats[0].tensors.items())
    # As many rows of text as there were real tokens.
    rows = caches[0].split("train")
    order = torch.cat(
        [torch.randperm(len(rows), generator=(g := torch.Generator().manual_seed(0))), torch.randperm(len(rows), generator=g)]
    )
    more = torch.randperm(len(rows), generator=g) if len(order) < 48 else order[:0]
    assert stats[0].rows["text"] == sum(rows[i] % 6 + 1 for i in torch.cat([order, more])[:48].tolist())
    assert stats[0].rows["image"] == 48 * 32


def test_a_padded_row_gives_the_velocity_it_gives_alone(pipeline: Any, source: Source, family: Family, tmp_path: Path) -> None:
    made = open_cache(str(padded(tmp_path, 1e8)), source)
    together = made.read([0, 3, 5])
    assert together["encoder_hidden_states_mask"].sum(1).tolist() == [1, 4, 6]
    x, t = torch.randn(3, 32, 12), torch.tensor([0.2, 0.5, 1.0])
    latents = together.pop("latents")
    assert latents[:, 0, 0].tolist() == [0, 3, 5]
    velocity = flow.predict(pipeline.transformer, x, t, together | family.grid_inputs({}, 3, *GRID, 6))
    for i, row in enumerate([0, 3, 5]):
        alone = made.read([row])
        alone.pop("latents")
        assert alone.keys() == {"encoder_hidden_states"}
        other = flow.predict(pipeline.transformer, x[i : i + 1], t[i : i + 1], alone | family.grid_inputs({}, 1, *GRID, 6))
        assert torch.allclose(velocity[i], other[0], atol=1e-5)


# -- whole runs --------------------------------------------------------------------------------------------------------


class Spoken(Display):
    """A display that remembers what it said."""

    def __init__(self) -> None:
        super().__init__(2)
        self.words: list[str] = []

    def say(self, text: str) -> None:
        self.words.append(text)


def run(folder: Path, out: Path, kind: str, path: Path | None, **more: Any) -> tuple[Run, list[str]]:
    recipe = {
        "model": {"path": str(folder)},
        "calibrate": {"source": kind, "path": str(path) if path else None, "resolution": SIZE, "samples": 64, "longest": 3, **more},
        "analyze": {"probes": 16, "supernet_steps": 4, "supernet_sets": 8, "trials": 2, "trial_steps": 4},
        "target": {"parameters": 0.8},
    }
    display = Spoken()
    return compress(parse_recipe(recipe, "here"), "mine.yaml", out, display, "analyze"), display.words


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "images", "cached", "auto"])
def test_a_users_data_goes_through_calibration_and_analysis(
    source: Source, folder: Path, prompts_file: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = {"prompts": prompts_file, "images": images}.get(kind, tmp_path / "cached")
    if kind in ("cached", "auto"):
        write_cache(path / "a.safetensors", 40)
    done, words = run(folder, tmp_path / "out", kind, path)
    assert done.cache is not None
    assert done.stats is not None
    assert done.plan is not None
    assert done.stats.rows["image"] == 64 * 32
    assert done.plan.edits()
    few = [w for w in words if "too few to be kept apart" in w]
    assert len(few) == (1 if kind in ("prompts", "images") else 0)
    assert any("encoding prompts" in w for w in words) == (kind in ("prompts", "images"))
    monkeypatch.setattr(encoding, "load_part", None)  # calling it would fail
    again, _ = run(folder, tmp_path / "out", kind, path)
    assert [s.reused for s in again.store.stages] == [True, True]
    # Other data is another record.
    if kind == "cached":
        write_cache(path / "b.safetensors", 3)
        other, _ = run(folder, tmp_path / "out", kind, path)
        assert other.stats is not None
        assert other.stats.digest != done.stats.digest


@pytest.mark.slow
def test_encodings_of_a_run_are_cached_samples(source: Source, images: Path, tmp_path: Path) -> None:
    made = encoded(source, "images", images, tmp_path)
    other = find_data("cached", str(tmp_path / f"samples-{made.digest}"), 999, source)
    assert isinstance(other, Cache)
    assert same(made, other)


def test_the_starter_recipe_names_the_sources(folder: Path, tmp_path: Path) -> None:
    commands.init(str(folder), tmp_path / "mine.yaml")
    assert "images | prompts | cached | noise" in (tmp_path / "mine.yaml").read_text("utf-8")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def refused(kind: str, path: Path | None, source: Source, *words: str, error: type[PpclcError] = RecipeError) -> None:
    """The one message, which comes before anything is written or any encoder is loaded."""
    with pytest.raises(error) as caught:
        find_data(kind, None if path is None else str(path), SIZE, source)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in (*words, *([] if path is None or error is ModelError else [f"calibrate.path = {str(path)!r}"])):
        assert word in message, message
    assert "\n" not in message


def test_a_bare_transformer_has_no_prompts(teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    for path in (teacher_folder, teacher_folder / "transformer"):
        for kind in ("prompts", "images"):
            way = (f"calibrate.source = {kind!r}", "model_index.json", "cached", "noise")
            refused(kind, prompts_file, open_source(str(path)), *way, error=ModelError)
            refused(kind, None, open_source(str(path)), *way, error=ModelError)
        assert find_data("auto", None, 256, open_source(str(path))) is None
        assert find_data("noise", None, 256, open_source(str(path))) is None


def test_a_task_brings_its_own_data(prompts_file: Path) -> None:
    task = open_source("builtin:two-digits")
    for kind in ("auto", "images", "prompts"):
        assert find_data(kind, None, 256, task) is None
        refused(kind, prompts_file, task, "brings data of its own", "cached")


def test_what_is_missing(source: Source, tmp_path: Path) -> None:
    for kind, wanted in (("prompts", "text file"), ("images", "folder of images"), ("cached", "safetensors")):
        refused(kind, None, source, "calibrate.path: missing", wanted)
    gone = tmp_path / "gone"
    refused("prompts", gone, source, "no such file", "one prompt a line")
    refused("images", gone, source, "no such file or folder", "webdataset")
    refused("cached", gone, source, "no such file or folder", "safetensors")
    refused("auto", gone, source, "no such file or folder", "text file")
    refused("prompts", tmp_path, source, "is a folder", "one prompt a line")
    refused("images", tmp_path, source, "holds no images", "metadata.jsonl")
    refused("cached", tmp_path, source, "holds no *.safetensors")
    refused("auto", tmp_path, source, "holds nothing to calibrate on")
    (tmp_path / "x.csv").write_text("a,b", "utf-8")
    refused("auto", tmp_path / "x.csv", source, "of no kind")
    refused("images", tmp_path / "x.csv", source, "no image folder")
    refused("cached", tmp_path / "x.csv", source, "is no *.safetensors")


def test_bad_prompts(source: Source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n  \n", "utf-8")
    refused("prompts", tmp_path / "a.txt", source, "holds no prompts")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    refused("prompts", tmp_path / "a.txt", source, "not UTF-8", "byte 3")


def test_resolutions_fit_the_tokens(source: Source, prompts_file: Path, tmp_path: Path) -> None:
    for resolution in (18, [16, 30], 2):
        with pytest.raises(RecipeError, match=r"calibrate\.resolution = .*wanted multiples of 4, .*e\.g\. \["):
            find_data("prompts", str(prompts_file), resolution, source)
    found = find_data("prompts", str(prompts_file), 64, source)
    assert isinstance(found, Unencoded)
    assert (found.size, found.grid) == ((64, 64), (16, 16))
    for value in (0, "big", [16], [16, 16, 16], [16, 0], 16.5, True):
        with pytest.raises(RecipeError, match=r"here: calibrate\.resolution"):
            parse_recipe({"model": {"path": "x"}, "calibrate": {"resolution": value}}, "here")
    with pytest.raises(RecipeError, match=r"here: calibrate\.path = 3: wanted"):
        parse_recipe({"model": {"path": "x"}, "calibrate": {"path": 3}}, "here")


@pytest.fixture
def spoiled(images: Path, tmp_path: Path) -> Path:
    where = tmp_path / "spoiled"
    shutil.copytree(images, where)
    return where


def test_bad_image_folders(source: Source, spoiled: Path) -> None:
    (spoiled / "003.txt").unlink()
    (spoiled / "004.txt").unlink()
    refused("images", spoiled, source, "2 of 6 images have no caption", "003.png first", "metadata.jsonl")
    (spoiled / "003.txt").write_text(" \n", "utf-8")
    (spoiled / "004.txt").write_text("x", "utf-8")
    refused("images", spoiled, source, "003.txt: holds no caption")
    (spoiled / "003.txt").write_text("x", "utf-8")
    (spoiled / "002.png").write_bytes(b"no image at all")
    refused("images", spoiled, source, "002.png: not a whole image", "take it out")
    data = bytearray((spoiled / "001.png").read_bytes())
    data[len(data) // 2] ^= 255
    (spoiled / "002.png").write_bytes(data)
    refused("images", spoiled, source, "002.png: not a whole image")
    (spoiled / "._005.png").write_bytes(b"what some systems leave beside a file")
    shutil.copy(spoiled / "001.png", spoiled / "002.png")
    assert len(read_pictures(str(spoiled))) == 6


@pytest.mark.slow
def test_an_image_that_breaks_off_is_named_and_nothing_is_kept(source: Source, spoiled: Path, tmp_path: Path) -> None:
    """JPEG has no checksum: that it is cut short shows when it is decoded, before any text is encoded."""
    picture(5, 64, 64).save(spoiled / "005.jpg")
    (spoiled / "005.png").unlink()
    data = (spoiled / "005.jpg").read_bytes()
    (spoiled / "005.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(RecipeError, match=r"005\.jpg: not a whole image \(image file is truncated.*take it out"):
        encoded(source, "images", spoiled, tmp_path / "records")
    assert not list((tmp_path / "records").glob("samples-*"))


def test_bad_tables(source: Source, spoiled: Path) -> None:
    table = spoiled / "metadata.jsonl"
    for line, words in (
        ("{", ["line 2: not JSON"]),
        ("[]", ["line 2: file_name = None"]),
        ('{"file_name": "001.png"}', ["text = None", "its caption"]),
        ('{"file_name": "001.png", "text": " "}', ["text = ' '"]),
        ('{"file_name": "009.png", "text": "x"}', ["'009.png': no such image"]),
        ('{"file_name": "001.txt", "text": "x"}', ["'001.txt': no such image"]),
    ):
        table.write_text('{"file_name": "000.png", "text": "a"}\n' + line, "utf-8")
        refused("images", spoiled, source, str(table), *words)


def test_bad_shards(source: Source, images: Path, tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    pack(tar, images, lambda t: (".txt", t.encode()))
    whole = tar.read_bytes()
    tar.write_bytes(b"no tar at all" * 100)
    refused("images", tar, source, "cannot be read as a tar file", "pack it again")
    for cut in (len(whole) // 2, 700, 512 * 5):
        tar.write_bytes(whole[:cut])
        refused("images", tar, source, "a.tar: c", "pack it again")  # cut off, or cannot be read
    broken = bytearray(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        broken[opened.getmembers()[4].offset + 150] ^= 255  # in a header's checksum
    tar.write_bytes(broken)
    refused("images", tar, source, "cut off or damaged after 4 members")
    with tarfile.open(tar, "w:gz") as out:
        out.add(images / "000.png", "000.png")
    refused("images", tar, source, "uncompressed tar file")
    with tarfile.open(tar, "w") as out:
        out.add(images / "000.png", "000.png")
    refused("images", tar, source, "1 of 1 images have no caption", "000.png")
    pack(tar, images, lambda t: (".json", b"{"))
    refused("images", tar, source, "000.json: not JSON")
    pack(tar, images, lambda t: (".json", b'{"label": 3}'))
    refused("images", tar, source, "6 of 6 images have no caption")
    with tarfile.open(tar, "w") as out:
        for name in ("000.txt", "000.png", "000.seg.png"):
            out.add(images / name.replace(".seg", ""), name)
    refused("images", tar, source, "000.seg.png: the second image of '000'")


NAN = torch.full((4, 5, 16), 1.0)
NAN[2, 3, 4] = float("nan")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"encoder_hidden_states": torch.ones(4, 5, 15)},
            ["encoder_hidden_states has shape [4, 5, 15]", "wanted [4, T, 16]", "config.json"],
        ),
        ({"encoder_hidden_states": torch.ones(4, 16)}, ["encoder_hidden_states has shape [4, 16]", "wanted [4, T, 16]"]),
        ({"encoder_hidden_states": None}, ["encoder_hidden_states is missing"]),
        ({"encoder_hidden_states": NAN}, ["encoder_hidden_states: row 2 holds NaN"]),
        ({"encoder_hidden_states": torch.ones(4, 5, 16, dtype=torch.int32)}, ["encoder_hidden_states is I32", "bfloat16"]),
        ({"encoder_hidden_states": torch.ones(0, 5, 16)}, ["one row a sample"]),
        ({"latents": torch.ones(4, 32, 16)}, ["latents has shape [4, 32, 16]", "wanted [4, 32, 12]"]),
        ({"latents": torch.ones(4, 30, 12)}, ["latents has shape [4, 30, 12]", "wanted [4, 32, 12]"]),
        ({"latents": torch.ones(3, 32, 12)}, ["latents has shape [3, 32, 12]", "wanted [4, 32, 12]"]),
        ({"latents": torch.full((4, 32, 12), float("inf"))}, ["latents: row 0 holds NaN or infinite values"]),
        ({"encoder_hidden_states_mask": torch.ones(4, 6)}, ["mask has shape [4, 6]", "wanted [4, 5]"]),
        ({"encoder_hidden_states_mask": torch.eye(4, 5) * torch.tensor([1.0, 0, 1, 1])[:, None]}, ["row 1 masks all text"]),
        ({"prompt_embeds": torch.ones(4, 5, 16)}, ["prompt_embeds: not an input of QwenImageTransformer2DModel", "encoder_hidden_states"]),
        ({"timestep": torch.ones(4)}, ["timestep: not an input"]),
        ({"metadata": {}}, ["metadata height = 'missing'", "save_file(..., metadata="]),
        ({"metadata": {"height": "4", "width": "-8"}}, ["width = '-8'"]),
        ({"metadata": {"height": "4", "width": "0"}}, ["width = '0'"]),
    ],
)
def test_bad_cached_samples(source: Source, tmp_path: Path, tensors: dict[str, Any], words: list[str]) -> None:
    write_cache(tmp_path / "a.safetensors", 4, **tensors)
    refused("cached", tmp_path, source, "a.safetensors", *words)


def test_cached_files_must_be_alike_and_whole(source: Source, tmp_path: Path) -> None:
    write_cache(tmp_path / "a.safetensors", 4)
    write_cache(tmp_path / "b.safetensors", 4, latents=False)
    refused("cached", tmp_path, source, "b.safetensors: holds encoder_hidden_states, but a.safetensors holds", "latents")
    write_cache(tmp_path / "b.safetensors", 4, metadata={"height": "8", "width": "4"})
    refused("cached", tmp_path, source, "b.safetensors: height, width = (8, 4)", "(4, 8)")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data[:-100])
    refused("cached", tmp_path, source, "b.safetensors: not a whole safetensors file", "write it again")


def edit_index(root: Path, **changes: Any) -> None:
    file = root / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    where = tmp_path / "broken"
    shutil.copytree(folder, where)
    return where


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "QwenImageEditPipeline"}, ["_class_name = 'QwenImageEditPipeline'", "wanted QwenImagePipeline", "cached"]),
        ({"text_encoder": [None, None]}, ["text_encoder = [None, None]", "cached", "noise"]),
        ({"vae": None}, ["vae = None"]),
    ],
)
def test_pipelines_that_do_not_fit(broken: Path, prompts_file: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_index(broken, **changes)
    refused("prompts", prompts_file, open_source(str(broken)), "model_index.json", *words, error=ModelError)
    shutil.rmtree(broken / "vae")
    edit_index(broken, _class_name="QwenImagePipeline", text_encoder=["transformers", "X"], vae=["diffusers", "X"])
    refused("prompts", prompts_file, open_source(str(broken)), "vae: no such folder", error=ModelError)


def test_a_hubs_parts_are_fetched_when_they_are_needed(
    folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(*place: Any) -> Path:
        asked.append(place)
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ppclc.loading.hub.fetch", fetch)
    found = find_data("prompts", str(prompts_file), SIZE, open_source("some/model", "v1", "fp16"))
    assert isinstance(found, Unencoded)
    assert asked == [("some/model", "v1", "fp16"), ("some/model", "v1", "fp16", ("text_encoder", "tokenizer", "vae"))]


@pytest.mark.slow
def test_encoders_that_are_not_whole(broken: Path, folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    def fails(words: str) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            encoded(open_source(str(broken)), "prompts", prompts_file, tmp_path / "records")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "records").glob("samples-*"))

    weights = broken / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    gone = next(k for k in state if "layers.1.mlp" in k)
    save_file({k: v for k, v in state.items() if k != gone}, weights, metadata={"format": "pt"})
    fails(r"text_encoder: 1 tensors of Qwen2_5_VLForConditionalGeneration are missing or of a wrong shape, .*layers\.1\.mlp")
    save_file({k: torch.full_like(v, float("nan")) for k, v in state.items()}, weights, metadata={"format": "pt"})
    fails(r"text_encoder: gives NaN or infinite values from 'a cat' on")
    weights.write_bytes((folder / "text_encoder" / "model.safetensors").read_bytes()[:-50])
    fails(r"text_encoder: cannot be loaded as Qwen2_5_VLForConditionalGeneration")
    weights.unlink()
    torch.save(state, broken / "text_encoder" / "pytorch_model.bin")  # a pickle, which is never loaded
    fails(r"text_encoder: cannot be loaded as Qwen2_5_VLForConditionalGeneration .*safetensors included")
    edit_index(broken, text_encoder=["my_code", "Encoder"])
    fails(r"text_encoder = \['my_code', 'Encoder'\]: wanted a class of diffusers or transformers")


@pytest.mark.slow
def test_encoders_of_another_width(broken: Path, pipeline: Any, prompts_file: Path, tmp_path: Path) -> None:
    qwen_text_encoder(len(pipeline.tokenizer), 32).save_pretrained(broken / "text_encoder")
    with pytest.raises(ModelError, match=r"text_encoder: gives encoder_hidden_states of width 32, wanted 16 by the transformer's config"):
        encoded(open_source(str(broken)), "prompts", prompts_file, tmp_path / "records")


@pytest.mark.slow
def test_an_encoder_that_fails_is_named(broken: Path, prompts_file: Path, tmp_path: Path) -> None:
    qwen_text_encoder(100).save_pretrained(broken / "text_encoder")  # knows fewer words than its tokenizer
    with pytest.raises(ModelError, match=r"text_encoder: fails from 'a cat' on \(.*index.*\); does it fit"):
        encoded(open_source(str(broken)), "prompts", prompts_file, tmp_path / "records")


def test_samples_without_data_say_so(source: Source) -> None:
    for kind in ("prompts", "images", "cached"):
        with pytest.raises(RecipeError, match=rf"calibrate\.source = '{kind}'.*noise"):
            open_samples(kind, source, None, "train")  # type: ignore[arg-type]
    assert isinstance(open_samples("auto", source, None, "train"), Samples)
