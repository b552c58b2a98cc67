"""Weak scaling: eight small victims for each device, without any exchange between devices.

A CPU stands for as many devices as `--devices` says; they share its cores, so that on few cores the
time must grow.
"""

from collections.abc import Iterator

import jax

from benchmarks import sweep
from benchmarks.measure import Case

SERIES = "Weak scaling, devices"
DEVICES = (1, 2, 4, 8)
EACH = {"smoke": 1, "cpu": 8, "paper": 8}


def cases(rivals, scale: str) -> Iterator[Case]:
    for count in DEVICES:
        if count <= jax.local_device_count():
            yield sweep.case(None, SERIES, count, EACH[scale] * count, count)
