"""The TFDS dataset holds what the folder's reader gives, says whose it is, and needs no tensorflow."""

import gzip
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cacherl_jax.config import ConfigError
from cacherl_jax.data import builders, sgd
from cacherl_jax.data.sources import SOURCES
from cacherl_jax.versions import MissingExtra

SLOT = {"name": "city", "description": "Where", "is_categorical": False, "possible_values": []}
INTENT = {"name": "Find", "description": "Finds", "is_transactional": False, "required_slots": ["city"], "optional_slots": {}}
SCHEMA = [{"service_name": "Hotels_1", "slots": [SLOT], "intents": [INTENT]}]


def dialogue(number, text="A hotel in Orléans"):
    call = {"method": "Find", "parameters": {"city": text}}
    frame = {"service": "Hotels_1", "service_call": call, "service_results": [{"name": text}]}
    user = {"speaker": "USER", "utterance": text, "frames": []}
    return {
        "dialogue_id": f"3_{number:05}",
        "services": ["Hotels_1"],
        "turns": [user, {"speaker": "SYSTEM", "utterance": "Here.", "frames": [frame]}],
    }


@pytest.fixture
def folder(tmp_path):
    """Both splits, with ids that are not in the order of their names, and one broken record in each."""
    for split, numbers in (("train", (30, 4, 11, 2)), ("dev", (4, 1))):
        (tmp_path / "sgd" / split).mkdir(parents=True)
        (tmp_path / "sgd" / split / "schema.json").write_text(json.dumps(SCHEMA))
        records = [dialogue(numbers[0]), {"dialogue_id": f"broken in {split}"}, *map(dialogue, numbers[1:])]
        (tmp_path / "sgd" / split / "dialogues_001.json").write_text(json.dumps(records))
    return tmp_path / "sgd"


