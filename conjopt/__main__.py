"""``python -m conjopt``: the command ``conjopt``."""

from __future__ import annotations

import sys

from conjopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
