"""The page of an audit."""

from typing import Any


def page(found: Any) -> str:
    return "<!doctype html><title>audit</title>"
