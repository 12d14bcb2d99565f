"""accelerate, as the stages configure it: what they compute with, wait for and report to."""

import math
import os
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor

from distil_whisper.errors import UserError
from distil_whisper.outputs import RECORDS, OutputFolder, remove, write_text
from distil_whisper.trackers import project_configuration, resolve_report_to

FIRST_SCALE = 2.0**12  # of float16's gradients; torch's 2**16 loses the first steps, which are skipped until it fits
SECONDS_TO_APPEAR = 20  # until a file that one machine wrote is given up by another
Found = TypeVar("Found")
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def make_accelerator(args, *handlers, **options) -> Accelerator:
    """accelerate with our trackers and timeout. Raises UserError where the processes of a launcher do not know of one
    another: each would take itself for the only one."""
    accelerator = Accelerator(
        log_with=resolve_report_to(args.report_to, args.output_dir),
        project_config=project_configuration(args.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)), *handlers],
        **options,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but accelerate counts {accelerator.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true in the environment"
        )
    return accelerator


def share_folder(folder: OutputFolder, accelerator: Accelerator) -> None:
    """Let every process of a run hold the lock of its output folder. Each calls it once.

    Raises UserError where one does not see what another writes there: machines that share no file system.
    """
    mark, token = folder / f"{RECORDS}/{folder.stage}.seen", uuid.uuid4().hex
    if accelerator.is_main_process:
        write_text(mark, token)
    (token,) = broadcast_object_list([token])
    everywhere = all(gather_object([_appears(mark, token)]))
    if accelerator.is_main_process:
        remove(mark)
    if not everywhere:
        raise UserError(
            f"{folder.flag} {folder.path} is not the same folder for all processes; choose one on a file system that "
            "all machines share"
        )
    folder.share()


def _appears(mark: Path, token: str) -> bool:
    """Whether a file with this text is there within some seconds, which the file system of a network may take."""
    for _ in range(SECONDS_TO_APPEAR):
        if mark.exists() and mark.read_text(encoding="utf-8") == token:
            return True
        time.sleep(1)
    return False


class Turns:
    """Work of a run that its processes take in turn, as each comes to it, with nothing to wait for but the end.

    That wait has no limit: the slowest process may need hours more than the first, and collectives give a run up
    after --ddp_timeout. A process that dies takes the others with it, by its launcher.
    """

    def __init__(self, accelerator: Accelerator):
        self.processes = accelerator.num_processes
        store = torch.distributed.HashStore()
        if self.processes > 1:
            store = torch.distributed.group.WORLD.get_group_store()
        self._store = torch.distributed.PrefixStore("turns", store)

    def take(self) -> int:
        """The next number, from 0 on: no other process gets it."""
        return self._store.add("taken", 1) - 1

    def count(self, name: str, number: int) -> int:
        """Add to what all processes have counted under a name: their sum."""
        return self._store.add(name, number)

    def wait_at(self, place: str) -> None:
        """Go on when all processes have come to this place, which each passes once."""
        arrived = self.count(place, 1)
        while arrived < self.processes:
            time.sleep(0.2)
            arrived = self.count(place, 0)


def training_accelerator(args) -> Accelerator:
    """The same for training, with its compute type. Raises UserError where accelerate was configured for what a
    student cannot be trained on."""
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # ours are the same on all processes, always
    # accelerate has no other name for it yet
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # with a scaler, accelerate puts back the optimizer's step as it was before there was a schedule
    warnings.filterwarnings("ignore", "Seems like `optimizer.step", UserWarning)
    scaler = GradScalerKwargs(init_scale=FIRST_SCALE)
    accelerator = make_accelerator(args, buffers, scaler, mixed_precision=PRECISION[args.dtype])
    check_engine(accelerator)
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None  # it would round what goes into the model; autocast computes as for DDP
        plugin.cpu_ram_efficient_loading = False  # it would untie the output layer from the embeddings
    return accelerator


def allow_dropped_layers(accelerator: Accelerator, share: float) -> None:
    """Let processes train other layers than one another in a step, where that share of them is dropped by chance.

    Raises UserError under FSDP, whose processes gather the weights of each layer together.
    """
    if share and is_sharded(accelerator):
        raise UserError(
            f"the student's config drops layers in training (layerdrop {share:g}), which FSDP cannot do; set "
            "encoder_layerdrop and decoder_layerdrop to 0 in its config.json, or use DDP"
        )
    accelerator.ddp_handler.find_unused_parameters = share > 0


def clip_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter], most: float) -> torch.Tensor:
    """The norm of the gradients of all processes, which are clipped to `most` unless that is 0."""
    norm = accelerator.clip_grad_norm_(parameters, most or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def check_engine(accelerator: Accelerator) -> None:
    """Raise UserError for DeepSpeed and for FSDP of version 1."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed or (is_sharded(accelerator) and not accelerator.is_fsdp2):
        found = "DeepSpeed" if deepspeed else "FSDP with fsdp_version: 1"
        raise UserError(f"accelerate was configured for {found}; use DDP, or FSDP with fsdp_version: 2")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the student's weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def found_by_main_process(find: Callable[[], Found]) -> Found:
    """What the main process finds, or the UserError that it raises, on every process."""
    outcome: list = [None]
    if PartialState().is_main_process:
        try:
            outcome = [find()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]
