"""The `cacherl` command: one verb a stage, `demo` for all of them, `rollout` for episodes alone, `convert` for weights,
`plan` for what a run needs on a TPU, `doctor` for this machine, `cache` for stores."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cacherl_jax import interrupts
from cacherl_jax.config import Config, ConfigError, load_config, with_overrides
from cacherl_jax.verbs import convert, doctor, plan, rollout, think
from cacherl_jax.verbs.cache_parser import add_verbs

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "demo.py"
STAGES = ("record", "think", "sft", "grpo", "eval", "report")
DISTRIBUTED = """this is one of several processes with devices of their own, all started by the same command; --out is a
folder that all share. Cloud TPU, Slurm, Open MPI and Kubernetes say who they are; elsewhere set JAX_COORDINATOR_ADDRESS
(HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0). A signal to one stops all at the same step"""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a run that cannot go on, 2 for wrong usage, 130 after Ctrl-C, 0 after SIGTERM."""
    args = _parser().parse_args(argv)
    try:
        result = args.verb(args)
    except KeyboardInterrupt as error:
        terminated = interrupts.signal_of(error) == signal.SIGTERM
        word = "terminated" if terminated else "interrupted"
        print(f"\ncacherl: {word}. What was done is kept; the same command goes on from there.", file=sys.stderr)
        return 0 if terminated else INTERRUPTED
    except ConfigError as error:
        print(f"cacherl: {error}", file=sys.stderr)
        return 2
    except _run_errors() as error:
        print(f"cacherl: {error}", file=sys.stderr)
        return 1
    if _first(args):
        print(json.dumps(result) if args.json else _readable(result))
    return 1 if result.get("known_bad") else 0  # doctor's


def _first(args: argparse.Namespace) -> bool:
    """Whether this process speaks for all."""
    if not getattr(args, "distributed", False):
        return True
    from cacherl_jax import processes

    return processes.is_first()


def _run_errors() -> tuple[type[Exception], ...]:
    from cacherl_jax.cache.store import StoreError
    from cacherl_jax.chat_endpoint import EndpointUnusable
    from cacherl_jax.trajectories.paid import TeacherStopped
    from cacherl_jax.versions import MissingExtra

    return (StoreError, MissingExtra, FileNotFoundError, TeacherStopped, EndpointUnusable, plan.CompilerError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cacherl", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    helps = {
        "record": "tasks, demonstrators' transcripts and the cache's stores",
        "think": "add the teacher's reasoning to the transcripts, or to a corpus; train the tokenizer",
        "sft": "clone the demonstrators",
        "grpo": "reinforce, tools answered by the cache alone",
        "eval": "test tasks, live and from the evaluation store",
        "report": "summary.json, figure, table, page of trajectories",
        "demo": "all of these, in order",
        "iterate": "record and think once, then rounds of sft, grpo and rejection sampling, each evaluated",
        "rollout": "play tasks with a policy, tools answered by a store, into a folder of trajectories",
    }
    for name, text in helps.items():
        verb = verbs.add_parser(name, help=text, description=text)
        _add_config(verb)
        verb.add_argument("--seed", type=int, help="short for --set seed=N")
        verb.add_argument("--out", type=Path, required=True, help="the run's folder")
        verb.add_argument("--json", action="store_true", help="one JSON object on standard output, no progress bars")
        verb.add_argument("--distributed", action="store_true", help=DISTRIBUTED)
        verb.set_defaults(verb=_run_stages, stages=STAGES if name == "demo" else (name,))
        if name == "rollout":
            rollout.add_arguments(verb)
            verb.set_defaults(verb=_rollout)
        if name == "think":
            think.add_arguments(verb)
            verb.set_defaults(verb=_think)
    text = "weights from Hugging Face's files to a folder to start from, or back"
    verb = verbs.add_parser("convert", help=text, description=text)
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output, no progress bar")
    verb.set_defaults(verb=_convert)
    convert.add_arguments(verb)
    text = "compile a run's step for a TPU slice, without one: memory, FLOPs, bounds on its time, collectives"
    verb = verbs.add_parser("plan", help=text, description=text)
    _add_config(verb)
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output")
    verb.set_defaults(verb=_plan, seed=None)
    plan.add_arguments(verb)
    text = "versions, pairs known to break, devices and their memory, extras; status 1 when something is known to break"
    verb = verbs.add_parser("doctor", help=text, description=text)
    verb.add_argument("--json", action="store_true", help="one JSON object on standard output")
    verb.set_defaults(verb=lambda args: doctor.doctor())
    add_verbs(verbs.add_parser("cache", help="stores of recorded calls: fill, fit, inspect, publish"))
    return parser


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="a file of configs/, or a run's config as JSON")
    verb.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one field; may be repeated")


