"""One part of `python -m eval gpu`, in a process of its own: `python -m eval.gpu PART RESULTS`."""

import sys
from pathlib import Path

from eval.gpu import run_part

if __name__ == "__main__":
    sys.exit(run_part(sys.argv[1], Path(sys.argv[2])))
