"""Three networks of one's own, as they become bundles. From this folder:

    nearfar convert nets:make_mlp -o models/mlp --inputs nets:mlp_inputs
    nearfar convert nets:make_cnn -o models/cnn --inputs nets:cnn_inputs --variants int8,fp32 \
        --int8 static
    nearfar convert nets:make_encoder -o models/encoder --inputs nets:encoder_inputs \
        --axes batch=0,tokens=1

A factory would load trained weights; these are seeded, so that they are the same every time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_mlp() -> nn.Module:
    """A table of 30 numbers to 2 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(30), nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2), nn.Softmax(dim=-1)
    )


def mlp_inputs() -> Tensor:
    """Rows of the table."""
    return torch.randn(16, 30, generator=torch.Generator().manual_seed(1))


class Cnn(nn.Module):
    """Images of 8 x 8 to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).flatten(1))


def make_cnn() -> nn.Module:
    torch.manual_seed(0)
    return Cnn()


def cnn_inputs() -> dict[str, Tensor]:
    """Inputs may be named as `forward` names its parameters."""
    return {"image": torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


class Encoder(nn.Module):
    """Tokens to one vector for each text, and a score; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(512, 32)
        self.positions = nn.Embedding(128, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score = nn.Linear(32, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.tokens(ids) + self.positions(positions)
        hidden = self.layers(hidden, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vector = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return {"vector": vector, "score": self.score(vector)}


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder()


def encoder_inputs() -> tuple[Tensor, Tensor]:
    """Two texts, one shorter than the other."""
    ids = torch.randint(1, 512, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask
