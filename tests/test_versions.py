"""What a user reads when two packages do not fit together or an optional one is absent."""

import json
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cacherl_jax
from cacherl_jax import cli, versions
from cacherl_jax.evaluate import report

INIT = Path(cacherl_jax.__file__)


@pytest.mark.parametrize(
    ("jax", "flax", "fix"),
    [
        ("0.11.2", "0.12.8", "pip install -U flax, or jax<0.11.2"),
        ("0.12.0", "0.12.0", "pip install -U flax, or jax<0.11.2"),
        ("1.0", "0.11.2", "pip install -U flax, or jax<0.11.2"),
        ("0.9.2", "0.11.2", "pip install -U flax, or jax<0.9.2"),
        ("0.10.2", "0.11.0", "pip install -U flax, or jax<0.9.2"),
        ("0.11.2.dev20260101", "0.12.8", "pip install -U flax, or jax<0.11.2"),
    ],
)
def test_a_pair_known_to_break_is_refused_with_both_versions_and_the_way_out(jax, flax, fix):
    with pytest.raises(versions.KnownBadVersions) as refused:
        versions.check_pair(jax, flax)
    assert str(refused.value) == f"flax {flax} does not work with jax {jax}: {fix}"


@pytest.mark.parametrize(
    ("jax", "flax"), [("0.11.2", "0.12.9"), ("0.11.1", "0.12.8"), ("0.10.2", "0.12.0"), ("0.9.1", "0.11.2"), ("0.12.0", "0.13.0")]
)
def test_the_neighbours_of_broken_pairs_pass(jax, flax):
    versions.check_pair(jax, flax)


def test_a_broken_pair_is_refused_when_the_package_is_imported(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"jax": "0.11.2", "flax": "0.12.8"}.__getitem__)
    with pytest.raises(ImportError, match=r"flax 0\.12\.8 does not work with jax 0\.11\.2: pip install"):
        runpy.run_path(str(INIT))


def test_an_absent_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import of it fails, as if it were not installed
    with pytest.raises(versions.MissingExtra) as missing:
        versions.require("matplotlib", "report")
    assert str(missing.value) == "matplotlib is not installed: pip install 'cacherl_jax[report]'"
    assert isinstance(missing.value, ImportError) and isinstance(missing.value.__cause__, ImportError)


def test_a_present_package_is_returned_submodules_as_themselves():
    assert versions.require("json", "report") is json
    assert versions.require("importlib.metadata", "report") is metadata


def test_the_figure_asks_for_its_extra_before_it_draws(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(versions.MissingExtra, match=r"cacherl_jax\[report\]"):
        report.draw_training([], {}, tmp_path / "training.png")


def test_the_command_line_ends_with_the_message_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(cli, "_run_stages", lambda args: versions.require("matplotlib", "report"))
    assert cli.main(["report", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr() == ("", "cacherl: matplotlib is not installed: pip install 'cacherl_jax[report]'\n")


def test_a_run_records_versions_and_what_is_absent(monkeypatch):
    def version(name: str) -> str:
        if name == "optax":
            raise metadata.PackageNotFoundError(name)
        return f"{name} 1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    installed = versions.installed()
    assert installed["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert installed["optax"] == "absent" and installed["jax"] == "jax 1.2.3"
    assert set(installed) == {"python", *versions.PACKAGES}
