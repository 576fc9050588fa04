"""The numbers in README.md and docs/demo.md are those that the recorded run of the demo wrote."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "docs" / "demo-results.json").read_text(encoding="utf-8"))
FD = "FD-Pixels-2k"


def distances(model: str) -> list[float]:
    return [row["metrics"][FD] for row in RESULTS[model]["rows"]]


def test_the_recorded_demo_meets_its_aim() -> None:
    assert [row["nfe"] for row in RESULTS["teacher (diffusion)"]["rows"]] == [1, 2, 4, 8, 35]
    assert [row["nfe"] for row in RESULTS["tuned"]["rows"]] == [1, 2, 4, 8]
    assert distances("tuned")[0] <= distances("teacher (diffusion)")[0] / 10


def test_the_documents_quote_it() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    demo = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    for model in RESULTS:
        assert " / ".join(f"{value:.3f}" for value in distances(model)) in readme
        for row in RESULTS[model]["rows"]:
            assert f"| {row['nfe']} | {row['metrics'][FD]:.3f} |" in demo


def test_pictures_and_links_are_there() -> None:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        for part in text.split("](")[1:]:
            target = part.split(")")[0]
            if not target.startswith("http"):
                assert (path.parent / target).is_file(), f"{path} points to {target}"
