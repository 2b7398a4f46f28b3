"""Generation through transformers' own `generate` and `pipeline`, with every strategy people use."""

import shutil
import warnings

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # No end token: every generation runs to its length, so that lengths can be compared.
    config = GPTScratchConfig.preset("tiny", initializer_range=0.2, eos_token_id=None, bos_token_id=None)
    model = GPTScratchForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def tokenizer():
    text = (
        "The crypt door groans open. A lantern gutters over wet stone, and something below counts your steps."
    )
    tokenizer = train_tokenizer([text] * 20, vocab_size=300)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"  # as an export has them
    return tokenizer


def greedy(model, prompt=PROMPT, n=12, **kwargs):
    return model.generate(prompt, do_sample=False, max_new_tokens=n, **kwargs)


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens, each from a whole forward pass without a cache."""
    tokens = PROMPT
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda arguments: ", ".join(f"{k}={v}" for k, v in arguments.items()),
)
def test_every_cache_gives_the_tokens_of_no_cache(model, expected, arguments):
    assert torch.equal(greedy(model, **arguments), expected)


def test_generation_from_embeddings_gives_the_same_tokens(model, expected):
    embeddings = model.get_input_embeddings()(PROMPT)
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=12), expected[:, 5:]
    )


def test_an_assistant_changes_the_speed_and_not_the_tokens(model, expected):
    torch.manual_seed(1)
    assistant = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", n_layer=1, eos_token_id=None)).eval()
    assistant.generation_config.pad_token_id = 0
    assert torch.equal(greedy(model, assistant_model=assistant), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")),
    reason="torch.compile for the CPU needs a C++ compiler, and this machine has none",
)
def test_compiled_decoding_with_a_static_cache_gives_the_tokens_of_no_cache(model, expected):
    compiled = GPTScratchForCausalLM(model.config).eval()
    compiled.load_state_dict(model.state_dict())
    compiled.generation_config.pad_token_id = 0
    compiled.forward = torch.compile(compiled.forward, fullgraph=True)
    assert torch.equal(greedy(compiled, cache_implementation="static"), expected)


@pytest.mark.slow
def test_continuous_batching_gives_each_prompt_its_greedy_tokens(model, expected):
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
    prompts = [PROMPT[0].tolist(), [11, 12, 13], [20] * 17]
    results = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    generated = {tuple(r.prompt_ids): r.generated_tokens for r in results.values()}
    for prompt in prompts:
        alone = greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()
        assert generated[tuple(prompt)] == alone
    assert generated[tuple(prompts[0])] == expected[0, 5:].tolist()


def test_continuous_batching_ends_or_is_refused_before_the_last_position(model):
    """One request that was too long used to end all the others with an error of its own."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    n_positions = model.config.n_positions
    with pytest.raises(ValueError, match=f"prompt of {n_positions - 2} tokens and max_new_tokens=3 "):
        model.generate_batch([[5, 6], [7] * (n_positions - 2)], config, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"n_positions={n_positions}"):
        model.generate_batch([[7] * n_positions], config)
    prompts = [[5, 6], [7] * (n_positions - 2)]
    results = model.generate_batch(prompts, config, progress_bar=False)
    assert [len(result.generated_tokens) for result in results.values()] == [2, 2]


def test_left_padded_prompts_continue_as_each_does_alone(model):
    prompts = [[5, 6, 7, 8, 9], [30, 31], [40, 41, 42]]
    longest = max(map(len, prompts))
    batch = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    together = greedy(model, batch, attention_mask=mask)[:, longest:]
    for row, prompt in zip(together, prompts, strict=True):
        assert row.tolist() == greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"guidance_scale": 1.5, "do_sample": False},
        {"repetition_penalty": 1.3, "do_sample": False},
    ],
    ids=str,
)
def test_every_strategy_runs_to_its_length(model, arguments):
    torch.manual_seed(0)
    out = model.generate(PROMPT, max_new_tokens=6, **arguments)
    assert out.shape == (arguments.get("num_return_sequences", 1), 11)
    assert (out >= 0).all() and (out < 512).all()


def test_top_k_of_one_is_greedy_and_beams_never_score_below_greedy(model, expected):
    assert torch.equal(model.generate(PROMPT, do_sample=True, top_k=1, max_new_tokens=12), expected)

    def log_probability(tokens):
        log_probs = model(tokens).logits[:, :-1].log_softmax(-1)
        return log_probs.gather(2, tokens[:, 1:, None])[:, 4:].sum()

    beams = model.generate(PROMPT, num_beams=8, do_sample=False, max_new_tokens=2, length_penalty=0.0)
    assert log_probability(beams) >= log_probability(expected[:, :7]) - 1e-4


def test_generation_ends_at_n_positions_and_a_prompt_without_room_is_refused(model):
    almost = torch.full((1, 120), 3)
    assert greedy(model, almost, n=50).shape == (1, 128)
    embeddings = model.get_input_embeddings()(almost)
    assert model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=50).shape == (1, 8)
    assert model.generate(almost, do_sample=False, max_length=500).shape == (1, 128)
    with pytest.raises(ValueError, match=r"128 tokens.*n_positions=128"):
        greedy(model, torch.full((1, 128), 3), n=1)


def small_model_for(tokenizer):
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return GPTScratchForCausalLM(config).eval()


def test_pipeline_takes_one_prompt_and_a_batch(tokenizer):
    generate = pipeline("text-generation", model=small_model_for(tokenizer), tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = generate("The crypt door", max_new_tokens=5, do_sample=False)
        several = generate(["The crypt door", "A lantern"], max_new_tokens=5, do_sample=False, batch_size=2)
        assert one[0]["generated_text"].startswith("The crypt door")
        assert several[0] == one and several[1][0]["generated_text"].startswith("A lantern")
        # Its default of 256 new tokens is more than this model's 128 positions.
        assert generate("The crypt door")[0]["generated_text"]


def test_streaming_yields_the_text_that_generate_returns(tokenizer):
    model = small_model_for(tokenizer)
    inputs = tokenizer("The crypt", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=False, skip_special_tokens=False, timeout=60)
    out = model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=8)
    assert "".join(streamer) == tokenizer.decode(out[0])
