"""Settings: defaults <- recipe <- flags, and every mistake at once."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from training.recipe import TrainSettings, micro_batches_per_process
from training.settings import SettingsError, changed_settings, parse_settings, setting, settings_as_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def complaints(argv: list[str], **more) -> str:
    with pytest.raises(SettingsError) as caught:
        parse_settings(TrainSettings, argv, **more)
    return str(caught.value)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 6e-4\nmax_steps: 7\nwarmup_steps: 3\nsample_prompts: [a, b c]\n")
    settings = parse_settings(TrainSettings, ["--config", str(recipe), "--max_steps=9", "--compile", "none"])
    assert (settings.learning_rate, settings.max_steps, settings.warmup_steps) == (6e-4, 9, 3)
    assert settings.sample_prompts == ("a", "b c")
    assert settings.weight_decay == TrainSettings.weight_decay


def test_a_text_without_a_dot_is_still_a_number_where_one_is_wanted(tmp_path):
    """PyYAML reads `6e-4` as a text; a run once started with the default rate because of it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nbatch_tokens: 1e6\nblock_size: 1_000\nwarmup_steps: 0\n")
    settings = parse_settings(TrainSettings, ["--config", str(recipe)])
    assert (settings.learning_rate, settings.batch_tokens, settings.block_size) == (1e-3, 1_000_000, 1000)


def test_all_mistakes_come_at_once_with_file_flag_and_nearest_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rte: 1.0\nmax_steps: many\nblock_size: 2.5\nkeep_best: 7\n")
    text = complaints(
        ["--config", str(recipe), "--micro_batch_size", "0", "--n_layer", "--seed", "1", "2", "loose"]
    )
    assert "7 problems" in text
    assert "'learning_rte'" in text and "did you mean 'learning_rate'" in text
    assert "max_steps must be a whole number, is 'many'" in text
    assert "block_size must be a whole number, is 2.5" in text
    assert "keep_best must be true or false, is 7" in text
    assert "--micro_batch_size must be at least 1, is 0" in text
    assert "--n_layer takes one value, got none" in text
    assert "--seed takes one value, got 1 2 loose" in text


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\x00"])
def test_a_recipe_that_is_no_mapping_is_named(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    assert str(recipe) in complaints(["--config", str(recipe)])
    assert "nowhere.yaml" in complaints(["--config", str(tmp_path / "nowhere.yaml")])


def test_values_that_do_not_fit_together_are_named_with_numbers():
    text = complaints(
        ["--n_embd", "10", "--n_head", "3", "--warmup_steps", "5", "--max_steps", "4", "--dropout", "1"]
    )
    assert "n_embd=10 is not a multiple of n_head=3" in text
    assert "warmup_steps=5 is more than max_steps=4" in text
    assert "dropout=1.0 must be below 1" in text


def test_values_with_which_nothing_could_be_learned_or_sampled_are_refused():
    text = complaints(["--max_grad_norm", "0", "--block_size", "48", "--batch_tokens", "48"])
    assert "max_grad_norm=0" in text and "turns clipping off" in text
    assert "sample_tokens=48 leaves no room for a prompt in block_size=48" in text


def test_a_bare_no_of_yaml_and_a_capital_exponent_mean_what_they_say(tmp_path):
    """YAML reads `no` as false: `mixed_precision: no` was refused as not being a text."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: no\nkeep_best: no\n")
    settings = parse_settings(TrainSettings, ["--config", str(recipe), "--max_steps", "1E4"])
    assert (settings.mixed_precision, settings.keep_best, settings.max_steps) == ("no", False, 10_000)


def test_a_batch_that_does_not_divide_names_its_parts_and_the_nearest():
    settings = parse_settings(TrainSettings, ["--batch_tokens", "100000", "--block_size", "1000"])
    with pytest.raises(SettingsError) as caught:
        micro_batches_per_process(settings, 4)
    assert str(caught.value) == (
        "batch_tokens=100,000 is not a multiple of 64,000 "
        "(micro_batch_size 16 x block_size 1000 x 4 processes); nearest is 128,000."
    )


def test_unknown_choices_and_repeated_flags_are_refused():
    text = complaints(["--compile", "maybe", "--seed", "1", "--seed", "2"])
    assert "--compile must be one of auto, none, whole, regional; is 'maybe'" in text
    assert "--seed is given twice" in text


def test_help_shows_every_setting_with_default_unit_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_settings(TrainSettings, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in TrainSettings.__dataclass_fields__:
        assert f"--{name}  (default: " in text
    assert "--batch_tokens  (default: 524,288 tokens)" in text
    assert "one of: auto, no, bf16, fp16, fp8" in text


def test_saved_settings_are_a_recipe_for_the_same_settings(tmp_path):
    settings = parse_settings(TrainSettings, ["--learning_rate", "1e-7", "--sample_prompts", "a b", "é"])
    (tmp_path / "settings.yaml").write_text(settings_as_yaml(settings))
    assert parse_settings(TrainSettings, ["--config", str(tmp_path / "settings.yaml")]) == settings


def test_only_settings_that_change_the_run_count_as_changes():
    @dataclass(frozen=True)
    class Toy:
        depth: int = setting(1, "depth", changes_run=True)
        folder: str = setting("a", "folder")

    assert changed_settings(Toy(depth=2, folder="b"), {"depth": 1, "folder": "a"}) == ["depth: 1 then, 2 now"]
    assert changed_settings(Toy(folder="b"), {"depth": 1, "folder": "a"}) == []


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
def test_recipes_are_ten_billion_tokens_in_half_million_batches(name):
    settings = parse_settings(TrainSettings, ["--config", str(RECIPES / f"{name}.yaml")])
    assert settings.batch_tokens == 524_288 and settings.block_size == 1024
    assert settings.max_steps == 19_073 and settings.warmup_steps == 715
    assert (settings.adam_beta1, settings.adam_beta2, settings.weight_decay) == (0.9, 0.95, 0.1)
    for processes in (1, 2, 4, 8, 16):
        micro_batches = micro_batches_per_process(settings, processes)
        assert micro_batches * settings.micro_batch_size * 1024 * processes == 524_288


def test_the_demo_recipe_loads():
    settings = parse_settings(TrainSettings, ["--config", str(RECIPES / "demo.yaml")])
    assert micro_batches_per_process(settings, 1) >= 1
