"""GRPO's choice of episodes; whole steps are in test_stages.py."""

from collections import Counter

from cacherl_jax.tools.world import make_tasks
from cacherl_jax.train.grpo import episodes_of, select_tasks


def test_a_task_that_comes_twice_in_a_step_gets_samples_of_its_own():
    tasks = make_tasks("train", 5, 0)
    for step in range(5):
        chosen = select_tasks(tasks, step, 4, 0)
        episodes = episodes_of(chosen, 3)
        assert [task.id for task, _ in episodes] == [task.id for task in chosen for _ in range(3)]
        assert len({(task.id, sample) for task, sample in episodes}) == len(episodes) == 12
    steps = [Counter(task.id for task in select_tasks(tasks, step, 4, 0)) for step in range(5)]
    assert max(max(step.values()) for step in steps) == 2 and sum(steps, Counter()) == {task.id: 4 for task in tasks}
