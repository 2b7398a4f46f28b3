"""To and from transformers' own GPT-2, exactly: the same function, its weights laid out another way.

    python -m modeling_gpt_scratch.convert_gpt2 --from_gpt2 openai-community/gpt2 my_gpt2
    python -m modeling_gpt_scratch.convert_gpt2 --to_gpt2 run/export stock_gpt2

Stock GPT-2 keeps its projections in `Conv1D`, an `nn.Linear` with the weight transposed, and fuses queries,
keys and values into one of them (`c_attn`, columns q | k | v). Everything else has the same name and shape.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from .configuration_gpt_scratch import GPTScratchConfig
from .modeling_gpt_scratch import GPTScratchForCausalLM

SHARED_FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)

# One function under several names: GELU's tanh approximation.
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def from_gpt2(model: GPT2LMHeadModel) -> GPTScratchForCausalLM:
    """Our model with the weights, configuration and generation configuration of a stock one.

    Data types, devices and the train/eval mode are kept; no memory is shared. Dropout is kept too: stock
    GPT-2 trains with 0.1.

    Raises:
        TypeError: not a GPT2LMHeadModel.
        ValueError: an option of GPT-2's that our model lacks (all of them at once), or weights that are not
            plain numbers (quantised, or offloaded to disk).
    """
    _require(model, GPT2LMHeadModel)
    refuse_unsupported(model.config)
    config = GPTScratchConfig(
        **{name: getattr(model.config, name) for name in SHARED_FIELDS},
        initializer_range=model.config.initializer_range,
        tie_word_embeddings=_is_tied(model),
        dtype=model.dtype,
    )
    return _build(GPTScratchForCausalLM, config, model, weights_from_gpt2)


def to_gpt2(model: GPTScratchForCausalLM) -> GPT2LMHeadModel:
    """A stock GPT-2 with the weights, configuration and generation configuration of ours.

    Data types, devices and the train/eval mode are kept; no memory is shared.

    Raises:
        TypeError: not a GPTScratchForCausalLM.
        ValueError: weights that are not plain numbers (quantised, or offloaded to disk).
    """
    _require(model, GPTScratchForCausalLM)
    fields: dict = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    # transformers 5 does not write it by itself, and llama.cpp's converter reads it.
    fields["n_ctx"] = model.config.n_positions
    config = GPT2Config(
        **fields,
        initializer_range=float(model.config.initializer_range),  # stock wants exactly a float
        activation_function="gelu_new",
        tie_word_embeddings=_is_tied(model),
        dtype=model.dtype,
    )
    return _build(GPT2LMHeadModel, config, model, weights_to_gpt2)


def load_gpt2(source: str | Path | GPT2LMHeadModel, **from_pretrained_kwargs) -> GPTScratchForCausalLM:
    """Our model with a stock GPT-2's weights, from a Hub id, a folder or a model in memory.

    Args:
        from_pretrained_kwargs: as for `GPT2LMHeadModel.from_pretrained` (`dtype`, `revision`, `resid_pdrop`,
            …); `attn_implementation` is our model's. Only safetensors are read.

    Raises:
        OSError: no such model.
        ValueError: not a GPT-2, weights missing, or anything that `from_gpt2` refuses.
    """
    if isinstance(source, nn.Module):
        if from_pretrained_kwargs:
            raise ValueError(
                f"{', '.join(from_pretrained_kwargs)}: only for loading by name; this model is loaded already"
            )
        return from_gpt2(source)

    _require_type(source, GPT2Config, **from_pretrained_kwargs)
    attn_implementation = from_pretrained_kwargs.pop("attn_implementation", None)
    stock: GPT2LMHeadModel
    report: dict
    stock, report = GPT2LMHeadModel.from_pretrained(  # type: ignore[misc]
        source, use_safetensors=True, output_loading_info=True, **from_pretrained_kwargs
    )
    # transformers only warns, and goes on with random numbers in their place.
    if missing := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise ValueError(f"{source} lacks weights, or has them in another shape: {', '.join(missing)}")
    model = from_gpt2(stock)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


def refuse_unsupported(config: GPT2Config) -> None:
    """Raise a ValueError that names every option of `config` that our model would not follow."""
    problems = []
    if config.activation_function not in TANH_GELUS:
        problems.append(
            f"activation_function={config.activation_function!r} (only {', '.join(TANH_GELUS)}, "
            "which are the same function)"
        )
    if not config.scale_attn_weights:
        problems.append(
            "scale_attn_weights=False (scores are always divided by the root of the head's width)"
        )
    for name in (
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
        "is_encoder_decoder",
    ):
        if getattr(config, name, False):
            problems.append(f"{name}=True")
    if problems:
        raise ValueError(f"this GPT-2 has options that GPTScratch lacks: {'; '.join(problems)}")


def weights_from_gpt2(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stock weights, or their gradients, under our names and in our layout; copies, not views."""
    ours = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")  # "transformer.h.0.attn.c_attn", "weight"
        attn, _, layer = module.rpartition(".")
        if layer == "c_attn":
            for part, piece in zip("qkv", tensor.chunk(3, dim=-1), strict=True):
                ours[f"{attn}.{part}_proj.{kind}"] = _transposed(piece)
        elif module.endswith("attn.c_proj"):
            ours[f"{attn}.o_proj.{kind}"] = _transposed(tensor)
        elif layer in ("c_fc", "c_proj"):
            ours[name] = _transposed(tensor)
        else:
            ours[name] = tensor.clone()
    return ours


