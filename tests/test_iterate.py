"""Rounds from end to end, as the experiment's smoke run. Where episodes are sampled for rejection, a policy that plays as the
expert stands in for a trained one."""

import dataclasses
import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cacherl_jax import cli
from cacherl_jax.config import Config, IterateConfig, RejectionConfig
from cacherl_jax.evaluate.rounds import curve
from cacherl_jax.reward.judge import Verdicts
from cacherl_jax.rollout import stream
from cacherl_jax.rollout.agent_loop import CallTools, Episode
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import inputs, iterate, sft
from cacherl_jax.text import chat
from cacherl_jax.trajectories import rejection
from cacherl_jax.trajectories.transcripts import read_transcripts
from cacherl_jax.trajectory import StopReason, Trajectory
from cacherl_jax.types import Kind, Observation, Task, Tier, ToolCall, ToolResult

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
IGNORANT = "\n</think>\n\nI do not know.<|im_end|>"


class Experts:
    """Stands where the runner stands. Sample 0 and 1 of a task say through the real loop what the expert's transcript says,
    sample 2 the same without a word of reasoning, sample 3 that it does not know. Ctrl-C comes after `stop` episodes."""

    def __init__(self, out, stop):
        self.out, self.stop, self.played, self.temperatures = out, stop, [], set()

    def run(self, engine, model, tok, specs, episodes, provider, config, seed, *, finished, on_done):
        read = read_transcripts(self.out / "think" / "transcripts.jsonl")[0]
        said = {t.task_id: [m for m in t.messages if m.role == "assistant"] for t in read if t.agent == "expert"}
        done = {(t.task_id, t.sample): t for t in finished}
        self.temperatures.add(config.temperature)
        for task, sample in episodes:
            if (task.id, sample) in done:
                continue
            if len(self.played) == self.stop:
                self.stop = None
                raise KeyboardInterrupt
            opening = chat.opening(tok, task.messages, [specs[name] for name in task.tools])
            episode, session = Episode(tok, specs, task, sample, config, opening), provider.start(task, sample)
            step, turns = episode.start(), iter(said[task.id])
            while step is not None:
                message = dataclasses.replace(next(turns), reasoning="") if sample == 2 else next(turns)
                ids = tok.encode(IGNORANT) if sample == 3 else chat.assistant_turn(tok, message)[0][1]
                step = episode.on_turn(ids, [-1.0] * len(ids), [-1.0] * len(ids))
                if isinstance(step, CallTools):
                    step = episode.on_answers([session.execute(call, place) for place, call in step.calls])
            done[task.id, sample] = episode.trajectory()
            self.played.append((task.id, sample))
            on_done(done[task.id, sample])
        return [done[task.id, sample] for task, sample in episodes]


