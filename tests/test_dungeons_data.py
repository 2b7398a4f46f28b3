"""From fields and a description to rows of a batch: the prompt, what is learnt, what sees what."""

import gzip
import json
import lzma
import subprocess
import sys
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from data.dungeon_files import read_splits
from data.dungeons import (
    FIELDS,
    DescriptionTooLong,
    Dungeon,
    DungeonBlocks,
    _pack,
    build_prompt,
    check_dungeons,
    collate_dungeons,
    encode_dungeon,
)
from data.loader import build_loader
from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from tests.hub_server import HubServer
from tests.training_toys import ROOT, environment
from training.packing import keeps_texts_apart

ROOMS = [
    {
        "title": f"The {place} of {n} Bells",
        "setting": "crypt",
        "place": place,
        "features": ["a cracked bell", "wet rope"],
        "description": f"Rope drips from bell {n} in the {place}, "
        + "and the water keeps time. " * (n % 4 + 1),
    }
    for n, place in enumerate(["cistern", "bridge", "stair", "larder"] * 5)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([json.dumps(room) for room in ROOMS], 300)


@pytest.fixture(scope="module")
def dungeons():
    return [
        Dungeon({name: room[name] for name in FIELDS if name in room}, room["description"], f"line {n}")
        for n, room in enumerate(ROOMS, start=1)
    ]


def test_a_prompt_has_the_fields_given_in_one_order_and_no_others():
    prompt = build_prompt(features=["a bell", "wet rope"], setting="crypt", mood=None, exits=[])
    assert prompt == "Setting: crypt\nFeatures: a bell, wet rope\nDescription:"
    assert build_prompt() == "Description:"
    with pytest.raises(ValueError, match="colour: no such field; there are title"):
        build_prompt(colour="red")


def test_the_description_and_its_end_are_learnt_and_the_prompt_is_not(tokenizer):
    row = encode_dungeon({"setting": "crypt"}, "Bells hang here. ", tokenizer, 200)
    prompt = tokenizer("Setting: crypt\nDescription:")["input_ids"]
    learnt = [label for label in row["labels"] if label != -100]
    assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["input_ids"][: len(prompt)] == prompt
    assert row["input_ids"][len(prompt) :] == learnt
    assert tokenizer.decode(learnt) == " Bells hang here.<|endoftext|>"


def test_a_description_longer_than_the_context_is_refused_or_left_out_by_line(tokenizer, dungeons):
    with pytest.raises(DescriptionTooLong, match="do not fit 30"):
        encode_dungeon({}, "bell " * 40, tokenizer, 30)
    long = [*dungeons, Dungeon({}, "water " * 400, "rooms.jsonl, line 21")]
    with pytest.raises(
        ValueError, match=r"1 of 21 train .* 128 tokens \(rooms.jsonl, line 21\).*--drop_too_long"
    ):
        check_dungeons(long, tokenizer, 128, drop_too_long=False, split="train")
    said = []
    kept = check_dungeons(long, tokenizer, 128, drop_too_long=True, split="train", say=said.append)
    assert kept == dungeons and "line 21" in said[0]
    with pytest.raises(ValueError, match="the train split is empty"):
        check_dungeons(long[-1:], tokenizer, 128, drop_too_long=True, split="train", say=said.append)


def test_fields_go_before_the_description_is_cut(tokenizer):
    """A long room is learnt with fewer fields, never with less of its text."""
    fields = {"title": "A very long title " * 4, "mood": "calm"}
    needed = len(encode_dungeon({}, "Bells hang here.", tokenizer, 999)["input_ids"])
    blocks = DungeonBlocks(
        [Dungeon(fields, "Bells hang here.")], tokenizer, block_size=needed + 12, context=needed + 12
    )
    text = tokenizer.decode(blocks[0]["input_ids"])
    assert "Bells hang here.<|endoftext|>" in text and "very long" not in text


def test_a_row_never_outgrows_its_block_whichever_fields_are_left_out(tokenizer):
    """Rows were packed by one drawing of the fields that fit the context; others kept longer ones."""
    rooms = [
        Dungeon(
            {"title": f"The Bell {n} " * 12, "mood": "calm", "setting": "crypt " * 9, "place": "stair " * 5},
            f"Rope drips from bell {n}. " * 4,
        )
        for n in range(12)
    ]
    blocks = DungeonBlocks(rooms, tokenizer, block_size=400, context=150, field_dropout=0.3, seed=1)
    whole = [len(encode_dungeon(r.fields, r.description, tokenizer, 9999)["input_ids"]) for r in rooms]
    assert min(whole) > 150 and max(len(block) for block in blocks.blocks) == 2
    for index in range(40 * len(blocks)):
        block = blocks[index]
        assert len(block["input_ids"]) == 400 and block["position_ids"].max() < blocks.longest_place <= 150


def test_a_tokenizer_without_an_end_token_is_refused_in_words(tokenizer):
    endless = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer has no end token.*`eos_token` in its tokenizer_config"):
        check_dungeons([Dungeon({}, "Bells.")], endless, 128, drop_too_long=True, split="train")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_every_room_is_packed_once_and_no_block_overflows(lengths):
    blocks = _pack(lengths, 40)
    assert sorted(number for block in blocks for number in block) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in block) <= 40 for block in blocks)


