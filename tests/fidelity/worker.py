"""Run by test_torch_fidelity.py in a process of its own: our numbers beside torch-fidelity's, as JSON on stdout.

torch-fidelity imports torchvision, whose registry build does not load beside a CPU torch unless two operators are
declared first (nothing here calls them). That trick belongs to this process alone, not to the product.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SAMPLES = 24


def declare_missing_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def stand_in_weights(path: Path) -> dict[str, Tensor]:
    """Random weights of the right shapes that keep the scale of the activations, saved as the published ones are."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: object) -> None:
            """Nothing: keeps the weights of the constructor."""

    torch.save({}, path)
    net = Blank("blank", ["2048"], feature_extractor_weights_path=path)
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    nn.init.normal_(net.fc.weight, 0, 1.0)
    common = net(two_sets()[0][:4])[0].mean(0)
    common /= common.norm()
    net.fc.weight -= (net.fc.weight @ common)[:, None] * common  # logits that differ from image to image
    nn.init.normal_(net.fc.bias, 0, 3.0)  # large, so that forgetting to leave it out shows
    state = {k: v.contiguous() for k, v in net.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, path, _use_new_zipfile_serialization=False)  # a plain dict in the older layout, as published
    return state


class Images(torch.utils.data.Dataset):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


def two_sets() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    noise = torch.rand(2, SAMPLES, 3, 32, 32, generator=rng)
    smooth = nn.functional.avg_pool2d(noise[1], 3, stride=1, padding=1)
    return (noise[0] * 255).byte(), (smooth * 200 + 40).byte()


def inception_score(logits: Tensor) -> float:
    p = logits.double().softmax(1)
    return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())


def main(folder: Path) -> dict[str, Any]:
    keep = declare_missing_operators()
    import torch_fidelity

    from fewstep.errors import FewstepError
    from fewstep.evaluation.features import features_of, iter_outputs, open_features
    from fewstep.evaluation.metrics import frechet_distance, gaussian_stats, kid

    path = folder / "stand-in.pth"
    state = stand_in_weights(path)
    a, b = two_sets()
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(a), input2=Images(b), fid=True, isc=True, kid=True, isc_splits=1, kid_subsets=1,
        kid_subset_size=SAMPLES, batch_size=20, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(path),
    )  # fmt: skip

    torch.manual_seed(5)
    before = torch.get_rng_state()
    net = open_features(f"inception:{path}")
    quiet = torch.equal(torch.get_rng_state(), before)
    parts = list(iter_outputs(net, a, batch_size=16))
    fa, logits = torch.cat([f for f, _ in parts]), torch.cat([part for _, part in parts])
    fb = features_of(net, b, batch_size=20)

    save_file(state, folder / "stand-in.safetensors")
    same = features_of(open_features(f"inception:{folder / 'stand-in.safetensors'}"), a[:2])
    grey = a[:2, :1]
    refusals = {}
    for name, change in {
        "classes": {"fc.weight": torch.zeros(1000, 2048)},
        "layer": {"Conv2d_1a_3x3.conv.weight": None},
    }.items():
        other = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(other, folder / f"{name}.pth")
        try:
            open_features(f"inception:{folder / f'{name}.pth'}")
        except FewstepError as error:
            refusals[name] = str(error)
    del keep
    return {
        "theirs": theirs,
        "fid": frechet_distance(gaussian_stats(fa), gaussian_stats(fb)),
        "kid": kid(fa, fb, size=SAMPLES, seed=0)[0],
        "is": inception_score(logits),
        "is with bias": inception_score(logits + state["fc.bias"]),
        "spread": float(fa.std()),
        "shapes": [list(fa.shape), list(logits.shape)],
        "net": [net.name, net.dim, net.hash, net.verified, net.preprocessing],
        "quiet": quiet,
        "safetensors": float((same - fa[:2]).abs().max()),
        "grey": float((features_of(net, grey) - features_of(net, grey.repeat(1, 3, 1, 1))).abs().max()),
        "refusals": refusals,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
