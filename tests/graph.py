"""What a CUDA graph would do with the operations of some Python code, on a CPU.

Capturing keeps every operation with the very tensors that it read and wrote. Replaying runs them
again on this memory, whatever Python has replaced since; so it shows what a graph would leave out.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conjopt import ConjSGD

# What reads a value on the host, or asks for its size there: not allowed while capturing.
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}


class Capture(TorchDispatchMode):
    """Inside the block operations are kept, and run as ever."""

    def __init__(self):
        super().__init__()
        self.operations, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        moves = name == "_to_copy" and kwargs.get("device") is not None
        if name in READS or moves:
            self.reads.append(name)
        self.operations.append((function, args, kwargs, out))
        return out

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.operations:
                again = function(*args, **kwargs)
                for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                    fresh = isinstance(new, Tensor) and new.data_ptr() != old.data_ptr()
                    if fresh and new.numel():
                        old.copy_(new)


@contextlib.contextmanager
def as_on_a_device(monkeypatch):
    """A CPU is asked whether a step is finite; a device is not. Take the way of devices."""
    with monkeypatch.context() as patch:
        patch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
        patch.setattr(ConjSGD, "_gate", lambda self, finite: finite)
        patch.setattr("conjopt.optim.checks.positive", lambda weight: None)
        patch.setattr("conjopt.optim.blocks.is_known_one", lambda number: False)
        yield
