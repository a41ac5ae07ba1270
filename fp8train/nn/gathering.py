"""From now on FSDP2 gathers the weights of a model as gathered_operands.py has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8train.errors import ConfigError
from fp8train.nn.gathered import follow_sharding
from fp8train.nn.gathered_operands import GatheredOperand
from fp8train.nn.weights import converted_linears, named_linears, own_weights

if TYPE_CHECKING:
    from fp8train.nn.linear import Float8Linear


def gather_operands(model: nn.Module) -> None:
    """From now on the weights of a converted and sharded model are gathered as what their GEMMs multiply.

    FP8 codes (1 byte an element) or BF16 (2), in place of FP32 masters (4): the same numbers. Weights that another
    module holds too, and those whose precision needs the master, are gathered as before.

    Args:
        model: after convert_model and torch's fully_shard, in this order.

    Raises:
        ValueError: there is no sharded Float8Linear, or FSDP2 casts or offloads its weights, or does not split them by
            rows among the same ranks at all times.
        ConfigError: this torch's FSDP2 has other parts, or a recipe with `swiglu: smooth` scales the input of a linear
            by weights that are not sharded as its own, or that another module holds too.
    """
    linears = converted_linears(model)
    _take_over(model, linears, masters=False)
    if all(linear.provider.gathered is None for linear in linears) and linears:
        raise ValueError(
            f"gather_operands: {type(model).__name__} has no sharded Float8Linear; needs one. Call convert_model, then "
            "fully_shard, then this."
        )


def gather_masters(model: nn.Module) -> None:
    """Weights go on to be gathered as FP32 masters, and where the recipe scales channels by them, with the scales.

    Args:
        model: as for gather_operands.

    Raises:
        ValueError, ConfigError: as gather_operands, but that nothing need be sharded.
    """
    if threes := _scaled(model).values():
        _take_over(model, [linear for three in threes for linear in three], masters=True)


def _scaled(model: nn.Module) -> dict[str, tuple[Float8Linear, ...]]:
    """By module path: each linear whose input the weights of two others scale, and these."""
    return {
        fqn: (linear, *linear.remedy.smooth)
        for fqn, linear in named_linears(model).items()
        if linear.remedy is not None and linear.remedy.smooth is not None
    }


def _take_over(model: nn.Module, linears: Sequence[Float8Linear], masters: bool) -> None:
    """Have FSDP2 ask for what the weights of these linears, or the masters, are gathered as."""
    peers = list[GatheredOperand]()
    try:
        parameters = list(_sharded_parameters(model))
        alone, known = own_weights(model), {id(linear) for linear in linears if linear.provider.gathered is None}
        for group, parameter in parameters:
            owner, linear = parameter._module_info, parameter._module_info.module
            if owner.param_name != "weight" or id(linear) not in known or id(linear.weight) not in alone:
                continue
            _check(parameter)
            follow_sharding(linear)
            peers.append(GatheredOperand(linear, group, parameter, peers, masters))
            linear.provider.gathered = peers[-1]
    except AttributeError as error:
        got = "swiglu: got smooth" if masters else "parallel.gather: got operands"
        raise ConfigError(
            f"{got} with torch {torch.__version__}, whose FSDP2 has other parts ({error}); needs torch 2.11 to 2.13. "
            + ("Take `smooth` out of the recipe." if masters else "Set parallel.gather=fp32.")
        ) from error
    for fqn, three in _scaled(model).items():
        _check_scaled(fqn, [linear.provider.gathered for linear in three])


def _sharded_parameters(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """FSDP2's records of the parameters that it shards, each with that of its group; all are sharded after this."""
    from torch.distributed.fsdp import FSDPModule  # takes seconds

    states = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            state = module._get_fsdp_state()
            states[id(state)] = state  # several modules may be sharded together
    for state in states.values():
        for group in state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]:
            if group is not None and hasattr(group.mesh_info, "shard_process_group"):  # or it is replicated
                yield from ((group, parameter) for parameter in group.fsdp_params)


def _check(parameter: Any) -> None:
    """Raise ValueError where this weight cannot be gathered so."""
    if parameter.offload_to_cpu or parameter.mp_policy.param_dtype not in (None, torch.float32):
        raise ValueError(
            "gather_operands: fully_shard offloads or casts weights; needs FP32 masters on the device. Leave out its "
            "offload_policy, and MixedPrecisionPolicy's param_dtype."
        )
    if parameter.fsdp_placement.dim != 0:
        raise ValueError(
            f"gather_operands: shard_placement_fn splits dimension {parameter.fsdp_placement.dim} of a Float8Linear's "
            "weight; needs dimension 0. Take Shard(0) for it."
        )
    if parameter.post_forward_mesh_info not in (None, parameter.mesh_info):
        raise ValueError(
            "gather_operands: fully_shard's reshard_after_forward is a number of ranks; needs True or False, since "
            "FSDP2 sends between these ranks what has come, and not what is asked of it. Change it."
        )


def _check_scaled(fqn: str, three: Sequence[GatheredOperand | None]) -> None:
    """Raise ConfigError where a weight and the two that scale its input are not all of them sharded, or not alike."""
    if len({None if one is None else tuple(one.ranks) for one in three}) > 1:
        raise ConfigError(
            f"gather_operands: the input of {fqn!r} is scaled by weights (swiglu: smooth) that are not sharded as its "
            "own; needs all three sharded alike, each in one module. Take `smooth` out of the recipe."
        )
