"""GRPO of the demo with answers graded by a judge behind HTTP that fails and errs, beside the demo's own rule.

Command:  python experiments/judge/run.py --out runs/judge
Cost:     about 15 CPU-minutes; Ctrl-C is safe, the same command goes on and asks for no verdict twice
Expect:   both policies end alike; most answers are graded by a verdict that is kept

One SFT, then GRPO twice from it with the same draws. The judge is a chat-completions server on this machine that reads the rubric's
material as a model would be shown it, and scores by the facts; 5 % of requests fail, 2 % of replies are no verdict, and a tenth of
what it grades gets a score drawn at random. Writes result.json beside this file, in a smoke run into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import runpy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from cacherl_jax import metrics
from cacherl_jax.config import Config, load_config, smoke, with_overrides
from cacherl_jax.evaluate.intervals import paired_difference
from cacherl_jax.reward.rubric import HIGHEST
from cacherl_jax.run_directory import RunDirectory
from cacherl_jax.stages import eval, grpo, inputs, record, sft, think
from cacherl_jax.whole_files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENDPOINT = runpy.run_path(str(ROOT / "tests" / "endpoint_server.py"))
FAILED, NO_VERDICT, AT_RANDOM = 0.05, 0.02, 0.10  # of requests, of replies, of what is graded
SHARED = ("record", "think", "sft")


def grade(body: dict[str, Any], trouble: random.Random) -> Any:
    """The reply to one request. What is graded at random is so by its own text: whatever order requests come in, the same."""
    draw = trouble.random()
    if draw < FAILED:
        return ENDPOINT["Act"](status=503)
    if draw < FAILED + NO_VERDICT:
        return "I would give it a four."
    text = body["messages"][-1]["content"]
    shown, luck = json.loads(text), random.Random(hashlib.sha256(text.encode()).digest())
    stated = [fact in shown["answer"] for fact in shown["facts"]]
    score = round(HIGHEST * sum(stated) / len(stated)) if stated else HIGHEST
    if luck.random() < AT_RANDOM:
        score = luck.randint(0, HIGHEST)
    return json.dumps({"reason": "By the facts.", "score": score})


def judged(run: RunDirectory) -> dict[str, Any]:
    """What GRPO asked of the judge, over all steps."""
    rows = [row["judge"] for row in metrics.read_metrics(run.out / "grpo" / "metrics.jsonl") if "judge" in row]
    failures = sum((Counter(row["failures"]) for row in rows), Counter())
    rollouts = run.config.grpo.steps * run.config.grpo.prompts * run.config.grpo.group
    return {"rollouts": rollouts, "asked": sum(row["asked"] for row in rows), "failures": dict(failures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a model that learns nothing, in a minute")
    args = parser.parse_args()
    progress = metrics.progress_factory(enabled=not args.smoke)
    config: Config = load_config(ROOT / "configs" / "demo.py")
    config = smoke(config) if args.smoke else config
    trouble = random.Random(config.seed)
    right: dict[str, list[float]] = {}
    with ENDPOINT["Server"](lambda body: grade(body, trouble)) as server:
        settings = ["reward.answer=judge", f"reward.judge.base_url={server.url}", "reward.judge.model=scripted"]
        runs = {"facts": RunDirectory(args.out / "facts", config)}
        for stage in (record.record, think.think, sft.supervised):
            stage(runs["facts"], progress)
        for stage in SHARED:
            shutil.copytree(runs["facts"].out / stage, args.out / "judge" / stage, dirs_exist_ok=True)
        runs["judge"] = RunDirectory(args.out / "judge", with_overrides(config, settings))
        for name, run in runs.items():
            grpo.reinforce(run, progress)
            policies = {"sft": "sft", "grpo": "grpo"} if name == "facts" else {"grpo": "grpo"}
            (run.out / "played").mkdir(exist_ok=True)
            eval.play(run, run.out / "played", policies, progress)
            tasks, specs = inputs.load_tasks(run, "test"), inputs.load_specs(run)
            for policy in policies:
                right[f"{name}:{policy}"] = eval.correct(run.out / "played" / f"{policy}.live.jsonl", tasks, specs)
        requests = len(server.requests)
    differences = {
        "facts over SFT": ("facts:grpo", "facts:sft"),
        "judge over SFT": ("judge:grpo", "facts:sft"),
        "judge over facts": ("judge:grpo", "facts:grpo"),
    }
    result: dict[str, Any] = {name: sum(values) / len(values) for name, values in right.items()}
    for name, (a, b) in differences.items():
        result[name] = vars(paired_difference(right[a], right[b], seed=config.seed, draws=config.eval.bootstrap))
    result["judge"] = judged(runs["judge"]) | {"requests, tries again included": requests}
    result["cpu_seconds"] = {name: round(sum(run.cpu_seconds().values()), 1) for name, run in runs.items()}
    write_json((args.out if args.smoke else HERE) / "result.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
