"""A module put into another mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """In evaluation mode; afterwards each part of it as it was."""
    before = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for each, training in before:
            each.training = training
