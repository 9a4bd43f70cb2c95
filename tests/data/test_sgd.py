"""Schema-Guided Dialogue: files in either form, records that cannot be read, Qwen's rendering, the mask, and tasks."""

import copy
import gzip
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from cacherl_jax.config import ConfigError, DataConfig
from cacherl_jax.data import sgd
from cacherl_jax.data.tasks import SgdCorpus
from cacherl_jax.text import chat
from cacherl_jax.trajectory import Source
from cacherl_jax.types import Effects, Message, ToolCall, ToolSpec

SCHEMA = [
    {
        "service_name": "Banks_1",
        "slots": [
            {"name": "account", "description": "Which account", "is_categorical": True, "possible_values": ["checking", "savings"]},
            {"name": "amount", "description": "How much", "is_categorical": False, "possible_values": ["10"]},
        ],
        "intents": [
            {
                "name": "Transfer", "description": "Moves money", "is_transactional": True,
                "required_slots": ["amount"], "optional_slots": {"account": "checking"},
            },
            {
                "name": "Balance", "description": "Reads it", "is_transactional": False,
                "required_slots": ["account"], "optional_slots": {},
            },
        ],
    }
]  # fmt: skip
DIALOGUE = {
    "dialogue_id": "7_00001",
    "services": ["Banks_1"],
    "turns": [
        {"speaker": "USER", "utterance": "Où en est mon compte?", "frames": []},
        {
            "speaker": "SYSTEM",
            "utterance": "It holds $10.",
            "frames": [
                {
                    "service": "Banks_1",
                    "service_call": {"method": "Balance", "parameters": {"account": "épargne"}},
                    "service_results": [{"balance": "$10"}],
                }
            ],
        },
        {"speaker": "USER", "utterance": "Thanks.", "frames": []},
        {"speaker": "SYSTEM", "utterance": "Anything else?", "frames": [{"service": "Banks_1"}]},
    ],
}


def write_split(folder, files, schema=SCHEMA):
    """A split of uncompressed files; values that are not bytes are written as JSON."""
    folder.mkdir(parents=True)
    for name, content in {"schema.json": schema, **files}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def numbered(number, dialogue=DIALOGUE):
    return {**copy.deepcopy(dialogue), "dialogue_id": f"7_{number:05}"}


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_dialogue_becomes_messages_and_an_intent_a_tool(tmp_path):
    split = sgd.read(write_split(tmp_path / "train", {"dialogues_001.json": [DIALOGUE]}))
    (transcript,) = split.transcripts()
    assert (transcript.id, transcript.task_id, transcript.agent) == ("7_00001", "7_00001", "sgd")
    assert transcript.tools == ("Banks_1.Transfer", "Banks_1.Balance")
    assert transcript.messages == (
        Message("user", "Où en est mon compte?"),
        Message("assistant", tool_calls=(ToolCall("Banks_1.Balance", '{"account": "épargne"}', id="call_1_0"),)),
        Message("tool", '[{"balance": "$10"}]', tool_call_id="call_1_0"),
        Message("assistant", "It holds $10."),
        Message("user", "Thanks."),
        Message("assistant", "Anything else?"),
    )
    amount = {"type": "string", "description": "How much"}
    account = {"type": "string", "description": "Which account", "enum": ["checking", "savings", "dontcare"]}
    transfer = {"amount": amount, "account": account | {"default": "checking"}}
    assert split.specs == {
        "Banks_1.Transfer": ToolSpec(
            "Banks_1.Transfer",
            "Moves money",
            {"type": "object", "properties": transfer, "required": ["amount"]},
            Effects(reads=("Banks_1",), writes=("Banks_1",)),
        ),
        "Banks_1.Balance": ToolSpec(
            "Banks_1.Balance",
            "Reads it",
            {"type": "object", "properties": {"account": account}, "required": ["account"]},
            Effects(reads=("Banks_1",)),
        ),
    }


