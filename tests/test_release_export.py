"""An export in other formats, each read back by the program that it is for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from data.tokenizer import gpt2_tokenizer, train_tokenizer
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from release.card import main as describe
from release.export import export_gguf, export_stock
from release.export import main as export
from release.folder import ReleaseError
from release.verify import main as verify_main
from release.verify import relative_difference, verify
from tests.hub_server import card_problems
from tests.test_release_card import write_record

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["The bell in the crypt is cracked and the rope is wet.", "Water slides over the sluice wheel."] * 20


def write_export(folder, padding=0, **overrides):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    rows = len(tokenizer) + padding
    config = GPTScratchConfig.preset("tiny", vocab_size=rows, **ids, **overrides)
    config.initializer_range = 0.1  # logits of order one, so that a tolerance means something
    GPTScratchForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_export(tmp_path / "export")


def logits_of(model):
    ids = torch.randint(0, 299, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def test_the_stock_folder_needs_no_code_of_ours(folder, tmp_path):
    export([str(folder), "--stock", str(tmp_path / "stock")])
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert not [name for name in names if name.endswith(".py")]
    assert {"model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "auto_map" not in config
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock) is GPT2LMHeadModel
    ours = GPTScratchForCausalLM.from_pretrained(folder)
    # The same sums in float32, in another order.
    torch.testing.assert_close(logits_of(stock), logits_of(ours), rtol=0, atol=1e-5)
    chat = [{"role": "user", "content": "The bell"}, {"role": "assistant", "content": "is cracked"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "The bell\nis cracked"


@pytest.fixture
def run(tmp_path):
    """A finished run with the card of its export."""
    write_export(tmp_path / "crypt" / "export")
    write_record(tmp_path / "crypt")
    describe([str(tmp_path / "crypt"), "--license", "mit", "--language", "en"])
    return tmp_path / "crypt"


def card_of_a_form(run, flags, output):
    export([str(run / "export"), *flags, str(output)])
    assert (output / "loss.png").read_bytes() == (run / "loss.png").read_bytes()
    card = (output / "README.md").read_text()
    assert card_problems(card) == [] and "![Training and validation loss](loss.png)" in card
    assert "training/settings.yaml" not in card  # what is not beside it
    return card, ModelCard(card).data


def test_the_stock_folders_card_is_of_the_stock_folder(run, tmp_path):
    """It used to be the export's, which told of code files and a tag that were not there."""
    card, data = card_of_a_form(run, ["--stock"], tmp_path / "crypt-stock")
    for gone in ("trust_remote_code", "three files of PyTorch", "custom_code"):
        assert gone not in card
    assert 'model="crypt-stock")' in card and "GPT2LMHeadModel" in card and "# crypt-stock\n" in card
    assert (data.license, data.language) == ("mit", "en")
    whole = ModelCard.load(run / "export" / "README.md").data
    assert data.eval_results == whole.eval_results  # the same numbers: the logits are equal


@pytest.mark.parametrize("kind, bits", [("int8", "eight"), ("int4", "four")])
def test_a_quantised_folders_card_claims_no_result_of_the_unquantised_model(run, tmp_path, kind, bits):
    pytest.importorskip("torchao", reason="torchao is not installed")
    card, data = card_of_a_form(run, ["--torchao", kind], tmp_path / kind)
    assert data.eval_results is None and "model-index" not in card and data.license == "mit"
    assert f"{bits}-bit weights, rounded by torchao" in card and "pip install torchao" in card
    assert "## Results before quantising" in card and "## Samples before quantising" in card
    parameters = GPTScratchForCausalLM.from_pretrained(run / "export").num_parameters()
    assert f"{parameters:,} parameters" in card and f'model="{kind}", trust_remote_code=True' in card


def test_a_card_that_a_person_wrote_goes_along_as_it_is(run, tmp_path):
    words = '# Mine\npipeline("text-generation", model="x", trust_remote_code=True)\n'
    (run / "export" / "README.md").write_text(words)
    export([str(run / "export"), "--stock", str(tmp_path / "stock")])
    assert (tmp_path / "stock" / "README.md").read_text() == words


@pytest.mark.parametrize("overrides", [{}, {"n_inner": 96}, {"tie_word_embeddings": False}], ids=str)
def test_a_gguf_file_gives_the_same_logits_when_it_is_read_back(tmp_path, overrides):
    pytest.importorskip("gguf", reason="gguf is not installed")
    folder = write_export(tmp_path / "export", **overrides)
    (outcome,) = verify(folder, ["gguf"])
    assert outcome.status == "ok", outcome
    assert outcome.same_tokens == 12


