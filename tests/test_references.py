"""The defenses against plain NumPy, scikit-learn and PyTorch, written from the equations, on the
same weights and the same draws.

Full batches take the order of the rows out of every optimiser.
"""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import metrics
from bdjax.analysis.gradcam import grad_cam
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.repair.linf_pruning import LinfPruning
from bdjax.defenses.samples.activation_clustering import ActivationClustering
from bdjax.defenses.samples.spectral_signatures import SpectralSignatures
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, fit, poisoned_set, predict

KEY = jax.random.key(0)
TARGET = 3


# --- The nets once more ---


def layers(params, x):
    """What the victim's hidden layer and its logits are: `x: [B, 784]`."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden = np.maximum(x @ p["dense_1"]["kernel"] + p["dense_1"]["bias"], 0)
    # The last layer reads the input beside the hidden layer, `Ffnn`'s order.
    both = np.concatenate([x, hidden], 1)
    return hidden, both @ p["logits"]["kernel"] + p["logits"]["bias"]


class Torch:
    """`Cnn("VALID")` in PyTorch, with the weights of `params`."""

    def __init__(self, params):
        self.torch = pytest.importorskip("torch")
        self.p = {
            layer: {name: self.tensor(value) for name, value in leaves.items()}
            for layer, leaves in params.items()
        }

    def tensor(self, value):
        return self.torch.from_numpy(np.array(value, np.float32))

    def images(self, image):
        return self.tensor(np.asarray(image, np.float32) / 255).permute(0, 3, 1, 2)

    def maps(self, x):
        """The activations of the last convolution, `[B, C, H, W]`."""
        F = self.torch.nn.functional
        first = F.relu(F.conv2d(x, *self.conv("conv_1")))
        return F.relu(F.conv2d(F.max_pool2d(first, 2), *self.conv("conv_2")))

    def conv(self, name):
        return self.p[name]["kernel"].permute(3, 2, 0, 1), self.p[name]["bias"]

    def head(self, maps):
        F = self.torch.nn.functional
        flat = F.max_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(1)
        hidden = F.relu(flat @ self.p["dense"]["kernel"] + self.p["dense"]["bias"])
        return hidden @ self.p["logits"]["kernel"] + self.p["logits"]["bias"]

    def accuracy(self, maps, label):
        return float((self.head(maps).argmax(1).numpy() == np.asarray(label)).mean())


@pytest.fixture(scope="module")
def backdoored(sample):
    """A small CNN with the white square; 167 clean images of all classes."""
    model = build(Cnn("VALID", hidden=32, features=(4, 8)), sample.shape, sample.classes)
    data = poisoned_set(KEY, sample.train, BadNets(target=TARGET), sample.classes)
    run = jax.jit(lambda key: fit(key, model, Recipe(lr=3e-3, epochs=6, batch=50), data)[0])
    return model, jax.device_get(run(KEY)), sample.test[::3]


# --- Rules on numbers ---


def test_anomaly_index():
    for x in (np.random.default_rng(0).lognormal(3, 1, 43), np.array([3.0, 3, 3, 3, 9])):
        median = np.median(x)
        mad = 1.4826 * np.median(np.abs(x - median))
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(x == median, 0, np.abs(x - median) / mad)
        ours = metrics.anomaly_index(jnp.asarray(x, "float32"))
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


# --- Inputs and samples ---


def test_strip(victim, sample):
    model, variables, _ = victim
    clean, x, n = sample.clean[:80], sample.test.image[:20], 10
    strip = Strip(n=n, inputs=30, frr=0.05)
    ours = jax.jit(lambda v: strip(KEY, model, v, clean, x))(variables)

    key_split, key_clean, key_x = jax.random.split(KEY, 3)
    shuffled = clean.image[np.asarray(jax.random.permutation(key_split, 80))]
    held, overlays = shuffled[:30], shuffled[30:]

    def entropy(key, images):
        key_order, key_first = jax.random.split(key)
        order = np.asarray(jax.random.permutation(key_order, 50))
        first = np.asarray(jax.random.randint(key_first, (len(images), 1), 0, 50))[:, 0]
        found = []
        for image, start in zip(images, first):
            drawn = overlays[[order[(start + i) % 50] for i in range(n)]]
            blends = (image[None] / 255.0 + drawn / 255.0).reshape(n, -1)
            z = layers(variables["params"], blends)[1]
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            found.append(-(p * np.log2(np.maximum(p, 1e-300))).sum() / n)
        return np.array(found)

    benign = entropy(key_clean, held)
    boundary = NormalDist(benign.mean(), benign.std()).inv_cdf(0.05)
    np.testing.assert_allclose(ours.info["clean"], benign, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(ours.score, entropy(key_x, x), rtol=1e-3, atol=1e-5)
    assert float(ours.boundary) == pytest.approx(boundary, rel=1e-3)


@pytest.fixture(scope="module")
def rows(victim, sample):
    """A poisoned training set, and by hand its hidden activations and labels."""
    _, variables, attack = victim
    part = sample.train[::2]
    data = poisoned_set(KEY, part, attack, sample.classes)
    source, kind, label = (np.asarray(v) for v in data.plan[:3])
    image = part.image[source] / 255.0
    image[kind > 0, -5:, -5:] = 1
    hidden, _ = layers(variables["params"], image.reshape(len(image), -1))
    return data, hidden, label


def test_spectral_signatures(victim, rows):
    model, variables, _ = victim
    data, hidden, label = rows
    defense = SpectralSignatures(remove=0.2)
    ours = jax.jit(lambda v: defense(KEY, model, v, data))(variables)
    for k in range(10):
        of = label == k
        centred = hidden[of] - hidden[of].mean(0)
        score = (centred @ np.linalg.svd(centred)[2][0]) ** 2
        np.testing.assert_allclose(ours.score[of], score, rtol=0.02, atol=1e-3 * score.max())
        removed = np.asarray(ours.removed)[of]
        assert (removed != (score > np.quantile(score, 0.8))).sum() <= 1


@pytest.mark.parametrize("reduce", ["pca", "ica"])
def test_activation_clustering(victim, rows, reduce):
    """The clusters may differ where two splits cost the same; no cost is above scikit-learn's."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA, FastICA

    model, variables, _ = victim
    data, hidden, label = rows
    defense = ActivationClustering(reduce=reduce, dims=3, starts=10, size=0.35)
    ours = jax.jit(lambda v: defense(KEY, model, v, data))(variables)
    same = 0
    for k in range(10):
        of = label == k
        z = PCA(3).fit_transform(hidden[of])
        if reduce == "ica":
            z = FastICA(3, whiten="unit-variance", random_state=0).fit_transform(z)
        theirs = KMeans(2, n_init=10, random_state=0).fit(z)
        cluster = np.asarray(ours.info["cluster"])[of]
        cost = sum(((z[cluster == c] - z[cluster == c].mean(0)) ** 2).sum() for c in (0, 1))
        assert cost <= 1.02 * theirs.inertia_
        smaller = theirs.labels_ == (theirs.labels_.mean() < 0.5)
        agree = (smaller == (cluster == 1)).mean() > 0.97
        same += agree
        if agree:
            suspicious = bool(smaller.mean() < 0.35)
            share = float(ours.info["share"][k])
            assert share == pytest.approx(smaller.mean(), abs=0.03)
            assert abs(share - 0.35) < 0.03 or bool(ours.info["suspicious"][k, 1]) == suspicious
    assert same >= 6


