"""Model cards say what happened, in a form that the Hub reads, and nothing else."""

import json
import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from data.dungeons import FIELDS, build_prompt
from evaluation.statistics import proportion
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from release.card import for_repository, keep_owners_words, main
from release.record import wilson_interval
from release.sections import DUNGEON_FIELDS
from tests.hub_server import card_problems

METRICS = [
    {"step": 1, "tokens": 100, "loss": 6.0, "elapsed_seconds": 10.0, "tokens_per_second": 50.0},
    {"step": 1, "tokens": 100, "validation_loss": 5.5, "bits_per_byte": 2.5},
    {"step": 2, "tokens": 200, "loss": 5.9, "elapsed_seconds": 7500.0, "mfu": 0.25, "spend_usd": 4.2},
    {"step": 2, "tokens": 200, "validation_loss": 5.75, "bits_per_byte": None},
    {"step": 2, "tokens": 200, "hellaswag_acc_norm": 0.29, "hellaswag_questions": 1000},
]
STARTED = {
    "event": "started",
    "unix_time": 1.0,
    "device": "8 x H100",
    "processes": 8,
    "versions": {"torch": "2.13"},
}
RECEIPT = {
    "data_fingerprint": "ab" * 32,
    "source": "fineweb-edu",
    "config": "sample-10BT",
    "training_tokens": 9_900_000_000,
    "documents": 9_672_101,
    "contamination": {"questions_in_corpus": 3, "questions": 10042},
}
SAMPLES = [
    {"step": 1, "prompt": "The class", "text": " of old"},
    {"step": 2, "prompt": "The class", "text": " holds ```a fence``` and | a bar"},
]


def write_record(run):
    """The files of a run, beside its export."""
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in METRICS) + '{"step": 3, "l'
    )
    (run / "events.jsonl").write_text(json.dumps(STARTED) + "\n")
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SAMPLES))
    (run / "data.json").write_text(json.dumps(RECEIPT))
    settings = {"learning_rate": 6e-4, "batch_tokens": 524288, "source": "fineweb-edu", "seed": 1337}
    settings["hellaswag_questions"] = "hub"
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    (run / "loss.png").write_bytes(b"\x89PNG\r\n")


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    run = tmp_path / "crypt"
    GPTScratchForCausalLM(GPTScratchConfig.preset("tiny")).save_pretrained(run / "export")
    write_record(run)
    return run


def card_of(run, *flags):
    main([str(run), *flags])
    return (run / "export" / "README.md").read_text()


def test_a_card_tells_what_happened_in_the_run(run):
    card = card_of(run, "--license", "apache-2.0", "--language", "en")
    parameters = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny")).num_parameters()
    for said in (
        f"{parameters:,} parameters, 2 layers",
        "| validation loss | 5.7500 nats/token |",
        "| HellaSwag, acc_norm, 1,000 questions | 29.00%, 95% interval 26.27% to 31.89% |",
        "| source | fineweb-edu sample-10BT |",
        "| training tokens | 9,900,000,000 |",
        "| evaluation questions found in it | 3 of 10,042 |",
        "| hardware | 8 x H100, 8 processes |",
        "| time | 2.1 h |",
        "| spend | 4.20 USD |",
        "| model FLOPs utilisation | 25.0% |",
        "| batch, tokens a step | 524,288 |",
        "![Training and validation loss](loss.png)",
        "````text\nThe class holds ```a fence``` and | a bar\n````",
        "under the licence `apache-2.0`",
        "hf download user/name training/settings.yaml --local-dir .",
        "accelerate launch train_accelerate.py --config training/settings.yaml",
    ):
        assert said in card
    assert " of old" not in card and "bits per byte" not in card  # of the first validation, not of the last
    assert (run / "export" / "loss.png").exists()


