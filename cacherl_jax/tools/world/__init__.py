"""The embedded tool world: executable, deterministic tools with state, and tasks whose right calls are known."""

from cacherl_jax.tools.world.tasks import make_tasks
from cacherl_jax.tools.world.tools import LiveTools, tool_specs

__all__ = ["LiveTools", "make_tasks", "tool_specs"]
