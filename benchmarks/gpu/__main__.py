"""The proof on a GPU: kernels, whole models, analysis, distillation and engines, measured by one command.

    python -m benchmarks.gpu [--parts correctness speed ladder analysis engines] [--budget-s 540] [--tiny] [--out benchmarks/results]

Writes `<date>-<device>.json` and the same as Markdown, again after every part, so that a run that is cut off loses only the part that it was in.
What a machine cannot run, or has no time for, stands as "not run" with the reason. Needs nothing from the network. --tiny: everything shrunk, on the
CPU: what it measures means nothing, that it runs does. Exit code 1 where a kernel is wrong, or something broke.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu.measuring import NotRun, Proof, Row, alive, reclaim, short
from benchmarks.gpu.tables import markdown
from benchmarks.results_file import RESULTS, processor, unused
from ppclc.environment import versions
from ppclc.machine.gpu_state import gpu_fields, nvidia_smi
from ppclc.models import quiet_libraries

PARTS = {"correctness": 20, "speed": 45, "ladder": 60, "analysis": 30, "engines": 30}
"""Each part, and about how many seconds of a GPU it is worth starting with; within it, what there is no time for is left out."""
APART = ("engines",)
"""Parts that have a process of their own beside others: libraries that end it take nothing else with them."""
LIBRARIES = ("triton", "tensorrt", "tensorrt-rtx-cu13", "onnxruntime-gpu")


@dataclass
class Report:
    """The results file in the making."""

    path: Path
    document: dict[str, Any]
    broken: list[str] = field(default_factory=list)

    def add(self, part: str, found: Row) -> None:
        """Keep what a part gave, and write both files."""
        self.document["parts"][part] = found
        wrong = [row for row in found.get("rows", ()) if row.get("passed") is False or row.get("broke")]
        self.broken += [part] if wrong or found.get("broke") else []
        self.path.write_text(json.dumps(self.document, indent=1) + "\n", "utf-8")
        self.path.with_suffix(".md").write_text(markdown(self.document), "utf-8")


def machine(device: str) -> Row:
    """What figures depend on: the GPU and its driver, the processor, cores and memory."""
    found: Row = {"processor": processor(), "cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    if device != "cuda":
        return found
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name,
        "driver": nvidia_smi(["driver_version"]) or "unknown",
        "capability": f"{about.major}.{about.minor}",
        "gpu_memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "l2_bytes": getattr(about, "L2_cache_size", None),
    } | found


def used_versions() -> dict[str, str]:
    """Versions of all that has a say in the result; of the system its name alone."""
    found = versions(LIBRARIES) | {"platform": f"{platform.system()} {platform.machine()}"}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def command_of(options: argparse.Namespace) -> str:
    """The command line without the folder that results went to."""
    told = ["python", "-m", "benchmarks.gpu"]
    told += ["--parts", *options.parts] if options.parts != list(PARTS) else []
    told += ["--budget-s", f"{options.budget_s:g}"] if options.budget_s != BUDGET_S else []
    return " ".join([*told, *(["--tiny"] if options.tiny else [])])


def run_part(proof: Proof, name: str) -> Row:
    """What one part gives; an error, or nothing to run, is told in its place."""
    start = time.perf_counter()
    proof.say(f"== {name}")
    before = gpu_fields() if proof.is_cuda else {}
    found: Row = {}
    try:
        if name == proof.failing:
            raise RuntimeError(f"{name} was asked to fail")
        proof.needs(PARTS[name])
        part: Callable[[Proof], list[Row]] = getattr(import_module(f"benchmarks.gpu.{name}"), name)
        found["rows"] = part(proof)
    except NotRun as reason:
        found["not_run"] = str(reason)
    except Exception as error:
        found |= {"not_run": f"{type(error).__name__}: {short(error)}", "broke": True}
    found["seconds"] = time.perf_counter() - start
    if proof.is_cuda and before:
        found |= {"before": before, "after": gpu_fields()}
    if "not_run" in found:
        proof.say(f"{name}: not run: {found['not_run']}")
    return found


def run_apart(options: argparse.Namespace, parts: list[str], left_s: float) -> dict[str, Row]:
    """What parts give in a process of their own."""
    with tempfile.TemporaryDirectory(prefix="ppclc-gpu-") as home:
        command = [sys.executable, "-m", "benchmarks.gpu", "--parts", *parts, "--budget-s", str(max(1.0, left_s)), "--out", home]
        command += (["--tiny"] if options.tiny else []) + (["--device", options.device] if options.device else [])
        code = subprocess.run(command, check=False).returncode
        files = list(Path(home).glob("*.json"))
        found: dict[str, Row] = json.loads(files[0].read_text("utf-8"))["parts"] if files else {}
    gone = {"not_run": f"the process that ran it ended with exit code {code} and no result", "seconds": 0.0, "broke": True}
    return {part: found.get(part, gone) for part in parts}


BUDGET_S = 540.0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="where --tiny runs, else the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--failing", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the parts and write the results; the exit code."""
    options = parsed()
    quiet_libraries()
    wanted = options.device or ("cpu" if options.tiny else "cuda")
    device = wanted if torch.cuda.is_available() else "cpu"
    proof = Proof(device, options.tiny, time.perf_counter() + options.budget_s, options.failing)
    if device == "cpu" and not options.tiny:
        print("There is no CUDA device here; --tiny runs everything that can do without one, on small sizes.", file=sys.stderr)
        return 3
    about = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", str(about.get("gpu", "cpu-tiny")).lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"name": name, "command": command_of(options), "machine": about, "versions": used_versions(), "parts": {}}
    report = Report(unused(options.out, name), document)
    proof.say(f"{about.get('gpu', 'CPU')}: {', '.join(options.parts)}, at most about {options.budget_s:.0f} s")
    waiting = list(options.parts)
    while waiting:
        part = waiting.pop(0)
        if proof.is_cuda and part in APART and len(options.parts) > 1:
            report.add(part, run_apart(options, [part], proof.ends_at - time.perf_counter())[part])
            continue
        report.add(part, run_part(proof, part))
        reclaim()
        if proof.is_cuda and waiting and not alive():
            proof.say("the GPU no longer answers this process; the other parts run in another")
            for other, found in run_apart(options, waiting, proof.ends_at - time.perf_counter()).items():
                report.add(other, found)
            break
    proof.say(f"written: {report.path.name} and {report.path.with_suffix('.md').name}")
    print(markdown(document), flush=True)
    if report.broken:
        proof.say(f"broken or wrong: {', '.join(report.broken)}")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