def test_the_hub_reads_the_cards_metadata(run):
    """Tried against the documented schema; the Hub's own validator is far away."""
    card = ModelCard(card_of(run))
    metadata = card.data.to_dict()
    assert card_problems(str(card)) == []
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert metadata["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert "license" not in metadata and "language" not in metadata  # nobody said
    name, results = model_index_to_eval_results(metadata["model-index"])
    found = {(result.dataset_name, result.metric_type): result for result in results}
    assert name == "crypt"
    assert found["fineweb-edu, held out", "loss"].metric_value == 5.75
    assert found["fineweb-edu, held out", "perplexity"].metric_value == pytest.approx(
        math.exp(5.75), abs=1e-4
    )
    assert found["HellaSwag", "acc_norm"].metric_args == {"interval_95": [0.2627, 0.3189], "questions": 1000}
    assert all(result.dataset_type == "HuggingFaceFW/fineweb-edu" for result in results[:-1])


def test_questions_of_an_own_file_are_not_called_the_hubs(run):
    """They once were: whatever the run had asked stood in the card as Rowan/hellaswag's validation split."""
    settings = {"source": "fineweb-edu", "hellaswag_questions": "/home/someone/private/questions.jsonl"}
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    results = model_index_to_eval_results(ModelCard(card_of(run)).data.to_dict()["model-index"])[1]
    (hellaswag,) = (result for result in results if result.metric_type == "acc_norm")
    assert hellaswag.dataset_name == "HellaSwag questions of questions.jsonl"
    assert (hellaswag.dataset_type, hellaswag.dataset_split) == ("text", None)


def test_a_whole_evaluation_replaces_the_glance_taken_in_training(run):
    share = {"value": 0.3114, "low": 0.302, "high": 0.32, "correct": 3127, "total": 10042}
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "Rowan/hellaswag", "name": "HellaSwag"},
    }
    result["metrics"] = [{"type": "harness_acc_norm", "value": 0.3114}]
    index = [{"name": "crypt", "results": [result]}]
    scores = {"accuracy": {"harness_acc_norm": share}, "model-index": index}
    (run / "hellaswag.json").write_text(json.dumps(scores))
    card = card_of(run)
    assert "10,042 questions | 31.14%, 95% interval 30.20% to 32.00%" in card
    assert "29.00%" not in card
    results = model_index_to_eval_results(ModelCard(card).data.to_dict()["model-index"])[1]
    assert [r.metric_value for r in results if r.dataset_name == "HellaSwag"] == [0.3114]


def test_a_dungeon_export_says_how_it_wants_to_be_asked(run):
    settings = {"field_dropout": 0.2, "export_best": True, "data": ["/home/someone/private/rooms"]}
    settings["model"] = "artifacts/runs/demo/export"
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    told = {"before": {"rooms": 2.5405, "general": 2.1}, "after": {"rooms": 1.25, "general": 2.6}}
    (run / "finetuning.json").write_text(json.dumps(told))
    card = card_of(run)
    assert "| held-out rooms, bits per byte, after fine-tuning | 1.2500 |" in card
    assert "| other text, bits per byte, before fine-tuning | 2.1000 |" in card
    prompt = build_prompt(setting="crypt", features=["cracked bell", "wet rope"])
    assert f"```text\n{prompt}\n```" in card
    assert DUNGEON_FIELDS == FIELDS
    assert "dungeon rooms" in card and "finetune.py --config" in card
    assert "| validation loss | 5.5000" in card  # of the best weights, which are those exported
    assert "| rooms | rooms |" in card and "/home/someone" not in card


def test_nothing_is_made_up_where_files_are_missing(run):
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl", "data.json", "settings.yaml", "loss.png"):
        (run / name).unlink()
    card = card_of(run)
    assert card_problems(card) == []
    for heading in ("Results", "Data", "Training", "Samples", "Reproduce"):
        assert f"## {heading}" not in card
    assert "model-index" not in card and "None" not in card and "nan" not in card
    assert "## Use it" in card and "## Limits and licence" in card


def test_a_card_that_a_person_wrote_is_left_alone(run):
    card = run / "export" / "README.md"
    card.write_text("# Mine\n")
    with pytest.raises(SystemExit, match="was not written by this program and is left as it is"):
        main([str(run)])
    assert card.read_text() == "# Mine\n"
    card.unlink()
    plain = card_of(run)
    assert "language" not in plain
    named = card_of(run, "--language", "en", "--license", "mit")  # ours: written anew
    assert "language: en\n" in named and "license: mit\n" in named
    # A run that is repeated writes its card again: what its owner said is not lost.
    assert card_of(run) == named
    assert "license: apache-2.0\n" in card_of(run, "--license", "apache-2.0")


