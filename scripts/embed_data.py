"""Write the two data sets that ship with the package, ``src/fewstep/data/embedded/{digits,tiles}.npz``.

    python scripts/embed_data.py ../shared/data/dcss_nov2015_cc0_32x32_rgba.npz

Needs scikit-learn (for the digits). Lossless: ``digits`` keeps the counts 0..16, ``tiles`` the RGBA bytes.
Each file has ``x`` (uint8 ``[n,h,w]`` or ``[n,h,w,c]``), ``labels`` (uint8 ``[n]``) and ``classes`` (names).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

EMBEDDED = Path(__file__).resolve().parents[1] / "src" / "fewstep" / "data" / "embedded"


def embed_digits() -> None:
    """The 8x8 counts of scikit-learn's ``load_digits``, in its order."""
    digits = load_digits()
    x, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    assert np.array_equal(x, digits.images), "the counts are not whole numbers"
    np.savez_compressed(EMBEDDED / "digits.npz", x=x, labels=labels, classes=digits.target_names.astype(str))


def embed_tiles(source: Path) -> None:
    """The tiles of one release; the class is the first folder of ``releases/<release>/<class>/...``."""
    with np.load(source, allow_pickle=False) as arrays:
        x, paths = arrays["x"], arrays["paths"]
    classes, labels = np.unique([path.split("/")[2] for path in paths], return_inverse=True)
    np.savez_compressed(EMBEDDED / "tiles.npz", x=x, labels=labels.astype(np.uint8), classes=classes)


if __name__ == "__main__":
    EMBEDDED.mkdir(parents=True, exist_ok=True)
    embed_digits()
    embed_tiles(Path(sys.argv[1]))
