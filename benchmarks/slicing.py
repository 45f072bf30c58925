"""What cutting a checkpoint takes that need not fit in memory: speed beside `cp` of the bytes that stay, and memory.

    python -m benchmarks.slicing [--models qwen flux] [--blocks 8] [--repeats 5] [--out out/slicing]

`qwen`: Qwen-Image at its own widths with fewer blocks, bfloat16, in shards of 5 GB. `flux`: FLUX.1-dev whole, 23.8 GB. Both
of random numbers. `depth`: every second block goes, which moves bytes and nothing else. `rank`: as `depth`, and every modulation at
rank 64, which has to be computed. Each is cut in a process of its own, then the student's weight files are copied by `cp` and
brought to the disk; the order changes from one repeat to the next. Before either, the files that it reads are
dropped from the page cache.

seconds: from the first look at the files to the student's last byte on the disk, checksums included; imports are not. command_s: the
whole process with its imports. added: the highest anonymous memory of the process (RssAnon), looked at every 20 ms, less what it had after
its imports and one cut of a tiny model. speed: median of cp's seconds over ours, by pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results_file import write_results
from ppclc import plugins
from ppclc.families import Family
from ppclc.loading.checkpoints import Made, write_checkpoint
from ppclc.loading.classes import empty_model, random_model
from ppclc.loading.sources import open_source
from ppclc.models import quiet_libraries
from ppclc.passes.slice import slice_student
from ppclc.plan import CompressionPlan

MODELS = {"qwen": "qwen_image", "flux": "flux"}
RANK = 64
READY = "ready"


def published(family: Family, blocks: int) -> dict[str, Any]:
    """The published configuration, of Qwen-Image with so many blocks."""
    if family.name == "flux":
        return {"_class_name": family.class_name, "guidance_embeds": True}
    return {"_class_name": family.class_name, "num_layers": blocks, "guidance_embeds": False, "joint_attention_dim": 3584}


def write_teacher(folder: Path, family: Family, config: dict[str, Any]) -> None:
    """A checkpoint of random numbers, a tensor in memory at a time."""
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)

    def tensor(shape: torch.Size) -> Any:
        count = shape.numel()
        return lambda: noise.repeat(-(-count // len(noise)))[:count].view(shape)

    draft = folder.with_suffix(".draft")
    empty = empty_model(family, config)
    write_checkpoint(draft, {n: Made(torch.bfloat16, tuple(t.shape), tensor(t.shape)) for n, t in empty.state_dict().items()})
    empty.save_config(draft)
    draft.rename(folder)


def plan_of(source: Any, kind: str) -> CompressionPlan:
    """Every second block of each group gone; with `rank`, modulations made smaller too."""
    spans, first = [], 0
    for size in source.family.sizes(source.config):
        spans += [(b, b + 1) for b in range(first, first + size - 1, 2)]
        first += size
    return CompressionPlan.of(source.family.name, first, spans, modulation_rank=RANK if kind == "rank" else None)


def bank_of(width: int) -> dict[str, Any]:
    """A basis of the modulation as the calibration leaves it."""
    return {"modulation": {"basis": torch.linalg.qr(torch.randn(width, width))[0], "mean": torch.zeros(width)}}


def anonymous(process: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(row.split()[1]) for row in lines if row.startswith("RssAnon"))


def work(folder: Path, kind: str, out: Path) -> None:
    """Cut one teacher, and print what it took."""
    quiet_libraries()
    source = open_source(str(folder))
    tiny = random_model(source.family, dict(source.family.tiny_config), "bfloat16")
    tiny.save_pretrained(out / "tiny")
    small = open_source(str(out / "tiny"))
    wide = small.config["attention_head_dim"] * small.config["num_attention_heads"]
    small_plan = plan_of(small, kind).model_copy(update={"modulation_rank": 4 if kind == "rank" else None})
    slice_student(small, "bfloat16", small_plan, bank_of(wide), {}, out / "tiny-student")
    width = source.config["attention_head_dim"] * source.config["num_attention_heads"]
    plan, bank = plan_of(source, kind), bank_of(width) if kind == "rank" else {}
    print(READY, flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    student = slice_student(source, "bfloat16", plan, bank, {}, out / "student")
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "parameters": student.parameters, "bytes": student.bytes}))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cut(folder: Path, kind: str, out: Path) -> dict[str, Any]:
    """One cut in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.slicing", "--work", str(folder), kind, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdin and made.stdout  # noqa: PT018
        while made.stdout.readline().strip() != READY:
            assert made.poll() is None, "the worker failed before it began"
        before = peak = anonymous(made.pid)
        made.stdin.write("\n")
        made.stdin.flush()
        while made.poll() is None:
            peak = max(peak, anonymous(made.pid))
            time.sleep(0.02)
        told = json.loads(made.stdout.read().splitlines()[-1])
    return dict(told) | {"added_bytes": peak - before, "command_s": time.perf_counter() - start}


def copy(student: Path, to: Path) -> float:
    """Seconds of `cp` of a student's weights, the disk's part included."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    files = sorted(student.glob("*.safetensors"))
    forget(student)
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(to)], check=True)
    for file in files:
        with (to / file.name).open("rb") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - start


def measure(folder: Path, kind: str, repeats: int, out: Path) -> dict[str, Any]:
    """Pairs of cuts and copies."""
    cuts, copies = [cut(folder, kind, out / "cut")], []
    kept = out / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.move(out / "cut" / "student" / "transformer", kept)
    cuts.clear()
    for n in range(repeats):
        for own in (n % 2 == 0, n % 2 == 1):
            if own:
                cuts.append(cut(folder, kind, out / "cut"))
            else:
                copies.append(copy(kept, out / "copied"))
    row = {
        "teacher_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": cuts[0]["parameters"],
        "bytes": cuts[0]["bytes"],
        "added_bytes": max(c["added_bytes"] for c in cuts),
        "seconds": [c["seconds"] for c in cuts],
        "command_s": [c["command_s"] for c in cuts],
        "cp_s": copies,
        "speed": median(cp / c["seconds"] for cp, c in zip(copies, cuts, strict=True)),
    }
    shutil.rmtree(out, ignore_errors=True)
    return row


def main() -> None:
    """Write the teachers, cut and copy them; one results file."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/slicing"))
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for model in options.models:
        family = plugins.load("families", MODELS[model])
        folder = options.out / f"teacher-{model}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_teacher(folder, family, published(family, options.blocks))
        for kind in ("depth", "rank"):
            rows[f"{model}-{kind}"] = measure(folder, kind, options.repeats, options.out / f"work-{model}-{kind}")
            print(model, kind, json.dumps(rows[f"{model}-{kind}"]), flush=True)
        shutil.rmtree(folder)
    print(write_results("slicing", {"settings": {"blocks": options.blocks, "repeats": options.repeats, "rank": RANK}, "cuts": rows}))


if __name__ == "__main__":
    main()
