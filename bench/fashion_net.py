"""A small classifier of Fashion-MNIST at 16x16, whose features the comparison of objectives is measured in.

    python bench/fashion_net.py --data fashion_mnist_28x28_uint8.npz --out fashion16.safetensors

Takes about a minute on one CPU core and prints the accuracy on the test set. Needs nothing but the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import open_source
from fewstep.checkpoint.store import file_hash
from fewstep.evaluation.feature_net import FeatureNet, image_extractor

SIDE, WIDTH = 16, 128


class FashionNet(nn.Module):
    """Three 3x3 convolutions with pooling and one hidden layer, whose 128 values are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.three, self.hidden = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64 * 16, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[b, 1, 16, 16]`` in [-1, 1] -> features ``[b, 128]``."""
        x = F.relu(self.one(x))
        x = F.max_pool2d(F.relu(self.two(x)), 2)
        x = F.max_pool2d(F.relu(self.three(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))


def open_fashion_net(path: Path) -> FeatureNet:
    """The trained net for ``open_reference(source, net)``: numbers are named FD-FashionNet16."""
    net = FashionNet()
    net.load_state_dict(load_file(path))
    net.eval().requires_grad_(False)
    return FeatureNet(
        "FashionNet16", WIDTH, file_hash(path), image_extractor("FashionNet16", net, channels=1, side=SIDE)
    )


def images_of(data: str, split: str) -> tuple[Tensor, Tensor]:
    source = open_source(data, resize=SIDE, split=split)
    x = source.read(torch.arange(len(source)).numpy())
    return x, torch.from_numpy(source.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    net = FashionNet()
    x, y = images_of(arguments.data, "train")
    steps = arguments.epochs * len(x) // 128
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(x), (128,))
        images = x[rows].float() / 127.5 - 1
        loss = F.cross_entropy(net.head(F.dropout(net(images), 0.3)), y[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}  loss {float(loss):.3f}", flush=True)
    net.eval()
    x, y = images_of(arguments.data, "test")
    with torch.no_grad():
        right = sum(
            int((net.head(net(a.float() / 127.5 - 1)).argmax(1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    save_file(net.state_dict(), arguments.out)
    print(f"accuracy on the {len(x):,} test images: {right / len(x):.4f}; written: {arguments.out}")


if __name__ == "__main__":
    main()
