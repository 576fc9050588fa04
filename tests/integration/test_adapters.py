"""Adapters: the teacher exactly at step 0, one copy of its weights, only A and B trained, saved, merged, resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import EDM, OBJECTIVES, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones.lora import adapter_of, adapter_tensors, base_names, merged
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data.sources import ArraySource
from fewstep.errors import CheckpointError, ConfigError
from fewstep.objectives import StepRandom
from fewstep.randomness import Streams
from fewstep.runs import configure, make_trainer
from fewstep.training.config import RunConfig
from fewstep.training.frozen import move_together, storage_bytes
from fewstep.training.loop import Watcher
from fewstep.training.past import require_diffusion
from fewstep.training.plan import plan
from fewstep.training.student import make_student
from fewstep.training.trainer import StepReport, Trainer
from fewstep.types import Batch, Progress
from fewstep.world import World

pytest.importorskip("peft")

CPU, ROWS = torch.device("cpu"), 6
SHAPE = {"mlp": (2,)}
SPECS: dict[str, dict[str, Any]] = {
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [4], "dropout": 0.3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 1, "heads": 2, "dropout": 0.3},
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9, "dropout": 0.3},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2},
    "diffusers": {"kind": "UNet2DModel", "config": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8}},
}  # fmt: skip
LORA = {"adapter.kind": "lora", "adapter.rank": 2}
SHORT = {
    "images": 4 * ROWS, "batch_size": ROWS, "optim.lr": 3e-2, "optim.name": "adam", "eval.samples": 0,
    "output.sample_images": 0, "output.grid": 4, "output.checkpoint_images": 2 * ROWS,
    "emas": [{"kind": "constant", "beta": 0.5}, {"kind": "power", "std": 0.1}],
}  # fmt: skip


def make(name: str, classes: int = 0) -> Denoiser:
    """A small network of that kind, no weight of which is zero."""
    if name == "diffusers":
        pytest.importorskip("diffusers")
    spec = {"name": name, "kwargs": SPECS[name] | ({"num_classes": classes} if classes else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec)
        for parameter in backbone.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    shape = SHAPE.get(name, (1, 8, 8))
    return Denoiser(
        backbone, EDM(), Parametrization("edm"), sample_shape=shape, num_classes=classes, spec=spec
    ).eval()  # fmt: skip


def data(name: str) -> ArraySource:
    generator = torch.Generator().manual_seed(3)
    if name == "mlp":
        return ArraySource("points", torch.randn(24, 2, generator=generator), None)
    return ArraySource("images", torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=generator), None)


def configured(objective: str = "ect", **settings: Any) -> RunConfig:
    return configure("tune", "demo", objective, SHORT | LORA | settings, "digits")


def trainer_of(teacher: Denoiser, config: RunConfig, name: str = "unet") -> Trainer:
    return make_trainer(config, make_student(teacher, config), data(name), World(0, 1, CPU), teacher)


def inputs(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, *SHAPE.get(name, (1, 8, 8)), generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.02, 0.1, 0.5, 1.0, 5.0, 60.0])


def bits(network: Denoiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", SPECS)
def test_step_0_is_the_teacher_and_only_the_adapter_moves(name: str) -> None:
    """Bit for bit, in evaluation; and what moves is A and B of every layer, in student and averages."""
    teacher, config = make(name), configured()
    theirs = bits(teacher)
    trainer = trainer_of(teacher, config, name)
    x, t = inputs(name)
    with torch.no_grad():
        want = teacher(x, t)
        for network in (trainer.student.eval(), *trainer.averages):
            assert torch.equal(network(x, t), want)
    start = bits(trainer.student)
    for _ in trainer.steps():
        pass
    adapter = adapter_of(trainer.student.backbone)
    assert adapter is not None
    expected = {n for n in start if ".lora_A." in n or ".lora_B." in n}
    assert len(expected) == 2 * len(adapter.layers)
    assert not any("map_augment" in layer for layer in adapter.layers)
    for network in (trainer.student, *trainer.averages):
        assert changed(start, bits(network)) == expected
    assert changed(theirs, bits(teacher)) == set()
    assert all(p.requires_grad for p in teacher.parameters()), "the user's own object"
    with torch.no_grad():
        assert not torch.allclose(trainer.student.eval()(x, t), want, atol=1e-3)


def test_layers_that_take_an_adapter() -> None:
    """Every Linear and Conv2d; of EDM's, not those that also resample."""
    for name in ("unet", "dit", "mlp"):
        network = make(name).backbone
        layers = {n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        student = make_student(make(name), configured())
        assert {
            n.removesuffix(".lora_A") for n, m in student.backbone.named_modules() if n.endswith(".lora_A")
        } == layers
    student = make_student(make("unet"), configured(**{"adapter.targets": ["attention", "embed.sec*"]}))
    adapter = adapter_of(student.backbone)
    assert adapter is not None
    assert adapter.layers[0] == "embed.second"
    assert {layer.rpartition(".")[2] for layer in adapter.layers[1:]} == {"qkv", "out"}
    assert adapter.scale == 1


@pytest.mark.parametrize("objective", ["ect", "ecd", "ctm", "tcm"])
def test_one_copy_of_the_base(objective: str) -> None:
    """Student, teacher, the teacher's frozen self, averages and companions: the base's bytes once, and the adapters."""
    teacher, config = make("unet"), configured(objective)
    trainer = trainer_of(teacher, config)
    beside = trainer.beside
    networks = [teacher, trainer.student, *trainer.averages, *beside.companions.values()]
    networks += [beside.teacher] if beside.teacher is not None else []
    own = sum(p.nbytes for n, p in trainer.student.backbone.named_parameters() if n not in trainer.frozen)
    students = 1 + len(trainer.averages) + len(beside.companions)
    base = sum(p.nbytes for p in teacher.parameters())
    assert len(networks) >= 4
    assert storage_bytes(networks) == base + students * own
    assert own < base / 2
    pointers = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    for network in networks[1:]:
        kept = {p.untyped_storage().data_ptr() for p in network.parameters()} & pointers
        assert kept == pointers
    whole = trainer_of(make("unet"), configure("tune", "demo", objective, SHORT, "digits"))
    assert storage_bytes([whole.student, *whole.averages]) == 3 * base + (
        0 if not whole.student.two_time else 3 * (sum(p.nbytes for p in whole.student.parameters()) - base)
    )


def test_what_moves_together_stays_together() -> None:
    teacher = make("unet")
    student = make_student(teacher, configured())
    move_together([student, teacher], torch.device("meta"))
    ours, theirs = ({p.untyped_storage()._cdata for p in network.parameters()} for network in (student, teacher))
    assert {p.device.type for p in (*student.parameters(), *teacher.parameters())} == {"meta"}
    assert len(theirs) == len(list(teacher.parameters()))
    assert theirs < ours


@pytest.mark.parametrize("objective", ["ecd", "cd"])
def test_the_loss_is_that_of_a_teacher_of_its_own(objective: str) -> None:
    """The shared teacher and a separate copy: the same loss and the same gradients, exactly."""
    found = []
    for separate in (False, True):
        teacher = make("unet")
        config = configured(objective)
        student = make_student(teacher, config)
        trainer = make_trainer(
            config, student, data("unet"), World(0, 1, CPU), teacher.clone() if separate else teacher
        )
        with torch.no_grad():  # away from B = 0
            for n, p in trainer.student.backbone.named_parameters():
                if "lora_B" in n:
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
        x, t = inputs("unet")
        assert trainer.beside.teacher is not None
        with torch.no_grad():
            assert torch.equal(trainer.beside.teacher(x, t), make("unet")(x, t))
            assert not torch.allclose(trainer.student.eval()(x, t), make("unet")(x, t), atol=1e-3)
        random = StepRandom(Streams(0), torch.arange(ROWS), CPU)
        trainer._train_mode()
        loss = trainer.objective.loss(trainer.student, Batch(x, None), Progress(0, 100), random, trainer.beside)
        loss.per_sample.sum().backward()
        gradients = [p.grad for p in trainer.student.parameters() if p.grad is not None]
        found.append((loss.per_sample.detach(), gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_takes_two_steps(objective: str) -> None:
    """What moves is the adapter, and what the teacher does not have: the embedding of a landing time."""
    teacher = make("unet")
    settings: dict[str, Any] = {"images": 2 * ROWS}
    trainer = trainer_of(teacher, configured(objective, **settings))
    start = bits(trainer.student)
    assert [r.progress.images_seen for r in trainer.steps()] == [ROWS, 2 * ROWS]
    trainer.require_finite()
    moved = changed(start, bits(trainer.student))
    assert all(".lora_" in name or name.startswith("landing.") for name in moved)
    assert moved >= {name for name in start if ".lora_B." in name}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    fewstep.save_model(make("unet"), folder / "teacher")
    fewstep.tune(
        folder / "teacher", "digits", out=folder / "run", recipe="demo", overrides=SHORT | LORA, device="cpu"
    )  # fmt: skip
    return folder / "run"


class Halfway(Watcher):
    """Leaves the run after two steps, as a crash would."""

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == 3 * ROWS:
            raise KeyError


def stopped(folder: Path, teacher: Denoiser | Path, **settings: Any) -> Path:
    with pytest.raises(KeyError):
        fewstep.tune(
            teacher, "digits", out=folder, recipe="demo", overrides=SHORT | LORA | settings, device="cpu",
            watcher=Halfway(),
        )  # fmt: skip
    return folder


def test_a_checkpoint_holds_what_was_trained(run: Path) -> None:
    path = latest_checkpoint(run)
    for file in ("student", "ema-0", "ema-1"):
        names = read_tensors(path / f"{file}.safetensors").keys()
        assert names and all(".lora_" in name for name in names)
    record = json.loads((path / "model.json").read_text())
    assert record["base"]["path"] == str(run.parent / "teacher")
    assert record["backbone"]["name"] == "unet"
    optimiser = {name.partition("/")[2] for name in read_tensors(path / "optimizer.safetensors")}
    assert all(".lora_" in name for name in optimiser)


def test_merged_equals_unmerged(run: Path) -> None:
    """``model/`` is the first average without its adapter; also from a checkpoint, with other averages."""
    teacher = fewstep.load(run.parent / "teacher")
    config = fewstep.runs.read_run(run)
    student = make_student(teacher, config)
    x, t = inputs("unet")
    for weights, file in (("ema", "ema-0"), ("ema-1", "ema-1"), ("student", "student")):
        state = read_tensors(latest_checkpoint(run) / f"{file}.safetensors")
        student.backbone.load_state_dict(state, strict=False)
        model = fewstep.load(run, weights=weights)
        assert adapter_of(model.backbone) is None
        assert all(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            want = student.eval()(x, t)
            torch.testing.assert_close(model.under(EDM())(x, t), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(merged(student)(x, t), want, atol=1e-5, rtol=1e-5)
            assert (want - teacher(x, t)).abs().max() > 1e-3
    assert base_names(student.backbone), "merging leaves the student as it is"
    fewstep.load(run, weights="std=0.1")


@pytest.mark.parametrize("stabilised", [False, True])
def test_scale_and_merging_of_large_kernels_and_strides(stabilised: bool) -> None:
    """Merged in double: equal to rounding for every layer, whatever its kernel; alpha scales B A."""
    settings = {"adapter.alpha": 6.0, "adapter.stabilised": stabilised, "adapter.rank": 4}
    student = make_student(make("unet").double(), configured(**settings)).double()
    for n, p in student.backbone.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(n)))
    x, t = (v.double() for v in inputs("unet"))
    with torch.no_grad():
        whole = merged(student.eval())
        torch.testing.assert_close(whole(x, t), student(x, t), atol=1e-10, rtol=1e-10)
        weights = adapter_tensors(student.backbone)
        product = weights["embed.first.lora_B.weight"] @ weights["embed.first.lora_A.weight"]
        found = whole.backbone.state_dict()["embed.first.weight"] - make("unet").double().backbone.embed.first.weight
        torch.testing.assert_close(found, product * (3.0 if stabilised else 1.5))


@pytest.mark.parametrize("name", ["unet", "diffusers"])
def test_peft_loads_the_adapter(name: str, tmp_path: Path) -> None:
    """``PeftModel.from_pretrained`` on the plain network (of diffusers: on diffusers' own) gives the first average."""
    from peft import PeftModel

    fewstep.tune(
        make(name), data(name), out=tmp_path / "run", recipe="demo", device="cpu",
        overrides=SHORT | LORA | {"adapter.alpha": 3.0, "adapter.stabilised": True},
    )  # fmt: skip
    teacher = make(name)
    model = fewstep.load(tmp_path / "run").under(EDM())
    before = adapter_of(teacher.backbone)
    plain = teacher.backbone.network if name == "diffusers" else teacher.backbone
    loaded = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter")
    assert before is None
    assert isinstance(loaded.get_base_model(), type(plain))
    x, t = inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(teacher.eval()(x, t), model(x, t), atol=1e-5, rtol=1e-5)
        assert (model(x, t) - make(name)(x, t)).abs().max() > 1e-3
    record = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (record["peft_type"], record["r"], record["lora_alpha"]) == ("LORA", 2, 3.0)


def test_diffusers_loads_the_adapter_of_a_conditional_network(tmp_path: Path) -> None:
    """``load_lora_adapter`` of a UNet2DConditionModel, which knows no alpha: the scale is in B."""
    diffusers = pytest.importorskip("diffusers")
    from fewstep.backbones.lora import Adapter, attach
    from fewstep.checkpoint.adapter import save_adapter

    def network() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return diffusers.UNet2DConditionModel(
                sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
                layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ).eval()  # fmt: skip

    ours, theirs = network(), network()
    names = tuple(n for n, m in ours.named_modules() if type(m) in (nn.Linear, nn.Conv2d))
    attach(ours, Adapter("", names, 2, 6.0), seed=1)
    for n, p in ours.named_parameters():
        if "lora_B" in n:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(n)))
    denoiser = Denoiser(ours, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8))
    save_adapter(denoiser, tmp_path / "adapter", "somewhere")
    theirs.load_lora_adapter(tmp_path / "adapter", prefix="unet", use_safetensors=True)
    x, text = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        want, found, plain = (net(x, 3, text).sample for net in (ours, theirs, network()))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert (want - plain).abs().max() > 1e-3