def test_files_are_the_same_compressed_or_not(shared_data, tmp_path):
    folders = [tmp_path / name for name in ("plain", "packed", "mixed")]
    utterances = []
    for name in ("schema", "dialogues_001", "dialogues_008"):
        content = json.loads(gzip.decompress((shared_data / "sgd" / "dev" / f"{name}.json.gz").read_bytes()))
        if name != "schema":
            content = content[:20]
            utterances += [turn["utterance"] for dialogue in content for turn in dialogue["turns"]]
        for folder, packed in zip(folders, (False, True, name == "dialogues_001"), strict=True):
            folder.mkdir(exist_ok=True)
            text = json.dumps(content).encode()
            (folder / f"{name}.json{'.gz' * packed}").write_bytes(gzip.compress(text) if packed else text)
    plain, *others = (sgd.read(folder) for folder in folders)
    transcripts = list(plain.transcripts())
    assert len(transcripts) == 40 and not plain.problems
    assert [m.content for t in transcripts for m in t.messages if m.role != "tool" and not m.tool_calls] == utterances
    for split in others:
        assert split.specs == plain.specs and list(split.transcripts()) == transcripts and not split.problems


def test_a_folder_without_schema_or_dialogues_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"absent holds no schema\.json .* such as sgd/train"):
        sgd.read(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"train holds no dialogues_\*\.json"):
        sgd.read(write_split(tmp_path / "train", {"dialogues.txt": []}))


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def call_frame(dialogue):
    return dialogue["turns"][1]["frames"][0]


def broken(change):
    dialogue = numbered(13)
    change(dialogue)
    return dialogue


@pytest.mark.parametrize(
    ("record", "name", "reason"),
    [
        (5, "1", "TypeError"),
        (None, "1", "TypeError"),
        ("7_00013", "1", "TypeError"),
        ([numbered(13)], "1", "TypeError"),
        ({}, "1", "KeyError 'turns'"),
        (broken(lambda d: d.pop("dialogue_id")), "1", "KeyError 'dialogue_id'"),
        (broken(lambda d: d.pop("turns")), "7_00013", "KeyError 'turns'"),
        (broken(lambda d: d.pop("services")), "7_00013", "KeyError 'services'"),
        (broken(lambda d: d.update(services=None)), "7_00013", "TypeError"),
        (broken(lambda d: d.update(turns=None)), "7_00013", "TypeError"),
        (broken(lambda d: d.update(turns="hello")), "7_00013", "TypeError"),
        (broken(lambda d: d["turns"].insert(2, 3)), "7_00013", "TypeError"),
        (broken(lambda d: d.update(dialogue_id=13)), "13", "TypeError dialogue_id is int, expected text"),
        (broken(lambda d: d.update(turns=d["turns"][1::2])), "7_00013", "ValueError the user says nothing"),
        (broken(lambda d: d["turns"][0].pop("speaker")), "7_00013", "KeyError 'speaker'"),
        (broken(lambda d: d["turns"][0].update(speaker="AGENT")), "7_00013", "ValueError speaker 'AGENT' is neither"),
        (broken(lambda d: d["turns"][3].pop("utterance")), "7_00013", "KeyError 'utterance'"),
        (broken(lambda d: d["turns"][3].update(utterance=["a"])), "7_00013", "TypeError utterance is list, expected text"),
        (broken(lambda d: d["turns"][3].pop("frames")), "7_00013", "KeyError 'frames'"),
        (broken(lambda d: d["turns"][3].update(frames=[4])), "7_00013", "TypeError"),
        (broken(lambda d: call_frame(d).pop("service")), "7_00013", "KeyError 'service'"),
        (broken(lambda d: call_frame(d).update(service_call=None)), "7_00013", "TypeError"),
        (broken(lambda d: call_frame(d)["service_call"].pop("method")), "7_00013", "KeyError 'method'"),
        (broken(lambda d: call_frame(d)["service_call"].pop("parameters")), "7_00013", "KeyError 'parameters'"),
        (broken(lambda d: call_frame(d)["service_call"].update(parameters=["a"])), "7_00013", "TypeError parameters of"),
        (broken(lambda d: call_frame(d).pop("service_results")), "7_00013", "KeyError 'service_results'"),
    ],
)
def test_a_record_that_cannot_be_read_costs_only_itself_and_is_named(tmp_path, record, name, reason):
    files = {"dialogues_001.json": [numbered(1), record, numbered(2)], "dialogues_002.json": [numbered(3)]}
    split = sgd.read(write_split(tmp_path / "train", files))
    for _ in range(2):  # problems are those of one reading, however often the split is read
        assert [t.id for t in split.transcripts()] == ["7_00001", "7_00002", "7_00003"]
        (problem,) = split.problems
        assert problem.startswith(f"dialogues_001.json, dialogue {name}: {reason}")


