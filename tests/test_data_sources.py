"""Every kind of source gives its documents in order, and says which file is wrong when one is."""

import gzip
import hashlib
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data.python_docs import extract, python_documents
from data.sources import (
    BUNDLED,
    Part,
    SourceError,
    SourceSpec,
    find_parts,
    list_parts,
    origin_of,
    read_documents,
    read_part,
    resolved,
)
from modeling_gpt_scratch import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = ["The first room.", "Zweiter Raum: größer.", "第三の部屋"]


def texts_of(source, counts=None, **settings):
    return [document.text for document in read_documents(SourceSpec(str(source), **settings), counts)]


def jsonl(texts=TEXTS, column="text"):
    return "".join(
        json.dumps({column: text, "other": 1}, ensure_ascii=False) + "\n" for text in texts
    ).encode()


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(jsonl()),
    "a.json": lambda path: path.write_bytes(jsonl()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl())),
    "a.JSONL.ZST": lambda path: path.write_bytes(zstandard.compress(jsonl())),
    # Two frames one after the other, as parallel compressors write them.
    "b.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl()[:20]) + zstandard.compress(jsonl()[20:])
    ),
    "a.parquet": lambda path: pa.parquet.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), path),
    "a.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "b.arrow": lambda path: write_arrow(path, pa.ipc.new_file),
}


