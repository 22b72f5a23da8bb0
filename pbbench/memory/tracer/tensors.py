"""The tensors in what a step is given: in nestings, modules, optimizers, and in tensors made of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with one storage each that a tensor consists of: itself, or a wrapper's or sparse tensor's parts."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in plain_parts(getattr(tensor, name))]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []  # opaque (MKL-DNN): there is no storage to count


def first_device(roots: Iterable[nn.Module], inputs: Any) -> torch.device | None:
    for tensor in (*(t for root in roots for t in (*root.parameters(), *root.buffers())), *tensors_in(inputs)):
        return tensor.device
    return None


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.parameters()
            yield from leaf.buffers()


def state_tensors(optimizer: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
