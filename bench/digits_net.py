"""A small convolutional network trained on scikit-learn's digits in seconds; ``python bench/digits_net.py`` folds it.

The tests' network: no download, no file, the same from run to run on one machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyfold

TRAINED_ON = 1200


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """In evaluation mode; images (597, 1, 8, 8) and labels that it did not see."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(load_digits().target)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    module = nn.Sequential(
        *[nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()],
        *[nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU()],
        *[nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)],
    )
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(TRAINED_ON).split(64):
            loss = F.cross_entropy(module(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval(), images[TRAINED_ON:], labels[TRAINED_ON:]


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((module(images).argmax(1) == labels).float().mean())


def main() -> None:
    module, images, labels = trained()
    print(f"dense        {accuracy(module, images, labels):.1%}")
    for ratio in (0.25, 0.5, 0.75):
        for repair in (None, "ar", "dir"):
            folded, report = pyfold.fold_model(module, example_inputs=images[:1], ratio=ratio, repair=repair, n_images=64)
            reached = accuracy(folded, images, labels)
            print(f"{repair or 'none':5} {reached:13.1%}   {report.removed_share:.0%} of the parameters removed")


if __name__ == "__main__":
    main()
