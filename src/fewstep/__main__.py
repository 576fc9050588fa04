"""``python -m fewstep``: the command line, also under torchrun."""

from __future__ import annotations

import sys

from fewstep.cli import main

if __name__ == "__main__":
    sys.exit(main())
