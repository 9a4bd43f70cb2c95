"""Which versions are installed, which pairs are known to break, and errors that name the extra to install."""

from __future__ import annotations

import importlib
import platform
import re
from importlib import metadata
from types import ModuleType

PACKAGES = ("cacherl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


class MissingExtra(ImportError):
    """An optional package is absent; the message names the extra that brings it."""


class KnownBadVersions(ImportError):
    """Two installed packages that are known not to work together."""


def installed() -> dict[str, str]:
    """Versions of what decides a run's results, and of Python."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """The installed version; "absent" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def check_pair(jax: str, flax: str) -> None:
    """Raises KnownBadVersions when this flax is known to break with this jax. pip installs such pairs without a word."""
    jax_version, flax_version = _numbers(jax), _numbers(flax)
    if jax_version >= (0, 11, 2) and flax_version <= (0, 12, 8):
        fix = "pip install -U flax, or jax<0.11.2"
    elif jax_version >= (0, 9, 2) and flax_version <= (0, 11, 2):
        fix = "pip install -U flax, or jax<0.9.2"
    else:
        return
    raise KnownBadVersions(f"flax {flax} does not work with jax {jax}: {fix}")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading digits of up to three parts: "0.13rc1" is (0, 13)."""
    digits = (re.match(r"\d+", part) for part in version.split(".")[:3])
    return tuple(int(found.group()) for found in digits if found)


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package. Raises MissingExtra naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed: pip install 'cacherl_jax[{extra}]'") from error
