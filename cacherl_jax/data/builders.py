"""Schema-Guided Dialogue as a TFDS dataset: read from a local folder, written as array_record, both without tensorflow.

    builder = prepare_sgd(Path("sgd"), Path("prepared"))
    for transcript in transcripts(builder, "train"): ...

An example is a transcript's id and its JSON; tool definitions stay in the folder, see `sgd.read`. `builder.info.metadata`
holds the digests of the files that the dataset was made of, and a line for each record that was left out.
`tfds.builder_from_directory(builder.data_dir)` opens the dataset where the folder is not at hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.config import ConfigError
from cacherl_jax.data import sgd
from cacherl_jax.types import Transcript
from cacherl_jax.versions import require

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

SPLITS = ("train", "dev")
HOMEPAGE = "https://github.com/google-research-datasets/dstc8-schema-guided-dialogue"
CITATION = """@article{rastogi2019towards,
  title={Towards Scalable Multi-domain Conversational Agents: The Schema-Guided Dialogue Dataset},
  author={Rastogi, Abhinav and Zang, Xiaoxue and Sunkara, Srinivas and Gupta, Raghav and Khaitan, Pranav},
  journal={arXiv preprint arXiv:1909.05855},
  year={2019}
}"""


def prepare_sgd(folder: Path, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Writes the dialogues of `folder`/train and `folder`/dev under `data_dir`, unless they are there; gives what reads them.

    Raises ConfigError when a split has no readable dialogue, or when `data_dir` holds the dataset of other files.
    """
    require("array_record", "data")
    import tensorflow_datasets as tfds

    writer = _sgd_writer()(folder, data_dir)
    writer.download_and_prepare()
    # Unlike the writer, whose class is local, this one and its data sources can be pickled for a loader's processes.
    builder = tfds.builder_from_directory(writer.data_dir)
    if _metadata(builder)["files"] != sgd.manifest(folder):
        raise ConfigError(f"{builder.data_dir} was made of other files than {folder} has; delete it or choose another data_dir")
    return builder


def transcripts(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[Transcript]:
    """The transcripts of a split, or of a part of it such as "train[:10%]", in the order of the folder's files."""
    require("array_record", "data")
    for example in builder.as_data_source(split):  # pyright: ignore[reportCallIssue] TFDS's decorator hides the parameters
        yield Transcript.from_json(json.loads(example["json"]))


def problems(builder: tfds.core.DatasetBuilder) -> list[str]:
    """`SgdSplit.problems` of both splits as the dataset was written: "SPLIT/FILE, dialogue ID: reason"."""
    return [f"{split}/{line}" for split in SPLITS for line in _metadata(builder)["problems"][split]]


def _metadata(builder: tfds.core.DatasetBuilder) -> Any:
    return builder.info.metadata


@functools.cache  # TFDS keeps every class by its name and refuses a second one
def _sgd_writer() -> Callable[[Path, Path], tfds.core.DatasetBuilder]:
    """The class that writes the dataset. It stands in a function because TFDS takes a second to import."""
    import tensorflow_datasets as tfds

    class SgdTranscripts(tfds.core.GeneratorBasedBuilder):
        """Schema-Guided Dialogue as transcripts in the message form of OpenAI's chat API."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, folder: Path, data_dir: Path) -> None:
            self._folder = folder
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self.__doc__} Made of {sgd.ATTRIBUTION}.",
                features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "json": tfds.features.Text()}),
                homepage=HOMEPAGE,
                citation=CITATION,
                license=f"{sgd.LICENCE}; {sgd.ATTRIBUTION}",
                disable_shuffling=True,  # examples stay in the order of their keys, which is the files'
                metadata=tfds.core.MetadataDict(files={}, problems={}),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            _metadata(self)["files"] = sgd.manifest(self._folder)
            return {split: self._generate_examples(split, sgd.read(self._folder / split)) for split in SPLITS}

        def _generate_examples(self, split: str, corpus: sgd.SgdSplit) -> Iterator[tuple[int, dict[str, bytes]]]:
            number = None
            for number, transcript in enumerate(corpus.transcripts()):
                # Half a surrogate pair, which JSON can spell and UTF-8 cannot, stays escaped in ASCII.
                text = json.dumps(transcript.to_json())
                yield number, {"id": transcript.id.encode(errors="replace"), "json": text.encode()}
            if number is None:
                raise ConfigError("\n".join([f"{self._folder / split} has no readable dialogue", *corpus.problems]))
            _metadata(self)["problems"][split] = list(corpus.problems)

    return SgdTranscripts