def test_the_dataset_gives_the_transcripts_of_the_folder(shared_data, tmp_path):
    folder = tmp_path / "sgd"
    for split in ("train", "dev"):
        (folder / split).mkdir(parents=True)
        for name in ("schema", "dialogues_001", "dialogues_010"):
            shutil.copy(shared_data / "sgd" / split / f"{name}.json.gz", folder / split)
        records = json.loads(gzip.decompress((folder / split / "dialogues_010.json.gz").read_bytes()))[:30]
        records[7:7] = [None, {"dialogue_id": "9_00009"}]
        (folder / split / "dialogues_010.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
        (folder / split / "dialogues_011.json").write_bytes(b"[{")
    builder = builders.prepare("sgd", folder, tmp_path / "prepared")
    problems = []
    for split in ("train", "dev"):
        expected = sgd.read(folder / split)
        assert list(builders.transcripts(builder, split)) == list(expected.transcripts())
        assert builder.info.splits[split].num_examples == 128 + 30
        problems += [f"{split}/{line}" for line in expected.problems]
    assert builders.problems(builder) == problems and len(problems) == 6
    assert problems[1] == "train/dialogues_010.json.gz, dialogue 9_00009: KeyError 'turns'"


def test_a_prepared_dataset_is_read_without_its_folder_in_parts_and_in_processes(folder, tmp_path):
    import tensorflow_datasets as tfds

    path = builders.prepare("sgd", folder, tmp_path / "prepared").data_dir
    shutil.rmtree(folder)
    builder = tfds.builder_from_directory(path)
    assert [t.id for t in builders.transcripts(builder, "train")] == ["3_00030", "3_00004", "3_00011", "3_00002"]
    assert [t.id for t in builders.transcripts(builder, "train[1:3]")] == ["3_00004", "3_00011"]
    assert [problem.partition(":")[0] for problem in builders.problems(builder)] == [
        "train/dialogues_001.json, dialogue broken in train", "dev/dialogues_001.json, dialogue broken in dev",
    ]  # fmt: skip
    source = pickle.loads(pickle.dumps(builder.as_data_source("dev")))
    assert [example["id"] for example in source] == [b"3_00004", b"3_00001"]


def test_the_dataset_carries_licence_and_citation(folder, tmp_path):
    builder = builders.prepare("sgd", folder, tmp_path / "prepared")
    assert "CC BY-SA 4.0" in builder.info.redistribution_info.license and sgd.ATTRIBUTION in builder.info.description
    assert "rastogi2019towards" in builder.info.citation and builder.info.homepage in sgd.ATTRIBUTION
    licence = (tmp_path / "prepared" / "sgd_transcripts" / "1.0.0" / "LICENSE").read_text()
    assert sgd.LICENCE in licence and sgd.ATTRIBUTION in licence
    assert builder.info.file_format.value == "array_record"


def test_every_source_has_its_dataset(shared_data, tmp_path):
    assert set(builders.DATASETS) == set(SOURCES)
    folder = shared_data / "tau-bench"
    builder = builders.prepare("tau_bench", folder, tmp_path)
    files = {
        "airline_tasks_test": "derived/airline_tasks_test.jsonl",
        "gpt_4o_airline": "historical_trajectories/gpt-4o-airline.json",
        "retail_tasks_dev": "derived/retail_tasks_dev.jsonl",
        "retail_tasks_train": "derived/retail_tasks_train.jsonl",
    }
    assert set(builder.info.splits) == set(files) and builders.problems(builder) == []
    for split, file in files.items():
        assert list(builders.transcripts(builder, split)) == list(SOURCES["tau_bench"](folder / file).transcripts())
    assert builder.name == "tau_bench_transcripts" and builder.info.redistribution_info.license.startswith("MIT; tau-bench")
    chats = tmp_path / "mine.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n{}\n')
    mine = builders.prepare("openai", chats, tmp_path)
    assert [t.id for t in builders.transcripts(mine, "train")] == ["mine:1"]
    assert builders.problems(mine) == ["train/mine.jsonl, line 2: KeyError 'messages'"]


def test_halves_of_surrogate_pairs_survive(folder, tmp_path):
    (folder / "dev" / "dialogues_002.json").write_text(json.dumps([dialogue(5, "cut \ud83d here")]))
    builder = builders.prepare("sgd", folder, tmp_path / "prepared")
    assert list(builders.transcripts(builder, "dev"))[-1].messages[0].content == "cut \ud83d here"


def test_a_dataset_is_written_once_and_that_of_other_files_is_refused(folder, tmp_path):
    first = builders.prepare("sgd", folder, tmp_path / "prepared")
    (file,) = (p for p in (tmp_path / "prepared").rglob("*dev.array_record*"))
    before = file.stat()
    again = builders.prepare("sgd", folder, tmp_path / "prepared")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(builders.transcripts(again, "dev")) == list(builders.transcripts(first, "dev"))
    (folder / "dev" / "dialogues_002.json").write_text(json.dumps([dialogue(5)]))
    with pytest.raises(ConfigError, match=r"sgd_transcripts/1\.0\.0 was made of other files than .*sgd has"):
        builders.prepare("sgd", folder, tmp_path / "prepared")
    assert len(list(builders.transcripts(builders.prepare("sgd", folder, tmp_path / "other"), "dev"))) == 3


@pytest.mark.parametrize(("content", "reason"), [(b"no", r"\ndialogues_001.json: Expecting value"), (b"[]", "$")])
def test_a_split_without_a_readable_dialogue_is_refused_and_leaves_nothing(folder, tmp_path, content, reason):
    (folder / "dev" / "dialogues_001.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"dev has no readable dialogue{reason}"):
        builders.prepare("sgd", folder, tmp_path / "prepared")
    assert not list((tmp_path / "prepared" / "sgd_transcripts").iterdir())
    with pytest.raises(ConfigError, match=r"train holds no schema\.json"):
        builders.prepare("sgd", tmp_path / "absent", tmp_path / "prepared")


def test_the_extra_is_named_where_it_is_absent(monkeypatch, folder, tmp_path):
    builder = builders.prepare("sgd", folder, tmp_path / "prepared")
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(MissingExtra, match=r"array_record is not installed: pip install 'cacherl_jax\[data\]'"):
        builders.prepare("sgd", folder, tmp_path / "other")
    with pytest.raises(MissingExtra, match=r"cacherl_jax\[data\]"):
        next(builders.transcripts(builder, "dev"))


def test_nothing_imports_tensorflow_and_tfds_comes_with_its_use(folder, tmp_path):
    program = (
        "import sys; from pathlib import Path; from cacherl_jax.data import builders\n"
        "before = 'tensorflow_datasets' in sys.modules\n"
        "builder = builders.prepare('sgd', Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "count = len(list(builders.transcripts(builder, 'train')))\n"
        "print(before, count, 'tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "prepared")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False 4 True False"
