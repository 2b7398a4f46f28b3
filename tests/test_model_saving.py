"""Checkpoints: what is in the folder, who can open it, and that no weight is lost or invented on the way."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from data.tokenizer import train_tokenizer
from modeling_gpt_scratch import (
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchModel,
)

TEXT = "The crypt door groans open. A lantern gutters over wet stone, and something below counts your steps."


def make(**overrides):
    torch.manual_seed(0)
    return GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", **overrides)).eval()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with everything that ours carry."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)
    model = make(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_elsewhere(code, cwd, *arguments):
    """Run Python in another process and folder, without our repository, offline, with an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    # The editable install would put our package on the path: a finder that refuses it stands for its absence.
    refuse = """
        import importlib.abc, sys
        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0].endswith("_gpt_scratch"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Refuse())
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(refuse) + textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_folder_holds_config_weights_tokenizer_and_the_code_files(folder):
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_gpt_scratch.py",
        "modeling_gpt_scratch.py",
        "kernels_gpt_scratch.py",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert "__init__.py" not in names
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_gpt_scratch.GPTScratchModel"


def test_checkpoint_loads_in_a_fresh_process_without_our_repository(folder, tmp_path):
    code = """
        import sys, torch
        from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline,
                                  AutoModelForSequenceClassification, AutoModelForTokenClassification)
        folder = sys.argv[1]
        trusted = dict(trust_remote_code=True)
        assert type(AutoConfig.from_pretrained(folder, **trusted)).__name__ == "GPTScratchConfig"
        for auto, name in ((AutoModel, "GPTScratchModel"), (AutoModelForCausalLM, "GPTScratchForCausalLM"),
                           (AutoModelForSequenceClassification, "GPTScratchForSequenceClassification"),
                           (AutoModelForTokenClassification, "GPTScratchForTokenClassification")):
            model = auto.from_pretrained(folder, **trusted)
            assert type(model).__name__ == name and type(model).__module__.startswith("transformers_modules")
        tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
        model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
        print("LOGIT", model(**tokenizer("The crypt", return_tensors="pt")).logits.double().sum().item())
        model.save_pretrained("again")
        tokenizer.save_pretrained("again")
        generate = pipeline("text-generation", model="again", trust_remote_code=True)
        print("TEXT", generate("The crypt", max_new_tokens=5, do_sample=False)[0]["generated_text"])
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error)
            print("REFUSED")
    """
    result = run_elsewhere(code, tmp_path, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    tokenizer = train_tokenizer([TEXT] * 20, vocab_size=300)
    here = GPTScratchForCausalLM.from_pretrained(folder)
    logit = here(**tokenizer("The crypt", return_tensors="pt")).logits.double().sum().item()
    assert float(result.stdout.split("LOGIT")[1].split()[0]) == pytest.approx(logit, abs=1e-4)
    assert "TEXT The crypt" in result.stdout and "REFUSED" in result.stdout
    # What remote code saves is again complete.
    assert (tmp_path / "again" / "modeling_gpt_scratch.py").exists()


def test_two_checkpoints_with_different_code_keep_their_own_in_one_process(folder, tmp_path):
    """A checkpoint's code that registered itself would serve the next checkpoint as well."""
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    code_file = other / "modeling_gpt_scratch.py"
    code_file.write_text(code_file.read_text() + "\nGPTScratchForCausalLM.mark = 'other'\n")
    code = """
        import sys
        from transformers import AutoModelForCausalLM
        marks = [getattr(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True), "mark", "first")
                 for path in (sys.argv[1], sys.argv[2], sys.argv[1])]
        print(marks)
    """
    result = run_elsewhere(code, tmp_path, folder, other)
    assert result.stdout.strip() == "['first', 'other', 'first']", result.stderr[-2000:]


def test_the_two_files_import_flat_from_one_folder(folder, tmp_path):
    code = """
        import sys
        sys.meta_path.pop(0)
        sys.path.insert(0, sys.argv[1])
        import modeling_gpt_scratch
        print(modeling_gpt_scratch.GPTScratchForCausalLM.from_pretrained(sys.argv[1]).num_parameters())
    """
    result = run_elsewhere(code, tmp_path, folder)
    assert result.stdout.strip().isdigit(), result.stderr[-2000:]


@pytest.mark.parametrize("trust", [None, False, True])
def test_our_installed_classes_win_over_remote_code(folder, trust):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is GPTScratchForCausalLM
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is GPTScratchModel
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is GPTScratchConfig
    assert (
        type(AutoModelForSequenceClassification.from_pretrained(folder))
        is GPTScratchForSequenceClassification
    )


def test_tied_weights_are_saved_once_and_tied_after_loading(folder):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    model = GPTScratchForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_untied_weights_stay_two(tmp_path):
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert same_weights(model, loaded)


def test_a_file_with_the_head_alone_ties_the_embedding_to_it(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert same_weights(model, loaded)


def test_body_and_causal_model_read_each_others_files(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "causal")
    body, report = GPTScratchModel.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    body.save_pretrained(tmp_path / "body")
    causal, report = GPTScratchForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(model, causal)


def test_a_loaded_weight_is_never_initialised_again(tmp_path):
    """A module with one parameter missing from the file is initialised; its other parameter must survive."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=3.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("transformer.h.0.attn.o_proj.bias", "transformer.h.1.ln_1.bias"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["transformer.h.0.attn.o_proj.bias"].abs().max() == 0


@pytest.mark.parametrize(
    "arguments, dtype",
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": "auto"}, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.float32),
        ({"attn_implementation": "eager"}, torch.float32),
    ],
    ids=str,
)
def test_loading_arguments_are_honoured(folder, arguments, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert model.dtype == dtype and model.device.type == "cpu"
    assert model.config._attn_implementation == arguments.get("attn_implementation", "sdpa")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_bfloat16_checkpoint_loads_as_bfloat16(tmp_path):
    make().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="no_such_attention"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="no_such_attention")
    if not torch.cuda.is_available():
        with pytest.raises(ImportError):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")


def test_a_model_made_on_the_meta_device_initialises_and_ties():
    with torch.device("meta"):
        model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny"))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_compiled_model_saves_the_same_folder(tmp_path):
    model = make()
    torch.compile(model).save_pretrained(tmp_path)
    assert same_weights(model, GPTScratchForCausalLM.from_pretrained(tmp_path))


def test_trimming_a_padded_vocabulary_leaves_the_logits_of_real_tokens_bit_identical(tmp_path):
    model = make(vocab_size=500)
    model.resize_token_embeddings(500, pad_to_multiple_of=64)
    input_ids = torch.arange(20).unsqueeze(0)
    padded = model(input_ids).logits
    model.resize_token_embeddings(500)
    model.save_pretrained(tmp_path)
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 500
    assert torch.equal(loaded(input_ids).logits, padded[..., :500])