def test_rounds_go_on_after_ctrl_c_and_learn_from_what_was_accepted(tmp_path, monkeypatch, capsys):
    experiment = runpy.run_path(str(EXPERIMENTS / "iterate" / "run.py"))
    run = RunDirectory(tmp_path / "demo", experiment["configs"](None, True)["demo"])
    assert [*experiment["configs"](tmp_path, True)] == ["demo"] and [*experiment["configs"](tmp_path, False)] == [
        "demo",
        "sgd_small",
    ]
    rules, arguments = run.config.iterate.rejection, ["--smoke", "--out", str(tmp_path)]
    experts = Experts(run.out, stop=7)
    monkeypatch.setattr(iterate, "runner", experts)
    with pytest.raises(KeyboardInterrupt):
        experiment["main"](arguments)
    assert list(stream.read_stream(run.out / "round0" / "rejection" / "samples.jsonl")) == experts.played
    experiment["main"](arguments)
    assert len(set(experts.played)) == len(experts.played) == rules.tasks * rules.samples  # none twice
    assert len({task for task, _ in experts.played}) == rules.tasks and experts.temperatures == {rules.temperature}

    result = json.loads((tmp_path / "result.json").read_text())["demo"]
    assert [v["version"] for v in result["versions"]] == ["sft0", "grpo0", "sft1"] and result["evaluated"] == "live"
    assert result["versions"][0]["gain_over_sft0"]["mean"] == 0 and result["versions"][0]["live"]["process"]["n"] == 6
    recorded = run.require("record")
    assert result["snapshots"] == {
        "training": recorded["train"]["snapshot"],
        "validation": recorded["validation"]["snapshot"],
        "evaluation": recorded["test"]["snapshot"],
    }
    first, second = result["rounds"]
    assert json.loads((run.out / "round0" / "round.json").read_text()) == first
    counts, accepted = first["rejection"]["counts"], inputs.load_trajectories(run.out / "round0" / "rejection" / "accepted.jsonl")
    assert counts["accepted"] == len(accepted) > 0 and counts["duplicate"] > 0 and counts["wrong_calls"] > 0
    assert sum(counts.values()) == first["rejection"]["episodes"] == rules.tasks * rules.samples
    assert first["rejection"]["rendered_alike"] == len(accepted)
    texts = read_transcripts(run.out / "round0" / "rejection" / "transcripts.jsonl")[0]
    assert [t.task_id for t in texts] == [t.task_id for t in accepted]

    # The next SFT's rows: all that was recorded, and the accepted episodes id by id.
    mix, original = second["data"], list(sft.thought(run))
    assert mix["transcripts"] == first["data"]["rows"] == len(original) and mix["accepted"] == len(accepted)
    rows, _ = iterate._merged_rows(run, 1)
    added = Counter(row.tokens_T.tobytes() for row in rows[len(original) :])
    assert mix["rows"] == len(rows) == len(original) + mix["accepted_rows"] and mix["accepted_rows"] > 0
    assert set(added) <= {t.tokens_T.tobytes() for t in accepted} and max(added.values()) <= run.config.iterate.mix.repeats
    assert all(np.array_equal(r.mask_T, t.sampled_T) for r in rows for t in accepted if np.array_equal(r.tokens_T, t.tokens_T))
    calls = Counter(c.name for t in original for m in t.messages for c in m.tool_calls)
    assert {name: n["recorded"] for name, n in mix["calls"].items()} == calls

    page = (tmp_path / "demo.html").read_text()
    assert page.count("<polyline") == 2 and "http" not in page and result["snapshots"]["training"] in page
    assert all(f"<td>{v['version']}</td>" in page for v in result["versions"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "| demo, live | sft1 |" in (tmp_path / "table.md").read_text()

    # What came out is a model like any other.
    command = ["convert", "--from", str(run.out / "round1" / "sft"), "--to-hf", str(tmp_path / "hf")]
    assert cli.main(command) == 0 and (tmp_path / "hf" / "tokenizer.json").is_file()
    capsys.readouterr()

    # A later stage alone depends on the mix, and none on the number of rounds: a run of one is the beginning of a run of two.
    command = ["iterate", "--json", "--out", str(run.out), "--config", str(tmp_path / "config.json")]
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_json()))
    assert cli.main([*command, "--set", "iterate.mix.repeats=1"]) == 2
    assert (
        f"{run.out / 'round1' / 'sft'} was made with other settings (iterate.mix.repeats: 3 then, 1 now)" in capsys.readouterr().err
    )
    settings = {path.parent.relative_to(run.out): path.read_text() for path in run.out.rglob("settings.json")}
    assert len(settings) == 2 + 3 + 3 + 1 and not any('"rounds"' in t or "iterate.rounds" in t for t in settings.values())
    assert cli.main(command) == 0 and json.loads(capsys.readouterr().out) == json.loads((run.out / "rounds.json").read_text())


def test_the_curve_lies_where_its_values_are():
    points = curve([{"mean": m, "low": low, "high": high} for m, low, high in ((0.0, 0.0, 0.5), (1.0, 0.5, 1.0))])
    assert points == [{"x": 44, "y": 216, "low": 216, "high": 130}, {"x": 676, "y": 44, "low": 130, "high": 44}]


