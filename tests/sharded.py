"""Run a script as `accelerate launch` with an FSDP configuration would on GPUs, on gloo ranks of this CPU.

accelerate keeps FSDP for devices other than CPUs; that alone is changed here.
"""

import os
import runpy
import sys

os.environ.pop("ACCELERATE_USE_CPU", None)

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def prepare_backend(self, *_, **__):
    return "gloo", DistributedType.MULTI_GPU


def set_device(self):
    self.device = torch.device("cpu")


PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
