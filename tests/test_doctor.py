"""`cacherl doctor`: what it says of this machine, and that it ends with 1 when something is known to break."""

import json
from importlib import metadata

from cacherl_jax import cli


def test_a_machine_that_works(capsys):
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (status, found["known_bad"]) == (0, [])
    assert found["versions"]["jax"] == metadata.version("jax")
    assert [d["platform"] for d in found["devices"]] == ["cpu"]
    assert found["compilation_cache"].endswith(".jax_cache")  # the tests' own, see conftest.py
    assert {e["extra"]: e["state"] for e in found["extras"]}["test"] == "present"


def test_a_pair_known_to_break_and_an_absent_package(monkeypatch, capsys):
    def version(name):
        if name == "optax":
            raise metadata.PackageNotFoundError(name)
        return {"jax": "0.12.0", "flax": "0.12.8"}.get(name, "1.0")

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["doctor", "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)["known_bad"]
    assert bad == [
        "flax 0.12.8 does not work with jax 0.12.0: pip install -U flax, or jax<0.11.2",
        "optax is absent: pip install cacherl_jax",
    ]


def test_an_absent_extra_is_named_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 0
    assert "absent: pip install 'cacherl_jax[report]'" in capsys.readouterr().out