def test_ablations_run_and_compare_each_row_with_its_full_system(tmp_path):
    experiment = runpy.run_path(str(EXPERIMENTS / "ablations" / "run.py"))
    experiment["main"](["--smoke", "--out", str(tmp_path), "--rows", "grpo", "exact", "reasoning", "rejection"])
    result = json.loads((tmp_path / "result.json").read_text())
    parts = ["GRPO", "cache tiers (exact only)", "written reasoning", "rejection sampling"]
    assert [row["removed"] for row in result["rows"]] == parts and result["seeds"] == [0]
    assert {path.name for path in (tmp_path / "seed0").iterdir()} == {"full", "exact", "reasoning", "rounds"}
    assert result["rows"][2]["paper_relative"] == pytest.approx(-0.412, abs=1e-3) and result["rows"][0]["difference"]["n"] == 6
    assert (tmp_path / "table.md").read_text().count("\n") == 6 and (tmp_path / "figure.png").is_file()
    # A command for other rows adds its own to them.
    old, path, add = result["rows"], tmp_path / "result.json", experiment["with_earlier"]
    new = {"removed": "KL"}, {"removed": "GRPO"}
    assert add(new, [0], path) == [new[1], *old[1:], new[0]]
    assert add(new, [0, 1], path) == add(new, [0], tmp_path / "none") == [*new[::-1]]
    # Without written reasoning the same episodes are shorter, and nothing else of the configuration differs.
    full, without = (RunDirectory(tmp_path / "seed0" / v, experiment["config_of"](v, 0, True)) for v in ("full", "reasoning"))
    assert full.config == without.config
    assert without.require("sft")["rows"] == full.require("sft")["rows"]
    assert without.require("sft")["tokens"] < full.require("sft")["tokens"]
    # What only weighs answers begins with the full system's SFT, which is trained once.
    trained = {path.parent.parent.name for path in (tmp_path / "seed0").glob("*/sft/metrics.jsonl")}
    copied = RunDirectory(tmp_path / "seed0" / "exact", experiment["config_of"]("exact", 0, True))
    assert trained == {"full", "reasoning"} and copied.require("sft") == full.require("sft")
    variants = {policy.split(":")[0] for name in experiment["ROWS"] for policy in experiment["policies_of"](name)}
    assert variants == {"full", "tier", "exact", "reasoning", "rounds", "kl", "data", "thinking"}
    changed = {v for v in variants if experiment["config_of"](v, 0, False) != experiment["world"]()}
    assert changed == {"tier", "exact", "kl", "data"}  # two rounds are the default of `iterate`


def test_a_judge_alone_decides_and_is_asked_about_what_nothing_else_speaks_against(monkeypatch, tmp_path):
    def episode(sample, stop=StopReason.ANSWER, observations=()):
        nothing = np.zeros(0, np.float32)
        return Trajectory("t", sample, nothing, nothing, nothing, nothing, (), observations, f"answer {sample}", stop, 1)

    doubtful = Observation(ToolCall.of("f"), ToolResult("{}"), Tier.BEST_EFFORT, Kind.RECORDED, fidelity=0.1)
    task = Task("t", "f", "train", (), (), ((ToolCall.of("f"),),))  # by its reference none of these would be right
    pairs = [
        (task, t)
        for t in (episode(0), episode(1), episode(2), episode(3, StopReason.TURN_CAP), episode(4, observations=(doubtful,)))
    ]
    asked = []

    class Judge:
        def grade(self, episodes):
            asked.extend(t.sample for _, t in episodes)
            return Verdicts([0.8, 0.4, None], 3, {"timeout": 1})

    config = Config(iterate=IterateConfig(rejection=RejectionConfig(least_answer=0.8, keep=4)))
    monkeypatch.setattr(iterate, "open_judge", lambda reward, verdicts: Judge())
    calls, score, judged = iterate._scores(pairs, {}, config, tmp_path / "verdicts.sqlite")
    accepted, counts = rejection.select(pairs, calls=calls, answer=score, rules=config.iterate.rejection)
    assert asked == [0, 1, 2] and [t.sample for t in accepted] == [0]
    assert (counts["wrong_answer"], counts["no_answer"], counts["unfaithful"]) == (2, 1, 1)
    assert judged == {"asked": 3, "failures": {"timeout": 1}}
