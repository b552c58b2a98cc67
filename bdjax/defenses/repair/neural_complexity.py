"""Node pruning by neural complexity: remove the nodes that the layer's complexity does not miss."""

import jax
import jax.numpy as jnp

from bdjax.channels import prune, responses
from bdjax.defenses.base import Repair
from bdjax.models.layers import check_site
from bdjax.registry import defense, static
from bdjax.train import Recipe, clean_set, fit
from bdjax.types import (
    Array,
    Model,
    Positive,
    Repaired,
    Share,
    Size,
    Split,
    Variables,
)


def correlation(x: jax.Array, ridge: Array | float) -> jax.Array:
    """The correlations `[n, n]` of `x: [N, n]`, from Σ + ε·(mean variance)·I; a constant node has
    none.
    """
    centred = x - x.mean(0, keepdims=True)
    cov = centred.T @ centred / x.shape[0]
    cov = cov + (jnp.asarray(ridge, jnp.float32) * jnp.trace(cov) / x.shape[1] + 1e-12) * jnp.eye(
        x.shape[1]
    )
    scale = jnp.sqrt(jnp.diag(cov))
    return cov / (scale[:, None] * scale[None, :])


def complexity(corr: jax.Array, present: jax.Array, draws: jax.Array) -> jax.Array:
    """C(X) = Σ_k [(k/n)·I(X) − ⟨I(X_k)⟩] in nats, of the nodes where `present: [n]` is 1, as
    Gaussians.

    I = Σ H(x_i) − H(X) = −½ ln det R. `draws: [S, n]` in [0, 1] order the nodes at random S times:
    the first k of an order are its X_k. One Cholesky factor of the ordered R has the determinants
    of all k: I(X_k) = −Σ_{i ≤ k} ln L_ii.
    """
    many, rank = present.sum(), jnp.arange(1.0, present.shape[0] + 1)
    both = (present[:, None] * present[None, :]) > 0
    eye = jnp.eye(present.shape[0])
    masked = jnp.where(both, corr, eye)

    def one(draw):
        order = jnp.argsort(jnp.where(present > 0, draw, 2.0))
        # I(X_k) − I(X_(k−1))
        gain = -jnp.log(jnp.diag(jnp.linalg.cholesky(masked[order][:, order])))
        return (
            gain * (rank - (many + 1) / 2)
        ).sum()  # the sum over k, by gains; absent nodes gain nothing

    return jax.vmap(one)(draws).mean()


@defense("neural-complexity")
class NeuralComplexity(Repair):
    """Prune the nodes whose removal changes the layer's neural complexity least (Zhang & Qiao,
    2010).

    A reconstruction: the paper's text was not at hand. In each of `rounds` rounds the activations
    of the layer on the clean images are taken for Gaussians; node j costs |C(X) − C(X∖j)| (see
    `complexity`, Tononi's measure); the cheapest nodes are masked, and the net is trained on the
    clean images before the next round. Nodes that sleep on clean images are the cheapest, hence the
    hope to meet a backdoor's; the method was made to find small nets, not to repair.

    `share`: of the nodes, pruned by the end of the last round, in [0, 1]; `site`: the layer
    (channels of a convolution are averaged over places); `orders`: random orders S of the nodes in
    the estimate of C, each taken forwards and backwards, which cancels most of the noise; `ridge`:
    ε, as a share of the mean variance; `recipe`: the training after each round. A round costs 2S·n³
    steps for each of n nodes: take a layer of at most some hundred.

    Decides most: `share`, which is ours. At 0.05, 0.17 and 0.5 the preset `cpu` left one net of
    Fashion-MNIST with the 5×5 square an ASR_nt of 97, 97 and 71 %, an all-to-all one, which had
    75 %, 50, 50 and 30 % (`experiments/sensitivity.py`).

    Presets: `cpu`, fewer rounds.

    `info`: `pruned`, how many; `complexity: [rounds]` before each round; `loss`, `acc: [rounds,
    epochs]`.

    Reference: Z. Zhang and J. Qiao, "A Node Pruning Algorithm for Feedforward Neural Network Based
    on Neural Complexity", In International Conference on Intelligent Control and Information
    Processing.
    """

    share: Share = 0.5
    ridge: Positive = 1e-3
    recipe: Recipe = Recipe(lr=1e-3, epochs=2)
    rounds: Size = static(16)
    orders: Size = static(8)
    site: str = static("penultimate")

    sensitive = "share"
    budget_fields = ("rounds", "orders", "recipe.epochs", "recipe.batch")
    presets = {"cpu": {"rounds": 4, "orders": 4, "recipe": Recipe(lr=1e-3, epochs=1, batch=50)}}

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        def activations(variables):
            return responses(model, variables, self.site, clean.image)

        nodes = jax.eval_shape(activations, variables).shape[1]
        variables = prune(variables, self.site, jnp.ones(nodes))
        before = variables["masks"][self.site]

        def one(variables, item):
            key, goal = item
            key_draw, key_fit = jax.random.split(key)
            present, corr = (
                variables["masks"][self.site],
                correlation(activations(variables), self.ridge),
            )
            draws = jax.random.uniform(key_draw, (self.orders, nodes))
            draws = jnp.concatenate([draws, 1 - draws])
            whole = complexity(corr, present, draws)
            without = jax.lax.map(
                lambda j: complexity(corr, present.at[j].set(0.0), draws), jnp.arange(nodes)
            )
            price = jnp.where(present > 0, jnp.abs(whole - without), jnp.inf)
            dear = jnp.argsort(jnp.argsort(price)).astype(jnp.float32) >= goal - (
                before.sum() - present.sum()
            )
            variables = prune(variables, self.site, dear.astype(jnp.float32))
            variables, log = fit(key_fit, model, self.recipe, clean_set(clean), variables=variables)
            return variables, {"complexity": whole, **log._asdict()}

        goals = jnp.round(
            self.share * before.sum() * jnp.arange(1.0, self.rounds + 1) / self.rounds
        )
        variables, info = jax.lax.scan(one, variables, (jax.random.split(key, self.rounds), goals))
        return Repaired(
            variables, {"pruned": before.sum() - variables["masks"][self.site].sum(), **info}
        )

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site)
        self.recipe.check(len(clean.label))