def test_an_epoch_has_every_room_once_and_the_next_leaves_out_other_fields(tokenizer, dungeons):
    blocks = DungeonBlocks(dungeons, tokenizer, block_size=256, context=200, field_dropout=0.5, seed=3)
    assert len(blocks) < len(dungeons)
    loader = build_loader(blocks, collate_dungeons, micro_batch_size=1, seed=3)
    texts = [tokenizer.decode(batch["input_ids"][0]) for batch in islice(loader, 2 * len(blocks))]
    epochs = texts[: len(blocks)], texts[len(blocks) :]
    for epoch in epochs:
        together = "".join(epoch)
        assert all(together.count(f"bell {n} in") == 1 for n in range(len(dungeons)))
    assert set(epochs[0]).isdisjoint(epochs[1])
    seen = Counter(name for text in texts for name in FIELDS if f"{name.capitalize()}: " in text)
    assert 0 < seen["title"] < 2 * len(dungeons)


def test_a_stream_resumed_anywhere_and_shared_between_processes_is_the_same(tokenizer, dungeons):
    blocks = DungeonBlocks(dungeons, tokenizer, block_size=256, context=200, field_dropout=0.5, seed=3)

    def stream(**options):
        loader = build_loader(blocks, collate_dungeons, micro_batch_size=2, seed=3, **options)
        return [batch["input_ids"].tolist() for batch in islice(loader, 12)]

    whole = stream()
    assert stream(start_batch=5)[:7] == whole[5:]
    assert [stream(rank=rank, world_size=2)[:3] for rank in (0, 1)] == [whole[0:6:2], whole[1:6:2]]
    other = DungeonBlocks(dungeons, tokenizer, block_size=256, context=200, field_dropout=0.5, seed=4)
    pairs = [(other[n]["input_ids"], blocks[n]["input_ids"]) for n in range(len(blocks))]
    assert not all(torch.equal(one, two) for one, two in pairs)
    assert other.fingerprint != blocks.fingerprint


@pytest.mark.parametrize("kind", ["ours", "stock GPT-2"])
def test_a_packed_room_is_learnt_as_if_it_stood_alone(tokenizer, dungeons, kind):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "n_positions": 200}
    if kind == "ours":
        model = GPTScratchForCausalLM(GPTScratchConfig(**sizes, initializer_range=0.2)).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()
    packed = DungeonBlocks(dungeons, tokenizer, block_size=400, context=200)
    alone = DungeonBlocks(dungeons, tokenizer, block_size=400, context=200, packs=False)
    block = packed.fullest()
    assert (block["position_ids"] == 0).sum() > 2 and block["position_ids"].max() < 200
    assert keeps_texts_apart(model, block)

    def summed_loss(batch, **more):
        logits = model(**{name: t for name, t in batch.items() if name != "labels"}, **more).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-100, reduction="sum"
        )

    with torch.no_grad():
        together = summed_loss(collate_dungeons([packed[n] for n in range(len(packed))]), use_cache=False)
        apart = summed_loss(collate_dungeons([alone[n] for n in range(len(alone))]), use_cache=False)
        # float32 forwards with other shapes; a leak moves the loss in the third digit.
        assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    labels = collate_dungeons([packed[n] for n in range(len(packed))])["labels"]
    assert (labels[:, 1:] != -100).sum() == packed.targets == alone.targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_across_rooms_is_found_out_in_its_own_precision(tokenizer, dungeons, dtype):
    """As models do that carry a state from token to token; rounding alone is not taken for it."""

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(300, 8)

        def forward(self, input_ids, position_ids=None, use_cache=None):
            return type("Output", (), {"logits": self.embed(input_ids).cumsum(1)})

    torch.manual_seed(0)
    block = DungeonBlocks(dungeons, tokenizer, block_size=400, context=200).fullest()
    assert not keeps_texts_apart(Recurrent().to(dtype), block)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 300, "n_positions": 200}
    model = GPTScratchForCausalLM(GPTScratchConfig(**sizes, initializer_range=0.2)).to(dtype)
    assert keeps_texts_apart(model, block)
    without_restarts = {**block, "position_ids": torch.arange(400) % 200}
    without_restarts["position_ids"][block["position_ids"] == 0] = 0
    assert not keeps_texts_apart(model, without_restarts)


