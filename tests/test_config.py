"""Configuration is strict in names and types, and survives a trip through JSON."""

import json
from pathlib import Path

import pytest

from cacherl_jax.config import PAPER_CACHE, Config, ConfigError, load_config, with_overrides


def test_json_round_trip_keeps_every_field():
    config = with_overrides(Config(), ['data.services=["Banks_1"]', "grpo.optimizer.learning_rate=0.5", "name=trial"])
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.grpo.optimizer.learning_rate == 0.5 and config.sft.optimizer != config.grpo.optimizer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.stepz=4", "no field 'stepz'.*steps"),
        ("grpoo.steps=4", "no field 'grpoo'.*grpo"),
        ("grpo.steps=many", "grpo.steps = 'many'"),
        ("grpo.steps=1.5", "grpo.steps = 1.5"),
        ("grpo.steps=true", "grpo.steps = True"),
        ("reward.tier=best", "'none', 'paper' or 'calibrated'"),
        ("mesh=3", "mesh = 3"),
        ("grpo", "NAME=VALUE"),
        ("data.train_tasks=-1", "data.train_tasks = -1: Input should be greater than 0"),
        ("grpo.validate_every=0", "grpo.validate_every = 0"),
        ("seed=-1", "seed = -1"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size = 100"),
        ("model.num_kv_heads=3", "num_heads=4 is not a multiple"),
        ("data.source=sgd", "data.path is empty"),
        ("rollout.max_sampled_tokens=7", "max_sampled_tokens=7 opens no turn at all: one needs room for 8 tokens"),
        ("grpo.minibatches=129", "minibatches=129 is above grpo.prompts x grpo.group = 128"),
        ("iterate.rejection.keep=5", "rejection.keep=5 is above iterate.rejection.samples=4; no task has so many episodes"),
        ("grpo.packed_length=128", "packed_length=128 is below rollout.context=256"),
        ("grpo.stops.soft_tokens=9", "soft_tokens=9 softens the penalty of the token cap.*'keep'; set it to 'penalty'"),
        ('grpo.stops={"token_cap": "penalty", "soft_tokens": 400}', "soft_tokens=400 is above rollout.max_sampled_tokens=320"),
        ('grpo={"group": 1, "baseline": "leave_one_out"}', "baseline='leave_one_out' needs other episodes.*grpo.group is 1"),
        ('grpo={"importance": "none", "beyond_cap": "mask"}', "beyond_cap='mask' needs weights.*'none'"),
        ("grpo.watch.think=1", "grpo.watch.think = 1: Input should be greater than 1"),
    ],
)
def test_wrong_overrides_name_the_field_the_value_and_what_is_allowed(override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(Config(), [override])


def test_the_papers_setting_trains_by_the_papers_reward():
    """paper.md, sections 2 to 4."""
    config = load_config(Path(__file__).parents[1] / "configs" / "qwen3_4b_paper.py")
    assert (config.cache, config.reward.tier, config.reward.process) == (PAPER_CACHE, "paper", "paper")
    grpo = config.grpo
    assert grpo.divide_by_std and (grpo.kl_coef, grpo.optimizer.learning_rate, grpo.lora.rank) == (0.15, 1e-6, 128)
    assert (grpo.prompts, grpo.group, config.rollout.min_tokens, config.rollout.max_sampled_tokens) == (16, 16, (150,), 32 * 1024)


def test_unknown_field_in_a_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"grpo": {"step": 3}}))
    with pytest.raises(ConfigError, match=r"unknown field 'grpo.step'"):
        load_config(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.py")
