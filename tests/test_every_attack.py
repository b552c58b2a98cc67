"""Every registered attack does as it says, and attacks that do not are found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import registry, testing
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack, Part, Stamped
from bdjax.attacks.clean_label import CleanLabel
from bdjax.attacks.post_it import PostIt
from bdjax.attacks.trojannn import TrojanNN
from bdjax.registry import pytree
from bdjax.types import Share

ENTRIES = registry.entries("attack")
PRESETS = [
    pytest.param(entry, preset, id=f"{entry.name}-{preset}")
    for entry in ENTRIES
    for preset in getattr(entry.cls, "presets", {})
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_attack_does_as_it_says(entry):
    testing.check_attack(entry.cls())


@pytest.mark.long
@pytest.mark.parametrize(("entry", "preset"), PRESETS)
def test_every_preset_does_as_it_says_on_grey_images(entry, preset):
    testing.check_attack(entry.cls(**entry.cls.presets[preset]), (28, 28, 1))


@pytest.mark.parametrize(("entry", "preset"), PRESETS)
def test_every_preset_has_values_that_are_checked(entry, preset):
    testing.check_values(entry.cls(**entry.cls.presets[preset]))


# --- Hooks are declared ---


class Crafts:
    """A mixin that is no attack."""

    def train(self, key, model, recipe, data, variables=None):
        raise NotImplementedError


def test_an_attack_says_whether_it_replaces_training_or_the_plan():
    class Mixed(Crafts, BadNets):
        pass

    class Plain(TrojanNN):
        trains = False

        def train(self, key, model, recipe, data, variables=None):
            return Attack.train(self, key, model, recipe, data, variables)

    class Planned(BadNets):
        def plan(self, key, y, classes):
            return super().plan(key, y, classes)

    found = [(cls.trains, cls.plans) for cls in (Attack, BadNets, TrojanNN, Mixed, Plain, Planned)]
    assert found == [
        (False, False), (False, False), (True, False), (True, False), (False, False), (False, True)
    ]  # fmt: skip
    for entry in ENTRIES:  # nobody forgot to say it
        owners = {
            hook: next(cls for cls in entry.cls.__mro__ if hook in vars(cls))
            for hook in ("train", "plan")
        }
        assert entry.cls.trains or owners["train"] is Attack
        assert entry.cls.plans == (owners["plan"] is not Attack)


# --- Attacks that do not as they say ---


@pytree
class Corner(Attack):
    """A sound attack: one white pixel. The broken ones differ from it in one thing."""

    alpha: Share = 0.5

    def exact(self, kind, shape, *, train=False):
        mask = jnp.zeros((*shape[:2], 1)).at[0, 0].set(jnp.asarray(self.alpha, jnp.float32))
        return Stamped(mask, jnp.ones(shape))

    def trigger(self, x, key):
        return x.at[0, 0].set((1 - self.alpha) * x[0, 0] + self.alpha)


BROKEN = {}


def broken(check, words, base=Corner):
    """A toy attack that `check` finds out, in these words."""

    def decorate(cls):
        made = pytree(type(cls.__name__, (cls, base), {"__annotations__": {}}))
        BROKEN[cls.__name__] = (made, check, words)
        return made

    return decorate


@broken("stamps", "pixels from 0.5 to 1.5")
class NoClip:
    def trigger(self, x, key):
        return x + self.alpha


@broken("stamps", "away from what `exact` says")
class HundredFold:
    def trigger(self, x, key):
        return x.at[0, 0].set(jnp.clip(x[0, 0] + 100 * self.alpha, 0, 1))


@broken("stamps", "at most 0.3 is allowed", CleanLabel)
class Louder:
    def trigger(self, x, key):
        noise = jax.random.normal(jax.random.key(1), x.shape)
        return jnp.clip(x + 100 * self.strength * noise, 0, 1)


@broken("stamps", "away from what `exact` says")
class Elsewhere:
    def trigger(self, x, key):
        return super().trigger(x, key).at[9, 9].set(0.5)


@broken("stamps", "kind 0 changes")
class Always:
    def stamp(self, kind, x, key, *, train=True):
        return self.trigger(x, key)


@broken("stamps", "kind 1 does nothing")
class Never:
    def trigger(self, x, key):
        return x

    def exact(self, kind, shape, *, train=False):
        return None


@broken("stamps", "NaN")
class NotANumber:
    def trigger(self, x, key):
        return jnp.log(x * 0 - 1)


@broken("values", "rate=-1 is accepted")
class Unchecked:
    def check(self, shape, classes):
        pass


@broken("values", "target=20 is accepted")
class AnyTarget:
    def check(self, shape, classes):
        registry.validate(self)


@broken("labels", "does not aim at")
class Contradicts:
    def shares(self, y, classes):
        return [Part(y >= 0, self.rate, 1, jnp.zeros_like(y) + 3)]


@broken("labels", "no row with trigger 1")
class KeepsLabels:
    def shares(self, y, classes):
        return [Part(y != self.target, self.rate, 1, y)]


@broken("labels", "a label that there is not")
class AimsAtNothing:
    def success(self, kind, y, classes):
        return jnp.full_like(y, classes)


@broken("labels", "targets are")
class OtherTargets:
    def targets(self, classes):
        return jnp.zeros(classes, bool)


@broken("randomness", "ignores its key", PostIt)
class Deaf:
    def trigger(self, x, key):
        return super().trigger(x, jax.random.key(0))


@broken("randomness", "two stamps")
class Fickle:
    def trigger(self, x, key):
        return x.at[0, 0].set(np.float32(np.random.default_rng().uniform()))


@broken("randomness", "without being random")
class Undeclared:
    def trigger(self, x, key):
        return x.at[0, 0].set(jax.random.uniform(key))


@broken("plan", "at rate 0")
class IgnoresRate:
    def shares(self, y, classes):
        return [part._replace(rate=0.1) for part in super().shares(y, classes)]


@broken("plan", "a clean row")
class TouchesClean:
    def plan(self, key, y, classes):
        plan = super().plan(key, y, classes)
        return plan._replace(label=jnp.zeros_like(plan.label))


@broken("plan", "count says 0 relabelled")
class Miscounts:
    def count(self, key, y, classes):
        return super().count(key, y, classes) | {"relabelled": 0}


@broken("leaves", "cannot be compiled")
class Untraceable:
    def trigger(self, x, key):
        return x.at[0, 0].set(float(self.alpha))


@broken("leaves", "cannot be compiled")
class LooksAtTarget:
    def success(self, kind, y, classes):
        return jnp.full_like(y, int(self.target))


def test_the_sound_toy_passes():
    testing.check_attack(Corner())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_attack_is_found_out(name):
    cls, check, words = BROKEN[name]
    with pytest.raises(AssertionError, match=words) as error:
        getattr(testing, f"check_{check}")(cls())
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_attack_fails_as_a_whole(name):
    with pytest.raises(AssertionError):
        testing.check_attack(BROKEN[name][0]())
