"""The bundled dataset is what its card says, and its script would notice if it were not."""

import re
import subprocess
import sys

import pytest
import yaml
from training_toys import ROOT

from data.corpora.dungeons.check import SPLITS, check, read_rows, split_of
from data.sources import SourceSpec, read_documents

FOLDER = ROOT / "data" / "corpora" / "dungeons"


@pytest.fixture(scope="module")
def rows():
    return list(read_rows(FOLDER))


def test_the_bundled_rooms_pass_their_own_check():
    done = subprocess.run(
        [sys.executable, "-m", "data.corpora.dungeons.check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_there_are_enough_and_the_card_counts_them_as_they_are(rows):
    problems, counts = check(rows)
    assert not problems and counts["rows"] >= 1000 and counts["settings"] >= 30
    shares = [counts[split] / counts["rows"] for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc0-1.0"
    assert [one["split"] for one in header["configs"][0]["data_files"]] == list(SPLITS)
    assert card.split("---\n", 2)[2].split("\n\n")[1].startswith(f"{counts['rows']:,} rooms")
    for split in SPLITS:
        assert f"| {split} | {counts[split]:,} |" in card
    for value in (
        counts["different words"],
        counts["words a description"],
        counts["moods"],
        counts["places"],
    ):
        assert (f"{value:,}" if isinstance(value, int) else value) in card


def test_no_setting_or_pair_of_a_held_out_room_is_in_the_training_split(rows):
    pairs = {split: {(r["setting"], r["place"]) for s, _, r in rows if s == split} for split in SPLITS}
    settings = {split: {setting for setting, _ in pairs[split]} for split in SPLITS}
    for split in ("validation", "test"):
        assert not pairs[split] & pairs["train"] and len(settings[split] - settings["train"]) == 2
    assert not pairs["validation"] & pairs["test"]


def changed(rows, number, **fields):
    """The rows, one of them with other fields; None removes one."""
    split, where, row = rows[number]
    row = {name: value for name, value in {**row, **fields}.items() if value is not None}
    return [*rows[:number], (split, where, row), *rows[number + 1 :]]


PLANTED = {
    "a copied sentence": (
        lambda rows: {"description": rows[6][2]["description"] + " " + rows[5][2]["description"][:60]},
        r"train.jsonl:7: shares '.*' with train.jsonl:6",
    ),
    "a feature that does not occur": (
        lambda rows: {"features": ["purple zeppelin"]},
        "train.jsonl:7: does not mention purple, zeppelin of features",
    ),
    "an exit that does not occur": (
        lambda rows: {"exits": ["a zeppelin"]},
        "does not mention zeppelin of exits",
    ),
    "first person": (
        lambda rows: {"description": "I hear it. " + rows[6][2]["description"]},
        "speaks in the first person outside quotations: 'I'",
    ),
    "too short": (lambda rows: {"description": "A short room."}, "train.jsonl:7: has 3 words"),
    "too long": (lambda rows: {"description": "Rooms go on. " * 50}, "has 150 words; 50 to 140 are right"),
    "a title twice": (lambda rows: {"title": rows[5][2]["title"]}, "has the title of train.jsonl:6"),
    "the same opening": (
        lambda rows: {
            "description": " ".join(rows[5][2]["description"].split()[:3]) + " " + rows[6][2]["description"]
        },
        "train.jsonl:7: opens like train.jsonl:6",
    ),
    "a missing field": (lambda rows: {"mood": None}, "train.jsonl:7: mood must be a text, is None"),
    "a text for a list": (lambda rows: {"features": "bell"}, "features must be a list of texts, is 'bell'"),
    "too many features": (lambda rows: {"features": ["a"] * 4}, "has 4 features, more than 3"),
    "an unknown field": (lambda rows: {"colour": "red"}, "has unknown fields: colour"),
    "a wrong article": (
        lambda rows: {"description": rows[6][2]["description"] + " It is an cane stand."},
        "train.jsonl:7: has a wrong article in its description: 'an cane'",
    ),
    "a wrong article before a vowel": (
        lambda rows: {"title": "A Iron Shot"},
        "train.jsonl:7: has a wrong article in its title: 'A Iron'",
    ),
    "a missing blank": (
        lambda rows: {"description": rows[6][2]["description"] + " He married her.Here it is."},
        "train.jsonl:7: lacks a blank in its description: 'her.Here'",
    ),
    "two words in one": (
        lambda rows: {"description": rows[6][2]["description"] + " He asks andwants."},
        "train.jsonl:7: lacks a blank in 'andwants'",
    ),
    "the same idea in other words": (
        lambda rows: {"description": " ".join(reversed(rows[5][2]["description"].split()))},
        r"train.jsonl:7: is too like train.jsonl:6, 0\.\d\d",
    ),
    "the wrong split": (
        lambda rows: {"setting": "lighthouse"},
        "train.jsonl:7: lighthouse / .* belongs to test",
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_found(rows, kind):
    change, message = PLANTED[kind]
    problems, _ = check(changed(rows, 6, **change(rows)))
    assert any(re.search(message, problem) for problem in problems), problems


def test_two_rooms_of_the_same_features_are_found(rows):
    for number, features in ((4, ["glass eel", "tin moon"]), (6, ["tin moon", "glass eel"])):
        text = f"{rows[number][2]['description']} Here are a {features[0]}, a {features[1]}."
        rows = changed(rows, number, features=features, description=text)
    problems, _ = check(rows)
    assert "train.jsonl:7: has the features glass eel and tin moon of train.jsonl:5" in problems


def test_sameness_of_the_whole_is_found(rows):
    """One setting, one opening word, one shape, a small vocabulary: each row alone would do."""
    alike = [
        (
            "train",
            f"x:{n}",
            {
                **row,
                "setting": "crypt",
                "features": ["bell", "ring"],
                "description": f"The {n}. " + "The bell rings here. " * 20,
            },
        )
        for n, (_, _, row) in enumerate(rows[:300])
    ]
    problems = "\n".join(check(alike)[0])
    for found in (
        "the setting 'crypt' has 100.0% of the rows, over 6%",
        "the first word 'the' has 100.0% of the rows, over 12%",
        "the shape",
        "have 1 feature(s), under 15%",
        "have 3 feature(s), under 25%",
        "different words; more than 8,000 are wanted",
        "1 settings; at least 30 are wanted",
    ):
        assert found in problems


def test_datasets_loads_the_folder_as_it_stands(tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(FOLDER), cache_dir=str(tmp_path))
    assert {split: len(loaded[split]) for split in loaded} == {
        split: len((FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()) for split in SPLITS
    }
    row = loaded["test"][0]
    assert isinstance(row["features"], list) and split_of(row["setting"], row["place"]) == "test"


def test_pretraining_on_the_bundled_rooms_sees_the_training_split_alone(rows):
    texts = [document.text for document in read_documents(SourceSpec("dungeons"))]
    described = [row["description"] for split, _, row in rows if split == "train"]
    assert len(texts) == len(described)
    assert all(text.endswith(description) for text, description in zip(texts, described, strict=True))


def test_the_script_travels_alone(tmp_path, rows):
    """On the Hub it lies beside the data, without this repository."""
    copy = tmp_path / "check.py"
    copy.write_text((FOLDER / "check.py").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-I", str(copy), str(FOLDER)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rows: {len(rows):,}" in done.stdout
