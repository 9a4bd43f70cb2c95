"""Names of TPU slices, and what a user reads for one that cannot be planned."""

import pytest

from cacherl_jax import cli
from cacherl_jax.config import ConfigError
from cacherl_jax.plan.topology import Topology, parse, twice


@pytest.mark.parametrize(
    ("text", "chips", "host"),
    [
        ("v5e:1x1", 1, (1, 1, 1)),
        ("v5e:2x4", 8, (2, 4, 1)),  # one host
        ("v6e:4x4", 16, (2, 2, 1)),
        ("v5p:2x2x1", 4, (2, 2, 1)),
        ("v5p:2x2x2", 8, (2, 2, 1)),
        ("v5e:4x4@2", 32, (2, 2, 1)),
    ],
)
def test_a_name_says_how_many_chips_of_how_many_hosts(text, chips, host):
    topology = parse(text)
    assert (topology.chips, topology.host, topology.name) == (chips, host, text)


@pytest.mark.parametrize("text", ["v5e", "v5e:3x3", "v9x:2x4", "v5e:2x4@", "v5e:2x4@0", "v5e:2x4@two", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(text, capsys):
    assert cli.main(["plan", "--topology", text]) == 2
    message = capsys.readouterr().err
    assert repr(text) in message and ("v6e:{1x1,2x2,2x4" in message or "for two slices write v5e:2x4@2" in message)


@pytest.mark.parametrize("text", ["h200", "H100:8", "a100", "gpu", "nvidia-h100", "b200", "l4", "mi300"])
def test_a_gpu_is_refused_as_such(text):
    with pytest.raises(ConfigError, match=r"none for GPUs\. Known: v5e:"):
        parse(text)


def test_slices_must_be_those_of_the_mesh(capsys):
    assert cli.main(["plan", "--topology", "v5e:2x4@2"]) == 2
    assert "--topology v5e:2x4@2 has 2 slices, mesh.slices=1" in capsys.readouterr().err


def test_the_next_larger_slice():
    assert twice(parse("v5e:2x2@2")) == Topology("v5e", "2x4", 2)
    assert twice(parse("v6e:16x16")) is None