def test_an_owners_licence_and_language_outlive_whatever_is_written_anew(run):
    """Also those that the Hub's page has put into the metadata, in forms that our flags do not know."""
    plain = card_of(run)
    there = "---\nlanguage: [en, de]\nlicense: other\nlicense_name: crypt\nlicense_link: LICENSE\n---\n"
    kept = keep_owners_words(plain, there)
    told = ModelCard(kept).data.to_dict()
    for name, value in yaml.safe_load(there.split("---\n")[1]).items():
        assert told[name] == value
    assert "under the licence `other`" in kept and "Nobody has said" not in kept
    changed = {"language", "license", "license_name", "license_link"}
    before = ModelCard(plain).data.to_dict()
    assert {name: told[name] for name in told.keys() - changed} == before
    assert kept.split("## Limits")[0].split("---\n", 2)[2] == plain.split("## Limits")[0].split("---\n", 2)[2]
    newer = card_of(run, "--license", "mit")
    assert "license_name" not in keep_owners_words(newer, there) and "license: mit\n" in newer
    for empty in (plain, "no metadata at all", ""):
        assert keep_owners_words(plain, empty) == plain


def test_only_commands_get_the_repositorys_name_and_samples_stay_as_they_came(run):
    """A model of documentation writes such lines itself."""
    text = 'pipe = pipeline(model="gpt2")\nhf download gpt2 model\nAuto.from_pretrained("gpt2")'
    (run / "samples.jsonl").write_text(json.dumps({"step": 2, "prompt": "Use it: ", "text": text}) + "\n")
    card = for_repository(card_of(run), "user/crypt")
    assert f"```text\nUse it: {text}\n```" in card
    assert 'pipeline("text-generation", model="user/crypt", trust_remote_code=True)' in card
    assert "\nhf download user/crypt training/settings.yaml --local-dir .\n" in card


def test_the_card_of_averaged_weights_tells_what_was_measured_of_them(run):
    """It is the run's second export; loss, scores and samples of the first are not its own."""
    lines = [{**line} for line in METRICS]
    lines[1]["averaged_validation_loss"], lines[3]["averaged_validation_loss"] = 5.25, 5.125
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "export").rename(run / "export-ema")
    main([str(run / "export-ema")])
    card = (run / "export-ema" / "README.md").read_text()
    assert "the moving average of the run's" in card and "| validation loss | 5.1250 nats/token |" in card
    for other in ("5.75", "HellaSwag", "## Samples", "bits per byte"):
        assert other not in card
    results = model_index_to_eval_results(ModelCard(card).data.to_dict()["model-index"])[1]
    assert {result.metric_type: result.metric_value for result in results}["loss"] == 5.125


def test_an_adapters_card_says_that_its_base_is_needed(run):
    (run / "export" / "config.json").unlink()
    (run / "export" / "adapter_config.json").write_text("{}")
    settings = {
        "field_dropout": 0.2,
        "method": "lora",
        "model": "openai-community/gpt2",
        "learning_rate": 1e-4,
    }
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    card = card_of(run)
    assert card_problems(card) == []
    metadata = ModelCard(card).data.to_dict()
    assert (metadata["library_name"], metadata["base_model"]) == ("peft", "openai-community/gpt2")
    assert {"lora", "dungeons"} <= set(metadata["tags"])
    assert (
        "A LoRA adapter" in card and "the base model has to lie where" in card and "| method | lora |" in card
    )


@pytest.mark.parametrize("share, total", [(0.0, 1), (0.29, 1000), (1.0, 50), (0.25, 10042)])
def test_the_interval_is_the_one_of_the_evaluation(share, total):
    """`release` may not import `evaluation`, so the formula stands twice."""
    other = proportion(round(share * total), total)
    low, high = wilson_interval(round(share * total) / total, total)
    assert (low, high) == pytest.approx((other.low, other.high), abs=1e-6)
