"""A folded module as files: weights as safetensors, widths as JSON; and back into the architecture that it was folded from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import pyfold
from pyfold.errors import PyfoldError
from pyfold.modules.folding import state_of, with_state
from pyfold.modules.norms import SHARE

WEIGHTS, WIDTHS = "model.safetensors", "pyfold-widths.json"


def save_model(module: nn.Module, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``pyfold-widths.json`` (every shape) into a folder, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state_of(module).items()}
    widths = {"pyfold": pyfold.__version__, "shapes": {name: list(tensor.shape) for name, tensor in state.items()}}
    for name in (WEIGHTS, WIDTHS):
        part = folder / f"{name}.part"
        if name == WEIGHTS:
            save_file(state, part)
        else:
            part.write_text(json.dumps(widths, indent=1) + "\n")
        os.replace(part, folder / name)


def load_model(module: nn.Module, folder: str | Path) -> nn.Module:
    """A copy of ``module``, of the architecture that was folded at its full widths, with the widths and weights of a folder.

    Raises
    ------
    ValueError
        If the folder holds no such files, or their tensors are not those of ``module``.
    """
    folder = Path(folder)
    try:
        shapes = json.loads((folder / WIDTHS).read_text())["shapes"]
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PyfoldError(f"{folder}: not what save_model writes ({error})") from error
    names = set(state_of(module))
    norms = {f"{name}.{SHARE}" for name, each in module.named_modules() if isinstance(each, nn.LayerNorm)}
    if names - set(state) or set(state) - names - norms:
        odd = sorted((names - set(state)) | (set(state) - names - norms))[0]
        raise PyfoldError(
            f"{folder}: '{odd}' is {'not in the file' if odd in names else 'not in the module'}; wrong architecture?"
        )
    for name, tensor in state.items():
        if list(tensor.shape) != shapes.get(name):
            raise PyfoldError(f"{folder}: {name} has shape {list(tensor.shape)} in {WEIGHTS}, {shapes.get(name)} in {WIDTHS}")
    return with_state(module, state)
