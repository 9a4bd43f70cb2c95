"""One run by two processes of two simulated devices each: the numbers of one, through kill -9 and a SIGTERM to one of them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import pytest
from test_stages import SIGNALLED, arguments, losses, saved

from cacherl_jax import cli

CHANGES = {
    "mesh.data": 2, "mesh.fsdp": 2, "data.demonstrators": ["expert"], "sft.steps": 5, "sft.accumulate": 2,
    "sft.tokens_per_batch": 512, "model.num_layers": 1, "grpo.steps": 1, "grpo.validate_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what needs no device."""
    out = tmp_path_factory.mktemp("runs") / "prepared"
    for verb in ("record", "think"):
        assert cli.main(arguments(verb, out, **CHANGES)) == 0
    return out


def start(out, verb, processes, *, devices, signals=None, **changes):
    """The processes of one command; signals: what a process does to itself, by its number."""

    def words(index):
        program = f"{SIGNALLED}{(signals or {}).get(index, '')}\ncli.command()"
        more = CHANGES | changes.get(f"process_{index}", {})
        return [program, *arguments(verb, out, **more), *["--distributed"] * (processes > 1)]

    return launch(words, processes, devices)


def launch(words, processes, devices):
    """Python processes that know each other; words: the program of each, and its arguments."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    children = []
    for index in range(processes):
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", *words(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | programs | names,
            )
        )  # fmt: skip
    return children


def ended(children):
    """(status, standard output, standard error) of each."""
    found = []
    for child in children:
        out, err = child.communicate()
        # Gloo, which joins CPUs, speaks on standard output, from several threads that cut into each other's lines.
        said = (line for line in out.splitlines(True) if not re.search(r"\[Gloo\]|Rank \d|peer ranks", line))
        found.append((child.returncode, "".join(line for line in said if line.strip()), err))
    return found


def test_two_processes_train_as_one_and_survive_what_happens_to_one_of_them(prepared, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    shutil.copytree(prepared, alone)
    shutil.copytree(prepared, both)
    ((status, _, err),) = ended(start(alone, "sft", 1, devices=4))
    assert status == 0, err[-3000:]

    killed = 'after_call(2, checkpoint.ocp.CheckpointManager, "save", lambda: os.kill(os.getpid(), signal.SIGKILL))'
    children = start(both, "sft", 2, devices=2, signals={1: killed})
    assert children[1].wait() == -signal.SIGKILL
    children[0].kill()  # it would wait for the other
    ended(children)
    assert not (both / "sft" / "done.json").exists()

    # In the first update that this process makes; the other one hears of it.
    terminated = 'after_call(1, grpo.steps, "accumulate", lambda: signal.raise_signal(signal.SIGTERM))'
    found = ended(start(both, "sft", 2, devices=2, signals={1: terminated}))
    for status, out, err in found:
        assert (status, out) == (0, "") and "the same command goes on from there" in err and "Traceback" not in err, err[-3000:]
    (step,) = saved(both, "sft")
    assert step in (3, 5) and not (both / "sft" / "done.json").exists()

    (status, out, err), (other, silent, _) = ended(start(both, "sft", 2, devices=2))
    assert (status, other, silent) == (0, 0, "") and json.loads(out)["sft"]["rows"] == 30, err[-3000:]
    (one,), (two,) = losses(alone, "sft"), losses(both, "sft")
    # Gloo adds the devices' parts of the loss in another order.
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-6) and one == two


def test_what_fails_in_the_first_process_ends_the_others_too():
    program = """
from cacherl_jax import processes
processes.start()
assert processes.of_first("the first", lambda: [processes.index()]) == [0]
processes.of_first("the judge", lambda: 1 / 0)
"""
    (first, _, why), (other, _, said) = ended(launch(lambda index: [program], 2, 1))
    assert first and other and "ZeroDivisionError" in why, why[-3000:]
    assert "ConfigError: the judge failed in the first process, which says why" in said, said[-3000:]


def test_processes_that_were_not_started_alike_are_refused(tmp_path):
    children = start(tmp_path, "record", 2, devices=1, process_1={"sft.steps": 6})
    for status, out, err in ended(children):
        assert (status, out) == (2, "") and "config.sft.steps is 5 in process 0, 6 in process 1" in err, err[-3000:]
    assert not list(tmp_path.iterdir())
