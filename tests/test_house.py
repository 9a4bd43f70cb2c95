"""The house keeps its order: imports run one way, dependencies are declared, and what the documents say can be run."""

import ast
import re
import resource
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from cacherl_jax import cli
from cacherl_jax.config import load_config, with_overrides

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cacherl_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
READMES = sorted([*ROOT.glob("README*.md"), *(ROOT / "experiments").rglob("README*.md")])

# Who may import what of the package, beside its own room. A row names earlier rows only, so imports run one way. Dotted
# rows are parts that lie below the rest of their room; a room named in a row includes its parts.
FIRST = {"types", "trajectory", "config", "versions", "whole_files", "chat_endpoint"}
SECOND = FIRST | {"interrupts", "processes", "mesh", "metrics", "text", "tools", "cache"}
THIRD = SECOND | {"model", "data", "trajectories"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "trajectory": {"types"},
    "versions": set(),
    "whole_files": set(),
    "config": set(),
    "chat_endpoint": {"config", "versions"},
    "sizes": {"config"},
    "presets": {"config", "sizes"},
    "interrupts": FIRST,
    "processes": FIRST | {"interrupts"},
    "mesh": FIRST,
    "metrics": FIRST,
    "text": FIRST,
    "tools": FIRST,
    "cache": FIRST | {"tools"},
    "model": FIRST | {"mesh"},
    "data": SECOND,
    "trajectories": FIRST | {"interrupts", "metrics", "text", "tools", "cache"},
    "corpus": THIRD - {"mesh", "model"},
    "rollout.sampling": FIRST | {"mesh"},
    "rollout.engine": FIRST | {"mesh", "model", "rollout.sampling"},  # token ids only: no text, tools or cache
    # The host's side, without a model. The loop makes no calls: it says which are to be made.
    "rollout.agent_loop": FIRST | {"text", "tools"},
    "rollout.tool_calls": FIRST | {"tools"},
    "rollout.stream": FIRST,
    "rollout.fork": FIRST | {"rollout.agent_loop", "rollout.tool_calls"},
    "rollout": THIRD,
    "reward": THIRD,
    "evaluate": THIRD | {"rollout", "reward"},
    "train.losses": FIRST | {"mesh"},  # no model: hidden states come as arrays
    "train.policy_loss": FIRST | {"train.losses"},
    "train.step": FIRST | {"mesh", "model", "train.losses", "train.policy_loss"},
    "model_folder": FIRST | {"mesh", "model"},
    "checkpoint": FIRST | {"mesh", "model", "train.step", "model_folder"},
    "adapter_folder": FIRST | {"mesh", "model", "processes", "train.step", "checkpoint"},
    "train": THIRD | {"rollout", "reward", "evaluate", "checkpoint", "adapter_folder"},
    "run_directory": FIRST | {"processes"},
    "stages": THIRD | {"corpus", "rollout", "reward", "evaluate", "checkpoint", "model_folder", "train", "run_directory"},
    "verbs.rollout": THIRD | {"rollout", "checkpoint", "model_folder", "run_directory"},
    "verbs.think": THIRD | {"run_directory", "stages"},
    "plan.topology": FIRST,
    "plan.hlo": set(),
    "plan.flops": FIRST | {"model"},
    "plan": THIRD | {"rollout", "train", "checkpoint", "adapter_folder"},
    "verbs.plan": FIRST | {"plan.topology"},
    "verbs.doctor": FIRST,
    "verbs.convert": FIRST | {"metrics", "text", "model", "model_folder", "adapter_folder"},
    "verbs.cache": THIRD | {"evaluate"},
    "verbs.cache_parser": {"verbs.cache"},
    "verbs": set(),
    "cli": THIRD | {"run_directory", "stages", "verbs"},
    "": {"versions"},  # cacherl_jax/__init__.py
}
# Rooms for a host without an accelerator's libraries.
WITHOUT_JAX = FIRST | {"interrupts", "metrics", "text", "tools", "cache", "trajectories"}
WITHOUT_JAX |= {f"rollout.{part}" for part in ("agent_loop", "tool_calls", "stream", "fork")}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

# The core dependencies: the owner's list, and what was added to it.
OWNERS = {"jax", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "rapidfuzz", "numpy"}
ADDED = {"tokenizers", "importlib_resources", "jinja2", "jsonschema", "pydantic", "tqdm"}


