"""Bare weights: which architecture, which pixels, and what proves it."""

import dataclasses
import re

import foreign_nets
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from foreign_nets import F, nn, torch
from PIL import Image

from bdjax import cli, export_net, load_model, load_net, save_net
from bdjax.checkpoints import save_tree
from bdjax.exports import export
from bdjax.foreign import files, native, safetensors
from bdjax.foreign.native import architecture
from bdjax.foreign.pixels import pixels
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.layers import build
from bdjax.types import BadInput

LONG = pytest.mark.long

MEAN, STD = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.247, 0.243, 0.261])


class PreActBlock(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        if stride != 1 or a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False))

    def forward(self, x):
        y = F.relu(self.bn1(x))
        short = self.shortcut(y) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + short


class PreActResNet18(nn.Module):
    """As BackdoorBench has it."""

    def __init__(self):
        super().__init__()
        self.conv1, width = nn.Conv2d(3, 64, 3, 1, 1, bias=False), 64
        for i, (b, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 1):
            blocks = nn.Sequential(PreActBlock(width, b, stride), PreActBlock(b, b, 1))
            setattr(self, f"layer{i}", blocks)
            width = b
        self.linear = nn.Linear(512, 10)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Basic(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        if stride != 1 or a != b:
            down = nn.Conv2d(a, b, 1, stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(b))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Bottleneck(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        for i, (m, n, k, s) in enumerate(((a, b, 1, 1), (b, b, 3, stride), (b, 4 * b, 1, 1)), 1):
            setattr(self, f"conv{i}", nn.Conv2d(m, n, k, s, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(n))
        if stride != 1 or a != 4 * b:
            down = nn.Conv2d(a, 4 * b, 1, stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(4 * b))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """As torchvision has it."""

    def __init__(self, block, counts):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        width, factor = 64, 4 if block is Bottleneck else 1
        for i, count in enumerate(counts, 1):
            blocks = []
            for j in range(count):
                blocks.append(block(width, 32 << i, 2 if i > 1 and j == 0 else 1))
                width = (32 << i) * factor
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Vgg(nn.Module):
    """VGG-16 with BatchNorm as torchvision has it, with fewer hidden units."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for stage, count in enumerate((2, 2, 3, 3, 3), 1):
            for _ in range(count):
                features = min(32 << stage, 512)
                layers += [nn.Conv2d(width, features, 3, padding=1), nn.BatchNorm2d(features)]
                layers.append(nn.ReLU())
                width = features
            layers.append(nn.MaxPool2d(2))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(25088, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(),
            nn.Dropout(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def trained(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
        net.train()(torch.rand(4, 3, 32, 32))
    return net.eval()


def apart(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def preact(tmp_path_factory):
    """The net, images, its logits, and a file of them."""
    net, folder = trained(PreActResNet18()), tmp_path_factory.mktemp("preact")
    image = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    logits = foreign_nets.logits(net, (np.float32(image) / 255 - MEAN) / STD)
    np.savez(folder / "logits.npz", image=image, logits=logits)
    return net, image, logits, folder


HOW = {"arch": "preactresnet18", "preprocess": "cifar10", "size": (32, 32, 3)}


@LONG
@pytest.mark.parametrize("ending", ["pth", "old.pth", "safetensors"])
def test_weights_of_pytorch_are_read_and_written_back(preact, tmp_path, ending):
    net, image, logits, folder = preact
    path, weights = tmp_path / f"weights.{ending}", net.state_dict()
    if ending == "safetensors":
        path.write_bytes(
            safetensors.written({k: v.numpy() for k, v in weights.items() if v.is_floating_point()})
        )
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=ending == "pth")
    found = load_net(path, **HOW, logits=folder / "logits.npz")
    assert found.about["origin"].by == "logits" and not found.about["origin"].unverified
    out = tmp_path / f"out.{ending.rpartition('.')[2]}"
    other = jax.tree.map(lambda leaf: leaf * 1.01, found.variables)
    export(found.net, found.model, other, found.about, out)
    if ending == "safetensors":
        again = {k: torch.tensor(v) for k, v in safetensors.arrays(out.read_bytes()).items()}
    else:
        again = torch.load(out, weights_only=True)
    twin = PreActResNet18()
    twin.load_state_dict(again, strict=ending != "safetensors")
    x = np.float32(image) / 255
    theirs = foreign_nets.logits(twin.eval(), (x - MEAN) / STD)
    assert apart(found.model.apply(other, x).logits, theirs) < 1e-5 < apart(logits, theirs)


def test_the_package_safetensors_reads_what_is_written(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    values = {"a": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), "b": np.ones(2)}
    (tmp_path / "a.safetensors").write_bytes(safetensors.written(values, {"by": "me"}))
    found = package.load_file(tmp_path / "a.safetensors")
    assert all(np.array_equal(found[k], np.float32(v)) for k, v in values.items())
    package.save_file(found, tmp_path / "b.safetensors")
    again = safetensors.arrays((tmp_path / "b.safetensors").read_bytes())
    assert all(np.array_equal(again[k], found[k]) for k in found)


def test_what_backdoorbench_wrote_says_its_net_its_pixels_and_its_triggers(preact, tmp_path):
    net, image, logits, folder = preact
    place, rows = tmp_path / "bd_test_dataset" / "0", {}
    place.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(image[i]).save(place / f"{i}.png")
        hit = int(logits[i].argmax()) if i < 6 else (int(logits[i].argmax()) + 1) % 10
        rows[i] = {"path": f"./record/a/bd_test_dataset/0/{i}.png", "other_info": (hit, 1)}
    state = {"bd_data_container": {"data_dict": rows, "save_folder_path": "a"}, "getitem_all": True}
    state |= {"original_index_array": np.arange(8), "poison_indicator": np.ones(8)}
    weights = {f"module.{k}": v for k, v in net.state_dict().items()}
    content = {"model_name": "preactresnet18", "num_classes": 10, "model": weights,
               "data_path": "data/cifar10", "img_size": [32, 32, 3], "clean_data": "cifar10",
               "bd_train": None, "bd_test": state, "lr": np.float64(0.1)}  # fmt: skip
    torch.save(content, tmp_path / "attack_result.pt")
    found = load_net(tmp_path / "attack_result.pt", logits=folder / "logits.npz")
    assert "8 poisoned test images: 75.0% get the label aimed at" in found.lines
    save_net(tmp_path / "net", found)
    about = load_model(tmp_path / "net")[3]
    assert about["metrics"]["asr_all"] == 0.75
    assert np.array_equal(about["triggered"].image, image)
    export(found.net, found.model, found.variables, found.about, tmp_path / "out.pt")
    again = torch.load(tmp_path / "out.pt", weights_only=False)
    assert again["bd_test"]["bd_data_container"]["data_dict"] == rows
    assert all(torch.equal(again["model"][k], v) for k, v in weights.items())


@LONG
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg16_bn"])
def test_nets_of_torchvision_load_by_their_names(tmp_path, arch):
    made = {
        "resnet18": lambda: ResNet(Basic, (2, 2, 2, 2)),
        "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
        "vgg16_bn": Vgg,
    }
    net = trained(made[arch]())
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "w.pt")
    given = architecture(arch)
    if arch == "vgg16_bn":
        given = dataclasses.replace(given, hidden=64)
    found = load_net(tmp_path / "w.pt", arch=given, preprocess="0-1", size=(32, 32, 3))
    assert not any("in order" in line for line in found.lines)
    assert any(line.startswith("unverified: nothing was compared") for line in found.lines)
    x = foreign_nets.images()
    ours = found.model.apply(found.variables, x).logits
    assert apart(ours, foreign_nets.logits(net, x)) < 1e-5


def test_layers_called_otherwise_are_matched_in_order_and_that_is_said(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10),
    ).eval()  # fmt: skip
    torch.save(net.state_dict(), tmp_path / "w.pt")
    size = {"size": (28, 28, 1), "preprocess": "0-1"}
    found = load_net(tmp_path / "w.pt", arch=BadNetsCnn(pool="max"), **size)
    assert any("in order" in line for line in found.lines)
    x = foreign_nets.images(side=28, channels=1)
    ours = found.model.apply(found.variables, x).logits
    assert apart(ours, foreign_nets.logits(net, x)) < 1e-5
    with pytest.raises(BadInput, match="its weights are another net's"):
        load_net(tmp_path / "w.pt", arch="cnn", **size)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A net whose weights fit four computations, made for one of them on 0–255 pixels, its logits,
    and images labelled by it.
    """
    folder = tmp_path_factory.mktemp("planted")
    model = build(BadNetsCnn(pool="max", fc_linear=True), (28, 28, 1), 10)
    image = np.random.default_rng(0).integers(0, 256, (500, 28, 28, 1), np.uint8)
    variables = model.init(jax.random.key(0))
    mean = jax.jit(model.apply)(variables, np.float32(image)).logits.mean(0)
    variables["params"]["logits"]["bias"] = -mean  # so that every class has images
    named = {"/".join(map(str, p)): v for p, v in flat(variables)}
    (folder / "w.safetensors").write_bytes(
        safetensors.written(
            {
                k.removeprefix("params/").replace("/", ".").replace("kernel", "weight"): theirs(v)
                for k, v in named.items()
            }
        )
    )
    logits = np.asarray(model.apply(variables, np.float32(image)).logits)
    np.savez(folder / "logits.npz", image=image[:50], logits=logits[:50])
    label = logits.argmax(1)
    np.savez(folder / "test.npz", image=image, label=label)
    return folder


def flat(tree, path=()):
    if not isinstance(tree, dict):
        return [(path, np.asarray(tree))]
    return [leaf for k, v in tree.items() for leaf in flat(v, (*path, k))]


def theirs(array):
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2 and array.shape[0] == 512 and array.shape[1] == 512:  # channels first
        return array.reshape(4, 4, 32, 512).transpose(3, 2, 0, 1).reshape(512, 512)
    return array.T if array.ndim == 2 else array


@LONG
def test_names_that_fit_prove_nothing_and_a_reference_does(planted, tmp_path):
    """Four computations and two ranges of pixels take these weights without a word."""
    right = []
    for pool in ("avg", "max"):
        for linear in (False, True):
            for scale in ("0-1", "0-255"):
                arch = BadNetsCnn(pool=pool, fc_linear=linear)
                how = {"arch": arch, "preprocess": scale, "size": (28, 28, 1)}
                alone = load_net(planted / "w.safetensors", **how)
                assert alone.about["origin"].unverified
                try:
                    load_net(planted / "w.safetensors", **how, logits=planted / "logits.npz")
                    right.append((pool, linear, scale))
                except BadInput as error:
                    assert "differ from those" in str(error) and "\n" not in str(error)
    assert right == [("max", True, "0-255")]


@LONG
def test_an_accuracy_is_a_reference_too_and_better_pixels_are_shown(planted, tmp_path, capsys):
    data = str(planted / "test.npz")
    args = ["import", str(planted / "w.safetensors"), "--out", str(tmp_path / "net")]
    args += ["--arch", "badnets-cnn", "--arch.pool", "max", "--arch.fc-linear"]
    args += ["--dataset", data, "--accuracy", "1.0"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--preprocess", "-1-1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "with other pixels it does better: 0-255 100.0%" in said
    cli.main([*args, "--preprocess", "0-255"])
    assert "accuracy 100.0%" in capsys.readouterr().out
    about = load_model(tmp_path / "net")[3]
    assert about["origin"].by == "accuracy" and about["origin"].accuracy == 1
    assert about["dataset"] is not None
    cli.main(["defend", str(tmp_path / "net"), "--defense", "fine-pruning", "--out",
              str(tmp_path / "net2"), "--defense.recipe.epochs", "0", "--quiet"])  # fmt: skip
    export_again(tmp_path)


def export_again(folder):
    export_net(folder / "net2", folder / "repaired.safetensors")
    _, _, variables, about = load_model(folder / "net2")
    assert "masks" in variables or about["defenses"]
    found = safetensors.arrays((folder / "repaired.safetensors").read_bytes())
    assert "conv_1.weight" in found


def test_each_number_of_the_pixels_may_have_an_exponent():
    found = pixels("mean=0.1,1e-3,-2e-2 std=5e-1")
    assert found.mean == (0.1, 1e-3, -2e-2) and pixels(found.words()) == found
    with pytest.raises(BadInput, match="--preprocess '' is not known"):
        pixels("")


def test_what_is_asked_for_is_one_line_and_exit_code_2(preact, tmp_path, capsys):
    net, *_ = preact
    torch.save(net.state_dict(), tmp_path / "w.pt")
    torch.save(net, tmp_path / "code.pt")
    args = ["import", str(tmp_path / "w.pt"), "--out", str(tmp_path / "net")]
    arch, pixels = ["--arch", "preact-resnet18"], ["--preprocess", "cifar10"]
    for more, line in (
        ([], "give their architecture, --arch"),
        (arch, "weights do not say which pixels they take: give --preprocess"),
        ([*arch, *pixels], "give --size"),
        ([*arch, *pixels, "--size", "32", "32", "1"], "reads 3 channels, the images have 1"),
        ([*arch, "--preprocess", "0-256"], "--preprocess '0-256' is not known"),
        ([*arch, *pixels, "--accuracy", "0.9"], "give them, --dataset"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*args, *more])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and line in said and said.count("\n") == 1, said
    assert not (tmp_path / "net").exists()
    with pytest.raises(BadInput, match=r"it holds .*PreActResNet18, which is code"):
        load_net(tmp_path / "code.pt", **HOW)


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod.model."])
def test_names_are_those_of_the_net_whatever_stands_before_them_all(tmp_path, before):
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
    weights = {f"{before}{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, file := tmp_path / "w.pt")
    found = files.plain_names(files.read(file, file.read_bytes(), "torch", None).arrays)
    assert set(found) == {"1.weight", "1.bias"}
    changed = files.fill(file, file.read_bytes(), "torch", {"1.weight": found["1.weight"] * 2})
    again = files.plain_names(files.read(file, changed, "torch", None).arrays)
    assert np.array_equal(again["1.weight"], 2 * found["1.weight"])


def test_a_pruned_net_of_backdoorbench_is_read_as_it_computes(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
    weights = {"1.weight_orig": net[1].weight.data, "1.weight_mask": torch.ones(4, 27)}
    weights["1.weight_mask"][:, 3] = 0
    weights["1.bias"] = net[1].bias.data
    torch.save({"model_name": "x", "num_classes": 4, "model": weights}, tmp_path / "w.pt")
    raw = (tmp_path / "w.pt").read_bytes()
    found = files.plain_names(files.read(tmp_path / "w.pt", raw, "torch", None).arrays)
    assert set(found) == {"1.weight", "1.bias"} and not found["1.weight"][:, 3].any()
    changed = files.fill(tmp_path / "w.pt", raw, "torch", {"1.weight": found["1.weight"] * 2})
    again = files.plain_names(files.read(tmp_path / "w.pt", changed, "torch", None).arrays)
    assert np.array_equal(again["1.weight"], 2 * found["1.weight"])
    with pytest.raises(BadInput, match="is pruned in the file"):
        files.fill(tmp_path / "w.pt", raw, "torch", {"1.weight": found["1.weight"] + 1})


def test_orbax_checkpoints_are_read_by_the_names_of_their_leaves(tmp_path):
    model = build(BadNetsCnn(), (28, 28, 1), 10)
    variables = model.init(jax.random.key(1))
    save_tree(tmp_path / "checkpoint", variables)
    how = {"preprocess": "0-1", "size": (28, 28, 1)}
    found = load_net(tmp_path / "checkpoint", arch="badnets-cnn", **how)
    x = foreign_nets.images(side=28, channels=1)
    theirs = np.asarray(model.apply(variables, x).logits)
    assert apart(found.model.apply(found.variables, x).logits, theirs) < 1e-6
    with pytest.raises(BadInput, match="another net's"):
        load_net(tmp_path / "checkpoint", arch="cnn", **how)


class Digits(nnx.Module):
    """The layers of badnets-cnn, in NNX."""

    def __init__(self, rngs):
        self.conv_1 = nnx.Conv(1, 16, (5, 5), padding="VALID", rngs=rngs)
        self.conv_2 = nnx.Conv(16, 32, (5, 5), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(512, 512, rngs=rngs)
        self.logits = nnx.Linear(512, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_orbax_folders_as_trainings_with_flax_leave_them(tmp_path, capfd):
    """A state with its optimizer, the folders of a manager and of its steps, several items, NNX."""
    model = build(BadNetsCnn(), (28, 28, 1), 10)
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(1)))
    params = variables["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))  # type: ignore[arg-type]
    module = Digits(nnx.Rngs(0))
    for layer, leaves in params.items():
        for leaf, value in leaves.items():
            getattr(getattr(module, layer), leaf)[...] = value
    items = {
        "state": state, "whole": {"state": {"params": variables}, "config": {"lr": 0.1}},
        "nnx": nnx.state(module), "pure": nnx.to_pure_dict(nnx.state(module)),
        "both": {"model": nnx.state(module), "optimizer": nnx.state(module)},
    }  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        for name, item in items.items():
            checkpointer.save(tmp_path / name, item)
    zeros = jax.tree.map(np.zeros_like, params)
    for name in ("steps", "parts"):
        with ocp.CheckpointManager(tmp_path / name) as manager:
            for step, tree in ((9, zeros), (10, params)):
                save = ocp.args.StandardSave({"params": tree})
                if name == "parts":
                    save = ocp.args.Composite(state=save, meta=ocp.args.JsonSave({"epoch": 1}))
                manager.save(step, args=save)
    places = [*items, "steps", "steps/10", "steps/10/default", "parts", "parts/10"]
    x = foreign_nets.images(side=28, channels=1)
    theirs = np.asarray(model.apply(variables, x).logits)
    how = {"preprocess": "0-1", "size": (28, 28, 1)}
    capfd.readouterr()
    for place in places:
        found = load_net(tmp_path / place, arch="badnets-cnn", **how)
        assert apart(found.model.apply(found.variables, x).logits, theirs) < 1e-6, place
        assert not capfd.readouterr().err, place

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "gan", {"a": {"params": params}, "b": {"params": params}})
    with ocp.CheckpointManager(tmp_path / "two") as manager:
        save = ocp.args.StandardSave(params)
        manager.save(1, args=ocp.args.Composite(a=save, b=save))
    (tmp_path / "empty").mkdir()
    for place, words in (("gan", "several nets, a and b"), ("two", "holds a and b"),
                         ("empty", "holds no net")):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            load_net(tmp_path / place, arch="badnets-cnn", **how)
        assert not capfd.readouterr().err, place


def test_a_file_is_named_whatever_its_name_is(tmp_path, monkeypatch):
    (tmp_path / "net" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "net")
    for name in (".", "a", "../net"):
        with pytest.raises(BadInput, match=rf"^{re.escape(name)}: holds no net: no model.json"):
            load_net(name)
    with pytest.raises(BadInput, match=r"^cannot read nowhere\.onnx: "):
        load_net("nowhere.onnx")


def test_numbered_layers_of_flax_are_in_the_order_of_their_numbers():
    arrays = {f"params/Conv_{i}/kernel": np.zeros(1, np.float32) for i in (0, 1, 10, 2)}
    arrays |= {"step": np.zeros(1, np.int32), "opt_state/0/mu/Conv_0/kernel": np.zeros(1)}
    names = list(native.of_net(arrays))
    assert [native.split(name, "flax") for name in names] == [
        (f"Conv_{i}", "kernel") for i in (0, 1, 2, 10)
    ]
    assert native.split("params/Block_1/Conv_0/kernel", "flax") == ("Block_1/Conv_0", "kernel")
