"""The stages of a run, in order: record, think, sft, grpo, eval, report. Each reads what earlier ones wrote to the run's folder.

    record/   tools.json, tasks.SPLIT.jsonl, transcripts.jsonl, training.sqlite, validation.sqlite, evaluation.sqlite
    think/    transcripts.jsonl, provenance.jsonl, tokenizer/; replies.sqlite of a model as teacher
    sft/      checkpoints, metrics.jsonl; expert_sft/ likewise, trained on the expert's transcripts alone
    grpo/     checkpoints, metrics.jsonl, rollouts/
    eval/     one file of trajectories a policy and tool source
    report/   training.png, trajectories.html, table.md
    summary.json

`iterate` (iterate.py) makes rounds of sft, grpo and rejection sampling of these, each in a folder of its own.

Training opens training.sqlite (and validation.sqlite for its curve); evaluation.sqlite is opened by eval alone.
"""