GZIPPED = gzip.compress(json.dumps([numbered(9)]).encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("dialogues_002.json", b"", "Expecting value"),
        ("dialogues_002.json", b'[{"dialogue_id": "7_00009", "tu', "Unterminated string"),
        ("dialogues_002.json", b'["\xff"]', "utf-8"),
        ("dialogues_002.json", b"{}", "holds dict, expected a list of dialogues"),
        ("dialogues_002.json", b"null", "holds NoneType, expected a list of dialogues"),
        ("dialogues_002.json", b'"x"', "holds str, expected a list of dialogues"),
        ("dialogues_002.json.gz", b"[]", "Not a gzipped file"),
        ("dialogues_002.json.gz", GZIPPED[:-20], "ended before"),
        ("dialogues_002.json.gz", GZIPPED[:-8] + bytes(8), "CRC"),
    ],
)
def test_a_file_that_cannot_be_read_costs_only_itself_and_is_named(tmp_path, name, content, reason):
    files = {"dialogues_001.json": [numbered(1)], name: content, "dialogues_003.json": [numbered(2)]}
    split = sgd.read(write_split(tmp_path / "train", files))
    for _ in range(2):
        assert [t.id for t in split.transcripts()] == ["7_00001", "7_00002"]
        (problem,) = split.problems
        assert problem.startswith(f"{name}: ") and reason in problem


def test_every_problem_is_counted(tmp_path):
    files = {"dialogues_001.json": [5, numbered(1), {}], "dialogues_002.json": b"no", "dialogues_003.json": [numbered(2), None]}
    split = sgd.read(write_split(tmp_path / "train", files))
    assert len(list(split.transcripts())) == 2
    places = [problem.partition(":")[0] for problem in split.problems]
    assert places == [
        "dialogues_001.json, dialogue 0", "dialogues_001.json, dialogue 2", "dialogues_002.json", "dialogues_003.json, dialogue 1",
    ]  # fmt: skip


# ---- the published files ---------------------------------------------------------------------------------------------


def test_the_manifest_names_what_differs_from_the_published_files(shared_data, tmp_path):
    assert sgd.manifest_differences(shared_data / "sgd") == []
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        for path in (shared_data / "sgd" / split).iterdir():
            (tmp_path / split / path.name).symlink_to(path)
    packed = tmp_path / "train" / "dialogues_002.json.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert sgd.manifest_differences(tmp_path) == []  # compression is no difference
    (tmp_path / "dev" / "dialogues_003.json.gz").unlink()
    (tmp_path / "dev" / "dialogues_999.json").write_text("[]")
    changed = tmp_path / "train" / "dialogues_001.json.gz"
    content = gzip.decompress(changed.read_bytes()) + b"\n"
    changed.unlink()
    changed.write_bytes(gzip.compress(content))
    assert sgd.manifest_differences(tmp_path) == [
        "dev/dialogues_003.json is missing",
        "dev/dialogues_999.json is not among the published files",
        "train/dialogues_001.json has other content",
    ]


# ---- 500 conversations as Qwen's own template and tokenizer write them -----------------------------------------------


@pytest.fixture(scope="module")
def conversations(shared_data):
    """(recorded dialogue, its transcript, its tools): 20 of each of 25 files, every service of dev among them."""
    dev, train = sgd.read(shared_data / "sgd" / "dev"), sgd.read(shared_data / "sgd" / "train")
    found = []
    for split, files in ((dev, dev.files), (train, train.files[::13][:8])):
        for path in files:
            for dialogue in json.loads(gzip.decompress(path.read_bytes()))[::3][:20]:
                transcript = sgd.to_transcript(dialogue, split.specs)
                found.append((dialogue, transcript, [split.specs[name] for name in transcript.tools]))
    assert len(found) == 500 and len({s for d, _, _ in found for s in d["services"]}) > 20
    return found


def as_json(messages, tools):
    return [message.to_json() for message in messages], [tool.to_function() for tool in tools]


@pytest.mark.parametrize("thinking_model", [False, True], ids=["plain", "thinking"])
def test_conversations_are_rendered_as_the_official_template_does(conversations, official, qwen_tokenizer, thinking_model):
    for _, transcript, tools in conversations:
        expected = official.text(*as_json(transcript.messages, tools), thinking_model=thinking_model)
        ids = chat.official_ids(
            qwen_tokenizer, transcript.messages, tools, thinking_model=thinking_model, add_generation_prompt=False
        )
        assert ids == official.ids(expected), transcript.id
        # What a policy is asked after each of the last messages that are not its own. Text alone: the ids are those above.
        asked = [i for i, m in enumerate(transcript.messages) if m.role in ("user", "tool")][-3:]
        for messages in (transcript.messages[: i + 1] for i in asked):
            options = {"thinking_model": thinking_model, "add_generation_prompt": True}
            expected = official.text(*as_json(messages, tools), thinking_model=thinking_model, prompt=True)
            assert chat.render_official(messages, tools, **options) == expected, transcript.id


