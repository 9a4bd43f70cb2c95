"""A full-size Qwen3-4B with random weights, from transformers and back: the same logits, the same bytes, and the memory it takes.

Command:  python experiments/parity_4b/run.py --work runs/parity_4b
Cost:     about 6 CPU-minutes, 13 GB of memory, 24 GB of disk below --work; each step that is done is not done again
Expect:   every tensor comes back byte for byte; figures in result.json beside this file

Needs torch (pip install torch==2.13.0). Each step runs in a process of its own, whose peak of resident memory is kept:
write        transformers writes the checkpoint in bfloat16, all norms off one
theirs       transformers' logits: in float32, a layer converted at a time, and in bfloat16
convert      cacherl convert --from-hf
ours         our logits, likewise
convert_back cacherl convert --to-hf
reload       transformers reads what came back; its warnings are counted
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
# Qwen3-4B-Thinking-2507's config.json, but for the number of layers.
SIZES = {
    "vocab_size": 151_936, "hidden_size": 2_560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 9_728, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "bos_token_id": 151_643, "eos_token_id": 151_645,
}  # fmt: skip
DTYPES = ("float32", "bfloat16")


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, count))


# ---- steps, each in its own process ----------------------------------------------------------------------------------


def write(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that no float32 copy exists at any time
    config = transformers.Qwen3Config(**SIZES, num_hidden_layers=args.layers, max_window_layers=args.layers)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(work / "hf", max_shard_size="2GB")
    return {"parameters": sum(p.numel() for p in model.parameters()), "shards": len(list((work / "hf").glob("*.safetensors")))}


def theirs(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.bfloat16)
    tokens = torch.tensor(tokens_of(args.tokens))
    with torch.no_grad():
        np.save(work / "theirs-bfloat16.npy", model(tokens).logits.float().numpy())
    # float32 as a whole would be 16 GB: what runs has float32 weights, what waits keeps bfloat16, and the round trip is exact.
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())
    for module in (*model.model.layers, model.model.norm, model.lm_head):
        module.register_forward_pre_hook(lambda module, inputs: module.float() and None)
        module.register_forward_hook(lambda module, inputs, output: module.bfloat16() and None)
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float32
    np.save(work / "theirs-float32.npy", logits.numpy())
    return {"threads": torch.get_num_threads()}


def ours(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    # XLA on CPUs multiplies in float32. This pass would convert all layers' weights before the scan, 16 GB instead of one layer's.
    os.environ["XLA_FLAGS"] = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"

    import jax
    import jax.numpy as jnp

    from cacherl_jax.model import qwen3
    from cacherl_jax.model_folder import model_config, reader

    config = model_config(work / "ours")
    read = reader(work / "ours", config)  # a weight at a time, all layers of it
    table = qwen3.table(config)
    tree = {name: jnp.asarray(read(name, None)) for name in table if name != "layers"}
    tree["layers"] = {name: jnp.asarray(read(name, None)) for name in table["layers"]}
    tokens_BT = jnp.asarray(tokens_of(args.tokens), jnp.int32)

    @jax.jit
    def logits(model: qwen3.Qwen3) -> jax.Array:
        return qwen3.logits(model, qwen3.forward(model, tokens_BT, jnp.ones_like(tokens_BT)))

    for dtype in reversed(DTYPES):
        # Computed in the configuration's dtype: a layer's weights are converted when the scan reaches it.
        model = qwen3.from_dict(dataclasses.replace(config, dtype=dtype), tree)
        np.save(work / f"ours-{dtype}.npy", np.asarray(logits(model)))
    return {"devices": str(jax.devices())}


def convert(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    return cacherl("convert", "--json", "--from-hf", work / "hf", "--to", work / "ours")


def convert_back(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    return cacherl("convert", "--json", "--from", work / "ours", "--to-hf", work / "back")


def cacherl(*arguments: object) -> dict[str, Any]:
    """The command itself, in this process, so that its memory is what is measured."""
    import contextlib
    import io

    from cacherl_jax import cli

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main([str(a) for a in arguments])
    if status != 0:
        sys.exit(status)
    return json.loads(out.getvalue())


def reload(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    import logging

    import torch
    import transformers

    warned, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(work / "back", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    return {"warnings": warned, "loading_info": {name: sorted(map(str, found)) for name, found in info.items()}}


STEPS = {f.__name__: f for f in (write, theirs, convert, ours, convert_back, reload)}


# ---- comparison ------------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...], int, int]]:
    """Every tensor's file, dtype, shape and bytes from the headers, without a library that both sides use."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, t in header.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in t["data_offsets"])
                found[name] = path, t["dtype"], tuple(t["shape"]), start, stop
    return found


