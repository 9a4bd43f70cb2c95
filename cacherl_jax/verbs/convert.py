"""`cacherl convert`: weights from Hugging Face's files to a folder to start from (model_folder.py), and back.

What is not weights is carried along byte for byte both ways: tokenizer, chat template, generation_config. The target appears
whole or not at all. `huggingface_hub` comes with transformers 5, a core dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacherl_jax.config import ConfigError

if TYPE_CHECKING:
    from cacherl_jax.config import ModelConfig
    from cacherl_jax.metrics import ProgressFactory
    from cacherl_jax.model.hf_files import Stored

# Files beside the weights that a checkpoint may have.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip


def add_arguments(verb: argparse.ArgumentParser) -> None:
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-hf", metavar="DIR_OR_ID", help="config.json and safetensors, or a Hub id such as Qwen/Qwen3-4B")
    source.add_argument(
        "--from", dest="from_ours", type=Path, metavar="DIR", help="a converted folder, or a finished stage such as runs/demo/sft"
    )
    target = verb.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, metavar="DIR", help="with --from-hf: the new folder, such as rollout --policy takes")
    target.add_argument("--to-hf", type=Path, metavar="DIR", help="with --from: the new folder, as transformers takes it")
    verb.add_argument(
        "--adapter",
        action="store_true",
        help="with --from a stage that trained one and --to-hf: the adapter alone, as PEFT takes it",
    )
    verb.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; by default as they are")


def convert(args: argparse.Namespace, progress: ProgressFactory) -> dict[str, Any]:
    """Returns counts and the files carried along. Raises ConfigError for what cannot be converted; nothing is written then."""
    if (args.from_hf is None) != (args.to is None):
        raise ConfigError("--from-hf goes with --to, and --from with --to-hf")
    if args.adapter and args.to_hf is None:
        raise ConfigError("--adapter goes with --from and --to-hf")
    if args.adapter:
        return _to_peft(args.from_ours, args.to_hf, args.dtype)
    if args.to is not None:
        return _from_hf(args.from_hf, args.to, args.dtype, progress)
    return _to_hf(args.from_ours, args.to_hf, args.dtype, progress)


def _from_hf(source: str, target: Path, dtype: str | None, progress: ProgressFactory) -> dict[str, Any]:
    _refuse_existing(target)
    folder = _local(source)

    from cacherl_jax import model_folder
    from cacherl_jax.model import hf, hf_files
    from cacherl_jax.model.hf_config import from_hf_config

    with _named(folder / "config.json"):
        config = from_hf_config(_fields(folder / "config.json"), dtype)
    found = hf_files.headers(folder)
    expected = {name: place.shape for name, place in hf.places(config).items()}
    with _named(folder):
        hf_files.check(_without_tied_head(config, found), expected)
    mesh = model_folder.conversion_mesh(config.hidden_size)
    with _replacing(target) as new, progress(total=len(expected), desc="convert") as bar:
        model = hf.load(config, lambda name, index: hf_files.read(found[name], name, index), mesh, lambda: bar.update(1))
        model_folder.write(new, model)
        carried = _carry(folder, new / "tokenizer")
    return _summary(config, expected, carried)


def _to_hf(folder: Path, target: Path, dtype: str | None, progress: ProgressFactory) -> dict[str, Any]:
    _refuse_existing(target)

    from cacherl_jax import model_folder
    from cacherl_jax.model import hf, hf_files

    config = model_folder.model_config(folder)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    places = hf.places(config)
    shapes = {name: place.shape for name, place in places.items()}
    read, tokenizer = model_folder.reader(folder, config), model_folder.tokenizer_folder(folder)
    with _replacing(target) as new, progress(total=len(places), desc="convert") as bar:
        with hf_files.Writer(new, shapes, config.dtype) as files:
            # Weight by weight, as they are stored; the files are filled in any order.
            for name, (weight, layer, _) in sorted(places.items(), key=lambda item: item[1].weight):
                tensor = read(weight, layer)
                files.write(name, tensor if layer is None else hf.layer_to_hf(tensor))
                bar.update(1)
        carried = _carry(tokenizer, new)
        (new / "config.json").write_bytes(_config_text(config, tokenizer))
    return _summary(config, shapes, sorted({*carried, "config.json"}))


def _to_peft(stage: Path, target: Path, dtype: str | None) -> dict[str, Any]:
    _refuse_existing(target)

    from cacherl_jax import adapter_folder, model_folder

    mesh = model_folder.conversion_mesh(model_folder.model_config(stage).hidden_size)
    with _replacing(target) as new:
        return adapter_folder.export(stage, new, mesh, dtype)


def _config_text(config: ModelConfig, tokenizer: Path) -> bytes:
    """config.json as it came, if it still says what the model is; else with what changed."""
    from cacherl_jax.model.hf_config import to_hf_config
    from cacherl_jax.text.tokenizer import END_OF_TEXT, Tokenizer

    path = tokenizer / "config.json"
    if path.is_file():
        came = _fields(path)
        fields = to_hf_config(config, came)
        if fields == came:
            return path.read_bytes()
    else:
        tok = Tokenizer.load(tokenizer)
        fields = to_hf_config(config) | {"eos_token_id": tok.im_end, "pad_token_id": tok.id(END_OF_TEXT)}
    return json.dumps(fields, indent=2).encode() + b"\n"


def _without_tied_head(config: ModelConfig, found: dict[str, Stored]) -> dict[str, Stored]:
    """Without a head that repeats the embedding: some releases with tied weights store both (Qwen3-0.6B, 1.7B)."""
    from cacherl_jax.model import hf, hf_files

    if not config.tie_word_embeddings or hf.HEAD not in found or hf.EMBEDDING not in found:
        return found
    same, V = found[hf.HEAD].shape == found[hf.EMBEDDING].shape, found[hf.HEAD].shape[0]
    for start in range(0, V if same else 0, 8192):
        rows = (slice(start, min(start + 8192, V)),)
        head, embedding = (hf_files.read(found[name], name, rows) for name in (hf.HEAD, hf.EMBEDDING))
        same = same and np.array_equal(head, embedding)
    if not same:
        raise ConfigError(f"tensor {hf.HEAD!r} differs from {hf.EMBEDDING!r}, but tie_word_embeddings says that they are one")
    return {name: stored for name, stored in found.items() if name != hf.HEAD}


# ---- folders ---------------------------------------------------------------------------------------------------------


def _local(source: str) -> Path:
    """The folder itself, or the Hub's files of that id in its cache: only those that are needed."""
    if Path(source).exists():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ConfigError(f"--from-hf {source}: there is no such folder, and it is no id such as Qwen/Qwen3-4B")
    import huggingface_hub

    from cacherl_jax.model import hf_files

    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=[*CARRIED, hf_files.INDEX, hf_files.SINGLE]))
        if shards := [name for name, tensors in hf_files.shard_names(folder).items() if tensors is not None]:
            # The same commit, which names the snapshot's folder.
            huggingface_hub.snapshot_download(source, revision=folder.name, allow_patterns=shards)
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--from-hf {source}: there is no such folder, and the Hub cannot give it: {first}") from error
    return folder


def _refuse_existing(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; choose another folder, or delete it")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when all went well, and is gone when not."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _carry(source: Path, target: Path) -> list[str]:
    """Copies what is not weights byte for byte; returns the names."""
    names = sorted({path.relative_to(source) for pattern in CARRIED for path in source.glob(pattern) if path.is_file()})
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return [str(name) for name in names]


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds {type(fields).__name__}, expected an object")
    return fields


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the path in front of what is wrong there."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _summary(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], carried: list[str]) -> dict[str, Any]:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {"tensors": len(shapes), "parameters": parameters, "dtype": config.dtype, "carried": carried}
