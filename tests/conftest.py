"""Shared fixtures. Tests run on the CPU, refuse silent rank promotion, and skip what needs data that is not there."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

ROOT = Path(__file__).parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are kept between runs: most of the suite's time is compilation.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora: $CACHERL_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("CACHERL_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real corpora are not at {path}; set CACHERL_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_data):
    from cacherl_jax.text.tokenizer import Tokenizer

    return Tokenizer.load(shared_data / "qwen3-tokenizer")