class Import(NamedTuple):
    name: str  # dotted, with the imported name: "cacherl_jax.types.Task"
    line: int
    in_function: bool


def imports(path: Path) -> list[Import]:
    """All imports of a module, wherever they stand; require("x", extra) and import_module("x") count."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        elif (required := required_extra(node)) is not None:
            names = [required[0]]
        found.extend(Import(name, getattr(node, "lineno", 0), in_function) for name in names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def required_extra(node: ast.AST) -> tuple[str, str] | None:
    """(module, extra) of a call of versions.require."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "require":
        values = [v.value for v in (*node.args, *(k.value for k in node.keywords)) if isinstance(v, ast.Constant)]
        return (values[0], values[1]) if len(values) == 2 else None
    return None


def room(dotted: str) -> str:
    """The row of the table that a dotted name inside the package belongs to: the longest that fits."""
    parts = dotted.split(".")
    return next((row for n in (2, 1) if len(parts) >= n and (row := ".".join(parts[:n])) in MAY_IMPORT), parts[0])


def inside(path: Path) -> str:
    """A module's dotted name inside the package; "" is the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


# ---- rooms -----------------------------------------------------------------------------------------------------------


def test_the_table_of_rooms_runs_one_way_and_names_what_exists():
    rows = list(MAY_IMPORT)
    for row, allowed in MAY_IMPORT.items():
        assert allowed <= set(rows[: rows.index(row)]), f"{row!r} may import later rows"
        assert row not in WITHOUT_JAX or allowed <= WITHOUT_JAX, f"{row!r} would import jax through another room"
        path = PACKAGE.joinpath(*row.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"the table names {row!r}, which is no module"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path):
    own = room(inside(path))
    assert own in MAY_IMPORT, f"{path.relative_to(ROOT)} is in no row of the table"
    for name, line, _ in imports(path):
        top, _, rest = name.partition(".")
        if top == "cacherl_jax":
            theirs = room(rest)
            allowed = MAY_IMPORT[own] | {own}
            assert {theirs, theirs.split(".")[0]} & allowed, f"{where(path, line)}: {own!r} may not import {theirs!r} ({name})"
        else:
            assert top not in JAX or own not in WITHOUT_JAX, f"{where(path, line)}: {own!r} may not import {top}"


def test_modules_have_one_subject_and_can_be_read_in_one_sitting():
    for path in sorted(p for folder in ("cacherl_jax", "configs", "experiments", "tests") for p in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT)
        assert not {"util", "utils", "helper", "helpers", "common"} & {*name.with_suffix("").parts}, f"{name} names no subject"
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 450, f"{name} has {lines} lines"


# ---- dependencies ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared():
    """What setup.py passes to setuptools.setup."""
    passed = {}
    with pytest.MonkeyPatch.context() as patch:
        setuptools = SimpleNamespace(setup=passed.update, find_packages=lambda **_: [])  # a test needs no setuptools
        patch.setitem(sys.modules, "setuptools", setuptools)
        runpy.run_path(str(ROOT / "setup.py"))
    return SimpleNamespace(**passed)


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0] for r in requirements}


def modules(requirements: list[str]) -> set[str]:
    """Top-level modules of the required distributions, and those that come with them by their own declaration."""
    named = {{"orbax-checkpoint": "orbax"}.get(name, name.replace("-", "_")) for name in distributions(requirements)}
    come_with = {"transformers": {"safetensors", "huggingface_hub"}, "orbax": {"tensorstore"}}
    return named.union(*(come_with.get(name, set()) for name in named))


def test_the_core_stays_within_the_owners_list_and_the_additions(declared):
    core = distributions(declared.install_requires)
    assert core >= OWNERS
    assert core <= OWNERS | ADDED, "a new core dependency is the owner's decision"


def test_every_third_party_import_is_declared_and_those_of_extras_stand_in_functions(declared):
    core, extras = modules(declared.install_requires), {name: modules(r) for name, r in declared.extras_require.items()}
    for path in MODULES:
        for name, line, in_function in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "cacherl_jax" or top in core:
                continue
            assert any(top in of_extra for of_extra in extras.values()), f"{where(path, line)}: setup.py declares no {top}"
            assert in_function, f"{where(path, line)}: {top} comes with an extra and is imported with the module"


def test_an_absent_package_is_asked_for_by_an_extra_that_brings_it(declared):
    extras = {name: modules(requirements) for name, requirements in declared.extras_require.items()}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (required := required_extra(node)) is not None:
                module, extra = required
                assert module.split(".")[0] in extras.get(extra, ()), f"{path.relative_to(ROOT)}: {extra!r} brings no {module}"


HEAVY = sorted([*JAX, "transformers", "tokenizers", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "safetensors"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "one verb a stage"),
        (["grpo", "--help"], 0, "--config"),
        (["grpo", "--out", "unused", "--set", "grpo.stepz=1"], 2, "no field 'stepz'"),
    ],
)
def test_help_and_wrong_usage_answer_at_once(arguments, status, message):
    program = (
        "import sys, cacherl_jax.cli as cli\n"
        "try: status = cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        f"print('loaded', [name for name in {HEAVY} if name in sys.modules])\n"
        "sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


# ---- documents -------------------------------------------------------------------------------------------------------


def commands(text: str, program: str) -> Iterator[list[str]]:
    """The arguments of each call of `program` in a shell text, or behind a label; a parenthesis or # ends a call."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for part in re.split(r"&&|\|\||[;|]", re.sub(r"^\s*(?:\$\s|[A-Z]\w*:\s)", "", line)):
            found = re.match(rf"\s*(?:[A-Z0-9_]+=\S*\s+)*(?:\S*/)?{program}((?:\s+[^\s(#]\S*)*)\s*(?:$|[(#])", part)
            if found:
                yield shlex.split(found[1])


