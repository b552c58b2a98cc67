"""Small nets of PyTorch, made on the spot, and their files, that the tests of imports share."""

import io
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F, nn = torch.nn.functional, torch.nn
SIDE, CLASSES = 32, 10


class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(b), nn.BatchNorm2d(b), nn.ReLU()
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(a, b, 1, stride) if a != b else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.SiLU(),
        )  # fmt: skip
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1),
            nn.Hardsigmoid(),
        )  # fmt: skip
        self.classifier = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = self.features(x)
        return self.classifier((x * self.squeeze(x)).mean([2, 3]))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d((4, 4)), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip


NETS = {"resnet": ResNet, "vgg": vgg, "mobile": Mobile, "vit": ViT}


def made(name, seed=0):
    """A net with statistics of BatchNorm that are not those of a fresh one, in evaluation mode."""
    torch.manual_seed(seed)
    net = NETS[name]()
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
        net.train()(torch.rand(16, 3, SIDE, SIDE))
    return net.eval()


def images(count=4, side=SIDE, channels=3):
    return np.random.default_rng(0).random((count, side, side, channels), np.float32)


def logits(net, x):
    with torch.no_grad():
        return net(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()


def onnx_bytes(net, how="legacy", opset=17):
    """The net as ONNX by torch's older exporter, with one image (`legacy`), any number (`dynamic`),
    with BatchNorm left apart (`training`), or by the newer one (`dynamo`).
    """
    x, file = torch.rand(1, 3, SIDE, SIDE), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "dynamo":
            pytest.importorskip("onnxscript")
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
            return program.model_proto.SerializeToString()
        kept = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
        named = {"input_names": ["image"], "dynamic_axes": {"image": {0: "n"}}}
        torch.onnx.export(
            net, (x,), file, dynamo=False, opset_version=opset,
            **(named if how != "legacy" else {}), **(kept if how == "training" else {}),
        )  # fmt: skip
    return file.getvalue()
