"""Target-aware pretraining: prune the source dataset for a target, then pretrain on what is left."""

import os

__version__ = "0.1.0"

# On Intel's processors MKL, which torch multiplies matrices with, rounds as its number of threads and the alignment of
# memory have it, unless it is told not to; what is promised for any number of ranks would differ in the last bits. MKL
# reads this at its first product, so it is set here, where every way in passes: the command, `python -m`, torchrun,
# srun and `import dp4tl_dist`. Who has set it has a reason.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
