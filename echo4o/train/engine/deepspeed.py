"""DeepSpeed ZeRO: stage 1 shards the optimiser over ranks, stage 2 also gradients, stage 3 also parameters.

Optimiser, schedule, loss scaling and clipping are the same as with any engine; DeepSpeed shards, exchanges and updates.
Checkpoints are ours (pieces), so that they load on any number of ranks and with any engine.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from echo4o.checkpoint.names import public_name
from echo4o.checkpoint.pieces import Piece, piece_of
from echo4o.config import ConfigError
from echo4o.train.engine.deepspeed_config import zero_settings
from echo4o.train.engine.protocol import Read
from echo4o.train.engine.single import SLOTS, SingleProcessEngine
from echo4o.train.engine.zero_partitions import Partitions, frozen_piece, local_square, partitions_of
from echo4o.train.processes import Processes

logger = logging.getLogger(__name__)


class DeepSpeedEngine(SingleProcessEngine):
    """See `echo4o.train.engine.protocol.Engine`.

    Args:
        processes: one or more.
        zero_stage: 1, 2 or 3.
        cpu_offload: optimiser, and with stage 3 weights, in host memory.
        reduce_dtype: in which gradients are summed over ranks; they are accumulated in float32.
        config_file: DeepSpeed's JSON; see `echo4o.train.engine.deepspeed_config`.
        gradient_accumulation_steps, max_grad_norm: the trainer's, which the file must not contradict.

    Raises:
        ConfigError: if DeepSpeed is not installed, or for settings that cannot work here.
    """

    def __init__(
        self,
        processes: Processes,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        zero_stage: int = 3,
        cpu_offload: bool = False,
        reduce_dtype: torch.dtype = torch.float32,
        config_file: str | Path | None = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__(device, compute_dtype, processes)
        self.settings = zero_settings(
            config_file,
            zero_stage=zero_stage,
            cpu_offload=cpu_offload,
            compute_dtype=compute_dtype,
            reduce_dtype=reduce_dtype,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_grad_norm=max_grad_norm,
            world_size=processes.world_size,
            on_gpu=device.type == "cuda",
        )
        self.stage = self.settings.stage
        self.notes = self.settings.notes
        self._deepspeed = _import_deepspeed(device)
        self._zero: Any = None
        self._partitions: Partitions

    def describe(self) -> str:
        what = {1: "optimiser", 2: "optimiser and gradients", 3: "everything"}[self.stage]
        in_host_memory = [
            name
            for name, there in (
                ("optimiser", self.settings.offloads_optimizer),
                ("weights", self.settings.offloads_weights),
            )
            if there
        ]
        offload = f", {' and '.join(in_host_memory)} in host memory" if in_host_memory else ""
        return f"DeepSpeed ZeRO-{self.stage}: each rank holds 1/{self.world_size} of {what}{offload}"

    def sharding(self) -> tuple[int, str]:
        return self.world_size, "blocks" if self.stage == 3 else "all"

    # ------------------------------------------------------------ preparation

    def prepare(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        read: Read | None = None,
    ) -> nn.Module:
        self._join()
        exact = _float32_values(model) if read is None and self.compute_dtype != torch.float32 else {}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.compute_dtype)
        if self.stage == 3:
            self._partition(model)
            with _shapes_shown(model):
                optimizer = build_optimizer(model)
        else:
            self._place(model, on_meta=read is not None)
            optimizer = build_optimizer(model)
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError(
                f"DeepSpeed cannot shard a {type(optimizer).__name__}: pass --optimizer adamw or --engine fsdp"
            )
        self._zero, *_ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=self.settings.config)
        # These hooks gather any parameter that is touched outside of its module, and only on the rank that touches it.
        # Here every parameter is used by its own module.
        self._zero.module_forward_pre_hook.remove()
        self._zero.module_forward_post_hook.remove()
        if self.stage == 3:
            _hide_from_recomputation(self._zero.optimizer.parameter_offload)
        self.module, self.optimizer = model, optimizer
        self._trained = {public_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._partitions = partitions_of(self._zero.optimizer, self.rank)
        if read is not None:
            read(self.trained() | self.frozen())
        for name, values in exact.items():
            piece = self.trained()[name]
            piece.values.copy_(values.reshape(-1)[piece.start : piece.stop])
        self.refresh()
        return model

    def _join(self) -> None:
        """Let DeepSpeed use the process group that we join."""
        self.processes.start(self.device, even_alone=True)
        local_rank = str(self.device.index or 0) if self.device.type == "cuda" else str(self.processes.local_rank)
        if os.environ.setdefault("LOCAL_RANK", local_rank) != local_rank:
            raise ConfigError(
                f"DeepSpeed uses GPU {os.environ['LOCAL_RANK']} (LOCAL_RANK) but device is {self.device}: "
                "leave --device at auto"
            )
        if self.device.type == "cpu":
            # Else DeepSpeed compiles (100 s) an exchange through shared memory that only its inference uses.
            self._deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=self.processes.timeout),
        )

    def _partition(self, model: nn.Module) -> None:
        """Stage 3: give each module's parameters room and cut them into partitions before the next module's."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        # Children first: Init takes a module with all that is below it.
        for module in reversed(list(model.modules())):
            _leave_meta(module, self.device, made)
            if any(True for _ in module.parameters(recurse=False)):
                self._deepspeed.zero.Init(
                    module=module, config_dict_or_path=self.settings.config, dtype=self.compute_dtype
                )

    # ------------------------------------------------------------ one step

    def no_sync(self, enabled: bool) -> AbstractContextManager:
        """Stages 2 and 3 scatter gradients after every micro-batch all the same: they have no room for whole ones."""
        self._zero.set_gradient_accumulation_boundary(not enabled)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor | None) -> None:
        assert loss is not None and loss.requires_grad, "every rank takes part in every exchange of gradients"
        # What DeepSpeed's own forward and the hooks on its outputs do: they do not look into a BagelOutput.
        self._zero.optimizer.clear_backward_seen_flag()
        self._zero._backward_prologue()
        # DeepSpeed averages over ranks; the trainer's losses are shares of a sum over ranks and micro-batches.
        self._zero.backward(loss * self.world_size, scale_wrt_gas=False)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        gradients = self._partitions.gradients()
        norm = math.sqrt(self.all_reduce_sum(local_square(gradients)).item())
        if 0 < max_norm < norm < math.inf:
            for gradient in gradients:
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self) -> None:
        self._zero.step()
        assert self._zero.was_step_applied(), "gradients that are not finite are skipped before"

    def zero_grad(self) -> None:
        self._partitions.forget_gradients()

    # ------------------------------------------------------------ tensors by name

    def trained(self) -> dict[str, Piece]:
        return self._pieces(self._partitions.masters)

    def _pieces(self, flat: list[Tensor]) -> dict[str, Piece]:
        places = self._partitions.places
        return {name: places[p].piece(flat[places[p].group]) for name, p in self._trained.items()}

    def frozen(self) -> dict[str, Piece]:
        if self.stage != 3:
            return super().frozen()
        persistent = set(self.module.state_dict(keep_vars=True))
        pieces = {
            public_name(name): frozen_piece(parameter, self.rank)
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad
        }
        return pieces | {
            public_name(name): piece_of(buffer, self.rank)
            for name, buffer in self.module.named_buffers()
            if name in persistent
        }

    def optimizer_slots(self, create: Collection[str] = ()) -> dict[str, Piece]:
        create = set(create)
        places, masters = self._partitions.places, self._partitions.masters
        for name, parameter in self._trained.items():
            master = masters[places[parameter].group]
            if not self.optimizer.state.get(master) and any(f"{name}.{slot}" in create for slot in SLOTS):
                self.optimizer.state[master] = _fresh_state(master)
        pieces = {}
        for slot in SLOTS:
            for name, parameter in self._trained.items():
                if state := self.optimizer.state.get(masters[places[parameter].group]):
                    pieces[f"{name}.{slot}"] = places[parameter].piece(state[slot])
        return pieces

    def optimizer_steps(self) -> dict[str, int]:
        places, masters = self._partitions.places, self._partitions.masters
        states = {name: self.optimizer.state.get(masters[places[p].group]) for name, p in self._trained.items()}
        return {name: int(state["step"]) for name, state in states.items() if state}

    def set_optimizer_steps(self, steps: Mapping[str, int]) -> None:
        """ZeRO counts once for all parameters of a group: the largest number counts."""
        of_group: dict[int, list[int]] = {}
        for name, number in steps.items():
            of_group.setdefault(self._partitions.places[self._trained[name]].group, []).append(number)
        for group, numbers in of_group.items():
            if min(numbers) != max(numbers):
                logger.warning(
                    "the optimiser has updated some parameters %d times and others %d times; DeepSpeed counts them "
                    "together, as %d",
                    min(numbers),
                    max(numbers),
                    max(numbers),
                )
            self.optimizer.state[self._partitions.masters[group]]["step"].fill_(float(max(numbers)))

    @torch.no_grad()
    def refresh_weights(self) -> None:
        self._partitions.refresh()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"--engine deepspeed needs DeepSpeed ({error}): pip install 'echo4o[deepspeed]', or use --engine fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _hide_from_recomputation(hooks: Any) -> None:
    """Selective recomputation compares the operations of both passes; gathering weights must not count among them."""

    def hidden(hook: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def run(module: nn.Module) -> None:
            with _disable_current_modes():
                hook(module)

        return run

    hooks.pre_sub_module_forward_function = hidden(hooks.pre_sub_module_forward_function)
    hooks.post_sub_module_forward_function = hidden(hooks.post_sub_module_forward_function)


def _float32_values(model: nn.Module) -> dict[str, Tensor]:
    """What trains, before it is rounded."""
    return {
        public_name(name): parameter.detach().float().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _leave_meta(module: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Room for a module's own tensors. `made` keeps what several modules share shared."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            if parameter not in made:
                values = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)


@contextlib.contextmanager
def _shapes_shown(model: nn.Module) -> Iterator[None]:
    """Partitioned parameters have no elements. An optimiser's groups go by their shapes: show these, without memory."""
    parameters: list[Any] = list(model.parameters())
    hidden = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(1).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, hidden, strict=True):
            parameter.data = data


def _fresh_state(master: Tensor) -> dict[str, Tensor]:
    """AdamW's state as it is before its first update."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=master.device),
        **{slot: torch.zeros_like(master, requires_grad=False) for slot in SLOTS},
    }