def test_resumed_in_the_same_bits(run: Path, tmp_path: Path) -> None:
    again = stopped(tmp_path / "again", run.parent / "teacher")
    assert latest_checkpoint(again).name == f"images-{2 * ROWS:09d}"
    fewstep.resume(again, device="cpu")
    for file in ("student", "ema-0", "ema-1", "optimizer"):
        ours, theirs = (read_tensors(latest_checkpoint(each) / f"{file}.safetensors") for each in (again, run))
        assert changed(ours, theirs) == set()
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert changed(read_tensors(again / file), read_tensors(run / file)) == set()


def test_a_base_that_is_gone_or_another(tmp_path: Path) -> None:
    base = tmp_path / "teacher"
    fewstep.save_model(make("unet"), base)
    run = stopped(tmp_path / "run", base)
    assert fewstep.load(run).sample_shape == (1, 8, 8)
    other = make("unet")
    other.backbone.stem.weight.data[0, 0, 0, 0] += 1e-3
    fewstep.save_model(other, base)
    for act in (fewstep.load, fewstep.resume):
        with pytest.raises(CheckpointError, match="other weights are there. Put the model back"):
            act(run)
    base.rename(tmp_path / "away")
    for act in (fewstep.load, fewstep.resume):
        with pytest.raises(CheckpointError, match="the model '.*teacher' that the rest is from cannot be read"):
            act(run)
    assert fewstep.load(run, network=make("unet")).sample_shape == (1, 8, 8)


