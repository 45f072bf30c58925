"""Judges of images: CLIP on tiny weights against the formula, the others through their libraries' places, and what is said when one is not at hand."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ppclc import plugins
from ppclc.errors import RecipeError, UnavailableError
from ppclc.judges import Judge, open_judges
from ppclc.judges.clip_score import prepared
from ppclc.loading.sources import open_source
from ppclc.passes.verify import VerifySettings, check_gates, judge_table
from ppclc.quality import difference_quality
from ppclc.recipe import parse_recipe
from tests.pipelines import clip_tokenizer

PROMPTS = ["a cat", "two dogs", "a red hat on a chair"]
SIZE = 16


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    words, tiny = clip_tokenizer(), {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=words.model_max_length, projection_dim=12, **tiny, **ends)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=12, **tiny)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_the_clip_score_is_the_cosine_in_percent(clip_folder: Path, images: torch.Tensor) -> None:
    from transformers import AutoTokenizer, CLIPModel

    found, left = open_judges({"clip_score": str(clip_folder)})
    judge, fits = found["clip_score"]
    assert (left, judge.better, judge.paired) == ([], "higher", False)
    model, words = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for image, prompt, score in zip(images, PROMPTS, fits(images, PROMPTS), strict=True):  # type: ignore[arg-type]
        small = torch.nn.functional.interpolate(image[None], (SIZE, 26), mode="bicubic", antialias=True).clamp(0, 1)[..., 5 : 5 + SIZE]
        with torch.no_grad():
            output = model(**words([prompt], return_tensors="pt"), pixel_values=(small - mean[:, None, None]) / std[:, None, None])
        a, b = output.image_embeds[0], output.text_embeds[0]
        assert score.item() == pytest.approx(max(0.0, 100 * (a @ b / a.norm() / b.norm()).item()), abs=1e-3)


def test_what_clip_sees_is_near_what_its_own_processor_gives(images: torch.Tensor) -> None:
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    smooth = torch.nn.functional.interpolate(images[:, :, ::8, ::8], (24, 40), mode="bicubic").clamp(0, 1)
    pictures = [Image.fromarray((255 * x.permute(1, 2, 0).numpy()).round().astype(np.uint8)) for x in smooth]
    theirs = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    ours = prepared(smooth, SIZE, processor.image_mean, processor.image_std)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.05  # of a spread of about 1


def test_the_table_has_every_judge_that_is_at_hand(
    clip_folder: Path, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = (images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    lpips: Any = types.ModuleType("lpips")

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert min(a.min(), b.min()) >= -1
            assert a.min() < -0.5  # in -1..1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    lpips.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UnavailableError, match=r"^verify\.judges\.lpips: no weights of vgg at hand in .*checkpoints"):
        open_judges({"lpips": "vgg"})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    wanted = VerifySettings(judges={"clip_score": str(clip_folder), "lpips": "vgg"}, seeds=(7,))
    table, left = judge_table(images, noisy, PROMPTS, wanted)
    assert (list(table), left) == (["clip_score", "lpips"], [])
    distance = 2 * (images - noisy).abs().mean((1, 2, 3)).double()
    assert (table["lpips"].teacher, table["lpips"].n, table["lpips"].seeds) == (0, 3, [7])
    assert table["lpips"].student == pytest.approx(distance.mean().item(), rel=1e-5)
    assert table["lpips"].drop_percent == pytest.approx(100 * distance.mean().item(), rel=1e-5)
    assert table["lpips"].ci95 is not None
    assert table["lpips"].ci95[0] < table["lpips"].drop_percent < table["lpips"].ci95[1]
    same, _ = judge_table(images, images, PROMPTS, wanted)
    assert all(row.drop_percent == 0 for row in same.values())
    assert judge_table(images, noisy, PROMPTS, VerifySettings(judges="none")) == ({}, [])
    assert judge_table(images[:1], noisy[:1], PROMPTS[:1], wanted) == ({}, [])


def test_image_reward_is_asked_with_pictures(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from PIL import Image

    library: Any = types.ModuleType("ImageReward")

    class Model:
        def score(self, prompt: str, path: str) -> float:
            return len(prompt) - np.asarray(Image.open(path)).mean() / 255

    library.load = lambda weights: Model()
    monkeypatch.setitem(sys.modules, "ImageReward", library)
    monkeypatch.setattr("ppclc.judges.image_reward.CACHE", tmp_path)
    with pytest.raises(
        UnavailableError, match=r"^verify\.judges\.image_reward: no weights of ImageReward-v1\.0 at hand, wanted .*ImageReward\.pt"
    ):
        open_judges({"image_reward": None})
    (tmp_path / "ImageReward.pt").touch()
    (_, fits) = open_judges({"image_reward": None})[0]["image_reward"]
    wanted = torch.tensor([len(p) for p in PROMPTS]) - images.mean((1, 2, 3))
    assert torch.allclose(fits(images, PROMPTS), wanted, atol=3e-3)  # type: ignore[arg-type]


def test_differences_are_told_in_hundredths_of_the_unit() -> None:
    teacher, student = torch.tensor([0.5, -0.5, 0.25, 0.0]), torch.tensor([0.25, -0.75, 0.0, -0.25])
    row = difference_quality(teacher, student, [1], "reward", "higher")
    assert (row.drop_percent, row.ci95) == (25.0, (25.0, 25.0))
    assert difference_quality(teacher, student, [1], "distance", "lower").drop_percent == -25.0


# -- not at hand -------------------------------------------------------------------------------------------------------


def test_judges_that_are_not_at_hand_are_told_and_do_not_stop_others(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lpips", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr("ppclc.judges.clip_score.PLUGIN", Judge(**{**vars(plugins.load("judges", "clip_score")), "weights": str(tmp_path)}))
    table, left = judge_table(images, images, PROMPTS, VerifySettings())
    assert table == {}
    assert [note.split(":")[0] for note in left] == plugins.names("judges") == ["clip_score", "image_reward", "lpips"]
    assert "no weights of" in left[0]
    assert "is not installed here: pip install" in left[1]
    assert all("\n" not in note for note in left)
    with pytest.raises(UnavailableError, match=r"^verify\.judges\.lpips: lpips is not installed here"):
        open_judges({"lpips": None})


def test_recipes_name_judges_and_gates_on_them(teacher_folder: Path) -> None:
    def settings(verify: dict[str, Any]) -> VerifySettings:
        return parse_recipe({"model": {"path": "x"}, "verify": verify}, "recipe").verify

    assert settings({}).judges_by_name is None
    assert settings({"judges": "none"}).judges_by_name == {}
    assert settings({"judges": {"clip_score": None, "lpips": "vgg"}}).judges_by_name == {"clip_score": None, "lpips": "vgg"}
    with pytest.raises(RecipeError, match=r"verify\.judges"):
        settings({"judges": "all"})
    source = open_source(str(teacher_folder))
    check_gates(settings({"gates": {"clip_score": {"drop_percent": 1}}}), source)
    with pytest.raises(RecipeError, match=r"verify\.judges\.beauty: no such judge; wanted some of clip_score, image_reward, lpips"):
        check_gates(settings({"judges": {"beauty": None}}), source)