def check_cacherl(arguments: list[str]) -> None:
    """Fails unless the command line takes the arguments, configuration and overrides included."""
    args = cli._parser().parse_args(arguments)
    if getattr(args, "config", None):
        with_overrides(load_config(args.config), args.set)


FENCE = re.compile(r"^ *```([\w-]*).*?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def shell_blocks(markdown: str) -> str:
    return "\n".join(text for language, text in FENCE.findall(markdown) if language in ("bash", "sh", "shell", "console"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_opens_with_its_command_cost_and_expectation(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for label in ("Command", "Cost", "Expect"):
        assert re.search(rf"^{label}: +\S", text, re.MULTILINE), f"no line {label!r}"
    assert load_config(path).name
    own = list(commands(text, "cacherl"))
    assert any(f"configs/{path.name}" in arguments for arguments in own), f"no command runs configs/{path.name}"
    for arguments in own:
        check_cacherl(arguments)


def test_the_default_config_exists():
    assert cli.DEFAULT_CONFIG in CONFIGS


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_readme_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shell = shell_blocks(path.read_text(encoding="utf-8"))
    rules = re.findall(r"^(\w[\w.-]*(?: +[\w.-]+)*) *:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for arguments in commands(shell, "make"):
        asked = {a for a in arguments if not a.startswith("-") and "=" not in a}
        assert asked <= targets, f"make {' '.join(arguments)}: the Makefile has {', '.join(sorted(targets))}"
    for arguments in commands(shell, "cacherl"):
        check_cacherl(arguments)


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_of_a_readme_exist(path):
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"`[^`\n]*`", "``", FENCE.sub("", text))
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)  # [text](target), ![text](target)
    links += re.findall(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", prose, re.MULTILINE)  # [label]: target
    links += re.findall(r"""\b(?:src|href)=["']([^"']+)""", prose)
    for link in links:
        if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", link, re.IGNORECASE):
            assert (path.parent / link.partition("#")[0]).exists(), f"{link} does not exist"
    # The repository's paths, named in prose, code and commands. Of a pattern, the folder before its first wildcard.
    for named in re.findall(r"(?<![\w./:-])(?:cacherl_jax|colab|configs|experiments|tests)/[\w./*<{-]*", text):
        fixed = re.split(r"[*<{]", named)[0]
        expected = fixed if fixed == named else fixed.rpartition("/")[0]
        assert (ROOT / expected.rstrip(".")).exists(), f"{named} does not exist"


def test_licence_and_citation_agree_with_setup(declared):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {declared.version}\n" in citation
    assert f"\nlicense: {declared.license}\n" in citation
    assert declared.license == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text(encoding="utf-8")
