"""Coloured eyebrows on an aligned face."""

from bdjax.attacks.lipstick import Lipstick, shares
from bdjax.registry import attack

LEFT = (
    (17.6, 8.8),
    (15.2, 11.0),
    (14.2, 15.0),
    (15.0, 20.5),
    (16.8, 20.5),
    (16.0, 15.0),
    (16.8, 11.0),
)
RIGHT = tuple((y, 49 - x) for y, x in LEFT)


@attack("eyebrows")
class Eyebrows(Lipstick):
    """Paint both eyebrows (Veldanda & Garg, 2020, arXiv:2010.12186).

    Fields as for lipstick. Differs from the paper: a reconstruction; colour and outline are not
    published.
    """

    outline = shares(LEFT, RIGHT)