# --- Nets ---


def test_grad_cam(backdoored):
    model, variables, clean = backdoored
    ours = grad_cam(model, variables, clean.image[:8], np.arange(8))
    net = Torch(variables["params"])
    maps = net.maps(net.images(clean.image[:8])).requires_grad_(True)
    net.head(maps)[range(8), range(8)].sum().backward()
    weight = maps.grad.mean((2, 3), keepdim=True)
    cam = net.torch.relu((weight * maps).sum(1, keepdim=True))
    wanted = net.torch.nn.functional.interpolate(cam, clean.image.shape[1:3], mode="bilinear")
    np.testing.assert_allclose(ours, wanted[:, 0].detach().numpy(), rtol=1e-3, atol=1e-4)


def test_fine_pruning(backdoored):
    model, variables, clean = backdoored
    recipe = Recipe(lr=1e-3, epochs=8, batch=len(clean.label))
    defense = FinePruning(max_drop=0.1, recipe=recipe)
    ours, info = jax.jit(lambda v: defense(KEY, model, v, clean))(variables)

    net = Torch(variables["params"])
    x, label = net.images(clean.image), net.tensor(clean.label).long()
    maps = net.maps(x)
    activation = maps.mean((0, 2, 3))
    order = activation.argsort().tolist()
    kept, pruned, points = net.torch.ones(8), 0, []
    for count in range(9):
        kept[order[:count]] = 0
        points.append(net.accuracy(maps * kept[None, :, None, None], clean.label))
        if pruned == count - 1 and points[0] - points[-1] <= 0.1 + 1e-9:
            pruned = count
    assert info["order"].tolist() == order and int(info["pruned"]) == pruned and 0 < pruned < 8
    np.testing.assert_allclose(info["curve"], points, atol=0.007)  # one image

    kept = net.torch.ones(8)
    kept[order[:pruned]] = 0
    leaves = [leaf.requires_grad_(True) for part in net.p.values() for leaf in part.values()]
    adam, losses = net.torch.optim.Adam(leaves, lr=1e-3), []
    for _ in range(8):
        adam.zero_grad()
        logits = net.head(net.maps(x) * kept[None, :, None, None])
        loss = net.torch.nn.functional.cross_entropy(logits, label)
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(info["loss"], losses, rtol=1e-3)
    with net.torch.no_grad():
        wanted = net.head(net.maps(x) * kept[None, :, None, None]).numpy()
    np.testing.assert_allclose(predict(model, ours, clean.image), wanted, atol=0.02)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("rule, drop", [("static", 0.4), ("zero", 0.05)])
