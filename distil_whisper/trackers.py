"""Where metrics go: metrics.jsonl always, and the trackers of accelerate that were asked for."""

import importlib.util
import json
import math
import netrc
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from distil_whisper.errors import UserError, nearest
from distil_whisper.outputs import OutputFolder, write_text

TRACKERS = ("wandb", "tensorboard", "trackio")
METRICS_FILE = "metrics.jsonl"
TABLE_ROWS = 50  # predictions that an evaluation shows in a table
FOLDERS = {"tensorboard": "runs", "wandb": "wandb"}  # that a tracker makes in the output folder


def resolve_report_to(report_to: list[str], output_dir: str) -> list[str] | None:
    """The names of the trackers to use, None for none. Raises UserError for an unknown name or a missing package.

    The default is tensorboard, and wandb where a login or a WANDB_MODE is configured. wandb asked for without a login
    runs offline below output_dir, which is said in one line.
    """
    if report_to == ["default"]:
        return ["tensorboard", "wandb"] if _wandb_is_configured() else ["tensorboard"]
    names = [] if [name.lower() for name in report_to] == ["none"] else list(dict.fromkeys(report_to))
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report_to has an unknown tracker {name} {nearest(name, [*TRACKERS, 'none'])}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}; install it with: pip install {name}")
    if "wandb" in names and not os.environ.get("WANDB_MODE") and not _wandb_is_configured():
        os.environ["WANDB_MODE"] = "offline"
        if os.environ.get("RANK", "0") == "0":
            runs = Path(output_dir) / FOLDERS["wandb"] / "offline-run-*"
            print(f"wandb has no login here, so it runs offline; upload the run later with: wandb sync {runs}")
    return names or None


class Trackers:
    """One run's metrics, from the main process: a line of metrics.jsonl and a call of each tracker for every log.

    resume_step: a resumed run goes on after that step, so its lines of metrics.jsonl beyond it are dropped; a run from
    the start (None) drops all of its stage. Lines of other stages in the same folder stay.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: OutputFolder,
        project: str,
        name: str | None,
        arguments: dict,
        resume_step: int | None = None,
    ):
        self.accelerator = accelerator
        self.path = folder / METRICS_FILE
        if not accelerator.is_main_process:
            return
        made = [FOLDERS[str(tracker)] for tracker in accelerator.log_with if str(tracker) in FOLDERS]
        folder.claim(METRICS_FILE, *made, shared=True)
        self.stage = folder.stage
        _keep_lines_until(self.path, self.stage, resume_step)
        if accelerator.log_with:
            flat = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in arguments.items()
            }
            wandb = {"name": name, "dir": str(folder.path)}
            accelerator.init_trackers(project, config=flat, init_kwargs={"wandb": wandb})

    def log(self, values: dict[str, float], step: int) -> None:
        """Record metrics of a step. Does nothing on other processes than the main one."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as file:
            known = {name: None if _is_no_number(value) else value for name, value in values.items()}
            file.write(json.dumps({"stage": self.stage, "step": step, **known}) + "\n")
        self.accelerator.log(values, step=step)

    def log_table(self, name: str, columns: list[str], rows: list[list], step: int) -> None:
        """Show rows (such as references and predictions) in wandb, the only tracker that has tables."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "wandb":
                tracker.log_table(name, columns=columns, data=rows, step=step)

    def finish(self) -> None:
        """Close the trackers."""
        self.accelerator.end_training()


def project_configuration(output_dir: str) -> ProjectConfiguration:
    """What Accelerator needs to know for tensorboard to write below the output folder."""
    return ProjectConfiguration(project_dir=output_dir, logging_dir=str(Path(output_dir) / FOLDERS["tensorboard"]))


def _keep_lines_until(path: Path, stage: str, step: int | None) -> None:
    """Start a stage's lines of the metrics file, or go on with those of a run up to the step that it resumes from."""
    written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in map(_line, written) if line is not None]
    kept = [line for line in lines if line.get("stage") != stage or (step is not None and line["step"] <= step)]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _is_no_number(value) -> bool:
    """Whether JSON has no word for a figure, such as the norm of an infinite gradient."""
    return isinstance(value, float) and not math.isfinite(value)


def _line(text: str) -> dict | None:
    """A line of metrics, None for one that a killed run left half written."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _wandb_is_configured() -> bool:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] != "disabled"
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