def _config(args: argparse.Namespace) -> Config:
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    return with_overrides(load_config(args.config), [*args.set, *seed])


def _run_stages(args: argparse.Namespace) -> dict[str, Any]:
    config = _config(args)  # checked before anything heavy is imported
    _join(args, config)
    from cacherl_jax import metrics
    from cacherl_jax.run_directory import RunDirectory
    from cacherl_jax.stages import eval, grpo, inputs, iterate, record, report, sft
    from cacherl_jax.stages.think import think

    inputs.check_weights(config)

    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "record": record.record,
        "think": think,
        "sft": sft.supervised,
        "grpo": grpo.reinforce,
        "eval": eval.evaluate,
        "report": report.summarise,
        "iterate": iterate.iterate,
    }
    run = RunDirectory(args.out, config)
    progress = metrics.progress_factory(enabled=not args.json and _first(args))
    result: dict[str, Any] = {}
    for stage in args.stages:
        result = verbs[stage](run, progress)
    return result


def _think(args: argparse.Namespace) -> dict[str, Any]:
    config = _config(args)
    think.check(args)
    _join(args, config)
    from cacherl_jax import metrics

    return think.think(args, config, metrics.progress_factory(enabled=not args.json and _first(args)))


def _rollout(args: argparse.Namespace) -> dict[str, Any]:
    config = _config(args)
    _join(args, config)
    from cacherl_jax import metrics

    return rollout.rollout(args, config, metrics.progress_factory(enabled=not args.json and _first(args)))


def _join(args: argparse.Namespace, config: Config) -> None:
    if args.distributed:
        from cacherl_jax import processes, versions

        processes.start()
        processes.refuse_differences({"config": config.to_json(), "versions": versions.installed()})


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from cacherl_jax import metrics

    return convert.convert(args, metrics.progress_factory(enabled=not args.json))


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    result = plan.plan(args, _config(args))
    return result if args.json else plan.readable(result)


WIDE = 60  # characters of a table's cell


def _readable(value: Any, indent: str = "") -> str:
    """A result as text: one line a field; objects of the same kind, in a list or under names, as a table."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return _table(value, indent)
    if not isinstance(value, dict):
        return _cell(value)
    if len(value) > 1 and all(isinstance(row, dict) and row for row in value.values()):
        return _table([{"": name, **row} for name, row in value.items()], indent)
    lines = []
    for name, child in value.items():
        below = bool(child) and (isinstance(child, dict) or (isinstance(child, list) and isinstance(child[0], dict)))
        lines.append(f"{indent}{name}:\n{_readable(child, indent + '  ')}" if below else f"{indent}{name}: {_cell(child)}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], indent: str) -> str:
    """A column a field; fields of an object inside get columns of their own."""
    flat = []
    for row in rows:
        flat.append({})
        for name, value in row.items():
            inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            flat[-1].update(inner)
    columns = list(dict.fromkeys(name for row in flat for name in row))
    cells = [columns, *([_cell(row.get(name, ""))[:WIDE] for name in columns] for row in flat)]
    numeric = [all(isinstance(row.get(name, 0), int | float) for row in flat) for name in columns]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append(indent + "  ".join(parts).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and not any(isinstance(v, dict | list) for v in value):
        return ", ".join(map(_cell, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else " ".join(str(value).splitlines())


def command() -> NoReturn:
    """`main` as a process. Its status is final: a signal while the interpreter takes itself down changes nothing."""
    signal.signal(signal.SIGTERM, interrupts.raise_terminated)
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(status)


if __name__ == "__main__":
    command()