def test_linf_pruning(backdoored, rule, drop):
    model, variables, clean = backdoored
    defense = LinfPruning(rule=rule, max_drop=drop, points=17)
    ours, info = jax.jit(lambda v: defense(KEY, model, v, clean))(variables)

    net = Torch(variables["params"])
    maps = net.maps(net.images(clean.image))
    top = maps.abs().amax((0, 2, 3))

    def cut(tau):
        if rule == "zero":
            return net.torch.where(maps.abs() > tau, 0.0, maps)
        return maps * (top <= tau)[None, :, None, None]

    before = net.accuracy(maps, clean.label)
    taus = float(top.max()) * np.linspace(1, 0, 17)
    chosen, points = np.inf, [before]
    for tau in taus:
        # The largest activation itself is at τ: which side it falls on is a matter of rounding.
        points.append(net.accuracy(cut(tau * (1 + 1e-6)), clean.label))
        if before - points[-1] > drop:
            break
        chosen = tau
    np.testing.assert_allclose(np.asarray(info["curve"])[: len(points)], points, atol=0.007)
    assert float(info["threshold"]) == pytest.approx(chosen, rel=1e-5) and chosen < 0.99 * taus[0]
    wanted = net.head(cut(chosen * (1 + 1e-6))).numpy()
    logits = predict(defense.wrap(model), ours, clean.image)
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=2e-3)


def test_neural_cleanse(backdoored):
    """λ starts at 0, is set, rises while the trigger works and falls when it no longer does."""
    model, variables, clean = backdoored
    patience, first = 3, 1e-3

    def search(variables, steps):
        defense = NeuralCleanse(
            steps=steps, batches=1, batch=len(clean.label), init="ones", init_cost=first,
            patience=patience, success=0.9,
        )  # fmt: skip
        return defense.search(KEY, model, variables, clean.image, jnp.asarray([TARGET]))

    net = Torch(variables["params"])
    torch, x = net.torch, net.images(clean.image)
    y = torch.full((len(x),), TARGET)
    raw = [torch.ones(1, 1, 28, 28, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(raw, lr=0.1, betas=(0.5, 0.9))
    cost, best, hits_at_zero, up, down, moves, log = 0.0, np.inf, 0, 0, 0, [], []
    for _ in range(40):
        mask, pattern = (torch.tanh(v) / 2 + 0.5 for v in raw)
        logits = net.head(net.maps((1 - mask) * x + mask * pattern))
        adam.zero_grad()
        (torch.nn.functional.cross_entropy(logits, y) + cost * mask.sum()).backward()
        adam.step()
        success = float((logits.argmax(1) == y).float().mean()) >= 0.9
        if success:
            best = min(best, float((torch.tanh(raw[0]) / 2 + 0.5).sum()))
        if cost == 0:
            hits_at_zero = hits_at_zero + 1 if success else 0
            if hits_at_zero == patience:
                # The step that sets λ is the first of the next run of hits.
                cost, up, down = first, 1, 0
                moves.append("set")
        else:
            up, down = (up + 1, 0) if success else (0, down + 1)
            if up == patience:
                cost, up = cost * 2, 0
                moves.append("up")
            elif down == patience:
                cost, down = cost / 2**1.5, 0
                moves.append("down")
        log.append((best, cost))
    assert moves[:5] == ["set", "up", "up", "up", "up"] and moves[-2:] == ["down", "down"]

    run = jax.jit(search)
    early, late = (run(variables, jnp.asarray(steps)) for steps in (20, 40))
    assert float(early.norm[0]) == pytest.approx(log[19][0], rel=0.02)
    assert float(early.cost[0]) == pytest.approx(log[19][1], rel=1e-5)
    # In the end some images are at the border: a miss may come a step earlier or later, and a step
    # takes a fifth off the norm.
    assert float(late.norm[0]) == pytest.approx(best, rel=0.2) and int(late.steps[0]) == 40
    assert 0.3 < float(late.cost[0]) / cost < 3
