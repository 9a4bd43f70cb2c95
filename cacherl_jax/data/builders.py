"""Recorded corpora as TFDS datasets: read from a local folder, written as array_record, both without tensorflow.

    builder = prepare("sgd", Path("sgd"), Path("prepared"))
    for transcript in transcripts(builder, "train"): ...

An example is a transcript's id and its JSON; tool definitions stay in the folder, see `sources.SOURCES`.
`builder.info.metadata` holds the digests of the files that the dataset was made of, and a line for all that was left out.
`tfds.builder_from_directory(builder.data_dir)` opens the dataset where the folder is not at hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data.recorded import Recorded, find, manifest
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.types import Transcript
from cacherl_jax.versions import require

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


@dataclass(frozen=True)
class Dataset:
    """What TFDS is told of a source. splits: from its folder to the folder or file that each split is read from."""

    homepage: str = ""
    citation: str = ""
    splits: Callable[[Path], Mapping[str, Path]] = field(default=lambda folder: {"train": folder})


def _tau_bench_splits(folder: Path) -> dict[str, Path]:
    """A split a file: gpt_4o_airline, airline_tasks_test, retail_tasks_train."""
    files = [*find(folder / "historical_trajectories", "*.json"), *find(folder / "derived", "*_tasks_*.jsonl")]
    return {file.name.partition(".json")[0].replace("-", "_"): file for file in files} or {"runs": folder}


DATASETS: dict[str, Dataset] = {
    "sgd": Dataset(
        homepage="https://github.com/google-research-datasets/dstc8-schema-guided-dialogue",
        citation="""@article{rastogi2019towards,
  title={Towards Scalable Multi-domain Conversational Agents: The Schema-Guided Dialogue Dataset},
  author={Rastogi, Abhinav and Zang, Xiaoxue and Sunkara, Srinivas and Gupta, Raghav and Khaitan, Pranav},
  journal={arXiv preprint arXiv:1909.05855},
  year={2019}
}""",
        splits=lambda folder: {"train": folder / "train", "dev": folder / "dev"},
    ),
    "taskmaster4": Dataset(
        homepage="https://github.com/google-research-datasets/Taskmaster",
        citation="""@article{sidahmed2024perl,
  title={PERL: Parameter Efficient Reinforcement Learning from Human Feedback},
  author={Sidahmed, Hakim and Phatale, Samrat and Hutcheson, Alex and others},
  journal={arXiv preprint arXiv:2403.10704},
  year={2024}
}""",
    ),
    "star": Dataset(
        homepage="https://github.com/RasaHQ/STAR",
        citation="""@article{mosig2020star,
  title={STAR: A Schema-Guided Dialog Dataset for Transfer Learning},
  author={Mosig, Johannes E. M. and Mehri, Shikib and Kober, Thomas},
  journal={arXiv preprint arXiv:2010.11853},
  year={2020}
}""",
    ),
    "tau_bench": Dataset(
        homepage="https://github.com/sierra-research/tau-bench",
        citation="""@article{yao2024tau,
  title={tau-bench: A Benchmark for Tool-Agent-User Interaction in Real-World Domains},
  author={Yao, Shunyu and Shinn, Noah and Razavi, Pedram and Narasimhan, Karthik},
  journal={arXiv preprint arXiv:2406.12045},
  year={2024}
}""",
        splits=_tau_bench_splits,
    ),
    "livemcpbench": Dataset(
        homepage="https://github.com/icip-cas/LiveMCPBench",
        citation="""@article{mo2025livemcpbench,
  title={LiveMCPBench: Can Agents Navigate an Ocean of MCP Tools?},
  author={Mo, Guozhao and others},
  journal={arXiv preprint arXiv:2508.01780},
  year={2025}
}""",
    ),
    "openai": Dataset(),
    "hermes": Dataset(),
}


def prepare(source: str, folder: Path, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Writes the splits of a source under `data_dir`, unless they are there; gives what reads them.

    source: a name of `sources.SOURCES`. Raises ConfigError when a split has no readable dialogue, or when `data_dir` holds
    the dataset of other files.
    """
    require("array_record", "data")
    import tensorflow_datasets as tfds

    opened = {split: SOURCES[source](path) for split, path in DATASETS[source].splits(folder).items()}
    root = folder if folder.is_dir() else folder.parent
    files = manifest(root, [path for corpus in opened.values() for path in (*corpus.schemas, *corpus.files)])
    writer = _writer(source)(opened, files, data_dir)
    writer.download_and_prepare()
    # Unlike the writer, whose class is local, this one and its data sources can be pickled for a loader's processes.
    builder = tfds.builder_from_directory(writer.data_dir)
    if _metadata(builder)["files"] != files:
        raise ConfigError(f"{builder.data_dir} was made of other files than {folder} has; delete it or choose another data_dir")
    return builder


def transcripts(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[Transcript]:
    """The transcripts of a split, or of a part of it such as "train[:10%]", in the order of the folder's files."""
    require("array_record", "data")
    for example in builder.as_data_source(split):  # pyright: ignore[reportCallIssue] TFDS's decorator hides the parameters
        yield Transcript.from_json(json.loads(example["json"]))


def problems(builder: tfds.core.DatasetBuilder) -> list[str]:
    """`Recorded.problems` of all splits as the dataset was written: "SPLIT/FILE, dialogue ID: reason"."""
    return [f"{split}/{line}" for split, lines in _metadata(builder)["problems"].items() for line in lines]


def _metadata(builder: tfds.core.DatasetBuilder) -> Any:
    return builder.info.metadata


@functools.cache  # TFDS keeps every class by its name and refuses a second one
def _writer(source: str) -> Callable[[dict[str, Recorded], dict[str, str], Path], tfds.core.DatasetBuilder]:
    """The class that writes a source's dataset. It stands in a function because TFDS takes a second to import."""
    import tensorflow_datasets as tfds

    dataset = DATASETS[source]

    class Writer(tfds.core.GeneratorBasedBuilder):
        """Recorded dialogues as transcripts in the message form of OpenAI's chat API."""

        name = f"{source}_transcripts"
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, opened: dict[str, Recorded], files: dict[str, str], data_dir: Path) -> None:
            self._opened, self._files = opened, files
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            corpus = next(iter(self._opened.values()))
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self.__doc__} Made of {corpus.attribution}.",
                features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "json": tfds.features.Text()}),
                homepage=dataset.homepage,
                citation=dataset.citation,
                license=f"{corpus.licence}; {corpus.attribution}",
                disable_shuffling=True,  # examples stay in the order of their keys, which is the files'
                metadata=tfds.core.MetadataDict(files=self._files, problems={}),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(split, corpus) for split, corpus in self._opened.items()}

        def _generate_examples(self, split: str, corpus: Recorded) -> Iterator[tuple[int, dict[str, bytes]]]:
            number = None
            for number, transcript in enumerate(corpus.transcripts()):
                # Half a surrogate pair, which JSON can spell and UTF-8 cannot, stays escaped in ASCII.
                text = json.dumps(transcript.to_json())
                yield number, {"id": transcript.id.encode(errors="replace"), "json": text.encode()}
            if number is None:
                raise ConfigError("\n".join([f"split {split} has no readable dialogue", *corpus.problems]))
            _metadata(self)["problems"][split] = list(corpus.problems)

    return Writer
