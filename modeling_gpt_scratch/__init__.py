"""GPT-2 written from scratch as a transformers model. Importing the package registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_gpt_scratch import PRESETS, GPTScratchConfig
from .modeling_gpt_scratch import (
    GPTScratchForCausalLM,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
    GPTScratchPreTrainedModel,
    linear_cross_entropy,
)

__version__ = "0.2.0"  # the one place; pyproject.toml, CITATION.cff's test and CHANGELOG.md's go by it

# `register` makes Auto classes find our code without trust_remote_code; `register_for_auto_class` makes
# save_pretrained copy the code files beside the weights. Here and not in the files that travel: a
# checkpoint's copy that registered itself would silently serve the next checkpoint too.
AutoConfig.register("gpt_scratch", GPTScratchConfig, exist_ok=True)
GPTScratchConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, GPTScratchModel),
    (AutoModelForCausalLM, GPTScratchForCausalLM),
    (AutoModelForSequenceClassification, GPTScratchForSequenceClassification),
    (AutoModelForTokenClassification, GPTScratchForTokenClassification),
    (AutoModelForQuestionAnswering, GPTScratchForQuestionAnswering),
):
    auto_class.register(GPTScratchConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

# transformers.Trainer shifts the labels, under label smoothing, only for classes on this list; a model that
# is not on it would learn to copy its input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt_scratch"] = "GPTScratchForCausalLM"


def _from_gpt2(cls, source, **kwargs) -> GPTScratchForCausalLM:
    """This model with stock GPT-2's weights, so with its logits, loss and gradients.

    `source` is a Hub id ("openai-community/gpt2"), a folder or a GPT2LMHeadModel; keyword arguments go to
    `GPT2LMHeadModel.from_pretrained`.
    """
    # Here: `python -m modeling_gpt_scratch.convert_gpt2` warns if importing the package imported it before.
    from .convert_gpt2 import load_gpt2

    return load_gpt2(source, **kwargs)


# Attached, because the converter stays home while the class travels with checkpoints.
GPTScratchForCausalLM.from_gpt2 = classmethod(_from_gpt2)  # type: ignore[attr-defined]

__all__ = [
    "PRESETS",
    "GPTScratchConfig",
    "GPTScratchForCausalLM",
    "GPTScratchForQuestionAnswering",
    "GPTScratchForSequenceClassification",
    "GPTScratchForTokenClassification",
    "GPTScratchModel",
    "GPTScratchPreTrainedModel",
    "linear_cross_entropy",
]
