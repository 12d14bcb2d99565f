"""Run a script whose second process is held up once, for longer than --ddp_timeout allows a collective to take."""

import os
import runpy
import sys
import time

from distil_whisper.decoding import Decoder

SECONDS = 12
decode = Decoder.__call__


def after_a_while(self, *arguments, **options):
    time.sleep(SECONDS)
    Decoder.__call__ = decode
    return decode(self, *arguments, **options)


if os.environ["RANK"] == "1":
    Decoder.__call__ = after_a_while
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
