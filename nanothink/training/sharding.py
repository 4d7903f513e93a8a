"""Parameters over several processes by PyTorch's FSDP2, and the same methods for a model in one process.

Each block, each frozen expert and the rest of a model are *groups* (Zhao et al. 2023, "PyTorch FSDP", section
3.2): a process keeps its rows of their parameters, and gathers a group's when it is read. The rest, with
embeddings and head, stays gathered from the forward to the end of the backward pass, since the chunked loss
reads the whole head. Gradients are added, not averaged, at the end of an accumulation window alone, and each
process keeps its rows of the sum. The optimizer sees these rows as parameters of their own: plain tensors,
which share their memory with the model's.

FSDP2 refuses parameters without a dimension: every process holds those, and their gradients are added apart.

With ``shard="none"`` every process keeps all rows (a mesh of N replicas by one shard): no parameter is
gathered, gradients are added all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nanothink.models.contract import Batch, LanguageModel, Loss, State
from nanothink.models.decoding import steps_by
from nanothink.training.muon_rows import MatrixOwners, rows_by_rank
from nanothink.training.optimizer import GroupedParameters

if TYPE_CHECKING:
    from nanothink.training.objectives import Objective

Shard = Literal["full", "none"]


class Placement:
    """A model that this process holds whole; the base of one that several hold together."""

    owners: MatrixOwners | None = None
    """Who orthogonalises which matrix; None where each process has all rows of all."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def groups(self) -> GroupedParameters:
        """The trained parameters by role, as this process's optimizer moves them."""
        return self.model.parameter_groups()

    def compute(self, objective: Objective, batch: Batch, scale: float) -> Loss:
        """The objective's loss of a batch."""
        return objective(self.model, batch, scale)

    def add_next(self, last: bool) -> None:
        """Say whether the next backward pass ends the window, and so adds gradients over all processes."""

    def collect(self) -> None:
        """Hand the window's gradients to the parameters of ``groups``."""

    def agree_on_overflow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Before unscaling: put an infinity into this process's gradients if one is in another's."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients to a norm of at most ``max_norm``; return their norm before that."""
        return float(nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True))

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Context for evaluation and text, without gradients: every process calls the model as the others do.

        Blocks are gathered as they are read. ``step`` gives all processes the logits of rank 0, so that they
        draw the same tokens.
        """
        yield

    def distributed(self, parameter: str, own: Tensor) -> Tensor:
        """A moment of a parameter as one tensor of all processes, from the rows in this one."""
        return own

    def rows(self, parameter: str, whole: Tensor) -> Tensor:
        """The rows of this process, of something shaped as a parameter."""
        return whole

    def shared(self) -> dict[str, Tensor]:
        """Weights and buffers that must be the same bits in every process, as far as they are here."""
        return self.model.state_dict()

    def shape(self, parameter: str) -> torch.Size:
        """The shape of the whole parameter."""
        return self.model.get_parameter(parameter).shape


class ShardedPlacement(Placement):
    """A model over all processes of the group.

    Args:
        model: of parameters without memory (on "meta"), but see ``from_rank0``. It is changed in place, and
            is then used through this object.
        device: of this process.
        shard: "full": each process keeps its rows; "none": all keep all.
        leave_whole: modules of which every process keeps everything.
        from_rank0: there the model is whole; its values and types are sent to the others, each process's rows
            to it. Otherwise they are yet to be filled.
    """

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        shard: Shard,
        leave_whole: Sequence[nn.Module] = (),
        *,
        from_rank0: bool = False,
    ) -> None:
        super().__init__(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        size = torch.distributed.get_world_size()
        self.shard = shard
        whole = _emptied(model) if from_rank0 else {}
        shape, names = ((size,), ("shard",)) if shard == "full" else ((size, 1), ("replicate", "shard"))
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        kept = {p for module in leave_whole for p in module.parameters()}
        kept |= {p for p in model.parameters() if p.ndim == 0}
        left = {id(module) for part in leave_whole for module in part.modules()}
        for part in reversed([m for m in model.modules() if isinstance(m, LanguageModel)]):  # experts first
            if id(part) in left:
                continue
            for block in part.blocks:
                fully_shard(block, mesh=self.mesh, ignored_params=kept)
            root = part is model
            fully_shard(part, mesh=self.mesh, reshard_after_forward=not root, ignored_params=kept)
            if not root:
                for method in ("hidden", "read"):
                    register_fsdp_forward_method(part, method)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # sums
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
        self._gathered_once = False
        model.__dict__["sharded_loss"] = MethodType(_loss, model)
        register_fsdp_forward_method(model, "sharded_loss")
        kept_names = [name for name, parameter in model.named_parameters() if parameter in kept]
        give_memory(model, device)
        kept = {model.get_parameter(name) for name in kept_names}  # _apply may have put others in their place
        if from_rank0:
            _send_rows(model, whole, shard)
        self._replicated = [p for p in model.parameters() if p.requires_grad and p in kept]
        self._own: dict[nn.Parameter, nn.Parameter] = {}  # by the model's
        self._parameters = dict(model.named_parameters())
        for parameter in model.parameters():
            if parameter.requires_grad:
                own = parameter if parameter in kept else nn.Parameter(_local(parameter.data))
                self._own[parameter] = own
        if shard == "full":
            matrices = [p for _, p in model.parameter_groups()["matrices"]]
            self.owners = MatrixOwners([(self._own[p], p.shape) for p in matrices])

    def groups(self) -> GroupedParameters:
        """See ``Placement.groups``."""
        return {
            role: [(name, self._own[parameter]) for name, parameter in named]
            for role, named in self.model.parameter_groups().items()
        }

    def compute(self, objective: Objective, batch: Batch, scale: float) -> Loss:
        """See ``Placement.compute``."""
        return Loss(*self.model.__dict__["sharded_loss"](objective, batch, scale))

    def add_next(self, last: bool) -> None:
        """See ``Placement.add_next``."""
        self._units[0].set_requires_gradient_sync(last)  # the root's holds for all

    def collect(self) -> None:
        """See ``Placement.collect``."""
        for parameter in self._replicated:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
        for parameter, own in self._own.items():
            if own is not parameter:
                own.grad = None if parameter.grad is None else _local(parameter.grad)
                parameter.grad = None

    def agree_on_overflow(self, parameters: Sequence[nn.Parameter]) -> None:
        """See ``Placement.agree_on_overflow``."""
        if not math.isfinite(self._norm(parameters)):
            next(p.grad for p in parameters if p.grad is not None and p.numel()).view(-1)[0] = math.inf

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """See ``Placement.clip``."""
        norm = self._norm(parameters)
        found = torch.tensor(norm, dtype=torch.float32, device=parameters[0].device)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, found, foreach=True)
        return norm

    def _norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """Norm of all gradients; what every process holds counts once."""
        shared = {id(p) for p in self._replicated} if self.shard == "full" else set()
        counted = [
            p.grad
            for p in parameters
            if p.grad is not None and p.numel() and not (id(p) in shared and torch.distributed.get_rank())
        ]
        own = nn.utils.get_total_norm(counted, foreach=True).cpu() if counted else torch.zeros(())
        square = own.double().square()
        if self.shard == "full":
            torch.distributed.all_reduce(square)
        return math.sqrt(square) if square >= 0 else math.nan

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """See ``Placement.in_step``."""
        root, model = self._units[0], self.model
        if not self._gathered_once:  # or what a forward pass in inference mode makes could not be trained
            self._gathered_once = True
            root._get_fsdp_state()._lazy_init()  # else the first block would take itself for the root
            for unit in self._units:
                unit.unshard()
                unit.reshard()

        def step(tokens: Tensor, state: State) -> Tensor:
            logits = type(model).step(model, tokens, state).contiguous()
            torch.distributed.broadcast(logits, src=0)
            return logits

        model.__dict__["step"] = step
        root.unshard()
        try:
            with steps_by("model"):  # programs would read rows for whole weights
                yield
        finally:
            root.reshard()
            del model.__dict__["step"]

    def distributed(self, parameter: str, own: Tensor) -> Tensor:
        """See ``Placement.distributed``."""
        from torch.distributed.tensor import DTensor

        like = self._parameters[parameter]
        if not isinstance(like, DTensor):
            return own
        return DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def shared(self) -> dict[str, Tensor]:
        """See ``Placement.shared``."""
        from torch.distributed.tensor import DTensor

        state = self.model.state_dict()
        alike = (
            state if self.shard == "none" else {n: t for n, t in state.items() if not isinstance(t, DTensor)}
        )
        return {name: _local(t) if isinstance(t, DTensor) else t for name, t in alike.items()}

    def shape(self, parameter: str) -> torch.Size:
        """See ``Placement.shape``."""
        return self._parameters[parameter].shape

    def rows(self, parameter: str, whole: Tensor) -> Tensor:
        """See ``Placement.rows``."""
        return own_rows(whole, self._parameters[parameter])


def _loss(
    model: LanguageModel, objective: Objective, batch: Batch, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective as a method, which FSDP2 takes for the forward pass of the whole model."""
    loss = objective(model, batch, scale)
    return loss.total, dict(loss.parts)


