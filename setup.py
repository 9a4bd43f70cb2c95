"""Installation. The core is light: no accelerator build of jax, no torch, no tensorflow. See the extras."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "tpu": ["jax[tpu]", "libtpu"],
    "report": ["matplotlib>=3.8"],
    "data": ["array_record>=0.8"],
    "parity": ["torch"],
    "teacher": ["openai>=1.40", "tenacity>=9"],
}
EXTRAS["test"] = [
    *EXTRAS["tpu"],
    *EXTRAS["report"],
    *EXTRAS["data"],
    *EXTRAS["teacher"],
    "hypothesis>=6.100",
    "jaxtyping>=0.2.36",
    "beartype>=0.19",
    "pyright>=1.1.400",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
]

setup(
    name="cacherl_jax",
    version="0.1.0",
    description="CacheRL in JAX: train multi-step tool-calling agents by SFT and GRPO without calling a live tool",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cacherl_jax", "cacherl_jax.*"]),
    package_data={"cacherl_jax": ["data/*.json", "evaluate/*.html"]},
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.3,<1.0",
        "transformers>=5,<6",
        "tokenizers>=0.22",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",
        "numpy>=2",
        "rapidfuzz>=3.9",
        "jinja2>=3.1",
        "jsonschema>=4.21",
        "pydantic>=2.7",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cacherl=cacherl_jax.cli:command"]},
)
