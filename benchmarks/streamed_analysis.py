"""What calibration and analysis of a teacher take that is never in memory as a whole, by its number of blocks.

    python -m benchmarks.streamed_analysis [--blocks 12 24 48] [--heads 9] [--samples 128] [--probes 32]

Teachers of random weights, a shard a block, go through `compress --until analyze`, streamed and resident, each in a process of
its own: moments of every block, the cost of every interval of up to four blocks, text streams, modulation ranks and networks, and a plan.

anonymous: the most memory of the process that is no file's, less that after all imports and a whole run on a tiny model: it is what must fit.
resident_set: the same with the pages of files that happened to be in memory, which the system takes back as it needs them: the sums of the
calibration lie in such files. moments: their bytes. equal_plans: whether both kinds of teacher came to the same plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from benchmarks.streamed import MODES, drop_from_cache, forget_the_past, peak_resident, teacher_config, write_teacher
from ppclc.compiler import compress
from ppclc.loading.classes import count_parameters, model_outline, random_model
from ppclc.loading.sources import open_source
from ppclc.models import blocks_of, quiet_libraries
from ppclc.recipe import parse_recipe
from ppclc.screens.display import Display

EVERY_S = 0.01


def recipe(folder: Path, mode: str, samples: int, probes: int) -> dict[str, Any]:
    """Everything up to a plan of seven tenths of the parameters, nothing trained."""
    return {
        "model": {"path": str(folder)},
        "calibrate": {"samples": samples, "longest": 4},
        "analyze": {"probes": probes, "budget": 10**6, "supernet_steps": 0, "trials": 0},
        "target": {"parameters": 0.7},
        "distill": {"teacher": mode},
    }


class Anonymous:
    """The most anonymous memory of this process while it is watched, sampled."""

    def __enter__(self) -> Anonymous:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Anonymous memory of this process in bytes (Linux alone)."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def child(folder: Path, mode: str, samples: int, probes: int) -> dict[str, Any]:
    """What one process measures of itself."""
    with tempfile.TemporaryDirectory() as temporary:
        tiny, out = Path(temporary) / "tiny", Path(temporary) / "out"
        family = open_source(str(folder)).family
        config = {"_class_name": family.class_name, **family.tiny_config, "num_layers": 6}
        random_model(family, config).save_pretrained(tiny)
        compress(parse_recipe(recipe(tiny, mode, 64, 16), "tiny"), "tiny", Path(temporary) / "warm", Display(2, -1), until="analyze")
        forget_the_past()
        before, resident_before = anonymous(), peak_resident()
        start = time.perf_counter()
        with Anonymous() as watched:
            run = compress(parse_recipe(recipe(folder, mode, samples, probes), "large"), "large", out, Display(2, -1), until="analyze")
        assert run.plan is not None
        assert run.stats is not None
        return {
            "seconds": time.perf_counter() - start,
            "stages_s": {s.name: s.seconds for s in run.store.stages},
            "anonymous_bytes": watched.peak - before,
            "resident_set_bytes": peak_resident() - resident_before,
            "moment_bytes": sum(t.nbytes for t in run.stats.tensors.values()),
            "plan": run.plan.model_dump(mode="json"),
        }


def measure(blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of teacher of one depth, files dropped from the cache before each."""
    family = open_source("builtin:two-digits").family
    config = teacher_config(family, blocks, options.heads)
    found: dict[str, Any] = {"block_bytes": 4 * count_parameters(blocks_of(model_outline(family, config), family)[0])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "transformer"
        write_teacher(folder, family, config)
        found["file_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for mode in MODES:
            drop_from_cache(folder)
            sizes = ["--samples", str(options.samples), "--probes", str(options.probes)]
            command = [sys.executable, "-m", "benchmarks.streamed_analysis", "--child", mode, "--folder", str(folder), *sizes]
            done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found[mode] = json.loads(done.stdout.splitlines()[-1])
    return found | {"equal_plans": found["streamed"]["plan"] == found["resident"]["plan"]}


def main() -> None:
    """Measure and write the results file; in a child, measure itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.child:
        print(json.dumps(child(options.folder, options.child, options.samples, options.probes)))
        return
    depths = {}
    for blocks in options.blocks:
        depths[str(blocks)] = one = measure(blocks, options)
        for mode in MODES:
            had = {k: f"{one[mode][f'{k}_bytes'] / 2**20:.0f} MiB" for k in ("anonymous", "resident_set", "moment")}
            print(blocks, mode, had, f"{one[mode]['seconds']:.0f} s", "equal plans:", one["equal_plans"], flush=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("child", "folder")}
    print(write_results("streamed-analysis", {"settings": settings, "depths": depths}))


if __name__ == "__main__":
    main()
