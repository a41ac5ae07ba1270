"""AdamW with moments in FP32 (torch's own, fused) or in BF16 (computed in FP32, stored in BF16)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.errors import ConfigError
from fp8train.optim.config import OptimConfig
from fp8train.shards import local

# A BF16 number moves only if it changes by more than half an ulp, at most 2^-8 of it: a moment that decays more slowly
# never shrinks.
SLOWEST_BF16_DECAY = 2.0**-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimConfig, moments: str = "fp32") -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of a model, in the groups of `parameter_groups`.

    Args:
        model: parameters fp32, on the device where they are to be trained.
        moments: what the recipe asks for, "fp32" or "bf16"; config.moments overrides it unless that is "auto".

    Raises:
        ConfigError: nothing to train, a parameter that is not fp32, or BF16 moments with a beta that BF16 cannot
            follow.
    """
    moments = moments if config.moments == "auto" else config.moments
    groups = parameter_groups(model, config.weight_decay)
    if moments == "bf16":
        return AdamWBF16Moments(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    assert moments == "fp32", moments
    # fused on the CPU too: 7.7 ms a step for 4.3M parameters, foreach 28.8 ms (torch 2.13, 1 thread of a Xeon, 2026-11)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, "decay" and "no_decay", with their names; an empty one is left out.

    No decay: embeddings (a tied lm_head is the embedding), biases, and whatever has fewer than two dimensions, such
    as norms.

    Raises:
        ConfigError: nothing to train, or a parameter that is not fp32.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay: list[tuple[str, nn.Parameter]] = []
    no_decay: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"optimizer: parameter {name} is {parameter.dtype}; needs torch.float32 master weights. "
                "Convert the model with model.float()."
            )
        without = id(parameter) in embeddings or parameter.ndim < 2 or name.rpartition(".")[2] == "bias"
        (no_decay if without else decay).append((name, parameter))
    if not decay and not no_decay:
        raise ConfigError(
            "optimizer: the model has 0 trainable parameters; needs at least 1. "
            "Set requires_grad on what is to be trained."
        )
    groups = (
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def checkpoint_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights that are trained and their two moments, which a checkpoint holds at least."""
    moment = 2 if isinstance(optimizer, AdamWBF16Moments) else 4
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(weight.numel() * (weight.element_size() + 2 * moment) for weight in weights)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class AdamWBF16Moments(torch.optim.Optimizer):
    """AdamW whose moments are kept in BF16, 4 bytes a parameter in place of 8.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    w = w (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps), all in FP32 on the FP32 master weights; then m
    and v are rounded to nearest even. FP32 copies exist for PIECE parameters at a time.

    Raises:
        ConfigError: 1 - beta is below 2^-8, so that a BF16 moment would never shrink.

    Source: DeepSeek-V3 (arXiv:2412.19437) 3.3.3, low-precision optimizer states.
    """

    PIECE = 1 << 24  # 64 MiB per FP32 temporary

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        for beta in betas:
            if 1.0 - beta < SLOWEST_BF16_DECAY:
                raise ConfigError(
                    f"optimizer: betas are {list(betas)} with BF16 moments; needs at most {1 - SLOWEST_BF16_DECAY:.3f} "
                    "each, or a moment cannot shrink in BF16. Set optim.betas=[0.9,0.95] or optim.moments=fp32."
                )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros(()),
                        **{key: torch.zeros_like(p, dtype=torch.bfloat16) for key in _MOMENTS},
                    }
                self.state[p]["step"] += 1
            for pieces in self._pieces(parameters):
                _update(pieces, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments come back in BF16 (exactly, if they were saved in BF16)."""
        state = state_dict["state"]
        # torch casts every floating state tensor to the dtype of its parameter: keep the moments out of its way
        bare = {i: {key: value for key, value in entry.items() if key not in _MOMENTS} for i, entry in state.items()}
        super().load_state_dict({**state_dict, "state": bare})
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters, strict=True):
            for key in _MOMENTS if i in state else ():
                self.state[p][key] = state[i][key].to(device=p.device, dtype=torch.bfloat16, copy=True)

    def _pieces(self, parameters: list[Tensor]) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor, float]]]:
        """Parameters as lists of (w, g, m, v, t) of about PIECE elements; a contiguous tensor above is cut up."""
        pieces: list[tuple[Tensor, Tensor, Tensor, Tensor, float]] = []
        size = 0
        for p in parameters:
            state = self.state[p]
            assert p.grad is not None
            tensors = tuple(map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"])))
            if tensors[0].numel() > self.PIECE and all(t.is_contiguous() for t in tensors):
                views = list(zip(*(t.view(-1).split(self.PIECE) for t in tensors), strict=True))
            else:
                views = [tensors]
            for view in views:
                pieces.append((*view, float(state["step"])))
                size += view[0].numel()
                if size >= self.PIECE:
                    yield pieces
                    pieces, size = [], 0
        if pieces:
            yield pieces


def _update(pieces: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], group: dict[str, Any]) -> None:
    """AdamW on one list of pieces, with the hyper-parameters of their group."""
    weights, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*pieces, strict=True))
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    grads = [g.float() for g in grads]
    m = [t.float() for t in exp_avgs]
    v = [t.float() for t in exp_avg_sqs]
    torch._foreach_lerp_(m, grads, 1.0 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1.0 - beta2)
    torch._foreach_copy_(exp_avgs, m)
    torch._foreach_copy_(exp_avg_sqs, v)
    torch._foreach_sqrt_(v)
    torch._foreach_div_(v, [math.sqrt(1.0 - beta2**t) for t in steps])
    torch._foreach_add_(v, group["eps"])
    torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(weights, m, v, [-lr / (1.0 - beta1**t) for t in steps])
