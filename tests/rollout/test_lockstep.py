"""Two processes of four simulated devices each, as two hosts of a slice would run: the same program, shared episodes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import test_runner as small

PROGRAM = Path(__file__).parent / "process.py"


def run(out, *, processes, devices, tp):
    """What each process found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    paths = [out / f"{processes}.{i}.json" for i in range(processes)]
    children = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), address, str(processes), str(i), str(tp), str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i, path in enumerate(paths)
    ]  # fmt: skip
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err[-3000:]
    return [json.loads(path.read_text()) for path in paths]


def test_two_processes_play_their_share_and_each_gets_all(tmp_path):
    first, second = run(tmp_path, processes=2, devices=4, tp=2)
    assert (first["devices"], first["rows"]) == (8, 2 * small.CONFIG.rows)
    assert first["own"] + second["own"] == first["episodes"] == len(small.CALLING) and first["in_order"]
    assert {k: v for k, v in first.items() if k != "own"} == {k: v for k, v in second.items() if k != "own"}
    (alone,) = run(tmp_path, processes=1, devices=8, tp=2)
    assert first["tiers"] == {"exact": 6 * len(small.CALLING)}
    assert alone["tokens_sha256"] == first["tokens_sha256"]  # the same rows a device, the same tp
