"""`python -m dp4tl_dist VERB ...`, which torchrun and srun start on every rank."""

import os
import sys

from dp4tl_dist.cli import main
from dp4tl_dist.siblings import started_by_launcher

if __name__ == "__main__":
    code = main()
    if started_by_launcher():
        # All is written and the group of ranks is left. Native threads of the libraries may be caught by the
        # interpreter's end ("terminate called without an active exception"), and the launcher would see a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
