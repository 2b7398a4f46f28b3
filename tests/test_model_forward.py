"""The forward pass: attention implementations, masks, packed documents, recorded outputs, initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_gpt_scratch import (
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
)
from modeling_gpt_scratch.modeling_gpt_scratch import CACHE

# Runs on the CPU; FlashAttention needs a GPU.
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
# FlexAttention has no backward pass on the CPU.
forward_only = torch.no_grad()
# One float32 product in another order, through two layers: logits are of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make(attention="sdpa", **overrides):
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", **overrides)
    # At initialisation attention is nearly uniform; larger weights let a leak between tokens show.
    config.initializer_range = 0.1
    model = GPTScratchForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def ids(rows, tokens, seed=0):
    return torch.randint(0, 511, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@forward_only
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_every_implementation_gives_the_eager_logits(attention):
    input_ids = ids(2, 40)
    expected = make("eager")(input_ids).logits
    torch.testing.assert_close(make(attention)(input_ids).logits, expected, **TOLERANCE)


@forward_only
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_token_sees_nothing_after_itself(attention):
    model, input_ids = make(attention), ids(1, 30)
    changed = input_ids.clone()
    changed[0, 20:] = ids(1, 10, seed=1)
    torch.testing.assert_close(model(input_ids).logits[:, :20], model(changed).logits[:, :20], **TOLERANCE)


@forward_only
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_left_padded_rows_equal_unpadded_ones(attention):
    model, text = make(attention), ids(1, 12)
    padded = F.pad(text, (5, 0), value=0)
    mask = (torch.arange(17) >= 5).long().unsqueeze(0)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 5:]
    torch.testing.assert_close(logits, model(text).logits, **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_four_dimensional_mask_is_taken_as_it_is(attention):
    model, input_ids = make(attention), ids(2, 10)
    allowed = torch.ones(10, 10, dtype=torch.bool).tril()
    allowed[5:, :5] = False  # tokens 5… see nothing of tokens 0–4
    if attention == "eager":
        mask = torch.zeros(2, 1, 10, 10).masked_fill(~allowed, torch.finfo(torch.float32).min)
    else:
        mask = allowed.expand(2, 1, 10, 10)
    position_ids = torch.arange(10).unsqueeze(0)
    logits = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
    alone = model(input_ids[:, 5:], position_ids=position_ids[:, 5:]).logits
    torch.testing.assert_close(logits[:, 5:], alone, **TOLERANCE)


@forward_only
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_packed_documents_do_not_see_one_another_with_default_arguments(attention, train):
    """A cache made by default hid the restarting positions, and document 2 read document 1."""
    model = make(attention).train(train)
    first, second = ids(2, 9), ids(2, 14, seed=1)
    position_ids = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    packed = model(torch.cat([first, second], dim=1), position_ids=position_ids).logits
    torch.testing.assert_close(packed[:, :9], model(first).logits, **TOLERANCE)
    torch.testing.assert_close(packed[:, 9:], model(second).logits, **TOLERANCE)


def test_packed_documents_stay_apart_in_a_compiled_step():
    model = make(n_layer=1).train()
    first, second = ids(2, 9), ids(2, 14, seed=1)
    position_ids = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packed = compiled(torch.cat([first, second], dim=1), position_ids=position_ids).logits
    torch.testing.assert_close(packed[:, 9:], model(second).logits, **TOLERANCE)


def test_packed_documents_longer_together_than_n_positions_are_fine():
    model = make().train()
    position_ids = torch.arange(100).repeat(2).unsqueeze(0)
    assert model(ids(1, 200), position_ids=position_ids).logits.shape == (1, 200, 512)


def record_attention_arguments(model, name, *args, **kwargs):
    """What an attention function registered under `name` is handed by each layer."""
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, attention_mask, **arguments):
        calls.append({"mask": attention_mask, "layer": module.layer_idx, **arguments})
        return sdpa(module, query, key, value, attention_mask, scaling=arguments["scaling"])

    ALL_ATTENTION_FUNCTIONS.register(name, spy)
    model.config._attn_implementation = name
    model(*args, **kwargs)
    return calls


def test_position_ids_and_further_arguments_reach_the_attention_function():
    position_ids = torch.arange(8).unsqueeze(0)
    calls = record_attention_arguments(make(), "spy", ids(1, 8), position_ids=position_ids, from_the_caller=7)
    assert [call["layer"] for call in calls] == [0, 1]
    for call in calls:
        assert call["from_the_caller"] == 7 and torch.equal(call["position_ids"], position_ids)
        assert call["dropout"] == 0.0 and call["scaling"] == 16**-0.5


def test_flash_attention_is_told_where_packed_documents_begin_in_a_batch_of_several_rows():
    """By itself transformers looks at restarting positions only in a batch of one."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    calls = record_attention_arguments(make(), "spy_flash", ids(2, 8), position_ids=position_ids)
    for call in calls:
        assert call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == [0, 3, 8, 16]
        assert call["max_length_q"] == call["max_length_k"] == 8


def test_a_servers_own_division_into_requests_is_left_as_it_is():
    """Continuous batching decodes several requests in a row: positions jump, and it knows whose each is."""
    position_ids = torch.tensor([[57, 12, 33]])
    lengths = torch.tensor([0, 58, 71, 105], dtype=torch.int32)
    calls = record_attention_arguments(
        make(),
        "spy_flash",
        ids(1, 3),
        position_ids=position_ids,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
    )
    assert all(call["cu_seq_lens_k"] is lengths for call in calls)


