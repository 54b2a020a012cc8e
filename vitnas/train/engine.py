"""Engine: the handful of calls that training needs from Accelerate (devices, precision, processes, trackers).

Several processes are started by torchrun, `accelerate launch` or SLURM's srun. Networks are *not* wrapped in DDP: ranks
may train different Archs in the same step, so gradients are averaged here, those that only some ranks have too.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from vitnas.errors import MissingExtra, UserError, first_line
from vitnas.stopping import asked, stopped_by

logger = logging.getLogger(__name__)

BUCKET = 8 << 20  # elements per all-reduce: large enough to be worth the call, small beside the gradients
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Engine:
    """Where and in what precision to run, and how to talk to the other processes.

    Args:
        precision: fp32, bf16 or fp16 (with loss scaling).
        cpu: stay on the CPU although there is an accelerator.
        trackers: tensorboard, wandb; they log beside metrics.jsonl.
        folder: where trackers write.

    Raises:
        MissingExtra: a tracker that is not installed.
        UserError: a precision that this device has not, or another than an earlier Engine of this process.
    """

    _agreed = 0  # how often the processes have agreed, by whichever Engine; the same in each of them

    def __init__(
        self,
        *,
        precision: str = "fp32",
        cpu: bool = False,
        trackers: Iterable[str] = (),
        folder: Path | None = None,
    ) -> None:
        names = list(trackers)
        for name in names:
            _require(name)
        adopt_slurm()
        check_precision(precision, cpu=cpu)
        self.precision = precision
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        cpu = cpu or not can_have_processes(wanted)
        if wanted > 1:  # Accelerate would choose threads by itself, and warn
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        self.accelerator = Accelerator(
            mixed_precision=PRECISIONS[precision], cpu=cpu, log_with=names or None, project_dir=folder
        )
        if self.world != wanted:
            raise UserError(
                f"WORLD_SIZE asks for {wanted} processes, and this one is in a world of {self.world}; all must know of "
                "each other. Start them by torchrun, `accelerate launch` or srun, and make no Engine before."
            )
        # Flags go between processes by a group of the hosts, which needs not wait for what the devices still compute.
        self._hosts: Any = None
        self._signal = 0  # that asked any of the processes to end
        if self.world > 1 and self.device.type != "cpu":
            self._hosts = torch.distributed.new_group(backend="gloo")
        if names:
            self.accelerator.init_trackers("vitnas")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer, with loss scaling where the precision needs it."""
        return self.accelerator.prepare_optimizer(optimizer)

    def autocast(self) -> Any:
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def scaler_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def restore_scaler(self, state: Mapping[str, Any]) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def clip(
        self, parameters: list[nn.Parameter], max_norm: float | None, *, per_tensor: bool = False
    ) -> Tensor:
        """Scale the gradients down to `max_norm` (None: leave them); returns their norm before.

        Args:
            per_tensor: each by its own norm, as DINO and EsViT do, instead of all together.
        """
        if max_norm is not None and per_tensor:
            self.accelerator.unscale_gradients()
            used = [p for p in parameters if p.grad is not None]
            return torch.stack([nn.utils.clip_grad_norm_(p, max_norm).float() for p in used]).norm()
        if max_norm is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def broadcast(self, network: nn.Module) -> None:
        """Give every process the first one's weights."""
        self.share(*network.state_dict().values())

    def share(self, *tensors: Tensor) -> None:
        """Give every process the first one's values, in place. Raises what another process met before."""
        self._agree(None)
        if self.world > 1:
            with torch.no_grad(), reaching_all():
                for tensor in tensors:
                    tensor.copy_(broadcast(tensor.detach().to(self.device, copy=True), from_process=0))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process meets inside is raised in all of them, so that none waits for another that has left.

        All processes go through the block. They hear of it at the block's end, or at the next `share` or `heed` inside.
        """
        met: Exception | None = None
        try:
            yield
        except _OtherLeftError:
            self._agree(None)
            raise
        except Exception as error:
            if self.world == 1 or hasattr(error, "_of_all"):
                raise
            met = error
            with reaching_all():
                _get_default_store().set(self._left, "")
        self._agree(met)

    def heed(self) -> None:
        """Leave the `together` around this if another process has, by an error. For blocks of long work that processes
        share out; without it they hear of the error when their own share is done."""
        if self.world == 1:
            return
        with reaching_all():
            has_left = _get_default_store().check([self._left])
        if has_left:
            raise _OtherLeftError

    @property
    def _left(self) -> str:
        """The word that one of the processes has left the block that all are in."""
        return f"vitnas/left/{self._agreed}"

    def _agree(self, met: Exception | None) -> None:
        """Raise in every process what any has met; the first one's where several have. All learn of a signal to one."""
        if self.world == 1:
            return
        Engine._agreed += 1
        flag = torch.tensor([int(met is not None), asked()])
        said: list[Any] = [None] * self.world
        mine = None if met is None else (type(met), " ".join(map(str, met.args)) or type(met).__name__)
        with reaching_all():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._hosts)
            has_met, number = flag.tolist()
            self._signal = self._signal or number
            if not has_met:
                return
            torch.distributed.all_gather_object(said, mine, group=self._hosts)
        kind, text = next(each for each in said if each is not None)
        error: Any = met if met is not None and mine == (kind, text) else kind.__new__(kind, text)
        error._of_all = True  # another `together` around this one must not ask again
        raise error

    def stop_if_asked(self, put_away: Callable[[], object]) -> None:
        """Put things away and end where a signal asks for it; all processes do at the same call, behind a `together`.

        Raises:
            Stopped: a signal came to any of them.
        """
        number = asked() if self.world == 1 else self._signal
        if number:
            put_away()
            raise stopped_by(number)

    def release(self) -> None:
        """Forget the optimizers that were prepared; Accelerate would keep them, and their state, for good."""
        self.accelerator.free_memory()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean gradient over the processes. A parameter that some did not use counts as 0 there; one that nobody
        used keeps no gradient, so that the optimizer leaves it alone."""
        if self.world == 1:
            return
        everything = [p for p in parameters if p.requires_grad]
        used = torch.tensor([float(p.grad is not None) for p in everything])
        with reaching_all():
            torch.distributed.all_reduce(used, group=self._hosts)
            self._average_used(everything, used.tolist())

    def _average_used(self, everything: list[nn.Parameter], used: list[float]) -> None:
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in (p for p, n in zip(everything, used, strict=True) if n):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter)
            size += parameter.numel()
            if size >= BUCKET:
                self._average(bucket)
                bucket, size = [], 0
        if bucket:
            self._average(bucket)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([grad.reshape(-1) for grad in grads]), reduction="mean")
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def wait(self) -> None:
        """Wait for all processes. Raises what another has met."""
        self._agree(None)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, in all of them; what it raises there is raised by all."""
        made: list[Any] = [None]
        with self.together():
            if self.is_main:
                made = [make()]
        if self.world > 1:
            with reaching_all():
                made = broadcast_object_list(made)
        return made[0]

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers, if there are any."""
        if self.accelerator.log_with:
            self.accelerator.log(dict(values), step=step)

    def finish(self) -> None:
        """Flush the trackers; the processes stay together, as a caller may have more for them to do."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def close(self) -> None:
        """Flush the trackers and leave the process group."""
        self.accelerator.end_training()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place; what a single process has, as it is. All must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with reaching_all():
            torch.distributed.all_reduce(tensor)
    return tensor


