"""Models of the hub, from a server of our own that the hub's own client talks to; and the choice of files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppclc.errors import ModelError
from ppclc.loading.hub import needed, variant_of
from ppclc.loading.sources import open_source
from ppclc.models import load_source
from ppclc.plan import CompressionPlan

ROOT = Path(__file__).parents[2]
MODEL, SHA, TOKEN = "some/Model-1.0", "0123456789abcdef0123456789abcdef01234567", "hf_secret"


# -- which files -------------------------------------------------------------------------------------------------------

FLUX = [
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "dev_grid.jpg",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
    "transformer/diffusion_pytorch_model.bin",
]
ALWAYS = {"LICENSE.md", "README.md", "model_index.json", "transformer/config.json"}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00003.safetensors", None),
        ("diffusion_pytorch_model.safetensors.index.json", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00003.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00003.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("model.non_ema.safetensors", "non_ema"),
        ("config.json", None),
    ],
)
def test_a_variant_is_read_off_the_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


def test_of_a_pipeline_the_transformer_alone_is_fetched() -> None:
    plain = {n for n in FLUX if n.startswith("transformer/diffusion_pytorch_model") and "fp16" not in n and not n.endswith(".bin")}
    assert set(needed(FLUX, None)) == ALWAYS | plain
    assert set(needed(FLUX, "fp16")) == ALWAYS | {n for n in FLUX if n.startswith("transformer/") and "fp16" in n}
    more = {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    assert set(needed(FLUX, "fp16", ["text_encoder", "tokenizer"])) - set(needed(FLUX, "fp16")) == more


def test_of_a_bare_transformer_the_root() -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors", "images/a.png", "README.md"]
    assert set(needed(names, None)) == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    assert set(needed(names, "bf16")) == {"config.json", "diffusion_pytorch_model.bf16.safetensors", "README.md"}


def test_a_variant_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^some/model: no variant 'fp8'; there is fp16, one without a variant$"):
        needed(FLUX, "fp8", where="some/model")
    only = [n for n in FLUX if not n.startswith("transformer/") or "fp16" in n or n.endswith("config.json")]
    with pytest.raises(ModelError, match=r"no weights without a variant; there is fp16$"):
        needed(only, None)


# -- variants in a folder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(teacher: Any, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared teacher in float32, and beside it in bfloat16, in shards."""
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(teacher_folder, folder, dirs_exist_ok=True)
    import copy

    half = copy.deepcopy(teacher).to(torch.bfloat16)
    half.save_pretrained(folder / "transformer", variant="bf16", max_shard_size="100KB")
    return folder


@pytest.mark.slow
def test_a_variant_of_a_folder_is_loaded(variants: Path, teacher: Any) -> None:
    plain, half = open_source(str(variants)), open_source(str(variants), variant="bf16")
    assert len(plain.weight_files()) == 1
    assert len(half.weight_files()) > 3
    assert plain.digest() != half.digest()
    assert {p.dtype for p in half.places().values()} == {torch.bfloat16}
    loaded = load_source(half).state_dict()
    assert all(torch.equal(loaded[n], t.to(torch.bfloat16).float()) for n, t in teacher.state_dict().items())
    whole = load_source(plain).state_dict()
    assert all(torch.equal(t, whole[n]) for n, t in teacher.state_dict().items())


def test_other_variants_are_named(variants: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no variant 'fp8': wanted diffusion_pytorch_model\.fp8\.safetensors or its index"):
        open_source(str(variants), variant="fp8").weight_files()
    shutil.copytree(variants, tmp_path / "half")
    (tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no diffusion_pytorch_model\.safetensors, nor its index; there is variant bf16: name it"):
        open_source(str(tmp_path / "half")).weight_files()


def test_what_has_no_revision_is_told_so(variants: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder, which has no revision 'v1'"):
        open_source(str(variants), "v1")
    for place in (("builtin:two-digits", "v1", None), ("builtin:two-digits", None, "fp16"), ("model.safetensors", "v1", None)):
        with pytest.raises(ModelError, match="has no revisions and no variants"):
            open_source(*place)


# -- the real client ---------------------------------------------------------------------------------------------------


class Hub:
    """As much of the hub's server as its client asks for: one model at one commit, under the names main and v2."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.tokens = folder, [], set()  # type: ignore[var-annotated]
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                hub.tokens.add(self.headers.get("Authorization"))
                path = self.path.split("?")[0]
                files = sorted(str(p.relative_to(hub.folder)) for p in hub.folder.rglob("*") if p.is_file())
                if path == f"/api/models/{MODEL}/tree/{SHA}":
                    entries = [{"type": "file", "path": f, "size": (hub.folder / f).stat().st_size, "oid": f} for f in files]
                    return self.answer(json.dumps(entries).encode(), "application/json")
                if path in (f"/api/models/{MODEL}", *(f"/api/models/{MODEL}/revision/{r}" for r in ("main", "v2", SHA))):
                    told = {
                        "id": MODEL,
                        "sha": SHA,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "siblings": [{"rfilename": f} for f in files],
                    }
                    return self.answer(json.dumps(told).encode(), "application/json")
                resolve = f"/{MODEL}/resolve/"
                if path.startswith(resolve):
                    file = hub.folder / path.removeprefix(resolve).split("/", 1)[1]
                    return self.answer(file.read_bytes(), "application/octet-stream")
                return self.answer(b"no such thing", "text/plain", 404)

            def answer(self, body: bytes, kind: str, code: int = 200) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Repo-Commit", SHA)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                if code == 404:
                    self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Nothing on the screen."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(variants: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    shutil.copytree(variants, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "original.safetensors").write_bytes(b"gigabytes that nobody needs")
    served = Hub(folder)
    yield served
    served.close()


def ppclc(home: Path, address: str, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-m", "ppclc", *args], env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.long
@pytest.mark.slow
def test_a_model_of_the_hub_by_revision_and_variant_online_and_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = ppclc(home, hub.address, "inspect", MODEL, "--check", "--revision", "v2", "--json", HF_TOKEN=TOKEN)
    assert done.returncode == 0, (done.stderr, hub.asked)
    assert json.loads(done.stdout)["checked"]
    assert f"Bearer {TOKEN}" in hub.tokens
    fetched = {line.split("/", 5)[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
    # The other variant, and a student of it.
    plan = home / "plan.json"
    plan.write_text(CompressionPlan.of("qwen_image", 6, [(2, 4)]).to_json())
    done = ppclc(home, hub.address, "slice", MODEL, "--plan", str(plan), "-o", "student", "--revision", "v2", "--variant", "bf16")
    assert done.returncode == 0, done.stderr
    student = load_file(home / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in student.values()} == {torch.bfloat16}
    # Without a server: what is in the cache.
    hub.close()
    done = ppclc(home, hub.address, "inspect", MODEL, "--revision", "v2", "--variant", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"] == 6
    done = ppclc(home, hub.address, "inspect", MODEL, "--revision", "v3", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"ppclc: {MODEL}: no such folder, and not to be had from the hub at revision 'v3'")
    assert done.stderr.count("\n") == 1
