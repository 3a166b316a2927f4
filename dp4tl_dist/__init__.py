"""Target-aware pretraining: prune the source dataset for a target, then pretrain on what is left."""

__version__ = "0.1.0"
