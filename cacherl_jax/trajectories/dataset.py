"""Thought transcripts as a TFDS dataset of array_record files, without tensorflow: the content of the two JSON Lines files.

An example is a transcript's id, its JSON, and the rows of its messages' provenance as a JSON list.
`tfds.builder_from_directory(folder).as_data_source("train")` opens it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacherl_jax.versions import require

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def write(folder: Path, source: str) -> Path:
    """Writes FOLDER/tfds from FOLDER/transcripts.jsonl and provenance.jsonl, unless it is there; gives the dataset's folder.

    source: what the description says of where the conversations are from. Raises MissingExtra without array_record.
    """
    require("array_record", "data")
    builder = _writer()(folder, source)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS talks, and standard output may be for a machine
        builder.download_and_prepare()
    return Path(builder.data_dir)


@functools.cache  # TFDS keeps every class by its name and refuses a second one
def _writer() -> Callable[[Path, str], tfds.core.DatasetBuilder]:
    """The class that writes the dataset. It stands in a function because TFDS takes a second to import."""
    import tensorflow_datasets as tfds

    class Writer(tfds.core.GeneratorBasedBuilder):
        """Recorded conversations with a teacher's reasoning before each call and answer."""

        name = "thought_transcripts"
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, folder: Path, source: str) -> None:
            self._folder, self._source = folder, source
            super().__init__(data_dir=folder / "tfds", file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self.__doc__} Source: {self._source}.",
                features=tfds.features.FeaturesDict({"id": text, "json": text, "provenance": text}),
                disable_shuffling=True,  # examples stay in the order of their keys, which is the file's
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, bytes]]]:
            for number, (line, rows) in enumerate(_examples(self._folder)):
                name = json.loads(line)["id"].encode(errors="replace")
                yield number, {"id": name, "json": line.encode(), "provenance": json.dumps(rows).encode()}

    return Writer


def _examples(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    """Each transcript's line, and its messages' rows, which stand in the same order."""
    with (folder / "transcripts.jsonl").open() as transcripts, (folder / "provenance.jsonl").open() as provenance:
        rows = itertools.groupby(map(json.loads, provenance), key=lambda row: row["transcript"])
        ahead = next(rows, None)
        for line in transcripts:
            own = []
            if ahead is not None and ahead[0] == json.loads(line)["id"]:
                own, ahead = list(ahead[1]), next(rows, None)
            yield line.rstrip("\n"), own
