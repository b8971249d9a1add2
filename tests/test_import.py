"""`import conjopt` stays cheap: what is slow to load waits until it is used."""

import subprocess
import sys
from pathlib import Path

import conjopt

ROOT = Path(__file__).parents[1]
SLOW = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
    "matplotlib",
    "sklearn",
    "lightning",
    "transformers",
    "tensorboard",
    "hypothesis",
    "conjopt.regularizers",
    "conjopt.report",
)


def test_nothing_slow_is_loaded():
    code = (
        "import sys, torch; before = set(sys.modules); import conjopt;"
        f"slow = (set(sys.modules) - before) & set({SLOW!r}); sys.exit(str(slow) if slow else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_dir_names_what_is_imported_late():
    assert set(conjopt.__all__) <= set(dir(conjopt))