class LostProcessError(UserError):
    """Another process of the group is gone, as one that was killed is."""

    _of_all = True  # nobody is there to be asked what they met


@contextmanager
def reaching_all() -> Iterator[None]:
    """Say in one sentence that another process is gone, whatever the transport raised."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LostProcessError(
            f"another process of this run cannot be reached ({first_line(error)}); all must be there. See what it said "
            "last, then run the same command again: it continues from the last checkpoint."
        ) from error


class _OtherLeftError(Exception):
    """Another process has met an error, which all raise at the end of the block."""


def _require(tracker: str) -> None:
    try:
        if tracker == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        elif tracker == "wandb":
            import wandb  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"the tracker {tracker!r}", "track") from error


def check_precision(precision: str, *, cpu: bool) -> None:
    """Refuse a precision that cannot work here, before anything is made.

    Raises:
        UserError: fp16 without an accelerator, or a second precision in one process (Accelerate keeps the first).
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    if precision == "fp16" and (cpu or not torch.accelerator.is_available()):
        raise UserError(
            "precision is 'fp16'; it needs an accelerator, and this runs on the CPU. Use fp32 or bf16."
        )
    if is_initialized() and (earlier := AcceleratorState().mixed_precision) != PRECISIONS[precision]:
        names = {kind: name for name, kind in PRECISIONS.items()}
        raise UserError(
            f"precision is {precision!r}; this process already runs in {names.get(earlier, earlier)!r}, and can run in "
            "one only. Use the same, or another process."
        )


def can_have_processes(world: int) -> bool:
    """Whether this machine's accelerator can be used by `world` processes; without one they meet on their CPUs.

    Accelerate takes a process without CUDA or the like for a world of its own, whatever the launcher says.

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or (world > 1 and kind.type == "mps"):
        return False
    count, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > count:
        raise UserError(
            f"{here} processes were started on a machine of {count} accelerators; each needs its own. Start {count}, "
            "or use device=cpu."
        )
    return True


NO_TASKS = (
    0xFFFFFFF0  # SLURM numbers the batch script and an interactive shell above this, as steps of their own
)


def adopt_slurm() -> None:
    """Under srun without torchrun, give torch the variables that it reads (rank, world size, first host).

    The script of a job has SLURM_NTASKS and SLURM_PROCID too, and is one process: only a step's own numbers count.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    tasks, step = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), int(os.environ.get("SLURM_STEP_ID", "0"))
    if tasks < 2 or step >= NO_TASKS:
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            logger.warning(
                "one process of a SLURM job of several tasks; `srun` in front of the command makes a group"
            )
        return
    first = first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    port = 20000 + (int(os.environ.get("SLURM_JOB_ID", "0")) + 37 * step) % 10000  # steps may share a host
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", first),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: `n003` of `n[003-005,9],other`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]
