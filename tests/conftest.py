"""Shared fixtures. Tests run on the CPU, refuse silent rank promotion, and skip what needs data that is not there."""

import os
from pathlib import Path
from types import SimpleNamespace

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
