"""What a user calibrates on, as it lies on disk: prompts in a text file; captioned images in a folder or in webdataset shards.

Nothing is encoded here. Every fault that can be found without decoding an image is told when the data is opened.

Shape suffixes: C channel, H height, W width.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ppclc.errors import RecipeError

IMAGE_ENDS = (".png", ".jpg", ".jpeg", ".webp")
BLOCK = 512
"""Bytes of a tar file's blocks."""


@dataclass(frozen=True)
class Picture:
    """One captioned image: `size` bytes at `offset` of a file; `name` is what messages call it, `digest` the bytes' SHA-256."""

    file: Path
    name: str
    offset: int
    size: int
    caption: str
    digest: str = ""

    def data(self) -> bytes:
        """The encoded image."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_prompts(path: str) -> list[str]:
    """The prompts in a text file, one a line; empty lines are left out, and of like lines all but the first.

    Raises:
        RecipeError: no such file, not UTF-8, or no prompt in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise RecipeError(f"calibrate.path = {path!r}: {what}; wanted a text file with one prompt a line")
    lines = _text(file, file.read_bytes(), path).splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise RecipeError(f"calibrate.path = {path!r}: holds no prompts; wanted a text file with one prompt a line")
    return prompts


def read_pictures(path: str) -> list[Picture]:
    """Captioned images in order: of a folder by path, of shards as they stand in them.

    Raises:
        RecipeError: nothing there; an image without a caption or that is no image; a shard that is not whole.
    """
    shards, folder = shards_at(path), Path(path).expanduser()
    if shards:
        pictures = [p for shard in shards for p in _shard_pictures(shard, path)]
    elif folder.is_dir():
        pictures = _folder_pictures(folder, path)
    else:
        what = "is no image folder" if folder.exists() else "no such file or folder"
        raise RecipeError(f"calibrate.path = {path!r}: {what}; wanted a folder of images with captions, or webdataset shards (*.tar)")
    if not pictures:
        wanted = "image.png with image.txt beside it, a metadata.jsonl, or webdataset shards (*.tar)"
        raise RecipeError(f"calibrate.path = {path!r}: holds no images; wanted {wanted}")
    return [_verified(p, path) for p in pictures]


def _verified(picture: Picture, path: str) -> Picture:
    """The picture with its digest. Raises RecipeError for what its format's own header or checksums show to be damaged."""
    data = picture.data()
    with _decoding(picture, data, path) as image:
        image.verify()
    return replace(picture, digest=hashlib.sha256(data).hexdigest())


def pixels(picture: Picture, height: int, width: int, path: str) -> torch.Tensor:
    """The image (3, H, W) in -1..1: upright, transparency over white, resized to cover, the middle of it.

    Raises:
        RecipeError: it cannot be decoded.
    """
    with _decoding(picture, picture.data(), path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    array_HWC = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(array_HWC.transpose(2, 0, 1)))


def shards_at(path: str) -> list[Path]:
    """The webdataset shards that a path names: a tar file, a folder's, or a pattern's, by name; none where it names others."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(f for f in place.glob("*.tar") if f.is_file())
    found = [place] if place.is_file() else sorted(Path(f) for f in glob.glob(str(place)))
    return found if found and all(f.suffix == ".tar" and f.is_file() for f in found) else []


@contextmanager
def _decoding(picture: Picture, data: bytes, path: str) -> Iterator[Image.Image]:
    """The image, header read; what Pillow says of a damaged one becomes a RecipeError that names it."""
    try:
        with Image.open(BytesIO(data)) as image:
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        where = f"calibrate.path = {path!r}: {picture.name}"
        reason = "no image format that is known here" if isinstance(error, UnidentifiedImageError) else error
        raise RecipeError(f"{where}: not a whole image ({reason}); mend it, or take it out with its caption") from None


def _text(where: Path | str, data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"calibrate.path = {path!r}: {where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and not a hidden one."""
    return name.lower().endswith(IMAGE_ENDS) and not Path(name).name.startswith(".")


