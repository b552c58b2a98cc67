"""Lean PyTorch: what a careful user of the PyTorch libraries would write, without their overheads."""
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def cnn(classes: int = 10) -> nn.Module:
    """The CNN of `bdjax.models.shamshiri.Cnn` at 28×28×1."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 2048), nn.ReLU(), nn.Linear(2048, classes),
    )  # fmt: skip


def tensors(image: Any, label: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 NCHW images and labels."""
    pixels = torch.from_numpy(np.array(np.asarray(image).transpose(0, 3, 1, 2)))
    return pixels, torch.from_numpy(np.array(label)).long()


def white_square(x: torch.Tensor) -> torch.Tensor:
    """The 5×5 white square, bottom-right."""
    x[..., -5:, -5:] = 1.0
    return x


def train(model: nn.Module, image: torch.Tensor, label: torch.Tensor, poisoned: torch.Tensor, batch: int) -> None:
    """One epoch of Adam over a fresh permutation, stamping the poisoned rows of each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.randperm(len(label))
    for first in range(0, len(label) - batch + 1, batch):
        rows = order[first : first + batch]
        x = image[rows].float() / 255
        flag = poisoned[rows]
        x = torch.where(flag[:, None, None, None], white_square(x.clone()), x)
        y = torch.where(flag, 0, label[rows])
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def strip(model: nn.Module, inputs: torch.Tensor, overlays: torch.Tensor) -> torch.Tensor:
    """Entropy of each input, its replicas as one batch."""
    found = []
    with torch.inference_mode():
        for x in inputs:
            p = F.softmax(model(x[None] + overlays), 1)
            found.append(torch.nan_to_num(-p * torch.log2(p)).sum(1).mean())
    return torch.stack(found)


def neural_cleanse(model: nn.Module, image: torch.Tensor, labels: int, outer: int, batch: int = 32) -> list[float]:
    """The loop over labels, outer steps and mini-batches of the released code, its bookkeeping included."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norms = []
    steps = len(image) // batch
    for target in range(labels):
        raw_mask = torch.randn(1, 1, 28, 28, requires_grad=True)
        raw_pattern = torch.randn(1, 1, 28, 28, requires_grad=True)
        optimizer = torch.optim.Adam([raw_mask, raw_pattern], lr=0.1, betas=(0.5, 0.9))
        y = torch.full((batch,), target)
        cost, best, up, down = 0.0, float("inf"), 0, 0
        for _ in range(outer):
            hits, norm = 0.0, 0.0
            for i in range(steps):
                x = image[i * batch : (i + 1) * batch].float() / 255
                mask, pattern = torch.tanh(raw_mask) / 2 + 0.5, torch.tanh(raw_pattern) / 2 + 0.5
                logits = model((1 - mask) * x + mask * pattern)
                size = mask.abs().sum()
                optimizer.zero_grad(set_to_none=True)
                (F.cross_entropy(logits, y) + cost * size).backward()
                optimizer.step()
                hits += (logits.argmax(1) == y).float().mean().item()
                norm += size.item()
            success, norm = hits / steps, norm / steps
            if success >= 0.99 and norm < best:
                best = norm
            up, down = (up + 1, 0) if success >= 0.99 else (0, down + 1)
            if up >= 5:
                cost, up = (1e-3 if cost == 0 else cost * 2), 0
            elif down >= 5:
                cost, down = cost / 2**1.5, 0
        norms.append(best)
    return norms


def ensemble(members: int, image: torch.Tensor, label: torch.Tensor, poisoned: torch.Tensor, batch: int) -> None:
    """Members trained one after another, each on its own view and bootstrap sample."""
    for k in range(members):
        generator = torch.Generator().manual_seed(k)
        rows = torch.randint(len(label), (len(label),), generator=generator)
        view = (torch.rand(1, 1, 28, 28, generator=generator) < 0.25).float()
        model = nn.Sequential(_View(view), cnn())
        train(model, image[rows], label[rows], poisoned[rows], batch)


class _View(nn.Module):
    def __init__(self, view: torch.Tensor):
        super().__init__()
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.view