def test_the_mask_covers_exactly_what_the_assistant_said(conversations, official, qwen_tokenizer):
    opened = "<|im_start|>assistant\n<think>\n"
    for dialogue, transcript, tools in conversations:
        # The episode's text: the official one, in which every turn of the assistant has the empty thinking block that the
        # template writes in the last alone. Sampled is what follows the block's opening, up to and with <|im_end|>.
        text = official.text(*as_json(transcript.messages, tools), thinking_model=True).removesuffix("\n")
        text = re.sub(r"<\|im_start\|>assistant\n(<think>\n\n</think>\n\n)?", f"{opened}\n</think>\n\n", text)
        parts = re.split(rf"(?<={re.escape(opened)})(.*?<\|im_end\|>)", text, flags=re.DOTALL)
        ids = official.ids(parts)
        said = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in ids])

        specs = {spec.name: spec for spec in tools}
        tokens_T, sampled_T, segments = chat.transcript_tokens(qwen_tokenizer, transcript, specs, max_tool_tokens=10**6)
        assert tokens_T.tolist() == [i for part in ids for i in part], transcript.id
        np.testing.assert_array_equal(sampled_T, said, transcript.id)
        own = [i for s in segments if s.source is Source.SAMPLED for i in range(s.start, s.stop)]
        assert np.flatnonzero(said).tolist() == own, transcript.id
        # And from the recording: a turn of its own for the calls that stand before a reply.
        turns = []
        for turn in (turn for turn in dialogue["turns"] if turn["speaker"] == "SYSTEM"):
            for frame in (frame for frame in turn["frames"] if "service_call" in frame):
                name = f"{frame['service']}.{frame['service_call']['method']}"
                call = f'{{"name": "{name}", "arguments": {json.dumps(frame["service_call"]["parameters"], ensure_ascii=False)}}}'
                turns.append(f"<tool_call>\n{call}\n</tool_call>")
            turns.append(turn["utterance"])
        assert official.decode(tokens_T[sampled_T]) == "".join(f"\n</think>\n\n{turn}<|im_end|>" for turn in turns)


# ---- tasks -----------------------------------------------------------------------------------------------------------

SEEN = ("Music_1", "RideSharing_1", "Hotels_1")
UNSEEN = ("Media_2", "Movies_2", "RideSharing_2")  # the last occurs in train, which must do without
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def small_sgd(shared_data, tmp_path_factory):
    """Two files of train, in which Hotels_1 does not occur, and two of dev; and the dialogues in them by folder and id."""
    root = tmp_path_factory.mktemp("sgd")
    recorded = {}
    for folder, names in (("train", ("dialogues_126", "dialogues_127")), ("dev", ("dialogues_006", "dialogues_010"))):
        (root / folder).mkdir()
        for name in ("schema", *names):
            shutil.copy(shared_data / "sgd" / folder / f"{name}.json.gz", root / folder)
        for name in names:
            for dialogue in json.loads(gzip.decompress((root / folder / f"{name}.json.gz").read_bytes())):
                recorded[folder, dialogue["dialogue_id"]] = dialogue
    return root, recorded


def chosen(recorded, folder, services):
    """The recorded dialogues of a folder that use these services alone."""
    return {i: d for (where, i), d in recorded.items() if where == folder and set(d["services"]) <= set(services)}


@pytest.fixture(scope="module")
def corpus(small_sgd):
    return SgdCorpus(DataConfig(source="sgd", path=str(small_sgd[0]), services=SEEN, unseen_services=UNSEEN))


