"""Student and teacher spread over the processes of `accelerate launch`, by PyTorch's fully_shard (FSDP2).

Every decoder layer is gathered while it computes, the LM heads while the loss does; gradients are summed over the
processes in float32. In a single process nothing is sharded, and all functions here do what their names say to ordinary
tensors. Nothing here is a setting, and importing it does nothing.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import common


def shard(model, dtype: torch.dtype, device: torch.device):
    """Shard a model over all processes, on their devices; `dtype` is what its decoder layers' matrices are gathered in.

    Embeddings, norms and head are gathered as they are: the residual stream stays float32 where they are, and the
    head's gradient too. A tied head is gathered with the embeddings.
    """
    _, world = common.rank_and_world()
    if world == 1:
        return model
    base, head = model.base_model, model.get_output_embeddings()
    mesh = init_device_mesh(device.type, (world,))
    vectors = {"param_dtype_override_fn": lambda p: p.dtype if p.ndim == 1 else None}
    can = vectors.keys() <= MixedPrecisionPolicy.__dataclass_fields__.keys()  # else they are rounded
    dtypes = {"param_dtype": dtype, "reduce_dtype": torch.float32} | (vectors if can else {})
    policy = MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes)
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    tied = head.weight is model.get_input_embeddings().weight
    groups = [fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in base.layers]
    groups.append(fully_shard(base, mesh=mesh, mp_policy=as_it_is))
    if tied:
        head.weight = model.get_input_embeddings().weight
    else:
        groups.append(fully_shard(head, mesh=mesh, mp_policy=as_it_is))
        head.call = types.MethodType(lambda head, hidden, function: function(hidden, head.weight), head)
        register_fsdp_forward_method(head, "call")
    for group in groups:
        group.set_gradient_divide_factor(1.0)  # the sum: the loss has the denominator of the whole step
        group.set_force_sum_reduction_for_comms(True)
    return model


def call_with_head(model, hidden: torch.Tensor, function: Callable) -> torch.Tensor:
    """function(hidden, weight) with the whole weight of the LM head, whose gradient reaches the shards."""
    head = model.get_output_embeddings()
    return head.call(hidden, function) if isinstance(head, FSDPModule) else function(hidden, head_weight(model))


def head_weight(model) -> torch.Tensor:
    """The LM head's weight; whole, if sharded, between `unsharded_heads`, or after a forward pass where it is tied."""
    head = model.get_output_embeddings()
    return head.weight if isinstance(head, FSDPModule) or not is_sharded(model) else embedding_weight(model)


def embedding_weight(model) -> torch.Tensor:
    return model.get_input_embeddings().weight


def named_parameters(model) -> dict[str, torch.nn.Parameter]:
    """As the optimizer knows them; a pass without gradients leaves the embeddings gathered."""
    if is_sharded(model):
        model.base_model.reshard()
    return dict(model.named_parameters())


def is_sharded(model) -> bool:
    return isinstance(model.base_model, FSDPModule)


@contextmanager
def unsharded_heads(*models) -> Iterator[None]:
    """Where no gradient is wanted."""
    heads = [m.get_output_embeddings() for m in models]
    heads = [head for head in heads if isinstance(head, FSDPModule)]
    for head in heads:
        head.unshard()
    try:
        yield
    finally:
        for head in heads:
            head.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in full; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, on the device of the template and sharded as that is."""
    if not isinstance(template, DTensor):
        return tensor
    tensor = tensor.to(template.device)
    return distribute_tensor(tensor, template.device_mesh, template.placements, src_data_rank=None)
