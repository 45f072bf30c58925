"""The report: the JSON keeps its contract, and the page says the same, stands alone and trusts no text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppclc import __version__
from ppclc.commands import summary
from ppclc.passes import report
from ppclc.passes.report import ReportInputs, report_html, report_json, write_report
from ppclc.plan import CompressionPlan
from ppclc.records import Analysis, Benchmark, BenchRow, Candidate, Distilled, Export, Gate, Parity, Quality, Stage, StartResult, Verdict
from ppclc.screens import words
from ppclc.screens.charts import THEME, style, training_charts

BLOCKS = 12
HOSTILE = "<script>alert('red three')</script> & \"blue\" five"
RECIPE = "model: {path: 'builtin:two-digits'}  # <b>not bold</b>\ntarget: {parameters: 0.5}\n"


def an_analysis(plan: CompressionPlan) -> Analysis:
    cka = torch.full((2, BLOCKS, BLOCKS), float("nan"), dtype=torch.float64)
    for stream in range(2):
        for u in range(BLOCKS):
            for k in range(u, min(u + 6, BLOCKS)):
                cka[stream, u, k] = 1 - 0.004 * (k - u) ** 1.5 * (1 + (u * 7 + stream) % 5)
    spans = [(u, v) for u in range(BLOCKS) for v in range(u + 1, min(u + 4, BLOCKS))]
    costs = [0.004 * (1 + (3 * u) % 7) ** (v - u) for u, v in spans]
    intervals = [
        Candidate(kind="interval", first=u, last=v, cost=c, parameters=150_000 * (v - u)) for (u, v), c in zip(spans, costs, strict=True)
    ]
    text = [Candidate(kind="text_stream", first=BLOCKS - k, last=BLOCKS - 1, cost=0.001 * k, parameters=48_000 * k) for k in range(1, 5)]
    return Analysis(
        reading="equation",
        strategy="output_error",
        streams=["image", "text"],
        probe_error={s: [0.1 + 0.05 * ((i * 5 + n) % 7) for i in range(BLOCKS)] for n, s in enumerate(("image", "text"))},
        first_differences={s: [None if i % 4 == 0 else 0.01 / (i % 4) for i in range(BLOCKS)] for s in ("image", "text")},
        ppcl_intervals=[(0, 3), (4, 7), (8, 11)],
        candidates=[*intervals, *text],
        modulation_error={4: 1e-2, 8: 4e-4, 16: 2e-5, 32: 1e-6},
        plan=plan,
        tensors={"cka": cka},
    )


def no_analysis(plan: CompressionPlan) -> Analysis:
    """An analysis without anything to draw, for tests of other things: charts take most of a page's time."""
    return Analysis(
        reading="caption", strategy="ppcl", streams=["image"], probe_error={"image": []}, first_differences={"image": [None] * 3},
        ppcl_intervals=[], candidates=[], modulation_error={}, plan=plan,
    )  # fmt: skip


def a_verdict(prompts: int = 5) -> Verdict:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.rand(prompts, 3, 8, 16, generator=generator)
    student = (teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).clamp(0, 1)
    quality = {
        "scene_accuracy_g1": Quality(
            teacher=84.47, student=83.98, drop_percent=0.5801, ci95=(-0.7123, 1.8725),
            n=2048, seeds=[0, 1], noise=0.8104, unit="%", better="higher",
        ),
        "frechet_distance_g2": Quality(
            teacher=10.13, student=10.88, drop_percent=7.404, ci95=None,
            n=1536, seeds=[5, 7], noise=0.2613, unit="", better="lower",
        ),
    }  # fmt: skip
    gates = [
        Gate(name="scene_accuracy_g1.drop_percent", value=0.5801, limit=1.5, passed=True),
        Gate(name="frechet_distance_g2.drop_percent", value=7.404, limit=5.0, passed=False),
    ]
    names = [HOSTILE, *(f"green {i} and cyan {i}" for i in range(1, prompts))]
    return Verdict(quality=quality, gates=gates, prompts=names, tensors={"teacher": teacher, "student": student})