def test_splits_are_disjoint_and_hold_all_chosen_dialogues(small_sgd, corpus):
    _, recorded = small_sgd
    ids = {split: [t.id for t in corpus.transcripts(split)] for split in SPLITS}
    assert Counter(ids["train"] + ids["validation"]) == Counter(list(chosen(recorded, "train", SEEN)))
    assert Counter(ids["test"]) == Counter(list(chosen(recorded, "dev", SEEN + UNSEEN)))
    assert 0 < len(ids["validation"]) < len(ids["train"]) / 4
    said = {split: {t.messages for t in corpus.transcripts(split)} for split in SPLITS}
    assert [len(said[split]) for split in SPLITS] == [len(ids[split]) for split in SPLITS]
    assert not said["train"] & said["validation"] and not (said["train"] | said["validation"]) & said["test"]
    for split in SPLITS:
        assert [t.id for t in corpus.tasks(split)] == ids[split] and corpus.transcript_count(split) == len(ids[split])
        assert {t.split for t in corpus.tasks(split)} == {split}
    assert corpus.problems == []


def test_unseen_services_are_in_test_alone_and_families_say_so(small_sgd, corpus):
    _, recorded = small_sgd
    services = {split: {s for t in corpus.tasks(split) for s in t.family.split("/")[1].split("+")} for split in SPLITS}
    assert services == {
        "train": {"Music_1", "RideSharing_1"},
        "validation": {"Music_1", "RideSharing_1"},
        "test": {"Music_1", "Hotels_1", "Media_2", "Movies_2"},
    }
    # Hotels_1 may be trained on, but no dialogue of train has it.
    trained = {s for d in chosen(recorded, "train", SEEN).values() for s in d["services"]}
    expected = Counter()
    for dialogue in chosen(recorded, "dev", SEEN + UNSEEN).values():
        known = "seen" if set(dialogue["services"]) <= trained else "unseen"
        expected[f"{known}/{'+'.join(sorted(dialogue['services']))}"] += 1
    assert Counter(t.family for t in corpus.tasks("test")) == expected
    assert set(expected) == {
        "seen/Music_1", "unseen/Hotels_1", "unseen/Media_2", "unseen/Media_2+Music_1", "unseen/Movies_2+Music_1",
    }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_a_task_is_the_recorded_dialogue(small_sgd, corpus, split):
    _, recorded = small_sgd
    for task in corpus.tasks(split):
        dialogue = recorded["dev" if split == "test" else "train", task.id]
        first, *later = [turn["utterance"] for turn in dialogue["turns"] if turn["speaker"] == "USER"]
        assert task.messages == (Message("user", first),) and task.followups == tuple(later)
        frames = [frame for turn in dialogue["turns"] for frame in turn["frames"] if "service_call" in frame]
        called = [(f"{f['service']}.{f['service_call']['method']}", f["service_call"]["parameters"]) for f in frames]
        (reference,) = task.references
        assert [(call.name, call.parsed()) for call in reference] == called
        assert {name.split(".")[0] for name in task.tools} == set(dialogue["services"])
        assert all(name in corpus.specs for name in task.tools) and {call.name for call in reference} <= set(task.tools)
        assert task.facts == ()


def test_sizes_take_the_first_of_a_split_and_no_services_are_all(small_sgd, corpus):
    root, recorded = small_sgd
    sizes = {"train_tasks": 7, "validation_tasks": 3, "test_tasks": 5}
    small = SgdCorpus(DataConfig(source="sgd", path=str(root), services=SEEN, unseen_services=UNSEEN, **sizes))
    for split in SPLITS:
        assert small.tasks(split) == corpus.tasks(split)[: sizes[f"{split}_tasks"]]
    whole = SgdCorpus(DataConfig(source="sgd", path=str(root)))
    assert sum(whole.transcript_count(split) for split in SPLITS) == len(recorded)


@pytest.mark.parametrize("field", ["services", "unseen_services"])
@pytest.mark.parametrize("name", ["Musik_1", "Music", "", "Music_1.PlayMedia"])
def test_an_unknown_service_is_refused_by_name(small_sgd, field, name):
    with pytest.raises(ConfigError, match=rf"data\.services: .* has no service '{re.escape(name)}'"):
        SgdCorpus(DataConfig(source="sgd", path=str(small_sgd[0]), **{field: (name,)}))


def test_a_corpus_lists_the_problems_of_both_folders(tmp_path):
    write_split(tmp_path / "train", {"dialogues_001.json": [numbered(n) for n in range(40)] + [{}]})
    write_split(tmp_path / "dev", {"dialogues_001.json": b"no", "dialogues_002.json": [numbered(1)]})
    corpus = SgdCorpus(DataConfig(source="sgd", path=str(tmp_path)))
    assert [p.partition(":")[0] for p in corpus.problems] == ["dialogues_001.json, dialogue 40", "dialogues_001.json"]
    assert corpus.transcript_count("train") + corpus.transcript_count("validation") == 40
