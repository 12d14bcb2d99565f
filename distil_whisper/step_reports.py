"""What became of each step, told to all processes without waiting for a GPU: bad steps, and requests to stop.

A bad step is one whose loss or gradients are not finite. It changes neither weights nor optimizer, on every process,
which is decided on the device. What is to be said of a step is copied while the next ones run, and read after LAG of
them.
"""

from collections import deque
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm

from distil_whisper.errors import UserError
from distil_whisper.examples import Batch

LAG = 2  # steps: a GPU has then done one, and has another to do


@dataclass(frozen=True)
class _Report:
    """What is on its way of a step: `values` are whether to stop, whether the step was bad, whether any process blames
    a row for it, and for each row of this process whether it is to blame."""

    step: int
    row_ids: list[str]
    values: torch.Tensor
    arrived: torch.cuda.Event | None


class StepReports:
    """Reports of steps; after `most` bad ones in a row training ends. Every process must call the methods."""

    def __init__(self, accelerator: Accelerator, most: int, bad_steps: int = 0, in_a_row: int = 0):
        self.accelerator = accelerator
        self.most = most
        self.bad_steps = bad_steps  # of the whole run
        self.in_a_row = in_a_row  # of them, those up to the last step that was read
        self._lag = LAG if accelerator.device.type == "cuda" else 0  # a CPU has computed what is there to read
        self._sent: deque[_Report] = deque()

    def send(self, step: int, group: list[Batch], blamed: torch.Tensor, norm: torch.Tensor, stop: bool) -> None:
        """Report a step of a group of batches: which of their rows are to blame for a loss that is not finite [rows],
        the norm of its gradients, and whether this process was asked to stop."""
        own = torch.stack([torch.full_like(norm, stop), blamed.any().to(norm)])
        stopping, blaming = self.accelerator.reduce(own, "sum").unbind()
        bad = ~norm.isfinite()
        if self.accelerator.scaler is not None:
            # The scaler answers an overflow of float16's gradients with a smaller scale. Below 1 that is no answer.
            bad &= (blaming > 0) | (self.accelerator.scaler.scale(torch.ones_like(norm)) < 1)
        values = torch.cat([torch.stack([stopping > 0, bad, blaming > 0]), blamed])
        row_ids = [row_id for batch in group for row_id in batch.row_ids or [""]]  # "": a silent window
        arrived = torch.cuda.Event() if values.is_cuda else None
        values = values.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record()
        self._sent.append(_Report(step, row_ids, values, arrived))

    def read(self, everything: bool = False) -> bool:
        """Name the bad ones of the steps of LAG steps ago, or of all; whether any process was asked to stop.

        Raises UserError after too many bad ones in a row.
        """
        stopping = False
        while len(self._sent) > (0 if everything else self._lag):
            report = self._sent.popleft()
            if report.arrived is not None:
                report.arrived.synchronize()
            stop, bad, blaming, *blamed = report.values.tolist()
            stopping |= stop
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self.bad_steps += 1
                self._name(report, [blame or not blaming for blame in blamed])
            if self.in_a_row >= self.most:
                self._fail(report.step, "the last checkpoint is as it was")
        return stopping

    def check_end(self, step: int) -> None:
        """Raise UserError if the last steps of a run were bad, more than one: no step comes any more that could say
        that its student is well. A single one may be due to a row."""
        if self.in_a_row > 1:
            self._fail(step, "the student is not saved; with more steps training goes on from the last checkpoint")

    def _fail(self, step: int, kept: str) -> None:
        raise UserError(
            f"the losses or gradients of the last {self.in_a_row} steps up to step {step} were not finite, which "
            "changed nothing; look at the rows that were named, or give a lower --learning_rate or another --dtype; "
            f"{kept}"
        )

    def _name(self, report: _Report, blamed: list[bool]) -> None:
        rows = [row_id for row_id, blame in zip(report.row_ids, blamed, strict=True) if blame and row_id]
        if self.accelerator.is_main_process or rows:
            named = f", on {', '.join(rows)}" if rows else ""
            tqdm.write(f"step {report.step} changed nothing: its loss or its gradients were not finite{named}")
