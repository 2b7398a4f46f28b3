"""Learning from a larger model's probabilities (Hinton et al. 2015), without either model's whole logits."""

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from training.files import write_safetensors
from training.finetuning import FinetuneSettings
from training.objective import IGNORED_LABEL
from training.settings import SettingsError

# Logits of this many targets at a time: the largest thing that either model's head makes.
CHUNK_ROWS = 256
# Of a head that is only a matrix: rounding of one product in bfloat16 stays below, scaled logits do not.
HEAD_TOLERANCE = 0.05


class _SummedDistillation(torch.autograd.Function):
    """Sum over rows of (1 - w) CE + w T² KL(teacher ‖ student); gradients are taken chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher_hidden, teacher_weight, share, temperature, dtype):
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_hidden = []
        w = weight.to(dtype)
        rows = (t.split(CHUNK_ROWS) for t in (hidden, targets.unsqueeze(1), teacher_hidden))
        for x, y, seen in zip(*rows, strict=True):
            x = x.to(dtype)
            logits = (x @ w.T).float()  # (n, V)
            student = logits.log_softmax(1)
            loss = loss - (1 - share) * student.gather(1, y).sum()
            # d CE / d logits = softmax - one_hot
            grad = student.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float32)).mul_(1 - share)
            softer = logits.div_(temperature).log_softmax(1)
            wanted = (seen @ teacher_weight.T).float().div_(temperature).log_softmax(1)
            p = wanted.exp()
            # T² keeps the part's gradients as large as the text's whatever T is (section 2 of the paper).
            loss = loss + share * temperature**2 * (p * (wanted - softer)).sum()
            grad += share * temperature * (softer.exp_() - p)  # T² d KL / d logits
            grad = grad.to(dtype)
            grad_hidden.append((grad @ w).to(hidden.dtype))
            grad_weight += (grad.T @ x).float()
        ctx.save_for_backward(
            torch.cat(grad_hidden) if grad_hidden else torch.zeros_like(hidden), grad_weight
        )
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden.float() * grad_loss).to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad_loss).to(ctx.weight_dtype), *[None] * 6


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    share: float,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Summed over rows: (1 - share) cross-entropy + share · T² · KL(teacher ‖ student, both at T), in nats.

    hidden (N, C), weight (V, C), targets (N,) int64, teacher_hidden (N, D), teacher_weight (V, D) in the
    teacher's own type. The student's products are in `dtype`; softmaxes and sums are float32.
    """
    return _SummedDistillation.apply(
        hidden, weight, targets, teacher_hidden, teacher_weight, share, temperature, dtype
    )


class Distillation:
    """An objective for the loop: learn from the text and from `teacher`, which stays as it is.

    Only rows that have a target reach the heads. With a `cache` folder the teacher's last hidden states are
    kept there in its own type, a file for each different row of a batch, named by the hash of row and
    teacher: what comes from there is exactly what the teacher would say. (Top-k probabilities would be
    smaller and not exact.) Rows repeat between epochs only without `field_dropout`.
    """

    def __init__(
        self, teacher: Any, *, vocabulary: int, share: float, temperature: float, cache: Path | None = None
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.vocabulary, self.share, self.temperature, self.cache = vocabulary, share, temperature, cache
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            self.name = hashlib.sha256(str(teacher.config.to_dict()).encode())
            for tensor in teacher.state_dict().values():
                self.name.update(_bytes_of(tensor))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], num_targets: Tensor) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        counted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
        is_target = counted != IGNORED_LABEL  # (B, T): whose next token is learnt
        hidden, dtype = last_hidden_states(model, inputs)
        weight = plain(model).get_output_embeddings().weight
        teacher_weight = self.teacher.get_output_embeddings().weight
        loss = distillation_loss(
            hidden[is_target],
            weight[: self.vocabulary],
            counted[is_target],
            self.teacher_states(inputs)[is_target],
            teacher_weight[: self.vocabulary],
            share=self.share,
            temperature=self.temperature,
            dtype=dtype,
        )
        return loss / num_targets

    @torch.no_grad()
    def teacher_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the teacher's last layer says about a batch: (B, T, D)."""
        device = inputs["input_ids"].device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        with torch.autocast(device.type, enabled=False):
            if self.cache is None:
                return last_hidden_states(self.teacher, inputs)[0]
            rows = []
            for number in range(len(inputs["input_ids"])):
                row = {name: tensor[number : number + 1] for name, tensor in inputs.items()}
                digest = self.name.copy()
                for name in sorted(row):
                    digest.update(_bytes_of(row[name]))
                file = self.cache / f"{digest.hexdigest()}.safetensors"
                if file.exists():
                    states = load_file(file, device=str(device))["states"]
                else:
                    states = last_hidden_states(self.teacher, row)[0].contiguous()
                    # Of a name of its own: another run may be writing the same row just now.
                    temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
                    try:
                        write_safetensors(temporary, {"states": states.cpu()})
                        os.replace(temporary, file)
                    finally:
                        temporary.unlink(missing_ok=True)
                rows.append(states)
            return torch.cat(rows)