class Own(nn.Module):
    """A user's network, in which the name of a layer that takes no adapter ends like that of one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 64)
        self.block = nn.ModuleDict({"head": nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block["head"](x)).flatten(1)).reshape(x.shape)


def own() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser.from_module(Own(), process=EDM(), prediction="x0", sample_shape=(1, 8, 8))


def test_a_network_of_the_users_own(tmp_path: Path) -> None:
    """Its adapter has the names of the user's module; an unfinished run is read with the network given again."""
    run = stopped(tmp_path / "run", own(), **{"adapter.targets": ["head"]})
    with pytest.raises(CheckpointError, match="network of your own"):
        fewstep.load(run)
    with pytest.raises(CheckpointError, match="network of your own"):
        fewstep.resume(run)
    assert fewstep.load(run, network=own()).sample_shape == (1, 8, 8)
    fewstep.resume(run, teacher=own(), device="cpu")
    saved = read_tensors(run / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.head.lora_{each}.weight" for each in "AB"}
    assert fewstep.load(run, network=own()).sample_shape == (1, 8, 8)


def test_merge_on_request(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without ``model/`` is still a model; ``fewstep merge`` writes it."""
    plain = fewstep.tune(
        run.parent / "teacher", "digits", out=tmp_path / "run", recipe="demo", device="cpu",
        overrides=SHORT | LORA | {"adapter.merge": False},
    ).path  # fmt: skip
    assert not (plain / "model").exists()
    assert main(["merge", str(plain), "--out", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "model")
    theirs = read_tensors(run / "model" / "model.safetensors")
    assert changed(read_tensors(tmp_path / "model" / "model.safetensors"), theirs) == set()
    with pytest.raises(ConfigError, match=r"model' is a few-step model\. Got: a run tuned with 'ec"):
        require_diffusion(tmp_path / "model", "Data are made by a diffusion model")
    assert main(["merge", str(plain), "--weights", "student", "--out", str(tmp_path / "student")]) == 0
    assert changed(read_tensors(tmp_path / "student" / "model.safetensors"), theirs)
    assert main(["merge", str(plain), "--out", str(tmp_path / "model")]) == 2
    assert main(["merge", str(tmp_path / "model"), "--out", str(tmp_path / "b")]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_tuned_again_from_an_adapter_run(run: Path) -> None:
    """The merged model is a teacher like any other: all of it is trained."""
    student = make_student(fewstep.load(run, weights="student"), configure("tune", "demo", "ect", SHORT, "digits"))
    assert all(p.requires_grad for p in student.parameters())


def test_the_plan_counts_what_is_trained() -> None:
    found = plan(trainer_of(make("unet"), configured("ecd")), budget=0.1)
    whole = sum(p.nbytes for p in make("unet").parameters())
    own = 4 * found.trained
    assert (found.weights, found.gradients, found.optimizer, found.averages) == (whole + own, own, 2 * own, 2 * own)
    assert found.checkpoint == 5 * own


def test_start_of_a_depends_on_the_runs_seed_alone() -> None:
    first = adapter_tensors(make_student(make("unet"), configured()).backbone)
    torch.rand(7)
    again = adapter_tensors(make_student(make("unet"), configured()).backbone)
    other = adapter_tensors(make_student(make("unet"), configured(seed=1)).backbone)
    assert changed(first, again) == set()
    assert changed(first, other) == {name for name in first if "lora_A" in name}
    assert not any(tensor.any() for name, tensor in first.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.rank": 0}, "The rank of an adapter must be at least 1. Got: adapter.rank=0"),
        ({"adapter.targets": ["atention"]}, r"Got: atention. Did you mean 'attention'\? Some of its \d+ names: embed."),
        ({"adapter.alpha": 0}, "adapter.alpha must be positive"),
        ({"student.freeze": ["stem"]}, "choose where it acts with adapter.targets"),
        ({"student.start": "fresh"}, "A fresh network has nothing to keep"),
        ({"adapter.kind": "dora"}, "'adapter.kind' cannot be changed here. Got: dora. Wanted: lora"),
        ({"adapter.rang": 3}, "Did you mean 'rank'?"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_student(make("unet"), configured(**settings))


def test_networks_that_take_no_adapter() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    bare = Denoiser(module, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match="no layer that takes an adapter.*student.freeze"):
        make_student(bare, configured())
    twice = make_student(make("unet"), configured())
    with pytest.raises(ConfigError, match="carries an adapter already"):
        make_student(twice, configured())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft, which is not installed. Run: pip install 'fewstep\[hf\]'"):
        make_student(make("unet"), configured())
    with pytest.raises(ConfigError, match="Adapters and freezing are for tuning"):
        configure("pretrain", None, None, LORA, "digits")
