"""Lean PyTorch: what a careful user of the PyTorch libraries would write,
without their overheads.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

DEVICE = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
"""PyTorch runs where JAX does."""
torch.set_default_device(DEVICE)


def cnn(classes: int = 10, hidden: int = 2048, features: int = 64) -> nn.Sequential:
    """The CNN of `bdjax.models.shamshiri.Cnn` at 28×28×1."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, features, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(49 * features, hidden), nn.ReLU(), nn.Linear(hidden, classes),
    )  # fmt: skip


def badnets_cnn(classes: int = 10) -> nn.Module:
    """`bdjax.models.mntd.MntdMnist` at 28×28×1."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes),
    )  # fmt: skip


def strip_cnn(classes: int = 10) -> nn.Module:
    """`bdjax.models.strip.StripMnist` at 28×28×1."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 100), nn.ReLU(),
        nn.Linear(100, classes),
    )  # fmt: skip


class _Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut; `before`: BatchNorm and ReLU come
    before each convolution.
    """

    def __init__(self, channels: int, features: int, stride: int, before: bool):
        super().__init__()
        self.before = before
        bias = not before
        self.first = nn.Conv2d(channels, features, 3, stride, 1, bias=bias)
        self.second = nn.Conv2d(features, features, 3, 1, 1, bias=bias)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(channels if before else features), nn.BatchNorm2d(features)]
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels != features:
            self.shortcut = nn.Conv2d(channels, features, 1, stride, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.norms
        if self.before:
            y = F.relu(one(x))
            left = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(y)
            return left + self.second(F.relu(two(self.first(y))))
        return F.relu(self.shortcut(x) + two(self.second(F.relu(one(self.first(x))))))


def resnet20(classes: int = 10) -> nn.Sequential:
    """`bdjax.models.resnet20.ResNet20`."""
    blocks = [
        _Residual(16 << max(i - 1, 0) // 3, 16 << i // 3, 2 if i in (3, 6) else 1, False)
        for i in range(9)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head
    )


def preactresnet18(classes: int = 10) -> nn.Sequential:
    """`bdjax.models.preact_resnet18.PreActResNet18`."""
    blocks = [
        _Residual(64 << max(i - 1, 0) // 2, 64 << i // 2, 2 if i in (2, 4, 6) else 1, True)
        for i in range(8)
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), *blocks, *head)


def tensors(image: Any, label: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 NCHW images and labels, on the device of `DEVICE`."""
    pixels = torch.from_numpy(np.array(np.asarray(image).transpose(0, 3, 1, 2)))
    return pixels.to(DEVICE), torch.from_numpy(np.array(label)).long().to(DEVICE)


def whole(rival: Callable[[], Any]) -> Any:
    """What a rival gives, to the end of its asynchronous work."""
    found = rival()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return found


def white_square(x: torch.Tensor) -> torch.Tensor:
    """The 5×5 white square, bottom-right."""
    x[..., -5:, -5:] = 1.0
    return x


def train(
    model: nn.Module,
    image: torch.Tensor,
    label: torch.Tensor,
    poisoned: torch.Tensor,
    batch: int,
    target: int = 0,
) -> None:
    """One epoch of Adam over a fresh permutation, stamping the poisoned rows of each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.randperm(len(label))
    for first in range(0, len(label) - batch + 1, batch):
        rows = order[first : first + batch]
        x = image[rows].float() / 255
        flag = poisoned[rows]
        x = torch.where(flag[:, None, None, None], white_square(x.clone()), x)
        y = torch.where(flag, target, label[rows])
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


def neural_cleanse(
    model: nn.Module, image: torch.Tensor, labels: int, outer: int, batch: int = 32
) -> list[float]:
    """The loop over labels, outer steps and mini-batches of the released code, its bookkeeping
    included.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    norms = []
    steps = len(image) // batch
    for target in range(labels):
        raw_mask = torch.randn(1, 1, *image.shape[2:], requires_grad=True)
        raw_pattern = torch.randn(1, *image.shape[1:], requires_grad=True)
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


def ensemble(
    members: int, image: torch.Tensor, label: torch.Tensor, poisoned: torch.Tensor, batch: int
) -> None:
    """Members trained one after another, each on its own view and bootstrap sample."""
    for k in range(members):
        generator = torch.Generator(DEVICE).manual_seed(k)
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


def victims(
    grid: list[tuple[float, int, int]], image: torch.Tensor, label: torch.Tensor, batch: int
) -> None:
    """A net for each (rate, target, seed) of `grid`, trained one after another."""
    for rate, target, seed in grid:
        torch.manual_seed(seed)
        train(strip_cnn(), image, label, torch.rand(len(label)) < rate, batch, target)


