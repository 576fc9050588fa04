"""From a run to a model card: pretrained with a network of diffusers, tuned, exported, published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import fewstep
from fewstep.checkpoint.model import weights_hash
from fewstep.cli import main
from fewstep.errors import ConfigError
from fewstep.exports.origin import origin_of, published
from fewstep.exports.push import plan_push, push

CONFIG = {
    "layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": [8, 16], "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SMALL = {
    "images": 32, "batch_size": 16, "output.sample_images": 0, "output.grid": 4, "eval.samples": 64,
    "eval.steps": [1, 2], "eval.teacher_nfe": [1],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet2DModel that was pretrained on digits for two steps, and tuned for two."""
    work = tmp_path_factory.mktemp("runs")
    network = {"model.backbone": "diffusers", "model.kwargs": {"config": CONFIG}, "model.conditional": True}
    fewstep.pretrain("digits", out=work / "teacher", overrides=SMALL | network | {"eval.samples": 0})
    (work / "teacher" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# A teacher\n")
    fewstep.tune(work / "teacher", "digits", out=work / "student", objective="ect", overrides=SMALL)
    return work / "student"


@pytest.fixture(scope="module")
def pipeline(run: Path) -> Path:
    """Its pipeline, by the command line, beside the run."""
    assert main(["export", str(run), "--quiet"]) == 0
    return run.with_name("student-diffusers")


def front_matter(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def test_a_run_with_a_network_of_diffusers(
    run: Path, pipeline: Path, plain_diffusers: Callable[[dict[str, Any]], dict[str, Tensor]]
) -> None:
    """What --set model.backbone=diffusers pretrains is what ConsistencyModelPipeline samples, labels included."""
    student = fewstep.load(run)
    assert student.parametrization.time == "quarter_log_thousand"
    assert student.num_classes == 10
    told = json.loads((pipeline / "fewstep.json").read_text())["calls"]["2"]
    common = {"batch_size": 2, "class_labels": [3, 1], "output_type": "pt", "num_inference_steps": None}
    [found] = plain_diffusers({"two": (pipeline, common | told)}).values()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        z = [torch.randn(2, 1, 8, 8) for _ in range(2)]
        x = student(80.0 * z[0], 80.0, torch.tensor([3, 1]))
        level = json.loads((pipeline / "fewstep.json").read_text())["levels"]["2"][1]
        wanted = student(x + level * z[1], level, torch.tensor([3, 1]))
    assert (found - wanted).abs().max() <= 1e-5


def test_the_card_tells_what_was_measured(run: Path, pipeline: Path) -> None:
    from fewstep.evaluation.figures import number

    card, head = (pipeline / "README.md").read_text(), front_matter(pipeline)
    results = json.loads((run / "results.json").read_text())
    rows = results["tuned"]["rows"]
    assert len(rows) == 2
    for row in [*rows, *results["teacher (diffusion)"]["rows"]]:
        for value in row["metrics"].values():
            assert number(value) in card
    assert results["tuned"]["features"]["name"] in card
    found = head["model-index"][0]["results"]
    assert [m["value"] for r in found for m in r["metrics"]] == pytest.approx(
        [v for row in rows for v in row["metrics"].values()], rel=1e-5
    )
    assert [m["name"].endswith(", 1 evaluation") for m in found[0]["metrics"]] == [True] * len(rows[0]["metrics"])
    assert {r["dataset"]["name"] for r in found} == {"digits"}


def test_the_card_tells_where_it_comes_from(run: Path, pipeline: Path) -> None:
    card, head = (pipeline / "README.md").read_text(), front_matter(pipeline)
    teacher = json.loads((run / "report.json").read_text())["facts"]["teacher"]
    assert teacher["sha256"][:16] in card
    assert "| Images | 32 in batches of 16 |" in card
    assert "| Objective | ect(" in card
    assert head["license"] == "cc-by-nc-4.0"
    assert "says the card of its teacher" in card
    assert {"consistency-model", "few-step", "ect"} <= set(head["tags"])
    assert head["library_name"] == "diffusers"
    assert str(run.parent) not in card, "folders of whoever exports are not published"
    assert str(run.parent) not in (pipeline / "fewstep.json").read_text()


def test_the_hub_s_library_reads_the_card(pipeline: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(pipeline / "README.md").data
    assert data.license == "cc-by-nc-4.0"
    assert [r.metric_value for r in data.eval_results] == [
        m["value"] for r in front_matter(pipeline)["model-index"][0]["results"] for m in r["metrics"]
    ]


def test_the_card_s_code_runs(pipeline: Path, tmp_path: Path) -> None:
    """With plain diffusers, from a folder of that name."""
    code = (pipeline / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'from_pretrained("student-diffusers")' in code
    code += "\nassert image.size == (8, 8) and image.mode == 'L'\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=pipeline.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_licences(run: Path, tmp_path: Path) -> None:
    """Said, or the model's card's, or its teacher's; else unknown."""
    assert origin_of(run, "mit").licence == "mit"
    assert (origin_of(run).licence, origin_of(run).said_by) == ("cc-by-nc-4.0", "the card of its teacher")
    assert origin_of(run / "model").licence == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: [apache-2.0]\n---\n")
    assert (origin_of(tmp_path).licence, origin_of(tmp_path).said_by) == ("apache-2.0", "the card of the model")
    for other in ("no front matter", "---\nlicense: unknown\n---\n", "---\n[broken\n---\n", "---\nlicense: mit\n"):
        (tmp_path / "README.md").write_text(other)
        assert origin_of(tmp_path).licence == "unknown"
    assert origin_of(None).licence == "unknown"


def test_folders_of_whoever_exports_are_not_published(run: Path, tmp_path: Path) -> None:
    """Neither in the command as it was typed, nor behind a kind; names on the hub stay."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    report = json.loads(path.read_text())
    report["command"] = (
        "fewstep tune /home/alice/secret/t --data hf:owner/name --out work/acme/r --config ./acme/c.yaml --seed 0 "
        "--set eval.data=shards:/home/alice/made --set 'note=\"~/acme/x y\"' --network /home/alice/net.py:make owner/t"
    )
    report["facts"]["origin"] = "samples of /home/alice/secret/t, drawn in 3 steps"
    path.write_text(json.dumps(report))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for result in results.values():
        result["reference"]["source"] = "/home/alice/digits"
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["data"]["source"], config["eval"]["data"] = "hf:owner/name", "shards:/home/alice/made"
    config["teacher"] = "owner/t"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    fewstep.export(tmp_path / "run", tmp_path / "out", licence="mit")
    card = (tmp_path / "out" / "README.md").read_text()
    for secret in ("alice", "acme", "work/", str(tmp_path), str(run.parent)):
        assert secret not in card
    command = card.split("Command")[1].split("```")[1].strip()
    assert command == (
        "fewstep tune t --data hf:owner/name --out r --config c.yaml --seed 0 --set eval.data=shards:made "
        "--set 'note=\"x y\"' --network net.py:make owner/t"
    )
    assert "samples of t, drawn in 3 steps" in card
    assert "Reference: digits" in card


def test_published_values() -> None:
    found = {
        "hf:/home/alice/secret#text": "hf:secret#text", "shards:/home/alice/made": "shards:made", "/home/alice/x/": "x",
        "file:/home/alice/net.py:make": "file:net.py:make", "hf:owner/name": "hf:owner/name",
        "owner/name": "owner/name",
        "../a/b": "b", "~/a": "a", "https://a.org/b/c": "https://a.org/b/c", "1 x 8 x 8, 3/4": "1 x 8 x 8, 3/4",
    }  # fmt: skip
    assert published({"a": [*found], "b": tuple(found)}) == {"a": [*found.values()], "b": [*found.values()]}


def test_a_bare_model_and_a_teacher_on_the_hub(run: Path, tmp_path: Path) -> None:
    fewstep.save_model(fewstep.load(run), tmp_path / "bare", {"teacher": "owner/name", "images": 7})
    fewstep.export(tmp_path / "bare", tmp_path / "out")
    card, head = (tmp_path / "out" / "README.md").read_text(), front_matter(tmp_path / "out")
    assert head["base_model"] == "owner/name"
    assert "| images | 7 |" in card
    assert "Nothing was measured." in card
    assert "ask whoever made the teacher before publishing" in card
    assert "model-index" not in head


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for ``HfApi``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo: str, *, exist_ok: bool, private: bool) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create", {"repo": repo, "exist_ok": exist_ok, "private": private}))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append(("upload", {"repo": repo_id, "folder": folder_path, "files": sorted(listed(folder_path))}))


def listed(folder: str | Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had asked for no network, and nobody had logged in."""
    for name in ("HF_HUB_OFFLINE", "FEWSTEP_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_the_plan_names_every_file(pipeline: Path) -> None:
    upload = plan_push(pipeline, "me/cats")
    assert sorted(name for name, _ in upload.files) == sorted(listed(pipeline))
    assert dict(upload.files)["README.md"] == (pipeline / "README.md").stat().st_size
    assert upload.size == sum(p.stat().st_size for p in pipeline.rglob("*") if p.is_file())


def test_push_creates_and_uploads(pipeline: Path, online: None) -> None:
    hub = Hub()
    assert push(plan_push(pipeline, "me/cats"), private=True, api=hub) == "https://hub/me/cats"
    assert hub.calls == [
        ("create", {"repo": "me/cats", "exist_ok": True, "private": True}),
        ("upload", {"repo": "me/cats", "folder": str(pipeline), "files": sorted(listed(pipeline))}),
    ]


def test_push_is_dry_by_default(
    pipeline: Path, online: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fewstep.exports.push as module

    hub = Hub()
    monkeypatch.setattr(module, "_api", lambda: hub)
    command = ["export", str(pipeline.with_name("student")), "--out", str(pipeline), "--push", "me/cats", "--json"]
    before = {name: (pipeline / name).stat().st_mtime_ns for name in listed(pipeline)}
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert hub.calls == []
    assert json.loads(out)["pushed"] is None
    assert "would go to me/cats. To upload them, add --yes." in err
    assert all(name in err for name in listed(pipeline))
    assert main([*command, "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] == "https://hub/me/cats"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert before == {name: (pipeline / name).stat().st_mtime_ns for name in listed(pipeline)}, "taken as it was"


def test_what_was_exported_before_is_what_is_pushed(
    run: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model, another format, other weights, or an export that does not say: another --out."""
    about = json.loads((pipeline / "fewstep.json").read_text())
    assert (about["source"], about["weights"]) == ("student", "ema")
    assert about["sha256"] == weights_hash(fewstep.load(run))
    same = ["--out", str(pipeline), "--push", "me/cats"]
    assert main(["export", str(run / "model"), *same]) == 0, "the same weights"
    for model, options in (
        (run.with_name("teacher"), []),
        (run, ["--to", "onnx"]),
        (run, ["--weights", "student"]),
    ):
        capsys.readouterr()
        assert main(["export", str(model), *options, *same]) == 2
        err = capsys.readouterr().err
        assert "holds another export" in err
        assert "another --out" in err
        assert "would go to" not in err
    assert main(["export", str(tmp_path / "nothing"), *same]) == 2
    older = tmp_path / "older"
    older.mkdir()
    (older / "README.md").write_text("---\nlicense: mit\n---\n")
    (older / "fewstep.json").write_text(json.dumps({name: about[name] for name in ("to", "difference", "licence")}))
    assert main(["export", str(run), "--out", str(older), "--push", "me/cats"]) == 2


def test_push_is_refused(pipeline: Path, online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upload = plan_push(pipeline, "me/cats")
    with pytest.raises(ConfigError, match=r"The hub did not take 'me/cats'. Got: RuntimeError: 401"):
        push(upload, api=Hub(RuntimeError("401\nand more")))
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push(upload)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="unset HF_HUB_OFFLINE"):
        push(upload, api=Hub())
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        plan_push(pipeline, "cats")
    with pytest.raises(ConfigError, match="is not an export"):
        plan_push(tmp_path, "me/cats")


def test_nothing_of_unknown_licence_is_published(run: Path, online: None, tmp_path: Path) -> None:
    fewstep.export(fewstep.load(run), tmp_path / "out")
    upload, hub = plan_push(tmp_path / "out", "me/cats"), Hub()
    with pytest.raises(ConfigError, match="--licence"):
        push(upload, api=hub)
    assert hub.calls == []
    push(upload, private=True, api=hub)
    assert len(hub.calls) == 2


def test_options_that_do_not_fit(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(pipeline.with_name("student"))
    for options, words in (
        (["--yes"], "--push OWNER/NAME"),
        (["--out", str(pipeline)], "already exists and is not empty"),
        (["--out", str(pipeline), "--push", "me/cats", "--licence", "mit"], "exported before, with its licence"),
        (["--to", "tensorrt"], "diffusers"),
    ):
        assert main(["export", run, *options]) == 2
        assert words in capsys.readouterr().err
