"""Backdoor attacks and defenses on image classifiers as pure, compiled JAX functions."""

__version__ = "0.1.0"