def load_teacher(settings: FinetuneSettings) -> Any:
    """The model of --teacher, in its own type.

    Raises:
        SettingsError: if it cannot be loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            settings.teacher,
            dtype="auto",
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # nothing from elsewhere is unpickled
        )
    except (OSError, ImportError) as error:
        raise SettingsError(f"--teacher {settings.teacher} cannot be loaded: {error}") from error


def build_distillation(settings: FinetuneSettings, model: Any, teacher: Any, vocabulary: int) -> Distillation:
    """The objective of --method distill; the tokenizers of `model` and `teacher` are the same.

    Raises:
        SettingsError: if either model's logits are not a plain product.
    """
    for name, one in ((settings.model, model), (settings.teacher, teacher)):
        check_head(one, name)
    return Distillation(
        teacher,
        vocabulary=vocabulary,
        share=settings.teacher_weight,
        temperature=settings.teacher_temperature,
        cache=Path(settings.teacher_cache) if settings.teacher_cache else None,
    )


def last_hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, torch.dtype]:
    """What reaches the head, (B, T, C), and the type of products there: autocast's, if that is on.

    The outermost model is called, because mixed precision and data parallelism are set up in its forward;
    logits of one position are the fewest that it can be asked for.
    """
    head = plain(model).get_output_embeddings()
    caught: list[Tensor] = []
    types: list[torch.dtype] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0]
        caught.append(states)
        kind = states.device.type
        is_on = torch.is_autocast_enabled(kind)
        types.append(torch.get_autocast_dtype(kind) if is_on else head.weight.dtype)

    handle = plain(model).base_model.register_forward_hook(catch)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return caught[0], types[0]


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def plain(model: Any) -> Any:
    """The transformers model inside data-parallel and compiled wrappers."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Whether logits are the last hidden states times one matrix, which chunks of them rely on.

    Raises:
        SettingsError: if not: scaled or capped logits, a bias, adapters on the head.
    """
    device = next(model.parameters()).device
    input_ids = torch.arange(4, device=device)[None]
    mode = model.training
    model.eval()
    caught: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
        model.train(mode)
    head = model.get_output_embeddings()
    is_plain = isinstance(head, nn.Linear) and torch.allclose(
        logits.float(),
        (caught[0].to(head.weight.dtype) @ head.weight.T).float(),
        atol=HEAD_TOLERANCE,
        rtol=0.01,
    )
    if not is_plain:
        raise SettingsError(
            f"{name}: a {type(model).__name__}'s logits are more than its last hidden states times a matrix, "
            "and logit distillation here knows no more. Let the teacher write instead "
            "(python -m data.synthesize) and train on its texts."
        )
