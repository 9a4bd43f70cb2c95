"""Configuration: frozen dataclasses, strict in names and types, to and from JSON. Presets live in configs/, one file a run.

A preset is a Python file with `get_config() -> Config`; presets derive from each other with `dataclasses.replace`.
`--set grpo.steps=4` changes one field; an unknown name or a value of another type is refused before any work.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

Positive = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Rate = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
PositiveRate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and what is allowed."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): RoPE for contexts `factor` times as long as those of pretraining. Names as in config.json."""

    factor: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] = 1.0  # 1: off, and nothing else here is read
    original_max_position_embeddings: Positive = 32_768  # the longest context of pretraining, in tokens
    beta_fast: PositiveRate = 32.0  # pairs that turn more often within it keep their frequency
    beta_slow: PositiveRate = 1.0  # pairs that turn less often are stretched by the whole factor
    attention_factor: PositiveRate | None = None  # of sines and cosines; None: computed from the factor and the mscales
    mscale: Rate = 0.0  # both or none
    mscale_all_dim: Rate = 0.0
    truncate: bool = True  # the ramp between the two begins and ends at a whole pair

    def __post_init__(self) -> None:
        _require(
            self.beta_fast >= self.beta_slow,
            f"model.yarn.beta_fast={self.beta_fast} is below model.yarn.beta_slow={self.beta_slow}",
        )
        _require(
            bool(self.mscale) == bool(self.mscale_all_dim),
            f"model.yarn.mscale={self.mscale} and model.yarn.mscale_all_dim={self.mscale_all_dim}: one alone is never read",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Qwen3, dense. Field names follow the Hugging Face config where one exists."""

    vocab_size: Count = 0  # 0: taken from the tokenizer
    hidden_size: Positive = 128
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    head_dim: Positive = 32
    intermediate_size: Positive = 384
    rope_theta: PositiveRate = 10_000.0
    yarn: YarnConfig = YarnConfig()
    rms_norm_eps: PositiveRate = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: PositiveRate = 0.02  # of matrices
    embedding_range: PositiveRate = 0.2  # of the embedding; 0.02 learns ten times slower at this size
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs")


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; the product must equal the number of devices in use.

    Rows are split over data and fsdp, the tokens of a row over seq, heads and vocabulary over tp, parameters over fsdp and
    seq together. `slices` of a multi-slice TPU, joined by the data-center network, divide the data axis.
    """

    data: Positive = 1
    fsdp: Positive = 1
    seq: Positive = 1
    tp: Positive = 1
    slices: Positive = 1

    def __post_init__(self) -> None:
        _require(self.data % self.slices == 0, f"mesh.data={self.data} is not a multiple of mesh.slices={self.slices}")


@dataclass(frozen=True)
class MemoryConfig:
    """What the training step keeps, and what it computes again."""

    compute: Literal["weights", "bfloat16"] = "weights"  # dtype of matrix products: that of the weights, or bfloat16
    remat: Literal["none", "dots", "full"] = "none"  # a layer's backward pass finds everything, matrix products, its input only
    logit_chunk: Positive = 4096  # tokens of a device whose logits exist at one time


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter, trained in the weights' place: W + alpha / rank * A B (Hu et al., arXiv 2106.09685)."""

    rank: Count = 0  # 0: all weights are trained
    alpha: PositiveRate = 32.0
    matrices: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = (
        "query", "key", "value", "output", "gate", "up", "down",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require(
            not self.rank or bool(self.matrices), f"lora.matrices is empty; with lora.rank={self.rank} nothing would be trained"
        )


@dataclass(frozen=True)
class DataConfig:
    """Where tasks and recordings come from: the embedded world (sizes below) or a corpus on disk."""

    source: Literal["world", "sgd"] = "world"
    path: str = ""  # folder of the corpus; unused for the world
    train_tasks: Positive = 1500
    validation_tasks: Positive = 100
    test_tasks: Positive = 400
    services: tuple[str, ...] = ()  # sgd: the subset of services; () is all
    unseen_services: tuple[str, ...] = ()  # sgd: services that only the test split has
    demonstrators: tuple[Literal["expert", "stopper", "wanderer"], ...] = ("expert", "stopper", "wanderer")  # world

    def __post_init__(self) -> None:
        _require(self.source == "world" or bool(self.path), f"data.path is empty; data.source={self.source!r} needs one")


@dataclass(frozen=True)
class TokenizerConfig:
    """A BPE trained on the recordings, with the fixed runs of the chat template as added tokens; or one from disk."""

    path: str = ""  # folder with tokenizer.json; "" trains one
    vocab_size: Annotated[int, pydantic.Field(ge=265)] = 680  # bytes and control tokens alone take 265


@dataclass(frozen=True)
class SimulatorConfig:
    """An OpenAI-compatible endpoint that stands in for tools. Its API key is read from OPENAI_API_KEY and kept nowhere."""

    base_url: str = ""  # such as http://localhost:8000/v1
    model: str = ""
    examples: Count = 3  # nearest stored calls shown
    max_tokens: Positive = 1024  # of a reply; a longer one is a failure
    timeout: PositiveRate = 60.0  # seconds a try
    retries: Count = 2  # after the first try, with growing pauses


@dataclass(frozen=True)
class CacheConfig:
    """How a call is keyed and answered (rooms: cache/). Tiers in order: exact, adapted, fuzzy, best effort, miss."""

    key: Literal["raw", "canonical", "state"] = "state"  # state: canonical call + earlier writes it depends on
    adapted: bool = True  # serve a stored result for other arguments where certified rules say it holds
    similarity: Literal["jaccard", "soft"] = "soft"  # the paper's, or softened inside free text
    fuzzy_threshold: Rate = 0.5  # similarity of typed key=value tokens; above 1 turns the tier off
    fuzzy_gate: tuple[Literal["enum", "boolean", "integer", "number"], ...] = ()  # argument types whose values must agree
    best_effort: Literal["off", "nearest", "schema", "simulator"] = "nearest"
    on_miss: Literal["error", "nearest", "fail", "live"] = "error"
    errors: Literal["exact", "all", "never"] = "exact"  # by which tiers stored errors and empty results are served
    simulator: SimulatorConfig = SimulatorConfig()  # for best_effort="simulator"
    fidelity: Literal["fitted", "table"] = "fitted"  # the table below stands in where nothing is fitted
    fidelity_exact: Share = 1.0
    fidelity_adapted: Share = 0.95
    fidelity_fuzzy: Share = 0.3
    fidelity_best_effort: Share = 0.1
    fidelity_miss: Share = 0.0

    def __post_init__(self) -> None:
        if self.best_effort == "simulator":
            for name in ("base_url", "model"):
                _require(
                    bool(getattr(self.simulator, name)),
                    f"cache.simulator.{name} is empty; cache.best_effort='simulator' asks an endpoint that it names",
                )


# The paper's three tiers and nothing else (paper.md, section 2).
PAPER_CACHE = CacheConfig(key="canonical", adapted=False, similarity="jaccard", errors="all", fidelity="table")


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "muon"] = "muon"  # muon: matrices by Muon, embeddings and scales by Adam
    moments: Literal["float32", "bfloat16"] = "float32"  # adamw's first and second
    learning_rate: Rate = 0.02
    adam_learning_rate: Rate = 3e-3  # muon's companion for non-matrices
    warmup_steps: Count = 20
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: Rate = 0.0
    clip_norm: PositiveRate = 1.0
    b1: Share = 0.9
    b2: Share = 0.95

    def __post_init__(self) -> None:
        _require(
            self.name == "adamw" or self.moments == "float32",
            f"optimizer.moments={self.moments!r} is for adamw; optimizer.name is {self.name!r}",
        )


@dataclass(frozen=True)
class SftConfig:
    steps: Positive = 1000
    tokens_per_batch: Positive = 1024  # rows times padded length; rows are bucketed by length
    accumulate: Positive = 1  # batches an update
    packed_length: Count = 0  # episodes are packed into rows of this many tokens; 0: one episode a row, bucketed by length
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: Positive = 200


MIN_TURN = 8  # tokens that must fit for a turn to be worth opening


@dataclass(frozen=True)
class RolloutConfig:
    """The agent loop and its engine (rooms: rollout/)."""

    rows: Positive = 64  # compiled rows a device (of tp devices together); never changes within a run, or bits differ
    slots: Count = 0  # rows in use on all devices; 0: all
    tp: Count = 0  # devices that share a row's heads; 0: as in training
    context: Positive = 256
    decode_steps: Positive = 4  # tokens a dispatch
    max_turns: Positive = 8
    max_turn_tokens: Positive = 96
    max_sampled_tokens: Positive = 320
    max_tool_tokens: Positive = 128  # longer tool text is cut, in tokens
    tool_timeout: PositiveRate = 30.0  # seconds a call may take, where the tools may take long
    min_tokens: tuple[Count, ...] = ()  # of the first turn, the second, ...: tokens to be sampled before it may stop
    temperature: Rate = 1.0
    top_p: Share = 1.0
    top_k: Count = 0  # 0: off

    def __post_init__(self) -> None:
        _require(
            self.max_sampled_tokens >= MIN_TURN,
            f"rollout.max_sampled_tokens={self.max_sampled_tokens} opens no turn at all: one needs room for {MIN_TURN} tokens",
        )
        for turn, tokens in enumerate(self.min_tokens):
            _require(
                tokens < self.max_turn_tokens,
                f"rollout.min_tokens of turn {turn} is {tokens}, not below rollout.max_turn_tokens={self.max_turn_tokens}; "
                "such a turn could not stop",
            )


@dataclass(frozen=True)
class GrpoConfig:
    steps: Positive = 20
    prompts: Positive = 8
    group: Positive = 16
    advantage: Literal["paper", "calibrated"] = "calibrated"
    process_weight: Rate = 0.5  # c of the calibrated advantage
    kl_coef: Rate = 0.02
    clip_low: Share = 0.2
    clip_high: Rate = 0.2
    importance_cap: PositiveRate = 2.0  # of trainer's over sampler's probability of a token, a weight of its policy term
    minibatches: Positive = 1  # optimizer steps a batch of rollouts
    tokens_per_batch: Positive = 2048
    packed_length: Count = 0  # as in SftConfig
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, adam_learning_rate=3e-4, warmup_steps=2, schedule="constant")
    checkpoint_every: Positive = 5
    validate_every: Positive = 5

    def __post_init__(self) -> None:
        _require(
            self.minibatches <= self.prompts * self.group,
            f"grpo.minibatches={self.minibatches} is above grpo.prompts x grpo.group = {self.prompts * self.group} episodes",
        )


