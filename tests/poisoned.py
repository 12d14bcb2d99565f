"""Run a script whose second process gets a sample of NaN as its first."""

import os
import runpy
import sys

from distil_whisper.examples import ExampleMaker

make = ExampleMaker.__call__


def poisoned(self, *given):
    example = make(self, *given)
    example.samples.fill(float("nan"))
    ExampleMaker.__call__ = make
    return example


if os.environ["RANK"] == "1":
    ExampleMaker.__call__ = poisoned
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