def test_compiled_training_reaches_sdpa_causal_and_without_a_mask():
    seen = []

    def backend(graph, example_inputs):
        for node in graph.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                seen.append((node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")))
        return graph.forward

    model, input_ids = make().train(), ids(2, 16)
    torch.compile(model, backend=backend, fullgraph=True)(input_ids, labels=input_ids)
    assert seen == [(None, True)] * 2


def test_hidden_states_and_attentions_are_returned_on_request():
    model, input_ids = make("eager"), ids(2, 10)
    out = model(input_ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (2, 10, 64)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 4, 10, 10)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 10))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    as_tuple = model(input_ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], out.logits)


def test_set_attn_implementation_takes_effect_and_an_unknown_name_is_refused():
    model = make("sdpa")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="no_such_attention"):
        GPTScratchModel._from_config(model.config, attn_implementation="no_such_attention")


def test_ids_and_embeddings_are_alternatives():
    model, input_ids = make(), ids(2, 6)
    embeddings = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_n_positions_tokens_work_and_one_more_is_a_clear_error():
    model = make()
    assert model(ids(1, 128)).logits.shape == (1, 128, 512)
    with pytest.raises(ValueError, match=r"129 tokens.*n_positions=128"):
        model(ids(1, 129))
    cache = model(ids(1, 100)).past_key_values
    with pytest.raises(ValueError, match=r"100 in the cache, 29 new"):
        model(ids(1, 29), past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_ids reach 128"):
        model(ids(1, 2), position_ids=torch.tensor([[127, 128]]))


def test_continuing_from_a_cache_equals_one_pass():
    model, input_ids = make(), ids(2, 20)
    whole = model(input_ids).logits
    first = model(input_ids[:, :12])
    second = model(input_ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, **TOLERANCE)


def test_a_cache_is_taken_by_the_name_of_this_transformers_and_refused_under_a_strange_one():
    """5.24 renamed past_key_values; the new name was swallowed, and generation went on without a cache."""
    model, input_ids = make(), ids(2, 20)
    first = model.transformer(input_ids[:, :12])
    second = model.transformer(input_ids[:, 12:], **{CACHE: first[CACHE]})
    states = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    torch.testing.assert_close(states, model.transformer(input_ids).last_hidden_state, **TOLERANCE)
    with pytest.raises(TypeError, match=r"past_of_tomorrow: .* are taken as past_key_values"):
        model(input_ids[:, :1], past_of_tomorrow=second[CACHE])


def test_training_mode_makes_no_cache_but_takes_one_that_it_is_given():
    model, input_ids = make().train(), ids(1, 8)
    assert model(input_ids).past_key_values is None
    cache = model.eval()(input_ids[:, :4]).past_key_values
    assert model.train()(input_ids[:, 4:], past_key_values=cache).past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_memory_and_not_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, input_ids = make(resid_pdrop=0.1).train(), ids(2, 16)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_dropout_acts_in_training_mode_only():
    model, input_ids = make(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), ids(1, 8)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_residual_projections_start_smaller_by_the_square_root_of_their_number():
    """transformers skips parents without parameters of their own, so a rule on the block would never run."""
    config = GPTScratchConfig.preset("tiny", n_layer=8, n_embd=128)
    model = GPTScratchForCausalLM(config)
    for block in model.transformer.h:
        for module, std in (
            (block.attn.q_proj, 0.02),
            (block.mlp.c_fc, 0.02),
            (block.attn.o_proj, 0.02 / math.sqrt(16)),
            (block.mlp.c_proj, 0.02 / math.sqrt(16)),
        ):
            # The deviation of n normal draws is known to about 1 / sqrt(2 n); n is 16,384 or more.
            assert module.weight.std().item() == pytest.approx(std, rel=0.05)
            assert module.bias.abs().max() == 0
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.loss_type == "ForCausalLM" and model.can_generate()


def test_no_buffers_that_a_load_could_fill_with_garbage():
    assert list(make().named_buffers()) == []


def test_the_vocabulary_resizes_and_stays_tied():
    model, input_ids = make(), ids(1, 8)
    before = model(input_ids).logits
    model.resize_token_embeddings(513, pad_to_multiple_of=64)
    assert model.config.vocab_size == model.lm_head.out_features == 576
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model(input_ids).logits[..., :512], before)
    model.resize_token_embeddings(512)
    assert torch.equal(model(input_ids).logits, before)


def test_classification_heads_take_a_step():
    config = GPTScratchConfig.preset("tiny", num_labels=3, pad_token_id=0)
    input_ids = ids(4, 10)
    sequence = GPTScratchForSequenceClassification(config)
    out = sequence(input_ids, labels=torch.tensor([0, 1, 2, 0]))
    assert out.logits.shape == (4, 3)
    out.loss.backward()
    token = GPTScratchForTokenClassification(config)
    out = token(input_ids, labels=input_ids % 3)
    assert out.logits.shape == (4, 10, 3)
    out.loss.backward()
    assert token.transformer.wte.weight.grad.abs().sum() > 0
