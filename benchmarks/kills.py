"""Runs that are killed at random moments of every pass, and whether they end as an unbroken one does.

    python -m benchmarks.kills [--kills 20] [--seed 0] [--out out/kills]

The small recipe of the embedded teacher, through all passes, in a process of its own. An unbroken run tells how
long every pass takes. A second folder then takes the kills one after the other, each on what the last left there:
two in every pass and in the start, the others where an unbroken run spends its time, each at a random share of
what its pass takes. After the last the run goes to its end. Weights, plan, the quality table and the exported
files are compared with those of the unbroken run. One results file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from ppclc.compiler import PASSES
from ppclc.records import file_digest

RECIPE = """\
model: {path: "builtin:two-digits"}
calibrate: {samples: 64}
analyze: {probes: 16, supernet_steps: 4, supernet_sets: 8, trials: 2, trial_steps: 4}
target: {parameters: 0.6}
plan: {text_stream: [10, 11], ffn: [{block: 9, stream: image}], modulation_rank: 8}
distill: {steps: 8, width_steps: 8, finetune_steps: 16, batch: 8, checkpoint_every: 2}
verify: {scenes: 16, seeds: [0, 1], guidance: [1], steps: 4, gates: {velocity_error: {drop_percent: 100}}}
export: [{backend: onnx}]
bench: {runs: 5}
"""
START = "start"
STAGES = (START, *PASSES)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LONGEST_S = 900


@dataclass
class Compiling:
    """One process of `ppclc compress`, with the moments at which its passes ended."""

    folder: Path
    out: str
    ended: dict[str, float] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "ppclc", "compress", "kills.yaml", "-o", self.out, "--json"]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_interrupts,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                self.words.append(line)
                if found := re.match(r"\[\d/\d\] (\w+): ([\d.]+) s$", line):
                    if not self.ended:
                        self.ended[START] = time.monotonic() - self.began - float(found[2])
                    self.ended[found[1]] = time.monotonic() - self.began

    def wait(self) -> int:
        """Exit code, once all that was said is read."""
        code = self.process.wait(LONGEST_S)
        self.reader.join()
        return code

    def seconds(self) -> dict[str, float]:
        """What each pass took, and the start before them."""
        times = [0.0, *(self.ended[s] for s in STAGES)]
        return {s: times[i + 1] - times[i] for i, s in enumerate(STAGES)}

    def strike(self, stage: str, after_s: float, number: signal.Signals) -> None:
        """Send a signal some time into a stage, or when the stage ends, if it does before; nothing to a process that has ended.

        On what an earlier kill left, a stage is shorter than in an unbroken run.
        """
        before = STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else None
        start = None if before and before != START else self.began
        while self.process.poll() is None:
            if start is None and before in self.ended:
                start = self.began + self.ended[before]
            if stage in self.ended or (start is not None and time.monotonic() >= start + after_s):
                self.process.send_signal(number)
                return
            time.sleep(0.002)


def _heed_interrupts() -> None:
    """In a new process: SIGINT is ignored by whatever a shell has put in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Kill:
    """Where a kill was meant to fall and where it fell; `steps`: of every training that had begun and was not over."""

    meant: str
    share: float
    fell_in: str
    seconds: float
    steps: dict[str, int]
    exit_code: int


def moments(seconds: dict[str, float], count: int, seed: int, each: int = 2, stages: tuple[str, ...] = STAGES) -> list[tuple[str, float]]:
    """Stages, in order, with the share of each after which to kill: `each` in every stage, the rest by what stages take."""
    rng = random.Random(seed)
    chosen = [s for s in stages for _ in range(each)]
    chosen += rng.choices(stages, [seconds[s] for s in stages], k=max(0, count - len(chosen)))
    return sorted(((s, rng.random()) for s in chosen), key=lambda m: (stages.index(m[0]), m[1]))


def kill(folder: Path, out: str, moment: tuple[str, float], seconds: dict[str, float], number: signal.Signals = signal.SIGKILL) -> Kill:
    """One run, killed at that moment."""
    stage, share = moment
    # Calibration begins when the start is over, which nothing on the screen tells.
    after = share * seconds[stage] + (seconds[START] if stage == "calibrate" else 0)
    compiling = Compiling(folder, out)
    compiling.strike(stage, after, number)
    code = compiling.wait()
    fell = next((s for s in PASSES if s not in compiling.ended), "none")
    if fell == "calibrate" and time.monotonic() - compiling.began < seconds[START]:
        fell = START
    return Kill(stage, share, fell, time.monotonic() - compiling.began, steps_of(folder / out), code)


def steps_of(out: Path) -> dict[str, int]:
    """The last step of every loss curve whose record is not whole yet."""
    found = {}
    for curve in sorted((out / "curves").glob("*.jsonl")):
        if not any((out / "records").glob(f"{curve.stem}-{'[0-9a-f]' * 16}")):
            found[curve.stem] = curve.read_text("utf-8").count("\n")
    return found


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped: digests of files, and numbers of the report that are no times."""
    report = json.loads((out / "report.json").read_text("utf-8"))
    files = [p for place in ("model", "export") for p in (out / place).rglob("*") if p.is_file() and p.name != "export.json"]
    digests = {str(p.relative_to(out)): file_digest(p) for p in sorted([*files, out / "plan.json", out / "recipe.yaml"])}
    parities = [e["parity"] for e in report["exports"]]
    return {"files": digests, "parity": parities} | {k: report[k] for k in ("plan", "student", "quality", "gates")}


def left_behind(out: Path) -> list[str]:
    """Drafts and work folders that nobody will read."""
    return sorted(str(p.relative_to(out)) for p in out.rglob(".*"))


def main() -> None:
    """Run unbroken, run with kills, compare, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/kills"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=False)
    (options.out / "kills.yaml").write_text(RECIPE, "utf-8")
    whole = Compiling(options.out, "whole")
    if whole.wait():
        raise SystemExit("".join(whole.words))
    seconds, kills = whole.seconds(), []
    for moment in moments(seconds, options.kills, options.seed):
        kills.append(kill(options.out, "killed", moment, seconds))
        print(kills[-1], flush=True)
    last = Compiling(options.out, "killed")
    if last.wait():
        raise SystemExit("".join(last.words))
    wanted, got = outcome(options.out / "whole"), outcome(options.out / "killed")
    results = {
        "recipe": RECIPE,
        "seed": options.seed,
        "unbroken_seconds": seconds,
        "kills": [asdict(k) for k in kills],
        "kills_that_fell": sum(k.exit_code == -signal.SIGKILL for k in kills),
        "equal": {part: got[part] == wanted[part] for part in wanted},
        "different_files": [f for f, d in wanted["files"].items() if got["files"].get(f) != d],
        "weights_sha256": {f: d for f, d in got["files"].items() if f.endswith(".safetensors")},
        "left_behind": left_behind(options.out / "killed"),
    }
    path = write_results("kills", results)
    document = json.loads(path.read_text("utf-8")) | {
        "command": f"python -m benchmarks.kills --kills {options.kills} --seed {options.seed}"
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
