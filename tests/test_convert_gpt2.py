"""Conversion to and from transformers' GPT-2: exact in both directions, and it says what it cannot do."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch.convert_gpt2 import (
    from_gpt2,
    load_gpt2,
    main,
    to_gpt2,
    weights_from_gpt2,
    weights_to_gpt2,
)

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = 61

SHAPES = {
    "one head": {"n_layer": 1, "n_head": 1, "n_embd": 8},
    "several heads": {"n_layer": 2, "n_head": 4, "n_embd": 32},
    "odd sizes": {"n_layer": 3, "n_head": 3, "n_embd": 21, "n_inner": 40},
    "untied": {"n_layer": 2, "n_head": 2, "n_embd": 16, "tie_word_embeddings": False},
}
# Sums of a few hundred float32 products, in another order (x @ w against x @ w.T and fused q, k, v).
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def stock_config(**overrides):
    fields = {"n_layer": 2, "n_head": 2, "n_embd": 16, **overrides}
    return GPT2Config(vocab_size=VOCABULARY, n_positions=24, bos_token_id=60, eos_token_id=60, **fields)


def randomise(model):
    """Every parameter away from its initial value: zero biases would hide a swap of q, k and v."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def stock_model(**overrides):
    return randomise(GPT2LMHeadModel(stock_config(**overrides))).eval()


def our_model(**overrides):
    fields = {"n_layer": 2, "n_head": 2, "n_embd": 16, **overrides}
    config = GPTScratchConfig(
        vocab_size=VOCABULARY, n_positions=24, bos_token_id=60, eos_token_id=60, **fields
    )
    return randomise(GPTScratchForCausalLM(config)).eval()


def batch(padding):
    """Three rows of 15 tokens; the first two lose 4 and 9 of them to padding on the given side."""
    input_ids = torch.randint(0, 60, (3, 15), generator=torch.Generator().manual_seed(2))
    if padding is None:
        return {"input_ids": input_ids, "labels": input_ids}
    attention_mask = torch.ones_like(input_ids)
    for row, padded in enumerate((4, 9)):
        where = slice(0, padded) if padding == "left" else slice(15 - padded, 15)
        attention_mask[row, where] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }


