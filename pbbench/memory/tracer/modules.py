"""Which module is running: in forward by hooks, in backward by the numbers autograd gave the nodes of that forward.

The hooks are torch's global ones, limited to the modules given, so nothing is left behind in the user's model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

OUTSIDE = "(outside modules)"
BACKWARD = "(backward)"


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread (a checkpoint's recomputation included)."""
    return torch._C._current_graph_task_id() != -1


class RunningModule:
    """Names the innermost running module among the modules under ``roots``. A root without a name goes by its class."""

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self._names = {
            id(module): ".".join(part for part in (root_name, name) if part) or type(module).__name__
            for root_name, root in roots.items()
            for name, module in root.named_modules()
        }
        self._roots = {id(root) for root in roots.values()}
        self._stack = [OUTSIDE]
        self._node_numbers: list[int] = []
        self._node_modules: list[str] = []

    @contextmanager
    def watch(self, root_begins: Callable[[], None]) -> Iterator[None]:
        """Follow the modules' calls meanwhile; ``root_begins`` is called before a root's forward (not a recomputed one)."""

        def begins(module: nn.Module, args: Any) -> None:
            name = self._names.get(id(module))
            if name is not None:
                if id(module) in self._roots and not in_backward():
                    root_begins()
                self._stack.append(name)
                self._note_nodes_of(name)

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            if id(module) in self._names and len(self._stack) > 1:
                self._stack.pop()
                self._note_nodes_of(self._stack[-1])

        with ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(begins).remove)
            hooks.callback(register_module_forward_hook(ends, always_call=True).remove)
            yield

    def name(self) -> str:
        """The module that runs now; in backward "name (backward)", the one whose operator is being differentiated."""
        running = self._stack[-1]
        if running is not OUTSIDE or not in_backward():  # a module running in backward is being recomputed
            return running
        number = getattr(torch._C._current_autograd_node(), "_sequence_nr", int)()
        position = bisect_right(self._node_numbers, number) - 1
        # a node that accumulates a gradient has the number 2⁶⁴ − 1 and belongs to no forward
        if position < 0 or number >= 2**63 or self._node_modules[position] is OUTSIDE:
            return BACKWARD
        return f"{self._node_modules[position]} {BACKWARD}"

    def _note_nodes_of(self, name: str) -> None:
        """Autograd numbers its nodes as they are made: those from here on belong to ``name``."""
        if torch.is_grad_enabled() and not in_backward():
            self._node_numbers.append(torch._C._autograd._get_sequence_nr())
            self._node_modules.append(name)
