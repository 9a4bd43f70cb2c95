"""A model of ours as the teacher: asked in batches, answers each request the same in any company."""

import asyncio
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from cacherl_jax import cli, mesh, model_folder
from cacherl_jax.config import Config, ConfigError, ModelConfig, RolloutConfig, TeacherConfig
from cacherl_jax.model import qwen3
from cacherl_jax.rollout.turns import Prompt, sample_turns
from cacherl_jax.stages.policy_teacher import load
from cacherl_jax.text.tokenizer import train_tokenizer
from cacherl_jax.trajectories import prompts
from cacherl_jax.trajectories.paid import Refused
from cacherl_jax.trajectories.teacher import LanguageTeacher
from cacherl_jax.types import Message

MESSAGE = Message("assistant", "It is in Oslo.")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "policy"
    tok = train_tokenizer([prompts.CLASSIFY, prompts.WRITE] * 2, [], 600)
    tok.save(folder / "tokenizer")
    shape = ModelConfig(
        vocab_size=tok.vocab_size, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=16
    )
    model_folder.write(folder, qwen3.init(shape, jax.random.key(0), mesh.one_device()))
    teacher = TeacherConfig(kind="policy", policy=str(folder), max_tokens=12, concurrency=2)
    rollout = RolloutConfig(context=512, rows=4, decode_steps=8)
    return dataclasses.replace(Config(), teacher=teacher, rollout=rollout)


def request(text, seed=0, max_tokens=12):
    chat = prompts.write([Message("user", text)], MESSAGE, {}, 1000)
    return prompts.Request("policy", chat, "reasoning", 1.0, max_tokens, seed)


def test_a_request_is_answered_the_same_alone_and_in_company(policy):
    model = load(policy)
    asked = [request("Where?"), request("Where is it?"), request("Where?", seed=1)]

    async def all_at_once():
        return await asyncio.gather(*map(model.complete, asked))

    together = asyncio.run(all_at_once())
    assert together == [asyncio.run(model.complete(one)) for one in asked]
    assert all(1 <= reply.completion_tokens <= 12 and reply.prompt_tokens > 100 for reply in together)
    assert all(reply.problem == ("cut" if reply.completion_tokens == 12 else "") for reply in together)
    with pytest.raises(Refused, match="exceed rollout"):
        asyncio.run(model.complete(request("Where? " * 300)))


def test_the_command_asks_a_policy_and_keeps_what_it_replied(policy, tmp_path, capsys):
    chats = [[{"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": "In Oslo."}] for n in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (tmp_path / "config.json").write_text(json.dumps(policy.to_json()))

    def think(out):
        command = ["think", "--json", "--source", "openai", "--path", str(tmp_path / "chats.jsonl"), "--out", str(out)]
        assert cli.main([*command, "--config", str(tmp_path / "config.json")]) == 0
        return json.loads(capsys.readouterr().out)

    made = think(tmp_path / "a")
    # Its weights are random: whatever it replies is asked for three times and leaves the blocks empty.
    assert (made["messages"], made["empty"], made["requests"], sum(made["rejected"].values())) == (3, 3, 9, 9)
    assert made["rejected"].keys() <= {"cut", "no_json", "empty"} and made["completion_tokens"] > 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "think" / "provenance.jsonl").read_text().splitlines()]
    assert {row["teacher"] for row in rows} == {made["teacher"]} and made["teacher"].startswith("policy:policy@")
    (tmp_path / "b" / "think").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "think" / "replies.sqlite", tmp_path / "b" / "think")
    assert think(tmp_path / "b")["from_store"] == 9


def test_a_policy_at_temperature_0_is_not_asked_the_same_again(policy):
    for temperature in (0.0, 0.5):
        config = dataclasses.replace(policy.teacher, temperature=temperature)
        assert LanguageTeacher(None, "policy", {}, config, 0).draws == (temperature > 0)


def test_turns_stop_at_their_budgets_and_misfits_are_refused(policy):
    model = load(policy)
    engine, key_2 = model._engine, np.zeros(2, np.uint32)
    short, long = sample_turns(engine, model._model, [Prompt([1, 2, 3], 3, key_2), Prompt([1, 2, 3], 11, key_2)], 0.0)
    assert len(short) <= 3 and len(long) <= 11 and long[: len(short)] == short
    for wrong in ([Prompt([1], 512, key_2)], [Prompt([1], 1, key_2)] * 3):
        with pytest.raises(ValueError, match=r"exceed|rows"):
            sample_turns(engine, model._model, wrong, 0.0)


def test_a_policy_trained_again_in_its_place_is_another_teacher(policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(policy.teacher.policy, folder)
    moved = dataclasses.replace(policy, teacher=dataclasses.replace(policy.teacher, policy=str(folder)))
    before = load(policy).name
    assert load(moved).name == before and before.startswith("policy:policy@")  # the same weights, wherever they lie
    drawn = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, top_k=5))
    assert load(drawn).name != before
    shutil.rmtree(folder / "checkpoints")
    model_folder.write(folder, qwen3.init(model_folder.model_config(folder), jax.random.key(1), mesh.one_device()))
    assert load(moved).name != before


def test_a_policy_without_room_is_refused_before_any_work(policy, monkeypatch):
    with pytest.raises(ConfigError, match="leaves no room"):
        load(dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, context=12)))
    with pytest.raises(ConfigError, match="holds no model"):
        load(dataclasses.replace(policy, teacher=dataclasses.replace(policy.teacher, policy="nowhere")))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="without --distributed"):
        load(policy)