def _emptied(model: nn.Module) -> dict[str, Tensor]:
    """Take the parameters of rank 0's model away and return them; give all processes their types."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    box = [{name: tensor.dtype for name, tensor in own.items()}]
    torch.distributed.broadcast_object_list(box, src=0)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = box[0][f"{prefix}.{name}" if prefix else name]
            empty = torch.empty_like(parameter, dtype=dtype, device="meta")
            module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
    return own if torch.distributed.get_rank() == 0 else {}


@torch.no_grad()
def _send_rows(model: nn.Module, whole: dict[str, Tensor], shard: Shard) -> None:
    """Fill parameters and buffers of all processes with the values of rank 0, one tensor after another.

    Args:
        whole: parameters in rank 0, which are let go of on the way; elsewhere empty.
    """
    from torch.distributed.tensor import DTensor

    first, size = torch.distributed.get_rank() == 0, torch.distributed.get_world_size()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = _local(tensor) if isinstance(tensor, DTensor) else tensor
        value = whole.pop(name, own).to(own.device) if first else own
        if shard == "none" or not isinstance(tensor, DTensor):
            torch.distributed.broadcast(_bytes(own.copy_(value)), src=0)
            continue
        row = math.prod(tensor.shape[1:]) * own.element_size()
        outgoing = [n * row if first else 0 for n in rows_by_rank(tensor.shape[0], size)]
        incoming = [own.nbytes if rank == 0 else 0 for rank in range(size)]
        sent = _bytes(value)[: sum(outgoing)]
        torch.distributed.all_to_all_single(_bytes(own), sent, incoming, outgoing)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: backends do not know every type."""
    return tensor.detach().view(-1).view(torch.uint8)


def _local(tensor: Any) -> Tensor:
    own: Tensor = tensor.to_local()
    return own


@contextmanager
def without_memory() -> Iterator[None]:
    """Give parameters of models built in the context no memory, but for the moment in which each is made.

    Buffers are as always. Not for several threads.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    def undrawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # torch would import its compiler, for more than a second, to draw nothing
        return lambda tensor, *given, **named: tensor if tensor.is_meta else draw(tensor, *given, **named)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    drawn = Tensor.normal_, Tensor.uniform_
    Tensor.normal_, Tensor.uniform_ = map(undrawn, drawn)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        Tensor.normal_, Tensor.uniform_ = drawn  # type: ignore[method-assign]


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Give parameters without memory some on ``device``, with no values yet; move the others there."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]


def own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that lies where the rows of ``like`` in this process do; no communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    own: Tensor = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return own