@dataclass(frozen=True)
class EvalConfig:
    temperature: Rate = 0.0
    bootstrap: Positive = 10_000


@dataclass(frozen=True)
class Config:
    """A whole run. Each stage reads its own part; `seed` reaches every random draw by derivation."""

    name: str = "demo"
    seed: Count = 0
    weights: str = ""  # a folder made by `cacherl convert`, to start from; "": random weights
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache: CacheConfig = CacheConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        _require(
            self.cache.on_miss != "live",
            "cache.on_miss='live' cannot be run: no stage of a run may reach a live tool; use error, nearest or fail",
        )
        _require(
            not self.grpo.packed_length or self.grpo.packed_length >= self.rollout.context,
            f"grpo.packed_length={self.grpo.packed_length} is below rollout.context={self.rollout.context}; "
            "an episode of that many tokens would fit into no row",
        )

    @property
    def rollout_model(self) -> ModelConfig:
        """The model as rollouts hold it: weights in the dtype of matrix products."""
        compute = self.memory.compute
        return self.model if compute == "weights" else dataclasses.replace(self.model, dtype=compute)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Strict: unknown fields and values of another type raise ConfigError with the field's path."""
        return _validated(_as_tuples(data))


# JSON has no tuples; strict validation wants them back where the dataclass has them.
def _as_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _as_tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_as_tuples(v) for v in value)
    return value