def test_shorter_rows_are_padded_where_nothing_sees_it(tokenizer, dungeons):
    rows = DungeonBlocks(dungeons, tokenizer, block_size=256, context=200, packs=False)
    batch = collate_dungeons([rows[0], rows[3]])
    assert set(batch) == {"input_ids", "labels"} and batch["input_ids"].shape == batch["labels"].shape
    shorter = min(len(rows[0]["input_ids"]), len(rows[3]["input_ids"]))
    assert batch["labels"].shape[1] > shorter
    row = int(len(rows[3]["input_ids"]) == shorter)
    assert (batch["labels"][row, shorter:] == -100).all()
    assert (batch["input_ids"][row, shorter:] == tokenizer.eos_token_id).all()


# Where rooms come from

MANY = [{**room, "description": f"{room['description']} Again, {n}."} for n in range(3) for room in ROOMS]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


TABLES = {
    "rooms.jsonl": lambda lines, table: lines,
    "rooms.ndjson": lambda lines, table: lines,
    "rooms.jsonl.gz": lambda lines, table: gzip.compress(lines),
    "rooms.jsonl.xz": lambda lines, table: lzma.compress(lines),
    "rooms.jsonl.zst": lambda lines, table: zstandard.compress(lines),
    "rooms.parquet": lambda lines, table: as_bytes(table, pyarrow.parquet.write_table),
    "rooms.arrow": lambda lines, table: as_bytes(table, write_stream),
}


def as_bytes(table, write):
    sink = pa.BufferOutputStream()
    write(table, sink)
    return sink.getvalue().to_pybytes()


def write_stream(table, sink):
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("name", TABLES)
def test_rows_keep_their_fields_in_whatever_file_they_lie(tmp_path, name, where):
    """Once anything but plain .jsonl was read for its descriptions alone, and all fields were lost."""
    lines = "".join(json.dumps(room) + "\n" for room in MANY).encode()
    source = tmp_path / name if where == "file" else tmp_path
    (tmp_path / name).write_bytes(TABLES[name](lines, pa.Table.from_pylist(MANY)))
    if where == "folder":
        (tmp_path / "README.md").write_text("# A card\n\nThis is no room.\n")
    found = [room for split in read_splits([str(source)], {}).values() for room in split]
    expected = [({n: v for n, v in room.items() if n in FIELDS}, room["description"]) for room in MANY]
    assert sorted(((room.fields, room.description) for room in found), key=str) == sorted(expected, key=str)
    assert all(room.where.startswith(f"{name}, ") for room in found)


