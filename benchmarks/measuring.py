"""What the benchmarks share: a clock that counts parts, the machine's name, variants in processes of their own."""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Container, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch

SIZES = {
    "tiny": {"d_model": 384, "layers": 4, "heads": 6, "mels": 80, "vocabulary": 51_865},
    "large-v3": {"d_model": 1280, "layers": 32, "heads": 20, "mels": 128, "vocabulary": 51_866},
}


class Clock:
    """Seconds by part."""

    def __init__(self, device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str):
        """Time a block as a part."""
        began = self.now()
        yield
        self.seconds[name] += self.now() - began

    def around(self, owner, method: str, name: str) -> None:
        """Time every call of a method as a part."""
        plain = getattr(owner, method)

        def timed(*args, **options):
            with self.part(name):
                return plain(*args, **options)

        setattr(owner, method, timed)

    def now(self) -> float:
        """A reading, with the work of a GPU done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def this_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """What this was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def make_parser(description: str, variants: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments of every benchmark; sizes and types are those of the machine at hand unless given."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="large-v3" if cuda else "tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--pairs", type=int, default=3, help="Processes of each variant, in turn.")
    parser.add_argument("--json", help="File for the results.")
    parser.add_argument("--variant", choices=variants, help=argparse.SUPPRESS)
    return parser


def in_turn(script: str, variants: Iterable[str], args, optional: Container[str] = ()) -> dict[str, list[dict]]:
    """What every variant gave, each --pairs times, one after the other; an optional one that fails is left out."""
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for _ in range(args.pairs):
        for name in list(runs):
            try:
                print(f"running {name}", file=sys.stderr)
                runs[name].append(in_own_process(script, name, args))
            except RuntimeError as error:
                if name not in optional:
                    sys.exit(str(error))
                print(f"{error}\nit is left out", file=sys.stderr)
                del runs[name]
    return runs


def write_json(args, result: dict) -> None:
    """Write the result where --json says, if it does."""
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def in_own_process(script: str, variant: str, args) -> dict:
    """What a variant prints last, as JSON, when the script runs it alone with the same arguments.

    Raises RuntimeError if it fails, with what it said.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("json", "variant", "pairs")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, script, "--variant", variant, *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"the variant {variant} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])