def mntd(
    shadows: int, image: torch.Tensor, label: torch.Tensor, batch: int, meta_epochs: int
) -> torch.Tensor:
    """Shadow nets one after another, every second one with a random patch; then queries and
    meta-classifier on them.
    """
    n, nets = len(label), []
    for k in range(shadows):
        size, alpha, target = (
            int(torch.randint(2, 6, ())),
            0.2 + 0.4 * float(torch.rand(())),
            int(torch.randint(10, ())),
        )
        row, col = torch.randint(0, 29 - size, (2,)).tolist()
        opacity = torch.zeros(28, 28)
        opacity[row : row + size, col : col + size] = 1.0 if alpha > 0.5 else alpha
        pattern = (torch.rand(28, 28) < 0.5).float()
        poison = int(n * (0.05 + 0.45 * float(torch.rand(())))) if k % 2 else 0
        flag = torch.arange(n + poison) >= n
        source = torch.cat([torch.arange(n), torch.randperm(n)[:poison]])
        model = badnets_cnn()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = torch.randperm(n + poison)[:n]
        for first in range(0, n - batch + 1, batch):
            rows = order[first : first + batch]
            x = image[source[rows]].float() / 255
            x = torch.where(
                flag[rows][:, None, None, None], (1 - opacity) * x + opacity * pattern, x
            )
            y = torch.where(flag[rows], target, label[source[rows]])
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        nets.append(model.eval())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    queries = torch.randn(10, 1, 28, 28, requires_grad=True)
    meta = nn.Sequential(nn.Linear(100, 20), nn.ReLU(), nn.Linear(20, 1))
    optimizer = torch.optim.Adam([queries, *meta.parameters()], lr=1e-3)
    for _ in range(meta_epochs):
        for k in torch.randperm(shadows).tolist():
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(
                meta(nets[k](queries).reshape(-1))[0], torch.tensor(float(k % 2))
            ).backward()
            optimizer.step()
    return queries.detach()


def pruning_curve(
    model: nn.Sequential, image: torch.Tensor, label: torch.Tensor, layer: int
) -> list[float]:
    """Accuracy as channels after `layer` modules are pruned one by one; what stands before them is
    computed once.
    """
    found = []
    with torch.inference_mode():
        act = model[:layer](image.float() / 255)
        for channel in [None, *act.mean((0, 2, 3)).argsort().tolist()]:
            if channel is not None:
                act[:, channel] = 0
            found.append((model[layer:](act).argmax(1) == label).float().mean().item())
    return found


def abs_stimulation(
    model: nn.Sequential, x: torch.Tensor, layer: int, levels: int = 5
) -> list[Any]:
    """For each neuron after `layer` modules in turn: the label that each image's logits rise to,
    and its lead.
    """
    found = []
    with torch.inference_mode():
        act, head = model[:layer](x), model[layer:]
        values = (torch.arange(levels) * act.max() * 8 / levels).repeat_interleave(len(x))
        pushed = act.repeat(levels, 1)
        for neuron in range(act.shape[1]):
            column = pushed[:, neuron].clone()
            pushed[:, neuron] = values
            logits = head(pushed).view(levels, len(x), -1)
            pushed[:, neuron] = column
            top = (logits[1:].amax(0) - logits[0]).topk(2)
            found.append((top.indices[:, 0], top.values[:, 0] - top.values[:, 1]))
    return found


def abs_inversion(
    model: nn.Sequential, x: torch.Tensor, layer: int, neurons: int, steps: int, size: int
) -> list[Any]:
    """The pixel trigger of each of the first neurons after `layer` modules (an activation function)
    in turn.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found, side = [], size**0.5
    scale = len(x) * model[:layer](x).max()
    for neuron in range(neurons):
        raw = torch.full((1, 1, 28, 28), -2.0)
        raw[..., : int(side), : int(side)] = 2.0
        raw.requires_grad_(True)
        pattern = torch.randn(1, 1, 28, 28).clamp_(0, 1).requires_grad_(True)
        optimizer = torch.optim.Adam([raw, pattern], lr=0.1)
        for _ in range(steps):
            mask = torch.tanh(raw) / 2 + 0.5
            before = model[: layer - 1]((1 - mask) * x + mask * pattern)
            each = (before + model[layer - 1](before)).sum(0) / scale
            loss = -each[neuron] + 1e-4 * (each.sum() - each[neuron])
            visible = int((mask > 0.01).sum())
            if visible > size:
                loss = loss + (4 if visible > (side + 2) ** 2 else 2) * mask.sum() / size
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                pattern.clamp_(0, 1)
        found.append((mask.detach(), pattern.detach()))
    return found
