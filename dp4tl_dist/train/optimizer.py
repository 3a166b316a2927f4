"""Optimizers by name, and loading the state of one from a file that anybody may have written."""

from typing import Any

import torch
from torch import nn

from dp4tl_dist.config import OptimConfig


def make_optimizer(module: nn.Module, train: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer over the parameters that ask for gradients. Its learning rate is set anew at every step."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=fused
        )
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, once it is known to be that of these parameters under these settings: torch takes any."""
    own = optimizer.state_dict()["param_groups"]
    settings = [{key: value for key, value in group.items() if key != "lr"} for group in own]
    if [{key: group.get(key) for key in group if key != "lr"} for group in state["param_groups"]] != settings:
        raise ValueError("the optimizer's settings are others")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and not fits(value, parameters[number]):
                raise ValueError(f"the optimizer's {name} of parameter {number} is {value.dtype} {list(value.shape)}")
    optimizer.load_state_dict(state)


def fits(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether a tensor of the optimizer's can belong to the parameter: a number, or one for each of its own."""
    if not value.is_floating_point() or value.is_meta or value.shape not in (parameter.shape, torch.Size()):
        return False
    # A file may hold a tensor whose elements share one place, which nothing can be written to.
    return value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