def pair(direction, **shape):
    """(stock, ours), the second made from the first or the first from the second."""
    if direction == "from_gpt2":
        stock = stock_model(**shape)
        return stock, from_gpt2(stock)
    ours = our_model(**shape)
    return to_gpt2(ours), ours


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("direction", ["from_gpt2", "to_gpt2"])
def test_logits_loss_and_gradients_are_the_same(direction, shape, padding):
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    stock, ours = pair(direction, **shape, **no_dropout)
    inputs = batch(padding)
    expected, found = stock(**inputs), ours(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)

    # In training mode ours takes the loss that builds no logits.
    expected, found = stock.train()(**inputs), ours.train()(**inputs)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)
    expected.loss.backward()
    found.loss.backward()
    stock_gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    our_gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(our_gradients, weights_from_gpt2(stock_gradients), **TOLERANCE)
    torch.testing.assert_close(weights_to_gpt2(our_gradients), stock_gradients, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_there_and_back_gives_the_same_bits(shape):
    stock, ours = stock_model(**shape), our_model(**shape)
    torch.testing.assert_close(to_gpt2(from_gpt2(stock)).state_dict(), stock.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(from_gpt2(to_gpt2(ours)).state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_both_generate_the_same_tokens_from_padded_prompts():
    stock, ours = pair("from_gpt2")
    inputs = batch("left")
    del inputs["labels"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 60, "eos_token_id": None}
    torch.testing.assert_close(ours.generate(**inputs, **settings), stock.generate(**inputs, **settings))


def test_the_configuration_goes_both_ways():
    given = {
        "n_inner": 48,
        "resid_pdrop": 0.25,
        "embd_pdrop": 0.125,
        "attn_pdrop": 0.5,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.05,
        "pad_token_id": 59,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    stock = stock_model(**given)
    ours = from_gpt2(stock)
    assert {name: getattr(ours.config, name) for name in given} == given
    back = to_gpt2(ours).config.to_dict()
    expected = stock.config.to_dict()
    assert back.pop("n_ctx") == 24  # what llama.cpp's converter reads
    for made_on_saving in ("architectures", "dtype"):
        back.pop(made_on_saving), expected.pop(made_on_saving)
    assert back == expected


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_every_name_of_the_tanh_gelu_is_the_same_function(activation):
    stock = stock_model(activation_function=activation)
    input_ids = batch(None)["input_ids"]
    torch.testing.assert_close(from_gpt2(stock)(input_ids).logits, stock(input_ids).logits, **TOLERANCE)


def test_the_generation_configuration_comes_along():
    stock = stock_model()
    stock.generation_config.update(temperature=0.7, do_sample=True, suppress_tokens=[3, 4])
    ours = from_gpt2(stock)
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    assert to_gpt2(ours).generation_config.to_dict() == stock.generation_config.to_dict()
    assert ours.generation_config is not stock.generation_config


def test_data_types_and_the_train_mode_are_kept():
    stock = stock_model().to(torch.bfloat16)
    stock.transformer.ln_f.float()
    ours = from_gpt2(stock)
    assert ours.transformer.h[0].attn.k_proj.weight.dtype == torch.bfloat16
    assert ours.transformer.ln_f.weight.dtype == torch.float32
    assert ours.config.dtype == torch.bfloat16
    assert not ours.training and from_gpt2(stock.train()).training
    torch.testing.assert_close(to_gpt2(ours).state_dict(), stock.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["from_gpt2", "to_gpt2"])
def test_the_two_models_share_no_memory(direction):
    source, converted = pair(direction)
    if direction == "to_gpt2":
        source, converted = converted, source
    before = copy.deepcopy(converted.state_dict())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    torch.testing.assert_close(converted.state_dict(), before, rtol=0, atol=0)


def test_tied_embeddings_stay_one_tensor_and_random_numbers_stay_unused():
    stock = stock_model()
    before = torch.get_rng_state()
    ours = from_gpt2(stock)
    back = to_gpt2(ours)
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert back.lm_head.weight is back.transformer.wte.weight


def test_all_unsupported_options_are_named_at_once():
    wanted = {
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "add_cross_attention": True,
    }
    with pytest.raises(ValueError) as error:
        from_gpt2(stock_model(**wanted))
    assert all(name in str(error.value) for name in wanted)


def test_only_language_models_are_converted():
    with pytest.raises(TypeError, match="needs a GPT2LMHeadModel, got a GPT2Model"):
        from_gpt2(GPT2Model(stock_config()))
    with pytest.raises(TypeError, match="needs a GPTScratchForCausalLM, got a GPT2LMHeadModel"):
        to_gpt2(stock_model())


def test_a_model_wrapped_in_adapters_is_refused_with_what_to_do():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(our_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="merge its adapters first"):
        to_gpt2(model)


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        stock = GPT2LMHeadModel(stock_config())
    with pytest.raises(ValueError, match="not in memory"):
        from_gpt2(stock)


def test_a_folder_or_a_model_is_loaded(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    for source in (str(tmp_path), tmp_path, stock):
        ours = GPTScratchForCausalLM.from_gpt2(source)
        torch.testing.assert_close(ours.state_dict(), from_gpt2(stock).state_dict(), rtol=0, atol=0)


def test_a_base_model_checkpoint_is_loaded_too(tmp_path):
    """The published `gpt2` was saved without the prefix `transformer.`, as a GPT2Model is."""
    stock = stock_model()
    stock.transformer.save_pretrained(tmp_path)
    torch.testing.assert_close(
        load_gpt2(tmp_path).state_dict(), from_gpt2(stock).state_dict(), rtol=0, atol=0
    )


def test_loading_takes_the_arguments_of_from_pretrained(tmp_path):
    stock_model().save_pretrained(tmp_path)
    ours = load_gpt2(tmp_path, dtype=torch.bfloat16, resid_pdrop=0.0, attn_implementation="flex_attention")
    assert ours.dtype == torch.bfloat16
    assert ours.config.resid_pdrop == 0.0
    assert ours.config._attn_implementation == "flex_attention"
    with pytest.raises(ValueError, match="dtype: only for loading by name"):
        load_gpt2(stock_model(), dtype=torch.bfloat16)


def test_missing_weights_are_an_error_and_not_random_numbers(tmp_path):
    stock_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_gpt2(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_gpt2(tmp_path)


def test_other_models_and_empty_folders_are_refused(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="a model of type 'llama'; this needs 'gpt2'"):
        load_gpt2(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_gpt2(tmp_path / "empty")


@pytest.fixture
def stock_folder(tmp_path):
    folder = tmp_path / "stock"
    stock_model(n_embd=8).save_pretrained(folder)
    texts = ["the dragon sleeps under the hall", "a torch burns in the corridor"] * 20
    train_tokenizer(texts, 280).save_pretrained(folder)
    return folder


def test_the_command_converts_a_folder_there_and_back_with_its_tokenizer(stock_folder, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "new" / "back"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "modeling_gpt_scratch.convert_gpt2"]
    done = subprocess.run(
        [*command, "--from_gpt2", stock_folder, ours], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {ours}" in done.stdout
    main(["--to_gpt2", str(ours), str(back)])

    input_ids = batch(None)["input_ids"]
    stock = GPT2LMHeadModel.from_pretrained(stock_folder)
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert type(loaded) is GPTScratchForCausalLM
    torch.testing.assert_close(loaded(input_ids).logits, stock(input_ids).logits, **TOLERANCE)
    again = AutoModelForCausalLM.from_pretrained(back)
    assert type(again) is GPT2LMHeadModel
    torch.testing.assert_close(again.state_dict(), stock.state_dict(), rtol=0, atol=0)

    text = "the torch burns"
    expected = AutoTokenizer.from_pretrained(stock_folder)(text)["input_ids"]
    for folder in (ours, back):
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text)["input_ids"] == expected
    # A checkpoint of ours brings its code; a stock one must not ask for any.
    assert (ours / "modeling_gpt_scratch.py").exists()
    assert "auto_map" not in json.loads((back / "config.json").read_text())


def test_the_command_overwrites_nothing(stock_folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not an empty folder"):
        main(["--from_gpt2", str(stock_folder), str(taken)])
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_the_command_says_when_there_is_no_tokenizer(tmp_path, capsys):
    stock_model(n_embd=8).save_pretrained(tmp_path / "stock")
    main(["--from_gpt2", str(tmp_path / "stock"), str(tmp_path / "ours")])
    main(["--to_gpt2", str(tmp_path / "ours"), str(tmp_path / "back")])
    messages = capsys.readouterr().err
    for source, output in (("stock", "ours"), ("ours", "back")):
        assert f"no tokenizer at {tmp_path / source}, so {tmp_path / output} gets none" in messages
        assert (tmp_path / output / "model.safetensors").exists()
        assert not (tmp_path / output / "tokenizer_config.json").exists()


def test_the_command_refuses_the_wrong_direction(stock_folder, tmp_path):
    with pytest.raises(SystemExit, match="a model of type 'gpt2'; this needs 'gpt_scratch'"):
        main(["--to_gpt2", str(stock_folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