def _folder_pictures(folder: Path, path: str) -> list[Picture]:
    table = folder / "metadata.jsonl"
    if table.is_file():
        return [_file_picture(folder / name, caption) for name, caption in _table(table, path)]
    images = sorted(f for f in folder.rglob("*") if f.is_file() and is_image(f.name))
    bare = [f for f in images if not f.with_suffix(".txt").is_file()]
    _all_captioned([str(f) for f in bare], len(images), "a .txt of the same name beside each, or one metadata.jsonl", path)
    return [_file_picture(f, _caption(f.with_suffix(".txt"), f.with_suffix(".txt").read_bytes(), path)) for f in images]


def _file_picture(file: Path, caption: str) -> Picture:
    return Picture(file, str(file), 0, file.stat().st_size, caption)


def _all_captioned(bare: list[str], count: int, wanted: str, path: str) -> None:
    if bare:
        raise RecipeError(f"calibrate.path = {path!r}: {len(bare)} of {count} images have no caption, {bare[0]} first; wanted {wanted}")


def _caption(where: Path | str, data: bytes, path: str) -> str:
    caption = " ".join(_text(where, data, path).split())
    if not caption:
        raise RecipeError(f"calibrate.path = {path!r}: {where}: holds no caption; wanted a line of text")
    return caption


def _table(table: Path, path: str) -> Iterator[tuple[str, str]]:
    """File and caption of every line of a metadata.jsonl."""
    for number, line in enumerate(_text(table, table.read_bytes(), path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"calibrate.path = {path!r}: {table}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{where}: not JSON ({error}); wanted an object with file_name and text") from None
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise RecipeError(f"{where}: file_name = {name!r}, text = {text!r}; wanted an image's file and its caption")
        if not is_image(name) or not (table.parent / name).is_file():
            raise RecipeError(f"{where}: file_name = {name!r}: no such image; wanted one of {', '.join(IMAGE_ENDS)} below {table.parent}")
        yield name, " ".join(text.split())


def _shard_pictures(shard: Path, path: str) -> list[Picture]:
    """Images of one shard with the caption of the same stem: everything before the first dot of the name."""
    members = _members(shard, path)
    captions: dict[str, str] = {}
    images: dict[str, tarfile.TarInfo] = {}
    with shard.open("rb") as file:
        for member in members:
            folder, _, name = member.name.rpartition("/")
            stem, _, end = name.partition(".")
            key, where = f"{folder}/{stem}", f"{shard}: {member.name}"
            if is_image(name):
                if key in images:
                    raise RecipeError(f"calibrate.path = {path!r}: {where}: the second image of {stem!r}; wanted one a stem")
                images[key] = member
            elif end in ("txt", "json"):
                file.seek(member.offset_data)
                text = _json_caption(where, file.read(member.size), path) if end == "json" else file.read(member.size)
                if text is not None and (end == "txt" or key not in captions):
                    captions[key] = _caption(where, text, path)
    bare = [f"{shard}: {m.name}" for key, m in images.items() if key not in captions]
    _all_captioned(bare, len(images), "a .txt, or a .json with caption or text, of the same stem", path)
    return [Picture(shard, f"{shard}: {m.name}", m.offset_data, m.size, captions[key]) for key, m in images.items()]


def _members(shard: Path, path: str) -> list[tarfile.TarInfo]:
    """The files of a tar, which must end as tar files end: in zeros."""
    wanted = "wanted a whole, uncompressed tar file; fetch or pack it again"
    try:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise RecipeError(f"calibrate.path = {path!r}: {shard}: cannot be read as a tar file ({error}); {wanted}") from None
    end = max((m.offset_data + -(-m.size // BLOCK) * BLOCK for m in members), default=0)
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise RecipeError(f"calibrate.path = {path!r}: {shard}: cut off or damaged after {len(members)} members; {wanted}")
    return [m for m in members if m.isfile()]


def _json_caption(where: str, data: bytes, path: str) -> bytes | None:
    try:
        row = json.loads(data)
    except ValueError as error:
        raise RecipeError(f"calibrate.path = {path!r}: {where}: not JSON ({error}); wanted an object with caption or text") from None
    found = next((row[k] for k in ("caption", "text") if isinstance(row.get(k), str)), None) if isinstance(row, dict) else None
    return found.encode() if found is not None else None
