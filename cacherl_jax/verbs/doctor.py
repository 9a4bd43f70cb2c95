"""`cacherl doctor`: what is installed on this machine, what is known to break, and what jax sees."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

from cacherl_jax import versions

# A module of each extra, and what the extra is for. The verbs that need one ask for it by themselves.
EXTRAS = {
    "tpu": ("libtpu", "TPUs, and plans for them"),
    "report": ("matplotlib", "figures"),
    "data": ("array_record", "data sets built from corpora"),
    "teacher": ("openai", "teachers and simulators behind an API"),
    "parity": ("torch", "comparison with transformers"),
    "test": ("pytest", "the tests"),
}


def doctor() -> dict[str, Any]:
    """What a report of a problem should hold. `known_bad` lists what must be changed; the rest is for the reader."""
    installed = versions.installed()
    known_bad = []
    try:
        versions.check_pair(installed["jax"], installed["flax"])
    except versions.KnownBadVersions as error:
        known_bad.append(str(error))
    known_bad += [f"{name} is absent: pip install cacherl_jax" for name in versions.PACKAGES[1:] if installed[name] == "absent"]
    return {
        "known_bad": known_bad,
        "versions": installed | {"libtpu": versions.version("libtpu")},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "memory_gib": _memory_gib()},
        "compilation_cache": _compilation_cache(),
        "devices": _devices(),
        "extras": [_extra(name, module, use) for name, (module, use) in EXTRAS.items()],
    }


def _extra(name: str, module: str, use: str) -> dict[str, str]:
    found = importlib.util.find_spec(module) is not None
    return {"extra": name, "for": use, "state": "present" if found else f"absent: pip install 'cacherl_jax[{name}]'"}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not on every system
        return None


def _compilation_cache() -> str:
    """Where compiled programs are kept between runs."""
    import jax

    return jax.config.values["jax_compilation_cache_dir"] or "none: JAX_COMPILATION_CACHE_DIR names a folder for them"


def _devices() -> list[dict[str, Any]]:
    """All devices of this process, those that are alike as one line; what failed, if jax finds none."""
    import jax

    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        return [{"platform": "none", "kind": str(error), "count": 0, "memory_gib": None}]
    rows: dict[tuple, dict[str, Any]] = {}
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = round(limit / 2**30, 2) if limit else None
        row = {"platform": device.platform, "kind": device.device_kind, "count": 0, "memory_gib": memory}
        rows.setdefault(tuple(row.values()), row)["count"] += 1
    return list(rows.values())