def test_a_folder_of_named_splits_is_read_by_them_whatever_the_kind(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(
        as_bytes(pa.Table.from_pylist(ROOMS[:5]), pyarrow.parquet.write_table)
    )
    lines = "".join(json.dumps(room) + "\n" for room in ROOMS[5:7]).encode()
    (tmp_path / "validation.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "test.jsonl").write_text("not read\n")
    splits = read_splits([str(tmp_path)], {})
    assert [len(splits["train"]), len(splits["validation"])] == [5, 2] and splits["validation"][0].fields


@pytest.mark.parametrize("name", ["rooms.jsonl.gz", "rooms.jsonl.zst", "rooms.parquet", "rooms.arrow"])
def test_a_damaged_file_of_rooms_is_named(tmp_path, name):
    whole = TABLES[name](
        b"".join(json.dumps(room).encode() + b"\n" for room in ROOMS), pa.table({"a": [1] * 99})
    )
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_splits([str(tmp_path / name)], {})


def test_a_dataset_on_the_hub_is_read_by_its_splits(tmp_path):
    def lines(rooms):
        return "".join(json.dumps(room) + "\n" for room in rooms).encode()

    files = {"train.jsonl": lines(ROOMS[:6]), "validation.jsonl": lines(ROOMS[6:9]), "README.md": b"# Rooms"}
    code = (
        "import json; from data.dungeon_files import read_splits;"
        "splits = read_splits(['hub:owner/rooms'], {'mood': 'title'});"
        "print(json.dumps({s: [[r.fields, r.description] for r in rooms] for s, rooms in splits.items()}))"
    )
    with HubServer({"owner/rooms": files}) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment() | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    splits = json.loads(done.stdout.splitlines()[-1])
    assert [len(splits["train"]), len(splits["validation"])] == [6, 3]
    fields, description = splits["validation"][0]
    assert fields["mood"] == fields["title"] == ROOMS[6]["title"] and description == ROOMS[6]["description"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"seting": "zone"}, "--columns seting: no field is called so; ours are description, title, setting"),
        ({"setting": "zoone"}, "--columns setting=zoone: no such column in .*there are .*'zone'"),
    ],
)
def test_a_column_that_is_not_there_is_refused_and_not_passed_over(tmp_path, columns, message):
    rows = [{"description": f"Room {n} is wet.", "mood": "calm", "zone": "crypt"} for n in range(40)]
    with pytest.raises(ValueError, match=message):
        read_splits([write_lines(tmp_path / "rooms.jsonl", rows)], columns)


def test_json_lines_with_other_names_are_mapped(tmp_path):
    rows = [{"text": f"Room {n} is wet.", "name": f"Room {n}", "zone": None} for n in range(40)]
    path = write_lines(tmp_path / "rooms.jsonl", rows)
    splits = read_splits([path], {"description": "text", "title": "name"})
    assert len(splits["train"]) + len(splits["validation"]) == 40 and splits["validation"]
    room = splits["train"][0]
    assert room.fields == {"title": room.description.removesuffix(" is wet.")}
    assert room.where.startswith("rooms.jsonl, line ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "A wet room."},
            r"rooms.jsonl, line 1: no description. The row has 'text'.*--columns description",
        ),
        ({"description": " ", "mood": "calm"}, "line 1: no description"),
        (
            {"description": "A wet room.", "zone": "a"},
            r"none of the fields .*'description', 'zone'.*--columns",
        ),
        ({"description": "A wet room.", "features": {"a": 1}}, "line 1: features must be a text or a list"),
        (["a"], "line 1: not an object but list"),
    ],
)
def test_a_dataset_without_the_fields_says_what_it_has(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_splits([write_lines(tmp_path / "rooms.jsonl", [row] * 3)], {})


def test_an_empty_split_is_named(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROOMS)
    write_lines(tmp_path / "validation.jsonl", [])
    with pytest.raises(ValueError, match=r"the validation split of .* is empty"):
        read_splits([str(tmp_path)], {})


def test_text_files_and_mud_worlds_are_rooms_to_learn_from_and_the_bundled_ones_to_measure_by(tmp_path):
    (tmp_path / "notes.txt").write_text("A wet\nroom.\n\nA dry room,\nand a bell.\n")
    (tmp_path / "old.wld").write_text(
        "#1\nThe Well~\nA well of black water stands in the middle of this cellar.\n~\n0 0 0\nS\n$\n"
    )
    own = tmp_path / "own"
    own.mkdir()
    write_lines(own / "train.jsonl", ROOMS[:3])
    write_lines(own / "validation.jsonl", ROOMS[3:5])
    splits = read_splits([str(own), str(tmp_path / "notes.txt"), str(tmp_path / "old.wld")], {})
    described = {room.description: room.fields for room in splits["train"]}
    assert described["A wet room."] == {} and described["A dry room, and a bell."] == {}
    assert described["A well of black water stands in the middle of this cellar."] == {"title": "The Well"}
    assert [room.description for room in splits["validation"]] == [row["description"] for row in ROOMS[3:5]]