def weights_to_gpt2(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights, or their gradients, under the stock names and in the stock layout; copies, not views."""
    stock = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        attn, _, layer = module.rpartition(".")
        if layer == "q_proj":
            parts = [_transposed(weights[f"{attn}.{part}_proj.{kind}"]) for part in "qkv"]
            stock[f"{attn}.c_attn.{kind}"] = torch.cat(parts, dim=-1)
        elif layer in ("k_proj", "v_proj"):
            continue  # came with its q_proj
        elif layer == "o_proj":
            stock[f"{attn}.c_proj.{kind}"] = _transposed(tensor)
        elif layer in ("c_fc", "c_proj"):
            stock[name] = _transposed(tensor)
        else:
            stock[name] = tensor.clone()
    return stock


def _transposed(tensor):
    return tensor.t().clone(memory_format=torch.contiguous_format)  # a bias has one dimension and stays


def _is_tied(model) -> bool:
    # The weights decide, not the configuration: transformers leaves a checkpoint untied whose two differ.
    return model.lm_head.weight is model.transformer.wte.weight


def _require(model, wanted: type[PreTrainedModel]) -> None:
    if not isinstance(model, wanted):
        hint = " (merge its adapters first)" if hasattr(model, "merge_and_unload") else ""
        raise TypeError(f"needs a {wanted.__name__}, got a {type(model).__name__}{hint}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised; load it without quantization_config to convert it")
    if offloaded := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ValueError(
            f"{len(offloaded)} weights are not in memory ({offloaded[0]}, …); load without offloading"
        )


def _require_type(source, config_class: type[PreTrainedConfig], **from_pretrained_kwargs) -> None:
    # transformers loads a checkpoint of another type all the same, with random numbers where names differ.
    settings, _ = config_class.get_config_dict(source, **from_pretrained_kwargs)
    if not settings:
        raise FileNotFoundError(f"no model at {source}: there is no config.json")
    if settings.get("model_type") != config_class.model_type:
        raise ValueError(
            f"{source} holds a model of type {settings.get('model_type')!r}; this needs "
            f"{config_class.model_type!r}"
        )


def _build(model_class: Callable, config, source: PreTrainedModel, convert: Callable):
    """`model_class(config)` around the converted weights of `source`, without initialising any of its own."""
    with torch.device("meta"):
        model = model_class(config)
    # Assigned rather than copied, so that each keeps its data type and device.
    model.load_state_dict(convert(source.state_dict()), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt_scratch.convert_gpt2",
        description="Convert a model folder or Hub id between GPT2LMHeadModel and GPTScratchForCausalLM.",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from_gpt2", action="store_true", help="SRC is a stock GPT-2, OUT becomes ours")
    direction.add_argument("--to_gpt2", action="store_true", help="SRC is ours, OUT becomes a stock GPT-2")
    parser.add_argument("source", metavar="SRC", help="a folder or a Hub id")
    parser.add_argument("output", metavar="OUT", type=Path, help="a folder that is new or empty")
    arguments = parser.parse_args(argv)

    try:
        convert_folder(arguments.source, arguments.output, to_stock=arguments.to_gpt2)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}")


def convert_folder(source: str, output: Path, *, to_stock: bool) -> None:
    """Convert the model at `source` into the folder `output`, with its tokenizer if it has one.

    Raises:
        FileExistsError: `output` holds something already.
        OSError, ValueError: as `load_gpt2` and `to_gpt2`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not an empty folder, and nothing is overwritten; name another")

    model: PreTrainedModel
    if to_stock:
        _require_type(source, GPTScratchConfig)
        model = to_gpt2(GPTScratchForCausalLM.from_pretrained(source, use_safetensors=True))
    else:
        model = load_gpt2(source)

    tokenizer = _find_tokenizer(source)
    if tokenizer is None:
        print(f"there is no tokenizer at {source}, so {output} gets none", file=sys.stderr)

    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)


def _find_tokenizer(source: str):
    try:
        # No code from the source runs, whatever its tokenizer's configuration asks for.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    # From a stock checkpoint without tokenizer files, transformers makes one up that knows no word.
    return tokenizer if tokenizer.vocab_size > 0 else None


if __name__ == "__main__":
    main()
