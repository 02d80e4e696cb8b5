"""Processes and what runs on them: who this one is, and how a module is spread over all of them.

Everything between processes is PyTorch's own (`torchrun`, DDP, FSDP2). Knows processes, devices and modules; does not
know what is trained.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nar.storage.fields import OneOf, Size, check

Item = TypeVar("Item")
PARALLEL = ("none", "ddp", "fsdp")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Engine:
    """How a step is computed; none of it changes what is learned, up to rounding.

    But masks of dropout and `mixed_context` are drawn, and an adversary's batch norms measured, by process and piece,
    and an adaptive adversary is weighed by piece.

    Attributes:
        parallel: over the processes of `torchrun`: "none", "ddp" (a copy in each), "fsdp" (a share of parameters,
            averages and optimizer state in each). One process is the same in all three.
        accumulate: pieces that a process cuts its share of a batch into, one after the other, to save memory.
        precision: "float32", or "bfloat16" for autocast; parameters and averages stay in float32.
        activation_checkpointing: compute the blocks again in the backward pass instead of keeping their activations.
        compile: `torch.compile` the blocks.
        device: "auto" takes CUDA where there is any, one GPU a process; else "cpu", "cuda" or "mps".
        workers: threads that read and decode the next batch while this one is computed.
    """

    parallel: Annotated[str, OneOf(*PARALLEL)] = "ddp"
    accumulate: Size = 1
    precision: Annotated[str, OneOf(*PRECISIONS)] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    workers: Size = 4

    def __post_init__(self) -> None:
        check(self, "engine.")


@dataclass(frozen=True)
class Workers:
    """This process, number `rank` of `count` that train together, on `device`; in the group `waiting` they wait."""

    rank: int
    count: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that logs, samples previews and exports."""
        return self.rank == 0

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of `items`, the same on every process, that are this one's to do."""
        return items[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.count > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes."""
        return self.sum(values) / self.count

    def gather(self, values: Tensor) -> Tensor:
        """The `values` of all processes, of one shape, joined along the first axis in the order of ranks."""
        if self.count == 1:
            return values
        pieces = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(pieces, values.contiguous())
        return torch.cat(pieces)

    def pinned(self, batch: Any) -> Any:
        """A batch in memory that CUDA copies from while it computes, where the device is one; else as it is."""
        if self.device.type != "cuda" or batch is None:
            return batch
        if isinstance(batch, tuple):
            return tuple(map(self.pinned, batch))
        return _pinned(batch) if isinstance(batch, Tensor) else batch.map(_pinned)

    def wait(self) -> None:
        """Return once every process is here."""
        if self.count > 1:
            dist.barrier(group=self.waiting)

    def agree(self, value: str) -> str:
        """What the first process has as `value`, on every process."""
        if self.count == 1:
            return value
        agreed = [value]
        dist.broadcast_object_list(agreed, group=self.waiting, device=torch.device("cpu"))
        return agreed[0]


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.pin_memory()


@contextmanager
def joined(device: str = "auto") -> Iterator[Workers]:
    """This process's place among those that `torchrun` started; alone, it is number 0 of 1."""
    rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not usable here ({reason}); try auto or cpu") from error
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count == 1 or dist.is_initialized():
        yield Workers(rank, count, place)
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))  # the others wait while the first samples previews
    # And where shares of pictures or captions take unlike times: torchrun ends them all when one fails.
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield Workers(rank, count, place, waiting)
    finally:
        dist.destroy_process_group()


def spread(
    step: nn.Module,
    blocks: Sequence[nn.Module],
    averages: tuple[nn.Module, Sequence[nn.Module]],
    engine: Engine,
    workers: Workers,
) -> nn.Module:
    """Prepare `step`, a module whose forward is the loss, for training on all processes.

    `blocks` are its repeated parts, which are recomputed, compiled and sharded one by one; `averages`, a copy with its
    own blocks, is only sharded. All but DDP happens in place.
    """
    if workers.count > 1 and engine.parallel == "none":
        raise ValueError(f"torchrun started {workers.count} processes but engine.parallel is none; set ddp or fsdp")
    if engine.precision == "bfloat16" and workers.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32, as the published trainers do
    for block in blocks:
        if engine.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if engine.compile:
            block.compile()
    if workers.count == 1:
        return step
    if engine.parallel == "ddp":
        return DistributedDataParallel(step, device_ids=None if workers.device.type == "cpu" else [workers.device])
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(workers.device.type, (workers.count,))
    for whole, parts in ((step, blocks), averages):
        for part in (*parts, whole):
            fully_shard(part, mesh=mesh)
    return step


def unsynchronised(step: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Within it, backward passes of pieces before the `last` one of a batch don't exchange gradients yet."""
    if last or not isinstance(step, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], step.no_sync())


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is in this process; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, on every process, which must all call this; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
