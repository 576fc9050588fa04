"""r(t) and the ImageNet weight against the peer's numbers (shared/golden/mapping.npz)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.penalty import weigh
from fewstep.times import Constant, Sigmoid, pair


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "mapping.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("branch", ["main", "imgnet"])
@pytest.mark.parametrize("adjust", ["const", "sigmoid"])
def test_every_case(arrays: dict[str, np.ndarray], branch: str, adjust: str) -> None:
    """r to 1e-12 of t, r = 0 on the same rows, and the gap without its cancellation."""
    t = torch.from_numpy(arrays[f"{branch}/t"])
    cases = [name for name in arrays if name.startswith(f"{branch}/{adjust}/") and name.endswith("/r_f64")]
    assert len(cases) == 64
    for name in cases:
        q, k, b, stage = (float(v) for v in re.findall(r"/q([\d.]+)/k([\d.]+)_b([\d.]+)/stage(\d+)/", name)[0])
        mapping = Constant() if adjust == "const" else Sigmoid(k, b)
        power = q ** (stage + 1)
        want = torch.from_numpy(arrays[name])
        assert float(arrays[name.replace("r_f64", "ratio")]) == pytest.approx(1 - 1 / power, rel=1e-12)
        r, gap = pair(mapping, t, power)
        assert float(((r - want) / t).abs().max()) < 1e-12, name
        # the peer rounds in the last bit where t(1 - n/q) is just above or below 0
        decided = (want > 0) | (t - t * mapping.n(t) / power < -1e-12 * t)
        assert torch.equal((r > 0)[decided], (want > 0)[decided]), name
        torch.testing.assert_close(gap, t - want, rtol=1e-14, atol=1e-12 * 500)


def test_the_imagenet_weight(arrays: dict[str, np.ndarray]) -> None:
    t = torch.from_numpy(arrays["imgnet/t"])
    weights = [name for name in arrays if name.endswith("weight_f64")]
    assert weights
    for name in weights:
        want = torch.from_numpy(arrays[name])
        torch.testing.assert_close(weigh("snrpk", t, t, 0.5), want, rtol=1e-12, atol=0)
