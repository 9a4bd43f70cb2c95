"""The headline experiment from end to end, with a model that learns nothing."""

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from cacherl_jax.cache.lookup import recordings
from cacherl_jax.config import ConfigError
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
    # An arm that was begun with something else does not go on.
    path = tmp_path / "seed0" / arms[1] / "settings.json"
    path.write_text(path.read_text().replace('"coverage": 0.6', '"coverage": 0.7'))
    (path.parent / "result.json").unlink()
    with pytest.raises(ConfigError, match=re.escape("other settings (coverage: 0.7 then, 0.6 now)")):
        runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")


def test_the_table_compares_seed_by_seed_and_leaves_out_what_is_not_done(tmp_path, monkeypatch, capsys):
    module = runpy.run_path(str(FOLDER / "figure.py"))
    module["main"].__globals__.update(HERE=tmp_path, SEEDS=tmp_path / "seeds", DRAWS=200)
    right = {"sft": 2, "expert_sft": 6, "live": 5, "ours 60": 4, "live answers": 3, "ours 60 answers": 1}  # tasks of eight

    def result(arm, seed):
        process = [float(i < right.get(arm, 5) + seed) for i in range(8)]
        facts = {"families": ["chain3", "choose"] * 4, "process": process, "answer": process, "cpu_seconds": 1.0}
        if arm == "sft":
            return facts | {"live_calls_of_recording": 100, "live_calls_of_demonstrations": 900}
        steps = [{"tiers": {"exact": share, "miss": 1 - share}} for share in (0.5, 0.7)]
        return facts | {"steps": steps, "live_calls_of_rl": 200 * (1 + seed) if arm.startswith("live") else 0}

    arms = (*module["ARMS"], *module["ANSWERS_ONLY"])
    for seed, done in enumerate((arms, module["ARMS"], arms[:-6])):  # the second without those paid by answers, the third not done
        for arm in done:
            (tmp_path / "out" / f"seed{seed}" / arm).mkdir(parents=True)
            (tmp_path / "out" / f"seed{seed}" / arm / "result.json").write_text(json.dumps(result(arm, seed)))
    monkeypatch.setattr(sys, "argv", ["figure.py", str(tmp_path / "out")])
    module["main"]()
    made = json.loads((tmp_path / "result.json").read_text())
    assert made["seeds"] == [0, 1] and made["answers_only"]["seeds"] == [0] and made["test_tasks"] == 8
    ours, alone = made["arms"]["ours 60"], made["answers_only"]["arms"]["ours 60 answers"]
    assert ours["by_seed"] == [4 / 8, 5 / 8] and ours["over_live"]["mean"] == -1 / 8 and ours["over_sft"]["mean"] == 2 / 8
    assert alone["over_live"]["mean"] == -2 / 8  # than live tools paid alike
    assert ours["tiers"]["exact"] == 0.6 and ours["tiers_last"]["exact"] == 0.7
    assert made["runs_until_paid"] == (100 / 200 + 100 / 400) / 2
    assert made["runs_until_paid_with_demonstrations"] == (1000 / 200 + 1000 / 400) / 2
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG") and "| ours 60 | 0.562 " in capsys.readouterr().out


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