def test_llama_cpp_gives_the_same_logits_and_splits_text_with_gpt2s_vocabulary_alike(tmp_path):
    """Of its kinds of splitting only "gpt-2" cuts the text as GPT-2 does; no kind at all is another one."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, compiled for 20 minutes, is not installed")
    tokenizer = gpt2_tokenizer()
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    config = GPTScratchConfig.preset("tiny", vocab_size=len(tokenizer), **ids)
    GPTScratchForCausalLM(config).save_pretrained(tmp_path / "export")
    tokenizer.save_pretrained(tmp_path / "export")
    (outcome,) = verify(tmp_path / "export", ["llama.cpp"])
    assert outcome.status == "ok", outcome


def test_a_gguf_file_names_the_rows_that_only_pad_the_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    export_gguf(write_export(tmp_path / "checkpoint", padding=20), tmp_path / "crypt.gguf")
    fields = gguf.GGUFReader(tmp_path / "crypt.gguf").fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds.count(gguf.TokenType.UNUSED) == 20
    assert kinds[299] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.tokens"].contents()[300] == "[PAD300]"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 299
    assert fields["gpt2.context_length"].contents() == 128


def test_a_tokenizer_that_llama_cpp_would_take_for_another_is_refused(folder, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 300)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    with pytest.raises(ReleaseError, match="WordLevel after Whitespace, not GPT-2's byte-level BPE"):
        export_gguf(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model.gguf").exists()


@pytest.mark.parametrize("kind, kept", [("int8", 127), ("int4", 7)])
def test_torchao_folders_load_with_quantised_projections(folder, tmp_path, kind, kept):
    pytest.importorskip("torchao", reason="torchao is not installed")
    export([str(folder), "--torchao", kind, str(tmp_path / kind)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    weight = model.transformer.h[0].attn.q_proj.weight.data
    assert type(weight) is not torch.Tensor
    assert int(weight.qdata.abs().max()) in (kept, kept + 1)
    expected = logits_of(GPTScratchForCausalLM.from_pretrained(folder))
    # A weight is kept to half a step: 1/254 of its row's largest, or 1/30 of its group's range, 9% of
    # the norm of normal weights; two blocks add that up to 0.5% and to 22%.
    allowed = {"int8": 0.05, "int4": 0.3}[kind]
    assert 0 < (logits_of(model) - expected).norm() < allowed * expected.norm()


def test_four_bits_want_widths_that_are_made_of_whole_groups(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    folder = write_export(tmp_path / "export", n_embd=48)
    with pytest.raises(SystemExit, match="32 weights of a row share a scale, and rows of 48 do not divide"):
        export([str(folder), "--torchao", "int4", str(tmp_path / "int4")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_nothing_is_overwritten_and_nothing_half_written_stays(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not an empty folder, and nothing is overwritten"):
        export([str(folder), "--stock", str(tmp_path / "mine")])
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"(?s)is not a whole export.*model.safetensors is missing"):
        export([str(folder), "--stock", str(tmp_path / "new")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_exported_says_what_to_do(folder, tmp_path):
    export_stock(folder, tmp_path / "stock")
    with pytest.raises(ReleaseError, match=r"of the type 'gpt2', not gpt_scratch.*--from_gpt2"):
        export_stock(tmp_path / "stock", tmp_path / "again")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ReleaseError, match="an adapter without its base"):
        export_stock(folder, tmp_path / "again")


def test_verify_finds_a_folder_whose_code_computes_something_else(folder, capsys):
    """The reference is this repository's code: a release whose folder carries another must not pass."""
    code = folder / "modeling_gpt_scratch.py"
    changed, count = re.subn(r"self\.ln_f\(", "1.01 * self.ln_f(1.0 * ", code.read_text(), count=1)
    assert count == 1
    code.write_text(changed.replace("1.01 * self.ln_f(1.0 * ", "1.01 * self.ln_f("))
    with pytest.raises(SystemExit, match="remote-code failed"):
        verify_main([str(folder), "--only", "remote-code", "stock"])
    table = capsys.readouterr().out
    assert re.search(r"remote-code +FAILED +1.0e-02 .* more than 1e-06", table)
    assert re.search(r"stock +ok", table)


def test_verify_tells_of_code_that_ends_its_process_without_a_word(folder, capsys):
    code = folder / "modeling_gpt_scratch.py"
    code.write_text(code.read_text() + "\n\nimport os\n\nos._exit(3)\n")
    with pytest.raises(SystemExit, match="remote-code failed"):
        verify_main([str(folder), "--only", "remote-code"])
    assert "RuntimeError: its process ended with the status 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_verify_notices_a_compiler_that_writes_another_text(folder, monkeypatch):
    """The tokens once came from the model as it is, beside logits of the compiled one."""
    plain = GPTScratchForCausalLM.forward

    def forward(self, input_ids=None, **more):
        output = plain(self, input_ids=input_ids, **more)
        if torch.compiler.is_compiling() and input_ids.shape[1] == 1:  # as a miscompiled cache would show
            output.logits = -output.logits
        return output

    (outcome,) = verify(folder, ["compile"])
    assert (outcome.status, outcome.same_tokens) == ("ok", 12)
    monkeypatch.setattr(GPTScratchForCausalLM, "forward", forward)
    torch.compiler.reset()
    (outcome,) = verify(folder, ["compile"])
    assert outcome.status == "FAILED" and "where our model writes" in outcome.note, outcome


@pytest.mark.slow
def test_verify_names_what_is_not_installed_and_how_to_get_it(folder):
    hidden = "import sys; sys.modules.update(dict.fromkeys(['gguf', 'llama_cpp', 'onnxruntime', 'torchao']))"
    program = f"{hidden}; from release.verify import main; main(sys.argv[1:])"
    consumers = ["gguf", "llama.cpp", "onnx", "torchao-int8", "torchao-int4", "stock"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), "--only", *consumers],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, package in (("gguf", "gguf"), ("llama.cpp", "llama-cpp-python"), ("torchao-int8", "torchao")):
        assert re.search(rf"{re.escape(name)} +not installed .*pip install {package}", done.stdout), (
            done.stdout
        )
    assert re.search(r"onnx +not installed .*pip install onnx onnxscript onnxruntime", done.stdout)
    assert re.search(r"stock +ok", done.stdout)


def test_a_difference_is_measured_where_the_words_probabilities_are():
    """A constant added to all words of a position changes nothing; a number that is none changes all."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert relative_difference(logits + 7.0, logits) < 1e-12
    assert relative_difference(1.01 * logits, logits) == pytest.approx(0.01)
    assert not relative_difference(logits * float("nan"), logits) <= 1.0