def bench_row(target: str, p50: float, speedup: float | None) -> BenchRow:
    return BenchRow(
        target=target, backend="onnxruntime", device="cpu", dtype="float32", shape={"batch": 1, "image": 32}, warmup=5, runs=50,
        mean_ms=p50 + 0.07, p50_ms=p50, p90_ms=p50 + 0.31, p99_ms=p50 + 0.93, peak_bytes=31_000_000, speedup=speedup,
    )  # fmt: skip


def an_export(backend: str, parity: Parity | None, **options: Any) -> Export:
    return Export(
        backend=backend, folder=f"export/{backend}", files={"model.onnx": "ab" * 32}, bytes=3_812_000, dtype="float32",
        shapes=[{"batch": 1}, {"batch": 4}], parity=parity, inputs=["hidden_states"], options=options, versions={}, seconds={"export": 1.0},
    )  # fmt: skip


def some_inputs(out: Path, **changes: Any) -> ReportInputs:
    plan = CompressionPlan.of("qwen_image", BLOCKS, [(3, 4), (7, 8)], [10, 11], modulation_rank=8, dead_code=True)
    curve = [(i, 0.4 * math.exp(-i / 40) + 0.01) for i in range(150)]
    inputs = ReportInputs(
        out=out,
        recipe_name="two_digits",
        recipe_text=RECIPE,
        model_path="builtin:two-digits",
        teacher={"parameters": 1_830_000, "bytes": 7_320_000, "blocks": BLOCKS},
        student={"parameters": 878_400, "bytes": 3_513_600, "blocks": 10},
        plan=plan,
        analysis=an_analysis(plan),
        distilled=[Distilled(edit=e, steps=150, losses=curve) for e in ("interval-3-4", "interval-7-8", "text-10-10-9-9", "finetune")],
        verdict=a_verdict(),
        exports=[
            an_export("onnx", Parity(max_abs=3.1e-6, rel_l2=8.2e-7, cosine=1.0)),
            an_export("tensorrt", None, attention_fused=9, attention_total=10),
        ],
        benchmark=Benchmark(rows=[bench_row("teacher", 6.48, 1.0), bench_row("student", 3.73, 6.48 / 3.73)]),
        stages=[
            Stage(name="calibrate", seconds=4.2, peak_rss_bytes=610_000_000, reused=True),
            Stage(name="distill", seconds=171.0, peak_rss_bytes=840_000_000),
        ],
        versions={"python": "3.11.7", "torch": "2.9.0"},
    )
    return dataclasses.replace(inputs, **changes)


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(some_inputs(Path("unused")))