def write_arrow(path, opener):
    table = pa.table({"n": [1, 2, 3], "text": TEXTS})
    with opener(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_its_texts_in_order(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("suffix", ["txt", "md", "txt.gz"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    content = "One file,\n\none document.\n"
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert texts_of(path) == [content]


def test_a_long_text_file_is_several_documents_that_end_at_blank_lines(tmp_path):
    scenes = [f"Scene {number}.\n" + f"A line of scene {number}.\n" * 60 for number in range(50)]
    content = "\n".join(scenes)
    (tmp_path / "input.txt").write_text(content)
    (tmp_path / "one.txt").write_text("x" * 50_000)
    *pieces, one = read_documents(SourceSpec(str(tmp_path)))
    assert "".join(piece.text for piece in pieces) == content
    assert all(piece.text.startswith("Scene ") for piece in pieces)
    assert all(10_000 < len(piece.text) <= 20_000 for piece in pieces[:-1])
    assert [piece.id.rpartition("input.txt")[2] for piece in pieces] == [
        f":{number}" for number in range(1, len(pieces) + 1)
    ]
    assert (one.text, one.id.endswith("one.txt")) == ("x" * 50_000, True)


def test_names_with_a_globs_characters_are_names_where_they_exist(tmp_path):
    folder = tmp_path / "checkout[2]"
    folder.mkdir()
    for name in ("a?.txt", "ab.txt", "[x]*.txt"):
        (folder / name).write_text(name)
    assert texts_of(folder) == ["[x]*.txt", "a?.txt", "ab.txt"]
    assert texts_of(folder / "a?.txt") == ["a?.txt"]
    assert texts_of(folder / "[x]*.txt") == ["[x]*.txt"]
    assert texts_of(tmp_path / "checkout[[]2]" / "a*.txt") == ["a?.txt", "ab.txt"]


def test_folders_and_globs_read_their_files_sorted_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "ignored.png").write_bytes(b"x")
    assert texts_of(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts_of(tmp_path / "?.txt") == ["a.txt", "b.txt"]
    assert texts_of(str(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]


def test_object_stores_are_read_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", jsonl())
    assert texts_of("memory://corpus") == TEXTS


def test_a_named_column_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(column="content"))
    assert texts_of(tmp_path / "a.jsonl", text_column="content") == TEXTS


def test_parts_depend_on_the_files_alone_and_cover_them(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.PART_BYTES", 10)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * (4 + number))
    parts = list_parts(SourceSpec(str(tmp_path)))
    assert [[os.path.basename(path)[0] for path in part.paths] for part in parts] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
    assert [part.bytes for part in parts] == [9, 6, 7, 8]


@pytest.mark.parametrize(
    "name, config, expected",
    [
        ("fineweb-edu", None, ("hub:HuggingFaceFW/fineweb-edu", "sample-10BT")),
        ("fineweb-edu", "100BT", ("hub:HuggingFaceFW/fineweb-edu", "sample-100BT")),
        ("fineweb-edu", "full", ("hub:HuggingFaceFW/fineweb-edu", "default")),
        ("fineweb", "CC-MAIN-2024-10", ("hub:HuggingFaceFW/fineweb", "CC-MAIN-2024-10")),
        ("tinystories", None, ("hub:roneneldan/TinyStories", None)),
    ],
)
def test_short_names_stand_for_hub_datasets(name, config, expected):
    spec = resolved(SourceSpec(name, config=config))
    assert (spec.source, spec.config) == expected


def test_wikitexts_lines_become_articles(tmp_path):
    """The Hub's files hold a line of WikiText a row; read as documents, headings were documents too."""
    first = [
        "",
        " = Lantern = \n",
        "",
        " A lantern is a portable light . \n",
        " = = History = = \n",
        " It is old . = \n",
        "",
    ]
    second = [" = A = B = \n", " The first line . \n", " = = = Deeper = = = \n", "\n"]
    rest = [" The end of an article that the file before began . \n"]
    pa.parquet.write_table(pa.table({"text": first + second}), tmp_path / "0.parquet", row_group_size=2)
    pa.parquet.write_table(pa.table({"text": rest + first[1:4]}), tmp_path / "1.parquet")
    part = Part((str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")), 0)
    texts = [document.text for document in read_part(SourceSpec("wikitext"), part)]
    assert texts == ["".join(first), "".join(second), "".join(rest), "".join(first[1:4])]


def test_the_bundled_rooms_are_their_titles_and_descriptions(tmp_path, monkeypatch):
    folder = tmp_path / "dungeons"
    folder.mkdir()
    room = {"setting": "a keep", "place": "cellar", "mood": "dread", "features": [], "exits": ["north"]}
    room |= {"inhabitants": [], "title": "The Cellar", "description": "Casks line the wall."}
    (folder / "train.jsonl").write_text(
        json.dumps(room) + "\n" + json.dumps({**room, "title": "Well"}) + "\n"
    )
    (folder / "validation.jsonl").write_text(json.dumps({**room, "title": "Not for training"}) + "\n")
    monkeypatch.setattr("data.sources.BUNDLED", tmp_path)
    assert texts_of("dungeons") == ["The Cellar\nCasks line the wall.", "Well\nCasks line the wall."]


def test_the_dungeons_that_come_with_the_project_are_read():
    text = (BUNDLED / "dungeons" / "train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert texts_of("dungeons") == [f"{row['title']}\n{row['description']}" for row in rows]


WORLD = """#3001
&gThe Temple &WOf Midgaard&n~
   You are in the southern end of the temple hall in the Temple of Midgaard.
The temple has been constructed from giant marble blocks, eternal in
appearance, and most of the walls are covered by ancient wall paintings.
   Large steps lead down through the grand temple gate, R&&B inside.
~
30 dh 0
D0
~
~
0 -1 3054
E
painting~
An old painting of several people, none of whom you have ever met before.
~
S
#3002
A Void~
Nothing.
~
30 0 0
S
$~
"""
AREA = """#AREA {{ 1 50} Diku    Crypt~
#MOBILES
#100
ghost~
a ghost~
A ghost hovers here, and it is no room although it looks like one in the file.
~
#0
#ROOMS
#100
{wThe {DCrypt{x~
Cold air seeps from between the stones of this low and narrow crypt.~
0 4 0
S
#0
#RESETS
#101
Not a room~
This follows the section of the rooms, and has nothing at all to do with them.
~
S
#$
"""


def test_compressed_rooms_are_rooms_too(tmp_path):
    """They were passed over without a word: the ending was understood, the content was not unpacked."""
    (tmp_path / "30.wld.gz").write_bytes(gzip.compress(WORLD.encode()))
    (tmp_path / "crypt.are.zst").write_bytes(zstandard.compress(AREA.encode()))
    (tmp_path / "x.wld.xz").write_bytes(lzma.compress(WORLD.encode()))
    assert [text.partition("\n")[0] for text in texts_of(tmp_path)] == [
        "The Temple Of Midgaard",
        "The Crypt",
        "The Temple Of Midgaard",
    ]
    os.truncate(tmp_path / "30.wld.gz", 100)
    with pytest.raises(SourceError, match=r"30\.wld\.gz cannot be read to its end"):
        texts_of(tmp_path)


def test_rooms_of_mud_worlds_are_documents_without_colour_codes(tmp_path):
    (tmp_path / "30.wld").write_bytes(WORLD.encode())
    (tmp_path / "crypt.are").write_bytes(AREA.replace("Cold", "Café-cold").encode("latin-1"))
    temple, crypt = texts_of(tmp_path)
    assert temple == (
        "The Temple Of Midgaard\n\n"
        "You are in the southern end of the temple hall in the Temple of Midgaard. The temple has been "
        "constructed from giant marble blocks, eternal in appearance, and most of the walls are covered by "
        "ancient wall paintings.\n\nLarge steps lead down through the grand temple gate, R&B inside.\n"
    )
    assert crypt == "The Crypt\n\nCafé-cold air seeps from between the stones of this low and narrow crypt.\n"


# ---- folders that hold other things too


def test_what_is_left_unread_is_said(tmp_path, capsys):
    for name in ("a.txt", "b.png", "c.csv", "LICENSE"):
        (tmp_path / name).write_text("text")
    assert texts_of(tmp_path) == ["text"]
    assert "Left unread in" in (said := capsys.readouterr().out)
    assert "3 files that end in (none), .csv, .png" in said
    assert texts_of(tmp_path / "*.txt") == ["text"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("beside", ["a.jsonl", ".gitattributes"])
def test_the_card_of_a_cloned_dataset_is_no_document(tmp_path, capsys, beside):
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A dataset\n")
    (tmp_path / beside).write_bytes(jsonl())
    (tmp_path / "b.txt").write_text("a text")
    assert texts_of(tmp_path) == [*(TEXTS if beside == "a.jsonl" else []), "a text"]
    assert "README.md" in capsys.readouterr().out
    assert texts_of(tmp_path / "README.md")[0].startswith("---")  # asked for by name it is read
    (tmp_path / beside).unlink()
    assert len(texts_of(tmp_path)) == 2  # and beside texts alone it is one of them


def test_what_save_to_disk_wrote_is_read(tmp_path):
    """Its dataset_info.json was taken for lines of JSON, and the command ended there."""
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert texts_of(tmp_path / "saved") == TEXTS


def test_the_receipt_knows_the_files_by_names_that_hold_on_any_machine(tmp_path):
    origins = []
    for folder in ("here", "there"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name in ("a.txt", "sub/b.txt"):
            (tmp_path / folder / name).write_text(name)
        spec, parts = find_parts(SourceSpec(str(tmp_path / folder)))
        origins.append(origin_of(spec, parts))
    digest = hashlib.sha256(b"a.txt\nsub/b.txt").hexdigest()
    assert origins == [{"files": 2, "bytes": 14, "files_sha256": digest}] * 2


# ---- bad input


def test_a_source_that_does_not_exist_says_what_does(tmp_path):
    with pytest.raises(SourceError, match=r"No source .*nothing.*python-docs.*fineweb-edu.*hub:OWNER/NAME"):
        texts_of(tmp_path / "nothing")


def test_a_folder_without_readable_files_says_what_it_found(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"1 files end in \.png; readable are \.txt"):
        texts_of(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_missing_column_says_which_exist(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(SourceError, match=rf"{name}.* has no column 'body'; it has .*'text'"):
        texts_of(tmp_path / name, text_column="body")


def test_a_column_that_is_no_text_is_refused(tmp_path):
    pa.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="'text' holds int64, not text"):
        texts_of(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ["bad"]}\n')
    with pytest.raises(SourceError, match=r"a\.jsonl:2.*holds a list, not text"):
        texts_of(tmp_path / "a.jsonl")


def test_files_of_mixed_schemas_fail_at_the_one_that_differs(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["good"]}), tmp_path / "a.parquet")
    pa.parquet.write_table(pa.table({"body": ["other"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet has no column 'text'; it has 'body'"):
        texts_of(tmp_path)


@pytest.mark.parametrize("line", ["not json", "[1]", '"text"', '{"text": "cut'])
def test_a_line_that_is_no_json_object_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(SourceError, match=r"a\.jsonl:2"):
        texts_of(tmp_path / "a.jsonl")


def test_nulls_and_blanks_are_left_out_and_counted(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["one", None, "", " \n\t", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n\n{"text": "three"}\n')
    counts = Counter()
    assert texts_of(tmp_path, counts) == ["one", "two", "three"]
    assert counts["blank"] == 4


def test_invalid_utf8_is_repaired_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    binary = pa.array([b"fine", b"caf\xe9"])
    forged = pa.StringArray.from_buffers(2, *binary.buffers()[1:])  # Arrow does not look inside
    with pa.ipc.new_stream(str(tmp_path / "c.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([forged], names=["text"]))
    counts = Counter()
    assert texts_of(tmp_path, counts) == ["caf\ufffd noir", "caf\ufffd", "fine", "caf\ufffd"]
    assert counts["repaired"] == 3


def test_lone_surrogates_are_repaired_and_whole_pairs_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    counts = Counter()
    assert texts_of(tmp_path, counts) == ["a\ufffdb", "\U0001f600"]
    assert counts["repaired"] == 1


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow", "b.arrow"]
)
def test_a_truncated_file_is_named_and_never_read_as_if_whole(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(SourceError, match=name.replace(".", r"\.")):
        texts_of(path)


def test_a_corrupt_parquet_footer_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    WRITERS["a.parquet"](path)
    content = bytearray(path.read_bytes())
    content[-30:-8] = b"\xff" * 22
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.parquet is not a whole Parquet file"):
        texts_of(path)


# ---- the documentation in this environment


def test_docstrings_are_read_without_running_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""This module says in more than a dozen words what it is good for, and then stops."""\n'
        "raise SystemExit('imported!')\n"
        "class Lamp:\n"
        "    def light(self, oil, *wicks, high=False):\n"
        '        """Burn the oil with a steady flame until someone blows it out or it is used up."""\n'
        "    def blow(self):\n"
        '        """Too short."""\n'
    )
    assert extract(path) == [
        "This module says in more than a dozen words what it is good for, and then stops.",
        "Lamp.light(oil, *wicks, high)\n"
        "Burn the oil with a steady flame until someone blows it out or it is used up.",
    ]


@pytest.mark.parametrize("content", [b"def broken(:\n'''x'''", b"\xff\xfe'''", b"'''" + b"(" * 5000])
def test_a_file_that_does_not_parse_is_passed_over(tmp_path, content):
    path = tmp_path / "module.py"
    path.write_bytes(content)
    assert extract(path) == []


def test_a_file_nested_deeper_than_python_can_follow_is_passed_over(tmp_path):
    """Each `elif` lies inside the `else` of the one before; the parser counts no depth for them."""
    words = "A text of more than a dozen words stands here so that it would be kept if it could be."
    branches = "".join(f"elif x == {number}:\n    pass\n" for number in range(3000))
    path = tmp_path / "module.py"
    path.write_text(f'"""{words}"""\nif x:\n    pass\n{branches}')
    assert extract(path) in ([], [words])
    path.write_text(f'"""{words}"""\n')
    assert extract(path) == [words]


def small_environment(monkeypatch, tmp_path):
    """A Python environment of three files instead of the real one, which takes half a minute to read."""
    package = tmp_path / "site" / "lamps"
    package.mkdir(parents=True)
    words = "The lamp burns with a steady flame until its oil is used up or somebody blows it out at last."
    (package / "a.py").write_text(f'"""{words}\n\nIt is lit by hand. {words.upper()} {words.title()}"""\n')
    (package / "b.py").write_text((package / "a.py").read_text())
    info = tmp_path / "site" / "lamps-1.0.dist-info"
    info.mkdir()
    badge = "[![badge](https://img.shields.io/x)](y)"
    readme = f"# Lamps\n\n{badge}\n\nA package of lamps. {words} {words.lower()} {words}"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lamps\nVersion: 1.0\n\n{readme}\n")
    own = tmp_path / "site" / f"gpt_scratch-{__version__}.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: gpt-scratch\n\nOurs. {readme}\n")
    library = tmp_path / "lib"
    (library / "pydoc_data").mkdir(parents=True)
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {{'with': {3 * words!r}}}\n")
    monkeypatch.setattr("data.python_docs.package_folders", lambda: [tmp_path / "site"])
    monkeypatch.setattr("data.python_docs.library_folder", lambda: library)


def test_the_environments_documentation_is_ordered_deduplicated_and_clean(monkeypatch, tmp_path):
    small_environment(monkeypatch, tmp_path)
    documents = dict(python_documents(processes=2))
    # Without this project's own page: what is written there must not change the corpus.
    assert list(documents) == ["help/with", "lamps-1.0.dist-info/METADATA", "lamps/a.py"]
    assert "shields.io" not in documents["lamps-1.0.dist-info/METADATA"]
    assert "A package of lamps." in documents["lamps-1.0.dist-info/METADATA"]
    # However many processes read it, the order is the same.
    assert list(python_documents(processes=3)) == list(documents.items())


@pytest.mark.slow
def test_this_environments_documentation_is_plenty_and_reads_as_prose():
    names, texts = zip(*python_documents(), strict=True)
    assert not any("gpt_scratch" in name for name in names)
    assert sum(map(len, texts)) > 8_000_000
    assert len(set(texts)) == len(texts)