def compare_bytes(work: Path) -> dict[str, Any]:
    before, after = tensors_of(work / "hf"), tensors_of(work / "back")
    differ, size = sorted(before.keys() ^ after.keys()), 0
    for name in before.keys() & after.keys():
        (path, *like, start, stop), (other, *other_like, other_start, other_stop) = before[name], after[name]
        a = np.memmap(path, np.uint8, "r", start, stop - start)
        b = np.memmap(other, np.uint8, "r", other_start, other_stop - other_start)
        if like != other_like or not np.array_equal(a, b):
            differ.append(name)
        size += stop - start
    files = {
        name: (work / "hf" / name).read_bytes() == (work / "back" / name).read_bytes()
        for name in ("config.json", "generation_config.json")
    }
    return {"tensors": len(before), "bytes": size, "tensors_that_differ": sorted(differ), "same_files": files}


def compare_logits(work: Path) -> dict[str, Any]:
    exact = np.load(work / "theirs-float32.npy")
    result: dict[str, Any] = {"logits": exact.shape, "standard_deviation": float(exact.std())}
    for name in ("ours-float32", "theirs-bfloat16", "ours-bfloat16"):
        logits = np.load(work / f"{name}.npy")
        assert logits.dtype == np.float32
        result[f"{name} against theirs-float32"] = {
            "largest": float(np.abs(logits - exact).max()),
            "rms": float(np.sqrt(np.mean(np.square(logits - exact)))),
            "same_first_choice": float(np.mean(logits.argmax(-1) == exact.argmax(-1))),
        }
    return result


# ---- the whole -------------------------------------------------------------------------------------------------------


def run_step(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the step returned and took; from its file, where it was done before."""
    done = args.work / f"{name}.json"
    if done.is_file():
        return json.loads(done.read_text())
    for left in {"write": ["hf"], "convert": ["ours"], "convert_back": ["back"]}.get(name, []):  # by one that was killed
        shutil.rmtree(args.work / left, ignore_errors=True)
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--work", str(args.work), "--layers", str(args.layers), "--tokens", str(args.tokens)]
    start = time.monotonic()
    process = subprocess.Popen([*command, "--step", name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"step {name} failed")
    result = {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_gb": round(used.ru_maxrss * 1024 / 1e9, 2),  # kilobytes on Linux
        "returned": json.loads(out.splitlines()[-1]),
    }
    done.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and what is done; may be deleted")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="result; by default result.json beside this file, at full size alone")
    parser.add_argument("--step", choices=STEPS, help="this step alone, in this process")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](args.work, args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    sizes, asked = args.work / "sizes.json", {"layers": args.layers, "tokens": args.tokens}
    if sizes.is_file() and json.loads(sizes.read_text()) != asked:
        sys.exit(f"{args.work} was begun with {sizes.read_text()}; take another folder, or delete it")
    sizes.write_text(json.dumps(asked))
    versions = {name: version(name) for name in ("jax", "flax", "torch", "transformers", "safetensors", "orbax-checkpoint")}
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions, **asked}
    result["steps"] = {name: run_step(name, args) for name in STEPS}
    result |= {"bytes": compare_bytes(args.work), "logits": compare_logits(args.work)}
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if out := args.out or (HERE / "result.json" if args.layers == 36 else None):
        out.write_text(text)


if __name__ == "__main__":
    main()