class Page(HTMLParser):
    """Every element with its attributes, and the text outside `<style>`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------------------------------------- report.json


KEYS = {
    "report": "ppclc recipe_sha256 teacher student plan quality gates stages exports bench versions",
    "model": "parameters bytes blocks",
    "plan": "format family num_blocks intervals text_stream ffn modulation_rank adapters dead_code kept",
    "quality": "teacher student drop_percent ci95 n seeds noise unit better",
    "gate": "name value limit passed",
    "stage": "name seconds peak_rss_bytes reused",
    "export": "backend files bytes dtype shapes parity",
    "fused": "attention_fused attention_total",
    "parity": "max_abs rel_l2 cosine",
    "bench": "target backend device dtype shape warmup runs mean_ms p50_ms p90_ms p99_ms peak_bytes speedup",
}
"""The contract, spelled out once more so that a record cannot change it unseen."""


BENCH_MORE = "speedup_ci95 spread noise samples_per_s end_to_end_ms parameters flops floor_ms floor_share sdpa cuda_graph clock session"
"""What a row of `bench` tells beside what the contract names."""


def test_the_json_has_the_contracts_keys_and_no_others() -> None:
    keys = {name: set(words.split()) for name, words in KEYS.items()}
    found = report_json(some_inputs(Path("unused")))
    assert set(found) == keys["report"]
    assert set(found["teacher"]) == set(found["student"]) == keys["model"]
    assert set(found["plan"]) == keys["plan"]
    assert all(set(entry) == keys["quality"] for entry in found["quality"].values())
    assert all(set(gate) == keys["gate"] for gate in found["gates"])
    assert all(set(stage) == keys["stage"] for stage in found["stages"])
    assert [set(e) for e in found["exports"]] == [keys["export"], keys["export"] | keys["fused"]]
    assert set(found["exports"][0]["parity"]) == keys["parity"]
    assert all(set(row) == keys["bench"] | set(BENCH_MORE.split()) for row in found["bench"])


def test_the_json_says_what_the_records_say() -> None:
    inputs = some_inputs(Path("unused"))
    found = json.loads(json.dumps(report_json(inputs), allow_nan=False))
    assert found["ppclc"] == __version__
    assert found["recipe_sha256"] == hashlib.sha256(RECIPE.encode()).hexdigest()
    assert (found["teacher"], found["student"]) == (inputs.teacher, inputs.student)
    assert CompressionPlan.from_json(json.dumps(found["plan"])) == inputs.plan
    assert inputs.verdict
    assert inputs.benchmark
    assert {n: Quality.model_validate(q) for n, q in found["quality"].items()} == inputs.verdict.quality
    assert [Gate.model_validate(g) for g in found["gates"]] == inputs.verdict.gates
    assert [Stage.model_validate(s) for s in found["stages"]] == inputs.stages
    assert [BenchRow.model_validate(r) for r in found["bench"]] == inputs.benchmark.rows
    assert found["exports"][0]["files"] == {"model.onnx": "ab" * 32}
    assert found["exports"][0]["parity"]["max_abs"] == 3.1e-6
    assert (found["exports"][1]["attention_fused"], found["exports"][1]["parity"]) == (9, None)
    assert found["versions"] == {"python": "3.11.7", "torch": "2.9.0"}


def test_a_figure_that_is_not_finite_is_null() -> None:
    verdict = a_verdict()
    broken = verdict.quality["scene_accuracy_g1"].model_copy(update={"drop_percent": math.nan, "ci95": (-math.inf, 1.0)})
    verdict = verdict.model_copy(update={"quality": {"scene_accuracy_g1": broken}})
    found = report_json(some_inputs(Path("unused"), verdict=verdict))["quality"]["scene_accuracy_g1"]
    assert (found["drop_percent"], found["ci95"]) == (None, [None, 1.0])


# --------------------------------------------------------------------------------------------- writing files


@pytest.mark.slow
def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    inputs = some_inputs(tmp_path)
    result = write_report(inputs)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}
    assert result["files"] == ["report.json", "report.html"]
    assert result["warnings"] == []
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == json.loads(json.dumps(result["report"]))
    assert (tmp_path / "report.html").read_text("utf-8") == report_html(inputs), "the page is the same each time"


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_a_library_the_json_is_written_and_the_way_out_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = write_report(some_inputs(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"report.json"}
    assert result["files"] == ["report.json"]
    (warning,) = result["warnings"]
    assert library in warning
    assert "pip install 'ppclc[report]'" in warning


def test_an_older_page_that_cannot_be_renewed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old", "utf-8")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert any("earlier run" in warning for warning in write_report(some_inputs(tmp_path))["warnings"])


# ----------------------------------------------------------------------------------------------- report.html


@pytest.mark.slow
def test_the_page_loads_nothing(page: str) -> None:
    found = Page(page)
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    assert not [t for t, _ in found.elements if t in {"script", "link", "iframe", "object", "embed", "base"}]
    for tag, attributes in found.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), f"<{tag} {name}={value!r}>"
        assert not [name for name in attributes if name.startswith("on")]


@pytest.mark.slow
def test_hostile_words_stay_words(page: str) -> None:
    found = Page(page)
    assert "<script" not in page
    assert "<b>" not in page
    assert HOSTILE in found.text
    assert any(image["alt"] == f"The student's image for: {HOSTILE}" for image in found.all("img"))
    assert RECIPE.strip() in found.text
    names = some_inputs(Path("unused"), recipe_name=HOSTILE, model_path=HOSTILE, versions={HOSTILE: HOSTILE})
    curves = [Distilled(edit=HOSTILE, steps=2, losses=[(0, 1.0), (1, 0.5)])]
    assert "<script" not in report_html(dataclasses.replace(names, distilled=curves, analysis=no_analysis(names.plan)))


@pytest.mark.slow
def test_the_page_holds_every_figure_of_the_quality_table(page: str) -> None:
    text = Page(page).text
    rows = ["84.47 83.98 0.58 −0.71 1.87 2,048 0.81", "10.13 10.88 7.40 1,536 0.26"]
    assert not [figure for row in rows for figure in row.split() if figure not in text]
    assert "scene accuracy, guidance 1" in text
    assert "frechet distance, guidance 2" in text
    assert "which includes zero" in text


def test_headline_figures_and_gates(page: str) -> None:
    text = Page(page).text
    for figure in ("52.0 %", "1,830,000 → 878,400", "0.58 %", "1.74×", "3.1e−6", "1 of 2 gates failed", "✓ passed", "✗ failed"):
        assert figure in text, figure


def test_the_headline_is_bad_when_any_of_its_gates_failed() -> None:
    verdict = a_verdict()
    upper = Gate(name="scene_accuracy_g1.upper_percent", value=1.8725, limit=1.0, passed=False)
    tiles = [report.quality_tile(verdict.model_copy(update={"gates": gates})) for gates in (verdict.gates, [*verdict.gates, upper], [])]
    assert [tile and tile.tone for tile in tiles] == ["good", "bad", ""]


def test_speed_up_is_a_range_when_it_varies() -> None:
    rows = [bench_row("teacher", 6.0, 1.0), bench_row("student", 3.0, 2.0), bench_row("student", 5.0, 1.2)]
    tile = report.speed_tile(Benchmark(rows=rows))
    assert tile
    assert tile.value == "1.20–2.00×"


@pytest.mark.slow
def test_every_block_is_on_the_strip_once(page: str) -> None:
    cells = [a["title"] for a in Page(page).all("span") if a.get("class") == "cell"]
    assert len(cells) == BLOCKS
    assert [int(re.findall(r"\d+", str(title))[0]) for title in cells] == list(range(BLOCKS))
    assert cells[4] == "Teacher block 4: blocks 3–4 became student block 3"
    assert cells[10] == "Teacher block 10: kept as student block 8; text stream mapped from block 9"
    assert cells[0] == "Teacher block 0: kept as student block 0"


def test_every_picture_has_words_and_follows_the_theme(page: str) -> None:
    found = Page(page)
    charts = found.all("svg")
    assert len(charts) == 2 + 4 + 3 + 1
    assert all(chart["role"] == "img" and chart["aria-label"] and chart["viewbox"] for chart in charts)
    assert all(image["alt"] for image in found.all("img"))
    assert not [stand_in for stand_in in THEME if stand_in in page]
    assert "prefers-color-scheme: dark" in found.style
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", found.style))


def test_ids_are_unique_and_references_meet_them(page: str) -> None:
    found = Page(page)
    ids = [str(a["id"]) for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a.get("href") or a.get("xlink:href") or "") for _, a in found.elements]
    wanted = set(re.findall(r"url\(#([^)]+)\)", page)) | {link[1:] for link in links if link.startswith("#")}
    assert wanted
    assert wanted <= set(ids)


def test_elements_close_in_order(page: str) -> None:
    open_elements: list[str] = []
    body = re.sub(r"<style>.*?</style>|<!doctype html>", "", page, flags=re.DOTALL)
    for slash, tag, own in re.findall(r"<(/?)([a-zA-Z][\w-]*)[^>]*?(/?)>", body):
        if own or tag in {"meta", "img", "br"}:
            continue
        if slash:
            assert open_elements.pop() == tag
        else:
            open_elements.append(tag)
    assert not open_elements


def test_images_are_enlarged_without_smoothing() -> None:
    image = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(1))
    image[0, 0, 0], image[1, 0, 0] = float("nan"), 7.0
    data = base64.b64decode(report.png_uri(image).removeprefix("data:image/png;base64,"))
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert (width, height) == (160, 80)
    start = data.index(b"IDAT")
    raw = zlib.decompress(data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start])])
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)
    wanted = image.nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).repeat_interleave(10, 0).repeat_interleave(10, 1)
    assert torch.equal(rows, wanted)


def test_large_images_are_thinned() -> None:
    data = base64.b64decode(report.png_uri(torch.zeros(3, 1024, 512)).removeprefix("data:image/png;base64,"))
    assert max(int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) <= report.LARGEST_IMAGE


def test_at_most_so_many_pairs() -> None:
    assert len(report.image_pairs(a_verdict(prompts=report.PAIRS + 6))) == report.PAIRS


@pytest.mark.slow
def test_a_run_that_stopped_early_has_a_page(tmp_path: Path) -> None:
    inputs = some_inputs(tmp_path, verdict=None, benchmark=None, exports=[], distilled=[], stages=[], versions={})
    result = write_report(inputs)
    assert {key: result["report"][key] for key in ("quality", "gates", "exports", "bench")} == {
        "quality": {}, "gates": [], "exports": [], "bench": [],
    }  # fmt: skip
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "No gates were checked" in text
    assert "What became of every block" in text
    assert "Latency" not in text


def test_a_run_in_which_all_was_reused_has_a_page() -> None:
    stages = [
        Stage(name="distill", seconds=171.0, peak_rss_bytes=840_000_000, reused=True),
        Stage(name="slice", seconds=0, peak_rss_bytes=0),
    ]
    inputs = some_inputs(Path("unused"), verdict=None, distilled=[])
    inputs = dataclasses.replace(inputs, analysis=no_analysis(inputs.plan))
    for some in (stages[:1], stages):
        assert "840 MB" in Page(report_html(dataclasses.replace(inputs, stages=some))).text


def test_an_empty_analysis_and_an_empty_plan_have_a_page() -> None:
    plan = CompressionPlan.of("flux", 3)
    quiet = Verdict(quality={}, gates=[], prompts=[])
    text = Page(report_html(some_inputs(Path("unused"), plan=plan, analysis=no_analysis(plan), verdict=quiet, distilled=[]))).text
    assert "The plan is empty: the student is the teacher." in text


def test_many_edits_share_one_colour_and_all_are_in_the_table() -> None:
    curves = [Distilled(edit=f"interval-{i}-{i + 1}", steps=3, losses=[(0, 1.0), (1, 0.5), (2, 0.0)]) for i in range(0, 26, 2)]
    plan = some_inputs(Path("unused")).plan
    page = report_html(some_inputs(Path("unused"), distilled=curves, analysis=no_analysis(plan)))
    assert all(f"interval-{i}-{i + 1}" in page for i in range(0, 26, 2))
    assert "too many to name" in page


@pytest.mark.parametrize(
    ("value", "told"),
    [(1_830_000, "1,830,000"), (-0.71234, "−0.7123"), (3.1e-6, "3.1e−6"), (0.0, "0"), (None, "–"), (math.nan, "–")],
)
def test_numbers_in_words(value: float | None, told: str) -> None:
    assert words.number(value) == told


def test_other_words() -> None:
    assert [words.bytes_text(n) for n in (0, 999, 7_320_000, 40_900_000_000)] == ["0 B", "999 B", "7.32 MB", "40.9 GB"]
    assert [words.seconds(s) for s in (0.42, 38.2, 725, 12_000)] == ["0.42 s", "38 s", "12 min 05 s", "3 h 20 min"]
    assert words.label("scene_accuracy_g2") == "scene accuracy, guidance 2"
    assert words.label("scene_accuracy_g1.5") == "scene accuracy, guidance 1.5"
    assert words.gate_label("scene_accuracy_g1.5.drop_percent") == "scene accuracy, guidance 1.5: drop in %"
    assert words.gate_label("velocity_error") == "velocity error"
    assert [words.many(n) for n in (1_830_000, 20_430_401_088)] == ["1,830,000", "20.43 billion"]
    assert words.label("velocity_error") == "velocity error"
    assert words.edit_words("text-9-10-8-8") == "text stream of 9–10 from 8"
    assert words.edit_words("modulation") == "modulation"


def test_linear_networks_are_told_in_words_and_on_the_strip() -> None:
    plan = CompressionPlan.of("qwen_image", BLOCKS, [(3, 4)], [], ffn=[(2, "image"), (2, "text"), (3, "image")])
    told = words.plan_words(plan)
    assert "The text feed-forward network of block 2 became one linear map." in told
    assert len(told) == 4
    strip = {stand.cells[0].block: stand for stand in report.stands(plan)}
    assert (strip[2].badges, strip[3].badges, strip[5].badges) == (("image ffn", "text ffn"), ("image ffn",), ())
    made = "image feed-forward network made linear; text feed-forward network made linear"
    assert strip[2].cells[0].note == f"Teacher block 2: kept as student block 2; {made}"
    assert [c.note.endswith("became student block 3; image feed-forward network made linear") for c in strip[3].cells] == [True, True]


def test_adapters_are_told_in_words_and_on_the_strip() -> None:
    plan = CompressionPlan.of("qwen_image", BLOCKS, [(3, 4), (6, 8)], adapters=[(6, 8)])
    assert words.plan_words(plan)[-1] == "Blocks 6–8 have linear adapters before them, one a stream."
    strip = {stand.cells[0].block: stand for stand in report.stands(plan)}
    assert (strip[3].badges, strip[6].badges) == ((), ("adapter",))
    assert strip[6].cells[1].note == "Teacher block 7: blocks 6–8 became student block 5; linear adapters in front of it"
    assert words.edit_words("interval-6-8-adapted") == "blocks 6–8 as one, with adapters"
    assert words.edit_words("interval-6-8") == "blocks 6–8 as one"


def test_starts_are_told_with_the_blocks_that_they_are_for() -> None:
    plan = CompressionPlan.of("qwen_image", 12, [(0, 1), (3, 5)])
    keys = [plan.interval_key(i) for i in plan.intervals]
    tried = [
        StartResult(starts=dict(zip(keys, blocks, strict=True)), errors=errors)
        for blocks, errors in (((0, 4), [(0, 0.2), (60, 0.034)]), ((1, 5), [(0, 0.1), (60, 0.3)]))
    ]
    told = report.started(SimpleNamespace(plan=plan, start_trials=tried))  # type: ignore[arg-type]
    assert told == [("0 to 1 from 0, 3 to 5 from 4", "0.034 after 60 steps"), ("0 to 1 from 1, 3 to 5 from 5", "0.1 after 0 steps")]


def test_a_speed_up_is_told_with_its_interval_and_that_it_is_noise_where_it_is(tmp_path: Path) -> None:
    inputs = some_inputs(tmp_path)
    assert inputs.benchmark is not None
    rows = [r.model_copy(update={"speedup_ci95": (0.55, 4.89), "noise": "calls drift"} if r.speedup else {}) for r in inputs.benchmark.rows]
    report = report_json(dataclasses.replace(inputs, benchmark=inputs.benchmark.model_copy(update={"rows": rows})))
    told = summary(report, tmp_path)
    assert sum("times the teacher's speed, 95 % interval 0.55 to 4.89" in line for line in told) == sum(
        r.target == "student" and bool(r.speedup) for r in rows
    )
    assert sum(line.startswith("noisy run: ") and line.endswith(": calls drift") for line in told) == sum(bool(r.noise) for r in rows) > 0


def test_a_curve_of_one_point_shows(tmp_path: Path) -> None:
    """Ten steps make one: a line alone would be none."""
    few = [Distilled(edit="interval-1-2", steps=4, losses=[(4, 0.5)], tensors={})]
    with style():
        (chart,) = training_charts(few)
    assert re.search(r"<use [^>]*var\(--c1\)", chart.svg)  # a mark in the curve's colour
