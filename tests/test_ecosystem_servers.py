"""What vLLM's and SGLang's Transformers backends ask of a custom model, point by point, held by our class.

Neither runs on this machine; their side is acted out as their documentation and source describe it: vLLM's
docs/models/supported_models.md, "Writing custom models", and SGLang's transformers_fallback.md. What vLLM
does with several requests in one row, and with a pipeline's stages, is in test_ecosystem_parallel.py.
"""

import ast
import inspect
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, GPTScratchModel
from modeling_gpt_scratch.modeling_gpt_scratch import GPTScratchAttention, GPTScratchBlock

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # the same float32 sums in another order
BLOCK_TOKENS = 4  # of a page of the cache below
# What the two backends know to do with a layer; SGLang refuses a plan that has anything else.
STYLES = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", n_layer=3, n_positions=64)
    config.initializer_range = 0.1  # attention far from uniform
    folder = tmp_path_factory.mktemp("served")
    GPTScratchForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_folder_says_where_its_base_model_is(folder):
    """vLLM: config.json must have auto_map.AutoModel; the class found there must be compatible."""
    config = json.loads((folder / "config.json").read_text())
    model_class = get_class_from_dynamic_module(config["auto_map"]["AutoModel"], str(folder))
    assert model_class.__module__.startswith("transformers_modules")
    assert model_class.is_backend_compatible() and model_class._supports_attention_backend
    assert model_class.__name__ == "GPTScratchModel"


def test_every_customisation_is_in_the_base_model(folder):
    """Both build AutoModel and put a head of their own on it; what that computes has to be the model."""
    causal = GPTScratchForCausalLM.from_pretrained(folder).eval()
    input_ids = torch.arange(12).unsqueeze(0)
    states = AutoModel.from_pretrained(folder).eval()(input_ids).last_hidden_state
    torch.testing.assert_close(states @ causal.lm_head.weight.T, causal(input_ids).logits, **TOLERANCE)
    assert type(causal.lm_head) is nn.Linear and causal.lm_head.bias is None


def test_keyword_arguments_are_passed_down_to_the_attention_function():
    for module in (GPTScratchModel, GPTScratchBlock, GPTScratchAttention):
        kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds, module
    source = inspect.getsource(GPTScratchAttention.forward)
    assert "ALL_ATTENTION_FUNCTIONS" in source and "**kwargs" in source


def test_the_config_has_the_names_that_servers_read(folder):
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    assert text is config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (64, 3, 4)
    assert (text.max_position_embeddings, text.vocab_size, text.tie_word_embeddings) == (64, 512, True)
    # Absent, and so taken as: as many keys as queries, no sliding window, no cap, no rotary positions.
    for name in ("num_key_value_heads", "sliding_window", "attn_logit_softcapping", "rope_parameters"):
        assert getattr(text, name, None) is None, name
    assert not hasattr(text, "layer_types")


def test_the_base_model_is_its_own_decoder_with_arguments_that_vllm_can_compile():
    """vLLM marks the second dimension of these three as free before it compiles the decoder's forward."""
    model = GPTScratchModel(GPTScratchConfig.preset("tiny"))
    assert model.get_decoder() is model
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(model.forward).parameters)


def test_plans_put_every_layer_where_it_belongs_when_they_are_read_as_patterns(folder):
    """Both match names by `re.match` of "model." and the plan's key, and place embeddings themselves."""
    model = AutoModel.from_pretrained(folder)
    plan = {f"model.{key}": style for key, style in model.tp_plan.items()}
    found = {}
    for name, module in model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            found[name] = next((style for key, style in plan.items() if re.match(key, name)), None)
    assert len(found) == 3 * 6
    for name, style in found.items():
        assert style == ("rowwise" if name.endswith(("o_proj", "mlp.c_proj")) else "colwise"), name
    assert set(found.values()) <= STYLES
    # The one style beyond those. transformers 5.17 itself puts it into the plan of every tied model.
    others = {key for key, style in model.tp_plan.items() if style not in STYLES}
    assert others <= {"wte", "embed_tokens"}
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    assert lists == ["h"] and "h" in model._pp_plan  # one, which a pipeline's stages share


def test_the_three_projections_can_become_one():
    """vLLM fuses q, k and v if each is called once with the same plain name, and nothing else is."""
    forward = ast.parse(inspect.cleandoc("\n" + inspect.getsource(GPTScratchAttention.forward)))
    layers = {name for name, _ in GPTScratchAttention(GPTScratchConfig.preset("tiny"), 0).named_children()}
    taken = [
        (node.func.attr, ast.unparse(node.args[0]))
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in layers
    ]
    by_input = [name for name, argument in taken if argument == "hidden_states"]
    assert sorted(by_input) == ["k_proj", "q_proj", "v_proj"], taken


