"""The log of every sample's loss: what it holds, exact under resume and over ranks; the scores that are made of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton
from numpy.typing import NDArray
from ranks import run_ranks

from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.losses import NAME, SampleLosses, load_losses
from dp4tl_dist.errors import Stopped, UserError
from dp4tl_dist.files import load_npz, save_npz
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.prune.loss_scores import cld, forgetting
from dp4tl_dist.prune.score import score
from dp4tl_dist.prune.scores_file import load_scores
from dp4tl_dist.train import watch
from dp4tl_dist.train.supervised import train
from dp4tl_dist.world import World
