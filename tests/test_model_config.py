"""The configuration says no to what cannot work, and names it; presets are the published sizes."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from modeling_gpt_scratch import PRESETS, GPTScratchConfig, GPTScratchForCausalLM


@pytest.mark.parametrize(
    "field, value", [("n_embd", "64"), ("n_layer", 2.0), ("layer_norm_epsilon", 1), ("use_cache", "yes")]
)
def test_a_field_of_the_wrong_type_is_refused_at_construction_and_on_assignment(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        GPTScratchConfig(**{field: value})
    config = GPTScratchConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        setattr(config, field, value)


def test_sizes_that_do_not_fit_one_another_are_all_named_with_their_numbers():
    with pytest.raises(StrictDataclassClassValidationError) as error:
        GPTScratchConfig(n_embd=65, n_head=4, n_layer=0, resid_pdrop=1.0)
    message = str(error.value)
    for part in ("n_embd=65", "n_head=4", "n_layer=0", "resid_pdrop=1.0"):
        assert part in message


def test_positional_arguments_are_refused():
    with pytest.raises((TypeError, ValueError)):
        GPTScratchConfig(100)


def test_a_config_made_invalid_by_assignment_is_not_saved(tmp_path):
    config = GPTScratchConfig.preset("tiny")
    config.n_head = 5
    with pytest.raises(StrictDataclassClassValidationError, match="n_head=5"):
        config.save_pretrained(tmp_path)


def test_integers_serve_as_dropout_and_unknown_fields_are_kept():
    config = GPTScratchConfig(resid_pdrop=0, foo=3)
    assert config.resid_pdrop == 0 and config.foo == 3


def test_hugging_face_names_read_and_write_gpt2_names():
    config = GPTScratchConfig(
        hidden_size=96, num_attention_heads=6, num_hidden_layers=3, max_position_embeddings=64
    )
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (96, 6, 3, 64)
    config.hidden_size = 192
    assert config.n_embd == 192
    assert (config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings) == (
        6,
        3,
        64,
    )


def test_a_config_survives_the_disk(tmp_path):
    config = GPTScratchConfig.preset("tiny", eos_token_id=[7, 8], attn_pdrop=0.1)
    config.save_pretrained(tmp_path)
    loaded = GPTScratchConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {
        **config.to_dict(),
        "transformers_version": loaded.to_dict()["transformers_version"],
    }
    assert loaded.auto_map["AutoModelForCausalLM"].endswith("GPTScratchForCausalLM")


# Tied parameters counted once. The paper's table prints 117M, 345M, 762M and 1542M; these are the counts of
# the weights that were published.
@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-350m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
    ],
)
def test_parameter_counts_match_the_published_models(preset, parameters):
    with torch.device("meta"):
        model = GPTScratchForCausalLM(GPTScratchConfig.preset(preset))
    assert model.num_parameters() == parameters


def test_every_preset_takes_overrides_and_an_unknown_one_lists_the_known():
    for preset in PRESETS:
        assert GPTScratchConfig.preset(preset, resid_pdrop=0.1).resid_pdrop == 0.1
    with pytest.raises(ValueError, match="gpt2-124m"):
        GPTScratchConfig.preset("gpt5")


def test_a_small_preset_has_its_end_token_inside_its_vocabulary():
    config = GPTScratchConfig.preset("tiny", vocab_size=300)
    assert config.eos_token_id == config.bos_token_id == 299