def _known_fields(cls: type, data: Mapping[str, Any], path: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"unknown field {path + name!r}; {path.rstrip('.') or 'the config'} has: {known}")
        default = fields[name].default
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            _known_fields(type(default), value, f"{path}{name}.")


_ADAPTER: pydantic.TypeAdapter[Config] = pydantic.TypeAdapter(Config)


def _validated(data: Mapping[str, Any]) -> Config:
    _known_fields(Config, data)
    try:
        # JSON mode: ints are accepted for floats and lists for tuples, nothing else is converted.
        return _ADAPTER.validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise ConfigError(f"{where or 'config'} = {first['input']!r}: {first['msg']}") from error


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with each "a.b=value" applied. Values are JSON; text that is not JSON is taken as a string."""
    data = config.to_json()
    for override in overrides:
        path, eq, text = override.partition("=")
        if not eq:
            raise ConfigError(f"--set {override!r}: expected NAME=VALUE, for example grpo.steps=4")
        node: Any = data
        *parents, leaf = path.strip().split(".")
        for parent in parents:
            if not isinstance(node, dict) or parent not in node:
                raise ConfigError(f"--set {override!r}: no field {parent!r}; known here: {', '.join(node)}")
            node = node[parent]
        if not isinstance(node, dict) or leaf not in node:
            known = ", ".join(node) if isinstance(node, dict) else "none"
            raise ConfigError(f"--set {override!r}: no field {leaf!r}; known here: {known}")
        try:
            node[leaf] = json.loads(text)
        except json.JSONDecodeError:
            node[leaf] = text
    return _validated(data)


def load_config(path: str | Path) -> Config:
    """Runs a preset file and returns its `get_config()`; a .json file is read as written by `Config.to_json`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    if path.suffix == ".json":
        try:
            return Config.from_json(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ConfigError(f"config file {path} is no JSON: {error}") from error
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ConfigError(f"{path} defines no get_config()")
    config = get_config()
    _require(isinstance(config, Config), f"get_config() of {path} returned {type(config).__name__}, expected Config")
    return config
