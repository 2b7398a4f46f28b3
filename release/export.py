"""An export in another format: `python -m release.export FOLDER --stock|--onnx|--gguf|--torchao KIND OUT`.

Each starts from the float32 weights of the folder; `python -m release.verify` tries what comes out.
"""

import argparse
import io
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TorchAoConfig
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.utils import logging as transformers_logging

from modeling_gpt_scratch import GPTScratchForCausalLM
from modeling_gpt_scratch.convert_gpt2 import to_gpt2
from release.card import build_card, is_ours, keep_owners_words
from release.folder import (
    ADAPTER_FILES,
    CARD_FILE,
    PICTURE_FILE,
    ReleaseError,
    check_export,
    find_run,
    read_config,
)

ONNX_FILE, GGUF_FILE = "model.onnx", "model.gguf"
ONNX_OPSET = 18
# A language model knows no roles: a conversation is its texts, one below the other. Servers want a template.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
TORCHAO_KINDS = ("int8", "int4")
INT4_GROUP = 32  # weights of a row that share a scale; torchao's smallest


class NotInstalled(ReleaseError):
    """A package of the format is missing; the message says how to get it."""


def load_export(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer; with this package's code, none from the folder runs.

    Raises:
        ReleaseError: if the folder is no whole export of this model.
    """
    check_export(folder)
    if (folder / ADAPTER_FILES[0]).exists():
        raise ReleaseError(
            f"{folder} is an adapter without its base. Fine-tune with --merge true, or merge it with PEFT's "
            "merge_and_unload, and export the whole."
        )
    if (found := read_config(folder).get("model_type")) != "gpt_scratch":
        raise ReleaseError(
            f"{folder} holds a model of the type {found!r}, not gpt_scratch. A stock GPT-2 is converted by "
            "`python -m modeling_gpt_scratch.convert_gpt2 --from_gpt2`."
        )
    model = GPTScratchForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def export_stock(folder: Path, output: Path) -> None:
    """A plain `GPT2LMHeadModel` folder: no code of ours, so `transformers serve`, vLLM and llama.cpp's own
    converter take it as it is. A tokenizer without a chat template gets a plain one, which servers ask for.
    """
    model, tokenizer = load_export(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    with _new_folder(output) as temporary:
        to_gpt2(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _describe(folder, temporary, output)


def export_onnx(folder: Path, output: Path) -> None:
    """A folder with model.onnx, `input_ids` int64 (batch, sequence) → `logits` float32 (batch, sequence,
    vocabulary), both sizes free, without a cache; tokenizer and config beside it. transformers from 5.23 on
    writes the weights into a file of their own, model.onnx.data.

    Raises:
        NotInstalled: without onnx and onnxscript.
    """
    _require("onnx", "onnxscript", pip="onnx onnxscript")
    model, tokenizer = load_export(folder)
    with _new_folder(output) as temporary, _quiet():
        sizes = {
            0: torch.export.Dim("batch"),
            1: torch.export.Dim("sequence", min=2, max=model.config.n_positions),
        }
        settings = OnnxConfig(dynamic_shapes={"input_ids": sizes}, opset_version=ONNX_OPSET)
        example: Any = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "use_cache": False}
        program: Any = OnnxExporter().export(model, example, settings)
        if isinstance(program, torch.onnx.ONNXProgram):  # until transformers 5.22
            program.save(str(temporary / ONNX_FILE))
        else:
            OnnxExporter.save_program(program.program, temporary / ONNX_FILE)
        model.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def export_gguf(folder: Path, output: Path) -> None:
    """A GGUF file of the architecture gpt2 in float32, with its tokenizer, for llama.cpp; `output` is the
    file, or a folder that gets model.gguf.

    Raises:
        NotInstalled: without gguf.
        ReleaseError: if the tokenizer is not GPT-2's kind of byte-level BPE, the one that this writes.
    """
    _require("gguf", pip="gguf")
    import gguf

    model, tokenizer = load_export(folder)
    words, merges = _byte_level_bpe(tokenizer)
    config, stock = model.config, to_gpt2(model)
    special = set(tokenizer.all_special_ids)
    rows = config.vocab_size
    # Rows that only pad the vocabulary need a name too, and are never to be written.
    names = [words.get(id_, f"[PAD{id_}]") for id_ in range(rows)]
    kinds = [
        gguf.TokenType.UNUSED
        if id_ not in words
        else gguf.TokenType.CONTROL
        if id_ in special
        else gguf.TokenType.NORMAL
        for id_ in range(rows)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix != ".gguf":
        output.mkdir(exist_ok=True)
        output = output / GGUF_FILE
    if output.exists():
        raise ReleaseError(f"{output} exists already, and nothing is overwritten; name another")
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_name(folder.resolve().name)
        writer.add_vocab_size(rows)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(names)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        for add, id_ in (
            (writer.add_bos_token_id, tokenizer.bos_token_id),
            (writer.add_eos_token_id, tokenizer.eos_token_id),
            (writer.add_pad_token_id, tokenizer.pad_token_id),
        ):
            if id_ is not None:
                add(id_)
        writer.add_add_bos_token(False)
        for name, array in _gguf_tensors(stock).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)


def export_torchao(folder: Path, output: Path, kind: str = "int8") -> None:
    """A folder with quantised projections; loads with torchao installed.

    `int8` has a scale for each row. `int4` has sixteen levels and a scale for INT4_GROUP weights of a row; a
    weight still takes a byte, as torchao 0.18 packs two into one on accelerators only. So it shows what four
    bits cost, and saves no more than eight. Embedding and head stay: they are one and the same.

    Raises:
        NotInstalled: without torchao.
        ReleaseError: for another kind, or a width that is not made of whole groups.
    """
    with _new_folder(output) as temporary:
        quantised, tokenizer = load_torchao(folder, kind)
        quantised.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _describe(folder, temporary, output)


def load_torchao(folder: Path, kind: str = "int8") -> tuple[Any, PreTrainedTokenizerBase]:
    """The export with quantised projections, in memory."""
    _require("torchao", pip="torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind not in TORCHAO_KINDS:
        raise ReleaseError(f"--torchao {kind}: only {', '.join(TORCHAO_KINDS)}")
    model, tokenizer = load_export(folder)
    if kind == "int4":
        widths = {
            layer.in_features
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name != "lm_head"
        }
        if odd := sorted(width for width in widths if width % INT4_GROUP):
            raise ReleaseError(
                f"--torchao int4: {INT4_GROUP} weights of a row share a scale, and rows of {odd[0]} do not "
                "divide; int8 takes any width"
            )
        weights: Any = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(INT4_GROUP),
        )
    else:
        weights = Int8WeightOnlyConfig(version=2)
    settings = TorchAoConfig(weights)
    return GPTScratchForCausalLM.from_pretrained(folder, quantization_config=settings).eval(), tokenizer


def _describe(folder: Path, made: Path, output: Path) -> None:
    """Picture and card of `folder` for what was `made` of it and will lie at `output`.

    A person's card is copied. One of ours is written for the new form: other code loads it, and quantised
    weights have results of their own.
    """
    if (folder / PICTURE_FILE).exists():
        shutil.copyfile(folder / PICTURE_FILE, made / PICTURE_FILE)
    if not (folder / CARD_FILE).exists():
        return
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    if is_ours(card):
        card = keep_owners_words(build_card(made, find_run(folder), made_from=folder, home=output), card)
    (made / CARD_FILE).write_text(card, encoding="utf-8")


def _gguf_tensors(stock: nn.Module) -> dict[str, np.ndarray]:
    """Stock weights under llama.cpp's names, matrices as (out, in), float32."""
    layers = {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    whole = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    tensors = {}
    for name, parameter in stock.named_parameters():  # a tied head is not listed twice
        module, _, kind = name.removeprefix("transformer.").rpartition(".")
        array = parameter.detach().float()
        if module == "lm_head":
            target = "output"
        elif module in whole:
            target = whole[module]
        else:
            _, number, layer = module.split(".", 2)
            target = f"blk.{number}.{layers[layer]}"
            if array.ndim == 2:  # Conv1D keeps (in, out)
                array = array.T
        tensors[f"{target}.{kind}"] = np.ascontiguousarray(array.numpy())
    return tensors


def _byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, str], list[str]]:
    """Words by id and merges in their order, of a tokenizer that splits as llama.cpp's "gpt-2" does."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    before, model = described.get("pre_tokenizer") or {}, described["model"]
    is_like_gpt2 = (
        model.get("type") == "BPE"
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space")
        and described.get("normalizer") is None
    )
    if not is_like_gpt2:
        raise ReleaseError(
            f"GGUF: the tokenizer is {model.get('type')} after {before.get('type')}, not GPT-2's byte-level "
            "BPE; llama.cpp would split text in another way. Use its own converter on the --stock folder."
        )
    words = {id_: word for word, id_ in tokenizer.get_vocab().items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return words, merges


def _require(*modules: str, pip: str) -> None:
    import importlib.util

    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise NotInstalled(f"{', '.join(missing)} not installed: pip install {pip}")


@contextmanager
def _new_folder(output: Path):
    """A temporary folder that becomes `output` when all is written; `output` must be new or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ReleaseError(f"{output} is not an empty folder, and nothing is overwritten; name another")
    temporary = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):  # safetensors files come out readable by their owner alone
            if path.is_file():
                path.chmod(0o644)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _quiet():
    """The exporters log, print and warn about themselves and their versions, not about this model."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "transformers"))}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m release.export", description="An export in another format."
    )
    parser.add_argument("folder", type=Path, help="an export, such as artifacts/runs/demo/export")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        "--stock", action="store_true", help="a plain GPT2LMHeadModel; no remote code, for servers"
    )
    kinds.add_argument("--onnx", action="store_true", help="for ONNX Runtime and whatever reads ONNX")
    kinds.add_argument("--gguf", action="store_true", help="for llama.cpp and what builds on it")
    kinds.add_argument("--torchao", choices=TORCHAO_KINDS, help="quantised weights")
    parser.add_argument("output", type=Path, help="a folder that is new or empty; for --gguf also FILE.gguf")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    write: Callable[[Path, Path], None]
    if arguments.stock:
        write = export_stock
    elif arguments.onnx:
        write = export_onnx
    elif arguments.gguf:
        write = export_gguf
    else:
        write = partial(export_torchao, kind=arguments.torchao)
    try:
        write(arguments.folder, arguments.output)
    except (ReleaseError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
