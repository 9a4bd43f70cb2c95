"""The headline experiment from end to end, with a model that learns nothing."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

from cacherl_jax.cache.lookup import recordings
from cacherl_jax.tools.record import record
from cacherl_jax.tools.world import LiveTools, make_tasks, tool_specs

FOLDER = Path(__file__).parents[2] / "experiments" / "live_control"


def test_arms_share_tasks_and_weights_and_only_the_live_one_calls_tools(tmp_path, monkeypatch, capsys):
    arms = ("live", "ours 60 answers")
    command = ["run.py", "--smoke", "--seeds", "0", "--out", str(tmp_path), "--arms", *arms]
    monkeypatch.setattr(sys, "argv", command)
    module = runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
    results = {arm: json.loads((tmp_path / "seed0" / arm / "result.json").read_text()) for arm in ("sft", *arms)}
    live, cached = (results[arm] for arm in arms)
    assert cached["live_calls_of_rl"] == 0
    assert live["rollouts"] == cached["rollouts"] == 12
    assert results["sft"]["recorded_episodes"] == 4 * module["SAMPLES"]
    assert len({len(r["process"]) for r in results.values()}) == 1
    assert live["steps"][0]["sampled_tokens"] > 0 and len(live["steps"]) == len(cached["steps"]) == 2
    # It answers nothing, and its process is half right: only where the process is paid does that count.
    assert live["steps"][0]["reward"] > 0 == cached["steps"][0]["reward"]
    # All arms begin with the same weights and draws: until a tool answers otherwise, they say the same.
    first = [(tmp_path / "seed0" / arm / "grpo" / "rollouts" / "00000.jsonl").read_text().splitlines() for arm in arms]
    turns = [[json.loads(line)["tokens"][:100] for line in lines] for lines in first]
    assert turns[0] == turns[1]
    before = capsys.readouterr().out
    runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")  # done: only read
    assert capsys.readouterr().out == before


def test_a_store_holds_the_stated_share_of_calls_whatever_its_key():
    module = runpy.run_path(str(FOLDER / "run.py"))
    specs, seed = tool_specs(), 1
    transcripts = list(
        record(
            make_tasks("train", 120, seed, ("chain3", "write_then_read", "choose")),
            ["wanderer"],
            LiveTools("train", seed),
            specs,
            seed,
        )
    )
    by_policy, others = transcripts[:70], transcripts[70:]
    asked, every = (module["calls_by_key"](t, specs) for t in (by_policy, transcripts))
    kept = module["kept_keys"](by_policy, others, specs, 0.6, seed)
    assert 0.6 <= sum(asked[key] for key in kept) / asked.total() < 0.63
    assert 0.5 < len(kept - asked.keys()) / len(every.keys() - asked.keys()) < 0.7  # of what others asked as much
    assert kept < module["kept_keys"](by_policy, others, specs, 1.0, seed) == every.keys()
    assert kept != module["kept_keys"](by_policy, others, specs, 0.6, seed + 1)
    for cache in (module["OURS"], module["PAPER_CACHE"]):
        pairs = [pair for t in transcripts for pair in module["keyed"](t, specs, cache)]
        assert Counter(key for key, _ in pairs) == every  # the same calls are left out for every arm
        assert [r for _, r in pairs] == [r for t in transcripts for r in recordings(t, specs, cache.key)]
