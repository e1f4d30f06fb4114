"""ResNet-18 as in He et al., "Deep Residual Learning for Image Recognition" (2015), table 1.

Its weights are random: what is asked is whether TensorRT takes the graph, not what it answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Block(nn.Module):  # type: ignore[misc]
    """Two convolutions and what goes past them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.other_norm = nn.BatchNorm2d(width)
        self.past: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.past = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, image: Tensor) -> Tensor:
        inside = torch.relu(self.norm(self.first(image)))
        return torch.relu(self.other_norm(self.second(inside)) + self.past(image))


class ResNet18(nn.Module):  # type: ignore[misc]
    """Images of 3 x 224 x 224 to 1,000 scores; 11.7 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )  # fmt: skip
        blocks: list[nn.Module] = []
        before = 64
        for width in (64, 128, 256, 512):
            for number in range(2):
                blocks.append(_Block(before, width, 2 if number == 0 and width > 64 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


def make_resnet18() -> nn.Module:
    """With random weights, the same every time."""
    torch.manual_seed(0)
    return ResNet18()


def resnet18_inputs() -> dict[str, Tensor]:
    """Random images."""
    return {"image": torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))}