class PagedAttention:
    """A layer's cache as servers keep it: pages of BLOCK_TOKENS tokens, a table of pages for each request."""

    def __init__(self, pages, heads, head_dim):
        self.keys = torch.zeros(pages, BLOCK_TOKENS, heads, head_dim)
        self.values = torch.zeros_like(self.keys)

    def forward(self, query, key, value, batch, scaling):
        """All (tokens, heads, head_dim), the new tokens of every request after one another."""
        outputs, begin = [], 0
        for request in batch:
            end = begin + request.new
            places = torch.arange(request.seen, request.seen + request.new)
            pages = torch.tensor(request.pages)
            self.keys[pages[places // BLOCK_TOKENS], places % BLOCK_TOKENS] = key[begin:end]
            self.values[pages[places // BLOCK_TOKENS], places % BLOCK_TOKENS] = value[begin:end]
            total = request.seen + request.new
            keys, values = (kept[pages].flatten(0, 1)[:total] for kept in (self.keys, self.values))
            allowed = torch.arange(total) <= places[:, None]
            q, k, v = (x.transpose(0, 1) for x in (query[begin:end], keys, values))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
            outputs.append(out.transpose(0, 1))
            begin = end
        return torch.cat(outputs)


class Request:
    def __init__(self, pages, tokens):
        self.pages, self.tokens, self.seen, self.new = pages, tokens, 0, 0


def paged(module, query, key, value, attention_mask, scaling=None, attention_instances=None, batch=None, **_):
    """Registered as the servers do. What is `batch` here is SGLang's `forward_batch`."""
    assert attention_mask is None, "the server's kernel knows what may see what"
    assert query.shape[0] == 1 and query.shape[1] == 4  # (1, heads, tokens, head_dim)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention_instances[module.layer_idx].forward(query, key, value, batch, scaling)[None], None


def served_model(folder, implementation):
    with torch.device("meta"):  # weights come later, by name
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = implementation
        model = AutoModel.from_config(config, trust_remote_code=True)
    weights = GPTScratchForCausalLM.from_pretrained(folder).transformer.state_dict()
    model.load_state_dict(weights, assign=True)
    return model.eval()


def test_requests_share_steps_over_a_paged_cache_and_each_gets_what_it_would_alone(folder):
    """Prefill in chunks beside single steps of others, pages out of order, flat position_ids (1, tokens)."""
    AttentionInterface.register("paged_for_test", paged)
    model = served_model(folder, "paged_for_test")
    causal = GPTScratchForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(pages, torch.randint(511, (length,), generator=generator))
        for pages, length in (([7, 2, 5], 11), ([0, 6, 3, 1], 14), ([4], 3))
    ]
    layers = {index: PagedAttention(pages=8, heads=4, head_dim=16) for index in range(3)}
    states = {id(request): [] for request in requests}
    schedule = [(6, 0, 3), (1, 5, 0), (1, 5, 0), (2, 1, 0), (1, 3, 0)]  # new tokens of each request
    for news in schedule:
        batch = []
        for request, new in zip(requests, news, strict=True):
            request.new = new
            if new:
                batch.append(request)
        input_ids = torch.cat([request.tokens[request.seen :][: request.new] for request in batch])
        positions = torch.cat([torch.arange(request.seen, request.seen + request.new) for request in batch])
        with torch.no_grad():
            found = model(
                input_ids=input_ids[None],
                position_ids=positions[None],
                use_cache=False,
                return_dict=False,
                attention_instances=layers,
                batch=batch,
            )[0][0]
        for request, part in zip(batch, found.split([request.new for request in batch]), strict=True):
            states[id(request)].append(part)
            request.seen += request.new
    for request in requests:
        assert request.seen == len(request.tokens)
        with torch.no_grad():
            expected = causal.transformer(request.tokens[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(torch.cat(states[id(request)]), expected, **TOLERANCE)


def test_a_servers_forward_is_one_graph(folder):
    """vLLM compiles the decoder whole; a look at the positions, say, would break the graph in two."""

    def flat(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **_):
        assert attention_mask is None
        return attention_instances[module.layer_idx](query, key, value, scaling), None

    def attend(query, key, value, scaling):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(
            1, 2
        )

    AttentionInterface.register("flat_for_test", flat)
    model = served_model(folder, "flat_for_test")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (9, 5):
        given = {
            "input_ids": torch.arange(tokens)[None],
            "position_ids": torch.arange(tokens)[None],
            "attention_instances": dict.fromkeys(range(3), attend),
        }
        with torch.no_grad():
            found = compiled(**given, use_cache=False, return_dict=False)[0]
            expected = AutoModel.from_pretrained(folder).eval()(given["input_ids"]).last_hidden_state
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_weights_are_found_under_the_names_that_servers_make_of_them(folder):
    """Both turn the checkpoint's prefix into "model."; the head is beside it, and nothing is left over."""
    saved = set(GPTScratchForCausalLM.from_pretrained(folder).state_dict())
    prefix = re.compile(rf"^{GPTScratchModel.base_model_prefix}\.(.+)")
    renamed = {prefix.sub(r"model.\1", name) for name in saved}
    expected = {f"model.{name}" for name in GPTScratchModel.from_pretrained(folder).state_dict()}
    assert renamed == expected | {"lm_head.weight"}
    assert not list(GPTScratchModel.from_pretrained(folder).named_buffers())  # they build without any
