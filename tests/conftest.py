"""Shared fixtures. Tests run on the CPU, refuse silent rank promotion, and skip what needs data that is not there."""

import inspect
import os
import re
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run here for milliseconds and are compiled for seconds: they need not be fast. Child processes get both.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Shaped, jaxtyped

from cacherl_jax.model import attention

ROOT = Path(__file__).parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are kept between runs: most of the suite's time is compilation.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_shapes_in_names(module) -> None:
    """Makes the public functions of a module check what the names of their arguments say: of q_BTNH and k_BKSH, four axes
    each, with one B and one H."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        shapes = {p: found[1] for p in inspect.signature(function).parameters if (found := re.search(r"_([A-Z][A-Z0-9]*)$", p))}
        if shapes and function.__module__ == module.__name__ and not name.startswith("_"):
            arrays = {p: Shaped[jax.Array | np.ndarray, " ".join(axes)] for p, axes in shapes.items()}
            optional = {p for p, parameter in inspect.signature(function).parameters.items() if parameter.default is None}
            function.__annotations__ = {p: array | None if p in optional else array for p, array in arrays.items()}
            setattr(module, name, jaxtyped(beartype(function), typechecker=None))


check_shapes_in_names(attention)  # before qwen3 takes its function from there

from cacherl_jax.model import qwen3  # noqa: E402
from cacherl_jax.train import losses, policy_loss  # noqa: E402

for checked in (qwen3, losses, policy_loss):
    check_shapes_in_names(checked)


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


@pytest.fixture(scope="session")
def official(shared_data):
    """Qwen's own templates and tokenizer as transformers runs them. text(messages, tools, thinking_model=, prompt=) renders
    messages in the form of OpenAI's chat API; ids(text) tokenizes a text, or each of a list."""
    import transformers

    folder = shared_data / "qwen3-tokenizer"
    names = {False: "chat_template.qwen3.jinja", True: "chat_template.qwen3-4b-thinking-2507.jinja"}
    templates = {thinking_model: (folder / name).read_text() for thinking_model, name in names.items()}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def text(messages, tools, *, thinking_model, prompt=False):
        return reference.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=templates[thinking_model],
            add_generation_prompt=prompt,
            tokenize=False,
        )

    def ids(text):
        return reference(text, add_special_tokens=False)["input_ids"]

    return SimpleNamespace(text=text, ids=ids, decode=reference.decode)
