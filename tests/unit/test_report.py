"""The report of a run: what the page says, draws and refuses to load; the dial; the terminal table."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fewstep.errors import DataError, StorageError
from fewstep.evaluation import figures
from fewstep.evaluation.figures import (
    history_series,
    history_svg,
    loss_stages,
    loss_svg,
    margin,
    quality_series,
    quality_svg,
)
from fewstep.evaluation.pictures import Frame, frame_of, sample_grid, samples_png, samples_svg
from fewstep.evaluation.report import (
    LOSS_NOTE,
    Picture,
    ReportData,
    Row,
    print_table,
    render,
    step_dial_png,
    verdict,
    write_report,
)
from fewstep.evaluation.svg import KINDS

WHEN = datetime(2025, 11, 21, 5, 7, tzinfo=UTC)
TEACHER = "teacher (diffusion)"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$x_1$]]>-->"


class Page(HTMLParser):
    """The page as a browser's parser sees it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("td", "th", "h1", "title", "dt", "dd", "pre", "figcaption", "p", "text", "div"):
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self.open) & self.texts.keys():
            self.texts[tag][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rows() -> list[Row]:
    teacher = {1: (11.4, 0.0347), 2: (7.9, 0.0239), 4: (3.2, 0.00932), 35: (0.17, -0.000073)}
    tuned = {1: (0.89, 0.00216), 2: (0.41, 0.000671), 4: (0.28, 0.000268)}
    return [
        Row(model, nfe, {"FD-pixels-2k": fd, "KID-pixels-2k": kid}, 5187.6 / nfe)
        for model, values in (("tuned", tuned), (TEACHER, teacher))
        for nfe, (fd, kid) in values.items()
    ]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def history(n: int = 80) -> list[dict[str, float]]:
    return [
        {"images": 100 * (i + 1), "loss": 2.0 ** -(4 * i // n) * (1 + i % 3 / 10), "stage": float(4 * i // n)}
        | {"lr": 1e-4 * min(1, i / 9), "r/t": 1 - 2.0 ** -(4 * i // n + 1), "images_per_second": 900.0 + i}
        for i in range(n)
    ]


def report(**changes: object) -> ReportData:
    data = ReportData(
        title="a run",
        summary=[("Teacher", "runs/teacher"), ("Recipe", "digits: not measured here")],
        rows=rows(),
        pictures=[Picture(row.model, row.nfe, noise(25, 1, 8, 8, seed=i)) for i, row in enumerate(rows())],
        reference=noise(30, 1, 8, 8, seed=99),
        history=history(),
        command="fewstep tune runs/teacher --data digits --out runs/tuned --seed 3",
        environment={"torch": "2.13.0", "machine": "2 cores"},
    )
    return replace(data, **changes)


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    text = render(report(), WHEN)
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    addresses = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name.rpartition(":")[2] in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert sum(a.startswith("data:image/png;base64,") for a in addresses) == 8
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "://" not in text
    assert "@import" not in text
    assert 'src="//' not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    policy = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_references_inside_the_page_resolve_and_ids_are_unique() -> None:
    text = render(report(), WHEN)
    ids = re.findall(r'\bid="([^"]*)"', text)
    targets = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    assert len(ids) == len(set(ids))
    assert len(targets) > 10
    assert targets <= set(ids)


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page as rows of cell texts, the heads included."""
    rows = [
        re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in re.findall(r"<table.*?</table>", text, re.DOTALL)
    ]
    return [
        [
            [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
            for row in table
        ]
        for table in rows
    ]


def test_a_table_per_metric_holds_every_number_in_order() -> None:
    head, last = ["Evaluations", TEACHER, "tuned"], ["35", "-7.3e-05", "–"]
    assert tables(render(report(), WHEN)) == [
        [head, ["1", "11.40", "0.89"], ["2", "7.90", "0.41"], ["4", "3.20", "0.28"], ["35", "0.17", "–"]],
        [head, ["1", "0.0347", "0.00216"], ["2", "0.0239", "0.000671"], ["4", "0.00932", "0.000268"], last],
        [head, ["1", "5,188", "5,188"], ["2", "2,594", "2,594"], ["4", "1,297", "1,297"], ["35", "148", "–"]],
    ]


def test_intervals_stand_behind_their_values_and_only_there() -> None:
    some = [
        Row(TEACHER, 1, {"FD-P-2k": 11.4, "KID-P-2k": 0.03}, 9.0, {"FD-P-2k": (11.1, 11.7)}),
        Row("tuned", 1, {"FD-P-2k": 0.352, "KID-P-2k": 0.02}, 9.0, {"FD-P-2k": (0.3401, 0.3639)}),
    ]
    text = render(report(rows=some, pictures=[]), WHEN)
    assert [table[1] for table in tables(text)][:2] == [["1", "11.40 ± 0.30", "0.352 ± 0.012"], ["1", "0.03", "0.02"]]
    assert "± is half of a 95 % interval" in text
    assert "± is half" not in render(report(pictures=[]), WHEN)


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (11.4, (11.1, 11.7), "± 0.30"),
        (1234.5, (1200.5, 1268.5), "± 34"),
        (0.00216, (0.00175, 0.00257), "± 0.00041"),
        (-7.3e-05, (-1.04e-04, -4.2e-05), "± 3.1e-05"),
        (5.0, (4.9996, 5.0004), "± 0.0004"),
        (13.25, (11.53, 14.97), "± 1.7"),
        (0.905, (0.686, 1.124), "± 0.22"),
        (0.0, (-0.5, 0.5), "± 0.50"),
        (2.0, (1.5, 4.0), "(1.50 to 4.00)"),
        (2.0, None, ""),
        (math.nan, (0.0, 1.0), ""),
        (2.0, (-math.inf, math.inf), ""),
    ],
)
def test_margins_have_the_digits_of_their_values(
    value: float, interval: tuple[float, float] | None, expected: str
) -> None:
    assert margin(value, interval) == expected


def test_a_metric_that_a_row_lacks_leaves_a_dash_and_a_gap() -> None:
    some = [
        Row("tuned", 1, {"A": 1.0}, 1.0),
        Row("tuned", 2, {"B": 2.0}, 1.0),
        Row("tuned", 3, {"A": math.nan}, 1.0),
    ]
    first, second, _ = tables(render(report(rows=some, pictures=[]), WHEN))
    assert first[1:] == [["1", "1.00"], ["3", "nan"]]
    assert second[1:] == [["2", "2.00"]]
    assert quality_series(some, "A") == {"tuned": ([1], [1.0])}


def test_the_page_tells_the_run_the_command_and_the_date() -> None:
    page = Page(render(report(), WHEN))
    assert page.texts["title"] == page.texts["h1"] == ["a run"]
    assert page.texts["pre"] == ["fewstep tune runs/teacher --data digits --out runs/tuned --seed 3"]
    pairs = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert pairs == {
        "Teacher": "runs/teacher",
        "Recipe": "digits: not measured here",
        "torch": "2.13.0",
        "machine": "2 cores",
        "Report written": "2025-11-21 05:07 UTC",
    }


def test_the_parts_stand_in_the_order_of_a_readers_questions() -> None:
    text = render(report(), WHEN)
    marks = [
        "<h1>",
        "One step: FD-pixels-2k",
        "Step dial",
        "FD-pixels-2k <span>lower",
        "<table",
        LOSS_NOTE.replace("'", "&#39;"),
    ]
    marks += ["Real data", "The run", "fewstep tune runs/teacher", "2025-11-21 05:07"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_the_dial_has_a_column_per_step_the_teacher_above_and_the_metric_below() -> None:
    page = Page(render(report(), WHEN))
    found = {}
    for caption, figure in zip(page.texts["figcaption"][:7], page.attributes("figure"), strict=False):
        name, value = caption.split("FD-pixels-2k")
        found[name.strip(), float(value)] = figure["style"]
    assert found == {
        (TEACHER, 11.4): "--step:1;--row:2",
        (TEACHER, 7.9): "--step:2;--row:2",
        (TEACHER, 3.2): "--step:3;--row:2",
        (TEACHER, 0.17): "--step:4;--row:2",
        ("tuned", 0.89): "--step:1;--row:3",
        ("tuned", 0.41): "--step:2;--row:3",
        ("tuned", 0.28): "--step:3;--row:3",
    }
    assert [text.strip() for text in page.texts["div"] if "not sampled" in text] == ["tuned: not sampled"]


def test_every_picture_shows_the_same_samples_of_the_same_noise() -> None:
    pictures = [Picture(TEACHER, 1, noise(25, 3, 8, 8)), Picture("tuned", 1, noise(9, 3, 8, 8))]
    shown = [decoded(a) for a in Page(render(report(pictures=pictures, reference=None), WHEN)).attributes("img")]
    assert [image.shape for image in shown] == [(26, 26, 4)] * 2
    assert np.array_equal(shown[0], shown[1])


def test_hostile_text_stays_text() -> None:
    hostile = report(
        title=HOSTILE,
        summary=[(HOSTILE, HOSTILE)],
        rows=[Row(HOSTILE, 1, {HOSTILE: 1.5}, 2.0), Row("teacher" + HOSTILE, 1, {HOSTILE: 2.5}, 2.0)],
        pictures=[Picture(HOSTILE, 1, noise(4, 1, 8, 8)), Picture("teacher" + HOSTILE, 1, noise(4, 1, 8, 8))],
        command=HOSTILE,
        environment={HOSTILE: HOSTILE},
    )
    page = Page(render(hostile, WHEN))
    assert not {"script", "x"} & {tag for tag, _ in page.tags}
    assert len(page.attributes("img")) == 3
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.texts["title"] == page.texts["h1"] == page.texts["pre"] == [HOSTILE]
    assert page.texts["dd"][:2] == [HOSTILE] * 2
    assert page.texts["th"][1] == "teacher" + HOSTILE
    assert any(HOSTILE[:30] in text for text in page.texts["text"])


def test_text_that_no_file_can_hold_is_written_readably(tmp_path: Path) -> None:
    odd = "a\x00b\udcffc 数字 $\\frac{$"
    data = report(command=odd, rows=[Row(odd, 1, {odd: 1.0}, 1.0), Row("teacher" + odd, 2, {odd: 1.0}, 1.0)])
    write_report(tmp_path / "report.html", data)
    assert "b\\udcffc 数字" in (tmp_path / "report.html").read_text("utf-8")
    step_dial_png(tmp_path / "dial.png", [Picture(odd, 1, noise(4, 1, 8, 8))], data.rows)


def test_the_page_stays_under_five_megabytes_in_the_worst_case(tmp_path: Path) -> None:
    pictures = [Picture(model, nfe, noise(25, 3, 256, 256)) for model in (TEACHER, "tuned") for nfe in (1, 2, 4, 8, 35)]
    long = [{"images": float(i), "loss": 1.0 + i % 7, "lr": 1.0, "stage": float(i // 2500)} for i in range(20_000)]
    path = tmp_path / "new" / "report.html"
    write_report(path, report(pictures=pictures, reference=noise(25, 3, 256, 256), history=long))
    assert 2_000_000 < path.stat().st_size < 5_000_000
    points = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    many = [Picture(model, nfe, points) for model in (TEACHER, "tuned") for nfe in range(1, 20)]
    write_report(path, report(pictures=many, reference=points))
    assert path.stat().st_size < 5_000_000


def test_the_page_follows_the_colour_scheme_and_the_width_of_the_reader() -> None:
    text = render(report(), WHEN)
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media (max-width: 44rem)" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(text).attributes("meta")
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--tuned)" in drawn
    assert "var(--teacher)" in drawn
    assert "currentColor" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b(?![^<]*</text>)", drawn), "a colour that no scheme can change"
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text)) - {"--step", "--row", "--steps", "--models"}
    light, dark = (
        set(re.findall(r"(--[a-z0-9]+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    )
    assert {f"--{kind}" for kind in KINDS} < used
    assert used <= light == dark


def test_every_picture_and_figure_has_words_for_those_who_do_not_see_it() -> None:
    page = Page(render(report(), WHEN))
    assert [a["alt"] for a in page.attributes("img")][:1] == [f"Samples: {TEACHER}, 1 evaluation"]
    assert all(a["alt"] for a in page.attributes("img"))
    labels = [a["aria-label"] for a in page.attributes("svg")]
    assert len(labels) == 6
    assert "tuned: 0.89 at 1, 0.41 at 2, 0.28 at 4" in (labels[0] or "")
    assert all(a["role"] == "img" for a in page.attributes("svg"))


@pytest.mark.parametrize("missing", list(itertools.product([True, False], repeat=4)))
def test_any_part_may_be_missing(missing: tuple[bool, ...]) -> None:
    empty = {"rows": [], "pictures": [], "history": [], "reference": None}
    changes = {name: value for gone, (name, value) in zip(missing, empty.items(), strict=True) if gone}
    text = render(report(**changes), WHEN)
    seen = ["<table" in text, 'class="dial"' in text, "<h2>Training" in text, "<h2>Real data" in text]
    assert seen == [not gone for gone in missing]
    assert ("No quality was measured" in text) is missing[0]
    assert ("No samples were kept" in text) is missing[1]


def test_a_bare_page_still_names_itself() -> None:
    page = Page(render(ReportData("bare", [], [], [], None, [], "", {}), WHEN))
    assert page.texts["h1"] == ["bare"]
    assert page.texts["dt"] == ["Report written"]
    assert "pre" not in page.texts


def test_the_note_on_the_loss_is_for_runs_with_stages() -> None:
    plain = [{"images": row["images"], "loss": row["loss"]} for row in history()]
    assert Page(render(report(), WHEN)).texts["figcaption"][-1] == LOSS_NOTE
    assert LOSS_NOTE not in Page(render(report(history=plain), WHEN)).texts["figcaption"]


def test_a_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(DataError, match=r"Got: float32 \[4, 1, 8, 8\]\. Wanted: uint8"):
        write_report(path, report(pictures=[Picture("tuned", 1, torch.zeros(4, 1, 8, 8))]))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="could not be written"):
        write_report(tmp_path, report(pictures=[], history=[], rows=[]))


# --- the verdict ------------------------------------------------------------------------------------


def quality(metric: str = "FD-pixels-2k", **values: dict[int, float]) -> list[Row]:
    names = {"teacher": TEACHER, "tuned": "tuned"}
    return [Row(names[m], nfe, {metric: v}, 1.0) for m, points in values.items() for nfe, v in points.items()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            quality(tuned={1: 0.89, 2: 0.41}, teacher={1: 11.40, 8: 1.1, 35: 0.17}),
            "One step: FD-pixels-2k 11.40 -> 0.89 (12.8 times lower) after tuning; "
            "the diffusion model needs 35 evaluations for 0.17.",
        ),
        (
            quality(teacher={1: 11.40, 35: 1.2}, tuned={1: 0.89}),
            "One step: FD-pixels-2k 11.40 -> 0.89 (12.8 times lower) after tuning; "
            "the diffusion model's best is 1.20, with 35 evaluations.",
        ),
        (
            quality(teacher={2: 8.0, 4: 2.0}, tuned={1: 1.0, 2: 6.0}),
            "2 evaluations: FD-pixels-2k 8.00 -> 6.00 (25 % lower) after tuning; "
            "the diffusion model needs 4 evaluations for 2.00.",
        ),
        (
            quality(teacher={1: 2.0}, tuned={1: 5.0}),
            "One step: FD-pixels-2k 2.00 -> 5.00 (2.5 times higher, which is worse) after tuning.",
        ),
        (
            quality(teacher={1: 2.0}, tuned={1: 2.0}),
            "One step: FD-pixels-2k 2.00 -> 2.00 (unchanged) after tuning.",
        ),
        (
            quality("Recall-pixels-2k", teacher={1: 0.1, 8: 0.9, 16: 0.8}, tuned={1: 0.4}),
            "One step: Recall-pixels-2k 0.1 -> 0.4 (4.0 times higher) after tuning; "
            "the diffusion model needs 8 evaluations for 0.9.",
        ),
        (
            quality("Recall-pixels-2k", teacher={1: 0.8}, tuned={1: 0.6}),
            "One step: Recall-pixels-2k 0.8 -> 0.6 (25 % lower, which is worse) after tuning.",
        ),
        (
            quality("KID-pixels-2k", teacher={1: 0.1}, tuned={1: -0.002}),
            "One step: KID-pixels-2k 0.1 -> -0.002 after tuning.",
        ),
        (
            [
                replace(
                    row, intervals={"FD-pixels-2k": (row.metrics["FD-pixels-2k"] - 0.3, 9.0)} if row.nfe == 1 else {}
                )
                for row in quality(teacher={1: 2.0, 2: 2.0}, tuned={1: 1.5, 2: 0.4})
            ],
            "2 evaluations: FD-pixels-2k 2.00 -> 0.4 (5.0 times lower) after tuning.",
        ),
        (
            [
                replace(row, intervals={"FD-pixels-2k": (row.metrics["FD-pixels-2k"] - 0.3, 9.0)})
                for row in quality(teacher={1: 2.0}, tuned={1: 1.5})
            ],
            "One step: FD-pixels-2k 2.00 -> 1.50 (25 % lower) after tuning, "
            "which decides nothing: the 95 % intervals overlap.",
        ),
        (
            [
                replace(row, intervals={"FD-pixels-2k": (row.metrics["FD-pixels-2k"] - 0.2,) * 2})
                for row in quality(teacher={1: 2.0}, tuned={1: 1.5})
            ],
            "One step: FD-pixels-2k 2.00 -> 1.50 (25 % lower) after tuning.",
        ),
        (quality(teacher={1: 3.0}, tuned={1: math.nan}), "One step: FD-pixels-2k 3.00 -> nan after tuning."),
        (
            quality(teacher={1: 3.0, 9: 0.5}),
            "FD-pixels-2k: teacher (diffusion) 3.00 with 1 evaluation, 0.5 with 9 evaluations.",
        ),
        (
            quality(teacher={35: 0.5}, tuned={1: 0.9}),
            "FD-pixels-2k: teacher (diffusion) 0.5 with 35 evaluations; tuned 0.9 with 1 evaluation.",
        ),
        ([Row("tuned", 1, {}, 1.0)], "No quality was measured in this run."),
        ([], "No quality was measured in this run."),
    ],
)
def test_verdict(given: list[Row], expected: str) -> None:
    assert verdict(given) == expected


# --- curves -----------------------------------------------------------------------------------------


def markers(svg: str) -> np.ndarray:
    """Centres of the drawn markers in drawing order, ticks left out."""
    body = re.sub(
        r'<g id="[^"]*matplotlib\.axis_.*?(?=<g id="[^"]*(?:line2d|patch)_\d+"><path d="M [^"]*clip)', "", svg
    )
    found = re.findall(r'<g clip-path="[^"]*">(.*?)</g>', body, flags=re.DOTALL)
    places = re.findall(r'<use [^>]*?x="([-\d.]+)" y="([-\d.]+)"', "".join(found))
    return np.array(places, dtype=float)


def test_the_quality_figure_draws_every_value_on_logarithmic_axes() -> None:
    svg = quality_svg(rows(), "FD-pixels-2k")
    assert svg is not None
    places = markers(svg)
    nfe = np.log([1, 2, 4, 35, 1, 2, 4])
    values = np.log([11.4, 7.9, 3.2, 0.17, 0.89, 0.41, 0.28])
    assert places.shape == (7, 2)
    for place, expected, sign in ((places[:, 0], nfe, 1), (places[:, 1], values, -1)):
        slope, offset = np.polyfit(expected, place, 1)
        assert sign * slope > 10
        assert np.abs(slope * expected + offset - place).max() < 1e-3


def test_bars_span_the_intervals() -> None:
    given = [Row("tuned", n, {"FD": v}, 1.0, {"FD": (v / 2, 3 * v)}) for n, v in ((1, 8.0), (2, 4.0), (4, 2.0))]
    svg = quality_svg(given, "FD") or ""
    groups = svg.split("LineCollection")[1:]
    bars = np.array([re.findall(r"[\d.]+", re.findall(r' d="([^"]*)"', group)[0]) for group in groups], dtype=float)
    assert bars.shape == (3, 4)
    places = markers(svg)
    slope, offset = np.polyfit(np.log([8.0, 4.0, 2.0]), places[:, 1], 1)
    for ends, factor in ((bars[:, 1], 0.5), (bars[:, 3], 3.0)):
        assert np.abs(slope * np.log(factor * np.array([8.0, 4.0, 2.0])) + offset - ends).max() < 1e-2
    assert len(re.findall("LineCollection", quality_svg(rows(), "FD-pixels-2k") or "")) == 0


def test_values_that_are_not_positive_are_drawn_on_a_linear_axis() -> None:
    places = markers(quality_svg(rows(), "KID-pixels-2k") or "")[:, 1]
    values = np.array([0.0347, 0.0239, 0.00932, -0.000073, 0.00216, 0.000671, 0.000268])
    slope, offset = np.polyfit(values, places, 1)
    assert slope < 0
    assert np.abs(slope * values + offset - places).max() < 1e-3


def test_the_legend_names_the_models_and_one_measurement_is_a_figure_too() -> None:
    assert all(f">{model}<" in (quality_svg(rows(), "FD-pixels-2k") or "") for model in (TEACHER, "tuned"))
    assert len(markers(quality_svg([Row("tuned", 1, {"A": 2.0}, 1.0)], "A") or "")) == 1
    assert quality_svg(rows(), "unknown") is None


def test_the_loss_is_cut_where_the_stage_changes() -> None:
    stages = loss_stages(history())
    assert [stage for stage, _, _ in stages] == [0, 1, 2, 3]
    assert [(images[0], images[-1]) for _, images, _ in stages] == [
        (100, 2000),
        (2100, 4000),
        (4100, 6000),
        (6100, 8000),
    ]
    assert [x for _, _, loss in stages for x in loss] == [row["loss"] for row in history()]
    svg = loss_svg(history()) or ""
    assert all(f">{name}<" in svg for name in ("stage 0", "1", "2", "3"))
    paths = [
        len(re.findall("[ML]", d)) for d in re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: var\(--tuned\)', svg)
    ]
    assert paths == [20, 20, 20, 20]


def test_a_loss_without_stages_is_one_piece_without_bands() -> None:
    plain = [{"images": row["images"], "loss": row["loss"]} for row in history()]
    assert [(stage, len(images)) for stage, images, _ in loss_stages(plain)] == [(None, 80)]
    assert "stage" not in (loss_svg(plain) or "")
    assert "var(--band)" not in (loss_svg(plain) or "")


def test_long_histories_are_thinned_by_means_and_nothing_is_lost() -> None:
    long = [{"images": float(i), "loss": float(i * i % 101)} for i in range(4000)]
    images, loss = history_series(long, "loss", limit=400)
    assert len(images) == len(loss) == 400
    assert images[:2] == [4.5, 14.5]
    assert loss[0] == np.mean([i * i % 101 for i in range(10)])
    assert np.mean(loss) == pytest.approx(np.mean([row["loss"] for row in long]), rel=1e-12)


def test_rows_without_the_key_or_with_numbers_that_are_not_finite_are_left_out() -> None:
    mixed = [
        {"images": 1, "lr": 0.1},
        {"images": 2},
        {"images": 3, "lr": math.nan},
        {"lr": 0.2},
        {"images": 5, "lr": 0.3},
    ]
    assert history_series(mixed, "lr") == ([1.0, 5.0], [0.1, 0.3])
    assert history_series([], "lr") == ([], [])
    assert history_svg(mixed, "loss", "loss") is None
    assert loss_svg(mixed) is None
    assert "0.1 to 0.3" in (history_svg(mixed, "lr", "learning rate") or "")


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 2.0], [1e-30, 1e30]])
def test_curves_of_odd_values_are_drawn(values: list[float]) -> None:
    odd = [{"images": i + 1, "loss": v, "lr": v, "stage": 0.0} for i, v in enumerate(values)]
    assert "var(--tuned)" in (loss_svg(odd) or "")
    assert "var(--tuned)" in (history_svg(odd, "lr", "lr") or "")


# --- samples ----------------------------------------------------------------------------------------


def decoded(attributes: dict[str, str | None]) -> np.ndarray:
    data = base64.b64decode((attributes["src"] or "").removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_to_the_bit_with_clear_gaps(channels: int) -> None:
    images = noise(7, channels, 4, 6)
    address, enlarged = samples_png(images, most=400)
    grid = decoded({"src": address})
    assert np.array_equal(grid, sample_grid(images))
    assert grid.shape == (3 * 5 - 1, 3 * 7 - 1, 4)
    assert enlarged
    for i, image in enumerate(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
        top, left = i // 3 * 5, i % 3 * 7
        assert np.array_equal(grid[top : top + 4, left : left + 6, :3], image)
    assert grid[..., 3].sum() == 255 * 7 * 4 * 6


def test_large_images_are_fewer_then_smaller_and_smooth() -> None:
    address, enlarged = samples_png(noise(25, 3, 120, 120), most=390)
    assert decoded({"src": address}).shape[0] in range(370, 391)
    assert not enlarged
    address, _ = samples_png(noise(25, 3, 512, 512), most=390)
    assert decoded({"src": address}).shape[:2] == (390, 390)


def dots(svg: str) -> np.ndarray:
    return np.array(re.findall(r"M(-?[\d.]+) (-?[\d.]+)h0", svg), dtype=float).reshape(-1, 2)


def test_points_are_drawn_where_they_are() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.5], [-2.0, 2.0], [2.1, 0.0], [math.nan, 0.0]])
    drawn = dots(samples_svg(points, Frame(0.0, 0.0, 2.0), colour="tuned", alt="five"))
    assert drawn.tolist() == [[100.0, 100.0], [150.0, 75.0], [0.0, 0.0]]


def test_a_page_of_points_draws_scatters_in_one_frame_and_counts_what_it_leaves_out() -> None:
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    stray = points.clone()
    stray[:3] = 50.0
    pictures = [Picture(TEACHER, 1, stray), Picture("tuned", 1, points)]
    text = render(report(pictures=pictures, reference=points), WHEN)
    scatters = re.findall(r'<svg viewBox="0 0 200 200".*?</svg>', text)
    assert [len(dots(svg)) for svg in scatters] == [497, 500, 500]
    assert np.array_equal(dots(scatters[1]), dots(scatters[2]))
    assert "3 points lie outside the frame" in text
    assert "<img" not in text
    assert "outside the frame" not in render(report(pictures=pictures[1:], reference=points), WHEN)


def test_the_frame_ignores_strays_and_survives_odd_points() -> None:
    points = torch.rand(2000, 2, generator=torch.Generator().manual_seed(2)) * torch.tensor([4.0, 1.0])
    points[0] = 1e9
    frame = frame_of(points)
    assert (frame.x, frame.y, frame.half) == pytest.approx((2.0, 0.5, 2.4), abs=0.06)
    assert frame_of(torch.full((3, 2), math.nan)) == Frame(0.0, 0.0, 1.0)
    assert frame_of(torch.full((3, 2), 7.0)) == Frame(7.0, 7.0, 1.0)


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 3), noise(4, 2, 8, 8), noise(4, 8, 8), torch.zeros(4, 2, dtype=torch.int64)]
)
def test_samples_that_cannot_be_drawn_are_refused_in_one_sentence(bad: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be drawn"):
        render(report(pictures=[Picture("tuned", 1, bad)], reference=None), WHEN)
    with pytest.raises(DataError, match="cannot be drawn"):
        step_dial_png(tmp_path / "dial.png", [Picture("tuned", 1, bad)], [])


def test_images_and_points_do_not_mix() -> None:
    mixed = [Picture("tuned", 1, noise(4, 1, 8, 8)), Picture("tuned", 2, torch.zeros(4, 2))]
    with pytest.raises(DataError, match="mix"):
        render(report(pictures=mixed, reference=None), WHEN)


# --- the dial as a picture ---------------------------------------------------------------------------


def test_the_dial_puts_steps_left_to_right_and_the_teacher_above(tmp_path: Path) -> None:
    colours = {
        ("tuned", 4): (250, 0, 0),
        ("tuned", 1): (0, 250, 0),
        (TEACHER, 4): (0, 0, 250),
        (TEACHER, 1): (250, 0, 250),
    }
    pictures = [
        Picture(model, nfe, torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(25, 3, 8, 8))
        for (model, nfe), colour in colours.items()
    ]
    step_dial_png(tmp_path / "dial.png", pictures, rows())
    drawn = np.asarray(Image.open(tmp_path / "dial.png")).astype(int)
    centre = {}
    for key, colour in colours.items():
        where = np.argwhere(np.abs(drawn - colour).max(-1) < 6)
        assert len(where) > 0.05 * drawn.shape[0] * drawn.shape[1]
        centre[key] = where.mean(0)
    assert centre[TEACHER, 1][0] == pytest.approx(centre[TEACHER, 4][0], abs=2)
    assert centre[TEACHER, 1][0] < centre["tuned", 1][0] - 100
    assert centre["tuned", 1][1] == pytest.approx(centre[TEACHER, 1][1], abs=2)
    assert centre["tuned", 1][1] < centre["tuned", 4][1] - 100
    assert (drawn[:3] == 255).all()
    assert drawn.shape[2] == 3


def test_the_dial_labels_columns_rows_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    from matplotlib.text import Text

    original = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *a, **k: (said.append(self.get_text()), original(self, *a, **k))[1])
    step_dial_png(tmp_path / "dial.png", report().pictures, rows())
    shown = {text for text in said if text}
    assert {
        "1 evaluation",
        "2 evaluations",
        "4 evaluations",
        "35 evaluations",
        TEACHER,
        "tuned",
        "not sampled",
    } < shown
    assert {text for text in shown if "FD" in text} == {
        f"FD-pixels-2k  {value}" for value in ("11.40", "7.90", "3.20", "0.17", "0.89", "0.41", "0.28")
    }


def test_the_dial_draws_points_and_needs_a_picture(tmp_path: Path) -> None:
    points = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    step_dial_png(tmp_path / "dial.png", [Picture("tuned", 1, points)], [])
    drawn = np.asarray(Image.open(tmp_path / "dial.png")).astype(int)
    orange = np.abs(drawn - (194, 65, 12)).max(-1) < 60
    assert orange.sum() > 300
    with pytest.raises(DataError, match="no pictures"):
        step_dial_png(tmp_path / "dial.png", [], [])


# --- the terminal -----------------------------------------------------------------------------------


def printed(given: list[Row]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=140)
    print_table(given, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]


def test_the_terminal_table_has_a_line_per_model_and_count_and_reads_no_markup() -> None:
    odd = Row("[red]odd[/red]", 8, {"FD-pixels-2k": 1.5}, 3.25, {"FD-pixels-2k": (1.25, 1.75)})
    assert printed([*rows(), odd]) == [
        ["Model", "Evaluations", "FD-pixels-2k\u00a0↓", "KID-pixels-2k\u00a0↓", "Samples/s"],
        [TEACHER, "1", "11.40", "0.0347", "5,188"],
        [TEACHER, "2", "7.90", "0.0239", "2,594"],
        [TEACHER, "4", "3.20", "0.00932", "1,297"],
        [TEACHER, "35", "0.17", "-7.3e-05", "148"],
        ["tuned", "1", "0.89", "0.00216", "5,188"],
        ["tuned", "2", "0.41", "0.000671", "2,594"],
        ["tuned", "4", "0.28", "0.000268", "1,297"],
        ["[red]odd[/red]", "8", "1.50 ± 0.25", "–", "3.25"],
    ]


def test_many_metrics_stand_below_each_other_in_a_terminal() -> None:
    many = [
        Row(model, nfe, {f"M{i}-P-2k": i + nfe / 10 + shift for i in range(6)}, 10.0 * nfe, {"M0-P-2k": (0.0, 1.0)})
        for model, shift, counts in ((TEACHER, 0.0, (1, 35)), ("tuned", 0.5, (1, 2)))
        for nfe in counts
    ]
    lines = printed(many)
    assert lines[0] == ["Metric", "Model", "1 evaluation", "2 evaluations", "35 evaluations"]
    assert lines[1] == ["M0-P-2k\u00a0↓", TEACHER, "0.1 (0 to 1.00)", "–", "3.50 (0 to 1.00)"]
    assert lines[4] == ["", "tuned", "1.60", "1.70", "–"]
    assert lines[-2:] == [["Samples/s", TEACHER, "10", "–", "350"], ["", "tuned", "10", "20", "–"]]
    assert len(lines) == 1 + 7 * 2


def test_no_window_and_no_setting_of_the_users_matplotlib_is_touched() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.quality_svg(rows(), "FD-pixels-2k")
    assert dict(matplotlib.rcParams) == before
