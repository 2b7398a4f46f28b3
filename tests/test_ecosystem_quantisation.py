"""Eight-bit weights from torchao and bitsandbytes, on the CPU: what is quantised, how far the logits move."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from modeling_gpt_scratch.convert_gpt2 import to_gpt2

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = GPTScratchConfig.preset("tiny")
    config.initializer_range = 0.1  # logits of order one, so that a tolerance means something
    GPTScratchForCausalLM(config).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def ids():
    return torch.randint(0, 511, (2, 12), generator=torch.Generator().manual_seed(1))


def projections(model):
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}


def assert_close_to_plain(quantised, folder):
    plain = GPTScratchForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, found = plain(ids()).logits, quantised(ids()).logits.float()
    # Eight bits keep a weight to 1/254 of its row's largest; two blocks add that up to well under 5 %.
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(found, expected)  # it was quantised at all
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert quantised.generate(ids(), **settings).shape == (2, 16)


def test_torchao_quantises_every_projection_and_saves(folder, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = GPTScratchForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    )
    found = projections(model)
    assert len(found) == 12
    # Its tensors stand in for the weight of an ordinary nn.Linear.
    assert {type(module) for module in found.values()} == {nn.Linear}
    assert torch.Tensor not in {type(module.weight.data) for module in found.values()}
    assert type(model.lm_head.weight.data) is torch.Tensor  # tied to the embedding
    assert_close_to_plain(model, folder)

    model.save_pretrained(tmp_path / "quantised")
    again = GPTScratchForCausalLM.from_pretrained(tmp_path / "quantised")
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, model(ids()).logits, rtol=0, atol=0)


def test_bitsandbytes_quantises_every_projection(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = GPTScratchForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    found = projections(model)
    assert len(found) == 12
    assert all(type(module) is bitsandbytes.nn.Linear8bitLt for module in found.values())
    assert type(model.lm_head) is nn.Linear
    assert_close_to_plain(model, folder)
    with pytest.raises(ValueError, match="quantised; load it without quantization_config"):
        to_gpt2(model)


def test_bitsandbytes_keeps_four_bits_of_each_weight(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = GPTScratchForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    )
    assert all(type(module) is bitsandbytes.nn.Linear4bit for module in projections(model).values())
    plain = GPTScratchForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, found = plain(ids()).logits, model(ids()).logits.float()
    # Sixteen levels: each weight is off by about a tenth of its row's spread.
    assert (found - expected).norm() < 0.5 * expected.norm()
