"""Train a student on pseudo-labels or transcripts, with its teacher's predictions (KL) or without: stage 3.

accelerate launch run_distillation.py --model_name_or_path ./distil-large-v2-init \
    --teacher_model_name_or_path openai/whisper-large-v2 --train_dataset_name ./common_voice_hi_pseudo_labelled \
    --train_dataset_config_name hi --text_column_name sentence --wer_threshold 10 --freeze_encoder \
    --dtype bfloat16 --max_steps 5000 --output_dir ./distil-large-v2-hi --do_train --do_eval --predict_with_generate

Killed and started again with the same command, it goes on from its last checkpoint.
"""

import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from distil_whisper import hub
from distil_whisper.arguments import MOST_BEAMS, DataFields, ModelFields, RunFields, option, parse, split_plus
from distil_whisper.audio import LogMel
from distil_whisper.augmentation import SpecAugment, WaveformAugment
from distil_whisper.caches import StateCaches, open_caches
from distil_whisper.checkpoints import Checkpoints, go_to, student_weights
from distil_whisper.decoding import Decoder
from distil_whisper.distiller import Distiller
from distil_whisper.engine import (
    allow_dropped_layers,
    clip_gradients,
    found_by_main_process,
    is_sharded,
    training_accelerator,
)
from distil_whisper.errors import UserError, exit_on_user_error
from distil_whisper.examples import Batch, Collator, ExampleMaker, Labeller, LabelSettings
from distil_whisper.losses import LossWeights
from distil_whisper.meters import Meter
from distil_whisper.mixing import Share
from distil_whisper.models import MODEL_FILES, LoadedWhisper, load_whisper, save_whisper
from distil_whisper.outputs import OutputFolder, check_apart, public_arguments
from distil_whisper.progress import bar, quiet_libraries
from distil_whisper.signals import StopRequest
from distil_whisper.step_reports import StepReports
from distil_whisper.trackers import METRICS_FILE, Trackers
from distil_whisper.trainer_state import Evaluation, TrainerState
from distil_whisper.training_sets import Mixture, open_training_sets, open_validation_sets
from distil_whisper.validation import Validator
from distil_whisper.verdicts import VerdictFiles

STAGE = "run_distillation"
SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
SCHEDULES += ["inverse_sqrt"]  # the others of transformers need arguments of their own
# Arguments that do not decide what is learnt.
MAY_CHANGE = {*(each.name for each in fields(RunFields)), "cache_dir", "preprocessing_num_workers"} - {"seed"}
MAY_CHANGE |= {"dataloader_num_workers", "eval_dataset_name", "eval_dataset_config_name", "eval_split_name"}
MAY_CHANGE |= {"eval_text_column_name", "do_train", "do_eval", "predict_with_generate", "generation_max_length"}
MAY_CHANGE |= {"generation_num_beams", "cache_encoder_outputs", "cache_teacher_states", "cache_size_gb", "eval_steps"}
MAY_CHANGE |= {"per_device_eval_batch_size", "logging_steps", "save_steps", "save_total_limit"}
MAY_CHANGE |= {"save_best_total_limit", "load_best_model_at_end", "max_skipped", "max_bad_steps"}


@dataclass
class Arguments(ModelFields, DataFields, RunFields):
    """What is trained, on what, and how."""

    model_name_or_path: str = option("", "The student to train: a folder or a name on the Hub.")
    teacher_model_name_or_path: str | None = option(
        None, "The teacher whose predictions the student learns. Needed unless --kl_weight is 0."
    )
    train_dataset_name: str | None = option(None, "Training datasets, separated by +: names on the Hub, or folders.")
    train_dataset_config_name: str | None = option(None, "Their configurations, separated by +.")
    train_split_name: str = option("train", "Their splits, separated by +.")
    train_dataset_samples: str | None = option(
        None, "Sampling weights of the training datasets, separated by +, such as their hours. Default: see README."
    )
    text_column_name: str | None = option(
        None, "Columns that hold the transcripts, separated by +. Default: text, where there is one."
    )
    eval_dataset_name: str | None = option(None, "Evaluation datasets, separated by +. Default: the training ones.")
    eval_dataset_config_name: str | None = option(None, "Their configurations. Default: those of training.")
    eval_split_name: str = option("validation", "Their splits, separated by +.")
    eval_text_column_name: str = option("text", "Columns that hold their transcripts, separated by +.")
    language_column_name: str = option("language", "Column of the language of each row, where there is one.")
    task_column_name: str = option("task", "Column of the task of each row, where there is one.")
    max_train_samples: int | None = option(
        None, "Use only so many rows of each training dataset (map-style).", at_least=1
    )
    max_skipped: float = option(
        5.0, "Stop when more than so many percent of the rows cannot be used.", at_least=0, at_most=100
    )
    use_pseudo_labels: bool | None = option(
        None,
        "Train on whisper_transcript (True) or on the transcripts (False). Default: on pseudo-labels where there are.",
        nargs="?",
        const=True,
    )
    wer_threshold: float | None = option(
        None,
        "Leave out rows whose pseudo-label differs from the transcript by more than this WER, in percent.",
        at_least=0,
    )
    filter_metric: str = option(
        "wer",
        "What --wer_threshold limits: wer or cer. In languages written without spaces, characters are the words.",
        choices=["wer", "cer"],
    )
    cut_utterances: bool = option(
        True, "Cut utterances above --wer_threshold out of packed windows, where that is certain, and keep the rest."
    )
    min_avg_logprob: float | None = option(
        None, "Leave out rows with a lower mean log-probability of the teacher.", at_most=0
    )
    max_no_speech_prob: float | None = option(
        None, "Leave out rows that the teacher holds for silence, so surely.", at_least=0, at_most=1
    )
    max_compression_ratio: float | None = option(
        None, "Leave out pseudo-labels that zlib shrinks more: loops.", at_least=0
    )
    max_ngram_repeats: int | None = option(
        None, "Leave out pseudo-labels that say the same three words more often.", at_least=0
    )
    min_chars_per_second: float | None = option(
        None, "Leave out pseudo-labels with fewer characters a second.", at_least=0
    )
    max_chars_per_second: float | None = option(
        None, "Leave out pseudo-labels with more characters a second.", at_least=0
    )
    drop_language_mismatch: bool = option(
        False, "Leave out rows where the teacher would have guessed another language than it was told."
    )
    drop_truncated: bool = option(True, "Leave out pseudo-labels that the teacher did not come to the end of.")
    drop_empty: bool = option(True, "Leave out rows with an empty label.")
    max_label_length: int | None = option(None, "Leave out rows with longer labels, in tokens.", at_least=0)
    timestamp_probability: float = option(
        0.2, "Share of the samples that keep the timestamps of their labels.", at_least=0, at_most=1
    )
    condition_on_prev_probability: float = option(
        0.1, "Share of the samples that are given the previous text.", at_least=0, at_most=1
    )
    shuffle_buffer_size: int = option(
        1000,
        "Rows that all processes together hold to shuffle them in streaming mode, if that is more than a block of up "
        "to 100 rows for each row of a step.",
        at_least=1,
        at_most=1_000_000,
    )

    do_train: bool = option(False, "Train.")
    do_eval: bool = option(False, "Evaluate every --eval_steps and at the end.")
    predict_with_generate: bool = option(
        False, "Measure the WER when evaluating, not the loss alone.", only_with={"do_eval": True}
    )
    generation_max_length: int | None = option(
        None,
        "The most tokens of a prediction. Default: as the decoder allows.",
        at_least=1,
        only_with={"predict_with_generate": True},
    )
    generation_num_beams: int = option(
        1, "Beams when evaluating.", at_least=1, at_most=MOST_BEAMS, only_with={"predict_with_generate": True}
    )

    kl_weight: float = option(1.0, "Weight of the KL divergence from the teacher; 0 needs no teacher.", at_least=0)
    temperature: float = option(
        2.0, "Temperature of both softmaxes in the KL divergence.", above=0, only_with={"kl_weight": True}
    )
    freeze_encoder: bool = option(
        False, "Do not train the encoder. One that equals the teacher's then runs once for both."
    )
    apply_spec_augment: bool | None = option(
        None,
        "Mask frames and mel bins of the log-mel. Default: as the student's config says, as for the masks' lengths.",
        nargs="?",
        const=True,
    )
    mask_time_prob: float | None = option(
        None, "Share of the frames that are masked. Default: as in the config.", at_least=0, at_most=1
    )
    mask_feature_prob: float | None = option(
        None, "Share of the mel bins that are masked. Default: as in the config.", at_least=0, at_most=1
    )
    noise_probability: float = option(0.0, "Share of the samples that white noise is added to.", at_least=0, at_most=1)
    noise_snr_db: list[float] = option(
        [10.0, 30.0],
        "Range of its signal-to-noise ratio in dB.",
        nargs=2,
        at_least=-100,
        at_most=100,
        only_with={"noise_probability": True},
    )
    speed_perturbation: list[float] = option(
        [1.0, 1.0], "Range of the speed that audio is played at.", nargs=2, at_least=0.5, at_most=2
    )
    cache_encoder_outputs: bool = option(False, "Keep encoder outputs on disk for later epochs (frozen encoder only).")
    cache_teacher_states: bool = option(False, "Keep the teacher's last hidden states on disk for later epochs.")
    cache_size_gb: float = option(50.0, "The most that both caches may take, in GB.", at_least=0)
    group_by_length: bool = option(
        False,
        "Let rows with labels of like length share a batch: less padding. Not with --streaming.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    per_device_train_batch_size: int = option(8, "Samples of a process in a batch.", at_least=1)
    per_device_eval_batch_size: int = option(8, "Samples of a process in an evaluation batch.", at_least=1)
    gradient_accumulation_steps: int = option(1, "Batches to an optimizer step.", at_least=1)
    max_steps: int = option(-1, "Optimizer steps. Default: as --num_train_epochs says.", at_least=-1)
    num_train_epochs: float = option(3.0, "Passes over the training data, where --max_steps is not given.", above=0)
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.", at_least=0)
    lr_scheduler_type: str = option(
        "linear",
        "Learning rate schedule, such as linear or constant_with_warmup.",
        choices=SCHEDULES,
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises to its peak.", at_least=0)
    weight_decay: float = option(0.0, "Weight decay of matrices (not of biases and layer norms).", at_least=0)
    adam_beta1: float = option(0.9, "First beta of AdamW.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Second beta of AdamW.", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.", above=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0: they are not.", at_least=0)
    max_bad_steps: int = option(
        10,
        "A step whose loss or gradients are not finite changes nothing; after so many in a row the run ends.",
        at_least=1,
    )
    logging_steps: int = option(25, "Steps between two lines of metrics.", at_least=1)
    eval_steps: int | None = option(
        None, "Steps between two evaluations. Default: only at the end.", at_least=1, only_with={"do_eval": True}
    )
    save_steps: int = option(500, "Steps between two checkpoints.", at_least=1)
    save_total_limit: int | None = option(None, "Keep so many of the newest checkpoints. Default: all.", at_least=1)
    save_best_total_limit: int = option(
        1, "Save and keep so many checkpoints of the best evaluations as well.", at_least=0
    )
    load_best_model_at_end: bool = option(False, "Save the best checkpoint as the trained model, not the last one.")


@dataclass
class Training:
    """What the training loop works with."""

    args: Arguments
    accelerator: Accelerator
    model: torch.nn.Module  # the Distiller, wrapped for the devices
    optimizer: torch.optim.Optimizer
    student: LoadedWhisper
    collator: Collator
    weights: LossWeights
    checkpoints: Checkpoints
    validator: Validator | None
    meter: Meter
    state: TrainerState = field(default_factory=TrainerState)
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    trackers: Trackers | None = None
    caches: StateCaches | None = None
    reports: StepReports | None = None
    data: Mixture | None = None

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below accelerate's wrapper."""
        return self.optimizer.optimizer


def parse_args(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Raises UserError for what it lacks or contradicts."""
    args = parse(Arguments, argv, description=__doc__)
    if not args.model_name_or_path:
        raise UserError("--model_name_or_path is missing; name the student to train")
    if not (args.do_train or args.do_eval):
        raise UserError("there is nothing to do; give --do_train, --do_eval or both")
    if not args.train_dataset_name and (args.do_train or not args.eval_dataset_name):
        raise UserError("--train_dataset_name is missing; name the data to train on")
    if not args.eval_dataset_name:
        args.eval_dataset_name, args.eval_dataset_config_name = args.train_dataset_name, args.train_dataset_config_name
    if args.kl_weight and args.do_train and not args.teacher_model_name_or_path:
        raise UserError(
            "--teacher_model_name_or_path is missing; name the teacher, or give --kl_weight 0 to train without one"
        )
    if args.do_train and args.streaming and args.max_steps <= 0:
        raise UserError("--streaming needs --max_steps, because the length of an epoch is not known")
    if args.streaming and args.group_by_length:
        raise UserError("--group_by_length needs to know all rows, which --streaming does not; leave out one of them")
    check_apart(args.output_dir, split_plus(args.train_dataset_name) + split_plus(args.eval_dataset_name))
    check_numbers(args)
    return args


def check_numbers(args: Arguments) -> None:
    """Raise UserError for numbers that contradict each other, or another argument."""
    if args.do_train and args.load_best_model_at_end and not (args.do_eval and args.save_best_total_limit):
        needed = "--save_best_total_limit 1 or more" if args.do_eval else "--do_eval"
        raise UserError(f"--load_best_model_at_end needs {needed}: else there is no best checkpoint")
    if args.max_steps == 0:
        raise UserError("--max_steps is 0; it must be 1 or more, or -1 for --num_train_epochs")
    for name in ("speed_perturbation", "noise_snr_db"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name} is {low} {high}; give the lower one first")


def load_models(args: Arguments, accelerator: Accelerator) -> tuple[LoadedWhisper, LoadedWhisper | None]:
    """The student in float32 and the teacher, if there is one, in the compute type. Raises UserError if they differ in
    what they must share: window, mel bins and vocabulary."""
    device = accelerator.device
    student = load_whisper(args.model_name_or_path, attn_type=args.attn_type, cache_dir=args.cache_dir, device=device)
    if args.gradient_checkpointing:
        student.model.activation_checkpointing_enable({"use_reentrant": False})
    if not args.kl_weight or args.teacher_model_name_or_path is None:
        return student, None
    teacher = load_whisper(
        args.teacher_model_name_or_path,
        dtype=args.dtype,
        attn_type=args.attn_type,
        cache_dir=args.cache_dir,
        device=device,
        argument="--teacher_model_name_or_path",
    )
    for what, ours, theirs in (
        ("window", student.window, teacher.window),
        ("tokenizer", student.grammar.fingerprint, teacher.grammar.fingerprint),
    ):
        if ours != theirs:
            raise UserError(
                f"student and teacher have different {what}s ({ours}, {theirs}), so the student cannot learn the "
                "teacher's predictions; make the student from this teacher with create_student_model.py"
            )
    return student, teacher


def make_validator(args: Arguments, student: LoadedWhisper, accelerator: Accelerator, collator: Collator) -> Validator:
    """What measures the student on the evaluation datasets."""
    beams, most = args.generation_num_beams, args.generation_max_length
    if is_sharded(accelerator):
        student = replace(student, model=copy.deepcopy(student.model))  # processes decode at a pace of their own
    decoder = Decoder(student, num_beams=beams, max_label_length=most) if args.predict_with_generate else None
    labeller = Labeller(student.grammar, LabelSettings(0.0, 0.0, args.seed))
    maker = ExampleMaker(labeller, student.window, args.audio_column_name)
    batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    sets = open_validation_sets(args, student)
    return Validator(sets, accelerator, maker, collator, batch_size, workers, decoder, is_sharded(accelerator))


def spec_augment(args: Arguments, config) -> SpecAugment | None:
    """SpecAugment by the flags and the student's config, None for none."""
    wanted = config.apply_spec_augment if args.apply_spec_augment is None else args.apply_spec_augment
    given = {name: getattr(args, name) for name in ("mask_time_prob", "mask_feature_prob")}
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(SpecAugment.from_config(config), **chosen) if wanted else None


def make_caches(run: Training, folder: OutputFolder, augment: WaveformAugment) -> StateCaches:
    """The caches that were asked for. Raises UserError where augmentation or training makes them worthless."""
    args, accelerator = run.args, run.accelerator
    if augment:
        raise UserError("caches cannot be used with noise or speed perturbation, which change the audio each time")
    folder.claim("states")
    accelerator.wait_for_everyone()
    return open_caches(
        folder / "states",
        accelerator.unwrap_model(run.model),
        args.cache_encoder_outputs,
        args.cache_teacher_states,
        args.cache_size_gb,
        accelerator.process_index,
        accelerator.num_processes,
    )


def make_optimizer(args: Arguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; only matrices decay."""
    decaying = set(get_parameter_names(model, [torch.nn.LayerNorm], [r"bias$"]))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decaying], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained if name not in decaying], "weight_decay": 0.0},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def train(run: Training, max_steps: int) -> None:
    """The training loop: optimizer steps, and between them metrics, evaluations and checkpoints.

    Asked to stop (SIGTERM, SIGINT), it ends the step, writes a checkpoint and leaves.
    """
    args, state = run.args, run.state
    batches = run.data.batches(run.accelerator.print)
    run.reports = StepReports(run.accelerator, args.max_bad_steps, state.bad_steps, state.bad_in_a_row)
    progress = bar(total=max_steps, initial=state.step, desc="training", unit="step")
    run.model.train()  # checkpoints are loaded in evaluation mode
    with StopRequest() as stop, progress:
        while state.step < max_steps:
            group = [next(batches) for _ in range(args.gradient_accumulation_steps)]
            optimizer_step(run, group, stop.received is not None)
            state.step += 1
            progress.update()
            last = state.step == max_steps
            logs, evaluates, saves = (
                last or bool(every and state.step % every == 0)
                for every in (args.logging_steps, args.eval_steps, args.save_steps)
            )
            stopping = run.reports.read(everything=logs or evaluates or saves)
            if stopping:
                run.reports.read(everything=True)  # a checkpoint counts the bad ones
            if logs:
                log(run)
            if run.validator is not None and evaluates:
                evaluate(run)
                saves |= found_by_main_process(lambda: state.step in state.best_steps()[: args.save_best_total_limit])
            if saves or stopping:
                save_checkpoint(run)
            run.checkpoints.raise_failure()
            if stopping and not last:
                run.checkpoints.finish()
                say(run, f"stopped at step {state.step}; the same command goes on from there")
                raise SystemExit(stop.exit_code)


def log(run: Training) -> None:
    """Write the metrics of the last steps to the trackers, and the first of them to the terminal."""
    values = run.meter.read()
    values["train/bad_steps"] = run.reports.bad_steps
    values["train/learning_rate"] = run.scheduler.get_last_lr()[0]
    if run.data.epoch is not None:
        values["train/epoch"] = run.data.epoch
    run.trackers.log(values, run.state.step)
    say(run, f"step {run.state.step}: " + ", ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items()))
    check_skipped(run)


def check_skipped(run: Training, at_end: bool = False) -> None:
    """Raise UserError if too many rows cannot be used. Of a part of them it must be more than chance could make: three
    standard deviations."""
    rows, skipped, most = run.meter.rows, run.meter.skipped, run.args.max_skipped
    allowed = most / 100 * rows
    sure = at_end or (rows >= 100 and skipped > allowed + 3 * math.sqrt(allowed))
    if sure and skipped > allowed:
        raise UserError(
            f"{skipped} of {rows} rows cannot be used, more than --max_skipped {most:g} percent; the lines that begin "
            "with 'skipped' say why: allow more to go on from the last checkpoint, or mend them"
        )


def check_end(run: Training) -> None:
    """Raise UserError if the evaluation after the last step found no finite cross-entropy, or if there is none and
    the last steps were bad."""
    values = run.state.evaluations.get(run.state.step, Evaluation({})).values
    if not values:
        run.reports.check_end(run.state.step)
    entropies = {name: value for name, value in values.items() if name.endswith("/ce")}
    if entropies and not any(map(math.isfinite, entropies.values())):  # one set may have a row that overflows
        raise UserError(
            f"the last evaluation found {next(iter(entropies))} {next(iter(entropies.values()))}, so the student is "
            "not saved; look at that data, or train with a lower --learning_rate or another --dtype"
        )


def check_evaluated(run: Training) -> None:
    """Raise UserError if the evaluation after the last step could use no row of a set: there is no figure of it."""
    evaluation = run.state.evaluations.get(run.state.step)
    if run.validator is not None and evaluation and (unmeasured := run.validator.unmeasured(evaluation.values)):
        raise UserError(
            f"no row of {', '.join(unmeasured)} could be used in the last evaluation, which therefore has no figure; "
            "the line 'rows left out of the evaluation' says why"
        )


def say(run: Training, line: str) -> None:
    """A line on the main process, above the progress bar."""
    if run.accelerator.is_main_process:
        tqdm.write(line)


def optimizer_step(run: Training, group: list[Batch], stop: bool) -> None:
    """One update from the batches of an accumulation group, which a GPU is not waited for.

    The loss is the mean over the valid tokens of all processes and batches. Dropout and the like are drawn from the
    seed, the step and the rank, so a resumed run draws the same. stop: whether this process was asked to.
    """
    accelerator, model, args = run.accelerator, run.model, run.args
    torch.manual_seed(hash((args.seed, run.state.step, accelerator.process_index)) & 0x7FFFFFFF)
    tokens = torch.full((), sum(batch.tokens for batch in group), device=accelerator.device)
    tokens = accelerator.reduce(tokens, "sum").clamp(min=1)
    sums, blamed = torch.zeros(3, device=accelerator.device, dtype=torch.float64), []
    for position, batch in enumerate(group):
        with nullcontext() if position + 1 == len(group) else accelerator.no_sync(model):
            kept = run.caches(batch, accelerator.device) if run.caches else {}
            with accelerator.autocast():
                losses = model(**batch.inputs(accelerator.device), **kept)
            # Wrappers average gradients over the processes; the sum over all of them is what is divided by all tokens.
            # A loss that is not finite makes them NaN on all processes, which leave the step out together.
            weight = torch.where(losses["loss"].isfinite(), accelerator.num_processes / tokens, torch.nan)
            accelerator.backward(losses["loss"] * weight)
        sums += torch.stack([losses[name].detach().double() for name in ("ce", "kl", "tokens")])
        blamed.append(losses["blamed"])
        for row_id, reason in batch.problems:
            tqdm.write(f"skipped {row_id}: {reason}")
    norm = clip_gradients(accelerator, [p for p in model.parameters() if p.requires_grad], args.max_grad_norm)
    if accelerator.scaler is None:  # which gives the optimizer the same itself
        run.raw_optimizer.found_inf = (~norm.isfinite()).float()  # 1: the update is left out, on the device
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.meter.add(group, sums, norm)
    run.reports.send(run.state.step + 1, group, torch.cat(blamed), norm, stop)


def evaluate(run: Training) -> None:
    """Validate, log what was found, and take note if it is the best so far."""
    with run.meter.paused():
        found = run.validator(run.model, run.weights)
    run.trackers.log(found.values, run.state.step)
    for name, rows in found.tables.items():
        run.trackers.log_table(f"eval/{name}", ["id", "reference", "prediction"], rows, run.state.step)
    for note in found.notes:
        say(run, note)
    say(run, f"step {run.state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.values.items()))
    measure = run.validator.measure(run.weights, run.args.teacher_model_name_or_path)
    run.state.evaluations[run.state.step] = evaluation = Evaluation(found.values, measure, found.rows)
    if evaluation.figure is not None and run.state.step not in run.state.best_steps():
        say(run, "other evaluations could use more rows, so this one is not ranked with them")


def save_checkpoint(run: Training) -> None:
    """A checkpoint of where training stands; every process takes part."""
    run.state.metered, run.state.streams = run.meter.sums(), run.data.to_keep()
    run.state.rows, run.state.skipped = run.meter.rows, run.meter.skipped
    run.state.bad_steps, run.state.bad_in_a_row = run.reports.bad_steps, run.reports.in_a_row
    run.state.scaler = run.accelerator.scaler.state_dict() if run.accelerator.scaler else {}
    run.checkpoints.save(run.student, run.model, run.raw_optimizer, run.scheduler, run.state)


def export(run: Training, folder: OutputFolder, repo: str | None) -> None:
    """Save the trained student with its card into the output folder, and push it."""
    args = run.args
    step = run.state.step
    if args.load_best_model_at_end:
        step = run.checkpoints.load_best(run.state, run.model)
    else:
        check_end(run)
    weights = student_weights(run.model)
    if run.accelerator.is_main_process:
        card = hub.model_card(
            name=repo or str(folder.path),
            base=args.teacher_model_name_or_path if args.kl_weight else args.model_name_or_path,
            relation="Teacher" if args.kl_weight else "Trained from",
            description=describe(args),
            arguments={**public_arguments(args), **folder.arguments()["arguments"]},
            datasets=[name for name in split_plus(args.train_dataset_name) if name],
            languages=[args.language] if args.language else [],
            results=results(run, step),
            facts={
                "Optimizer steps": step,
                "Parameters": f"{run.student.model.num_parameters():,}",
                "Arguments that changed on the way": "; ".join(folder.arguments()["changed"]),
            },
        )
        save_whisper(folder, run.student, weights, card)
        if repo:
            names = [*MODEL_FILES, METRICS_FILE]
            print(f"pushed to {hub.push_folder(folder.path, repo, names, message='Trained student')}")
        print(f"saved in {folder.path}")
    run.accelerator.wait_for_everyone()


def publish_to(args: Arguments, accelerator: Accelerator) -> str | None:
    """The repository that the student is pushed to, made before the work so that a refusal comes before it."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    return hub.resolve_repo(args.output_dir, args.hub_model_id, private=args.hub_private_repo)


def describe(args: Arguments) -> str:
    """What was done, in a sentence for the card."""
    if not args.kl_weight:
        return "A Whisper trained with cross-entropy, without the predictions of a teacher."
    return "A Whisper student distilled from its teacher with cross-entropy and KL divergence (arXiv 2311.00430)."


def results(run: Training, step: int) -> list[hub.Result]:
    """The evaluation of a step as results of the card; none if there was none."""
    figures = run.state.evaluations.get(step, Evaluation({})).values
    return [
        hub.Result(
            held_out.source.name,
            held_out.source.split,
            {name: figures[f"eval/{held_out.name}/{name}"] for name in ("wer", "cer")},
            held_out.source.config,
        )
        for held_out in (run.validator.sets if run.validator else [])
        if f"eval/{held_out.name}/wer" in figures
    ]


def begin(args: Arguments, accelerator: Accelerator, folder: OutputFolder) -> Training:
    """Load the models, wrap them for the devices, open what they are measured on."""
    student, teacher = load_models(args, accelerator)
    weights = LossWeights(kl=args.kl_weight if teacher else 0.0, temperature=args.temperature)
    log_mel = LogMel(student.feature_extractor).to(accelerator.device)
    distiller = Distiller(
        student.model,
        log_mel,
        weights,
        teacher.model if teacher else None,
        args.freeze_encoder,
        spec_augment(args, student.model.config),
    )
    if distiller.shares_encoder:
        accelerator.print("the frozen encoder equals the teacher's: it runs once for both")
    collator = Collator(student.window, student.grammar.end)
    validator = make_validator(args, student, accelerator, collator) if args.do_eval else None
    allow_dropped_layers(accelerator, distiller.layerdrop)
    model, optimizer = accelerator.prepare(distiller, make_optimizer(args, distiller))
    checkpoints = Checkpoints(folder, accelerator, args.save_total_limit, args.save_best_total_limit)
    meter = Meter(accelerator, weights)
    return Training(args, accelerator, model, optimizer, student, collator, weights, checkpoints, validator, meter)


def go_on(run: Training, folder: OutputFolder) -> int:
    """Put back what the last checkpoint holds, if there is one, and make the schedule: of how many steps."""
    args, stored = run.args, run.checkpoints.load_newest(run.model, run.raw_optimizer)
    if stored is not None:
        run.state = stored.state
        run.meter.go_on(run.state.metered, run.state.rows, run.state.skipped)
        run.data.resume(run.state.streams, run.state.step, arguments_before(run, folder), run.accelerator.print)
        if run.accelerator.scaler and run.state.scaler:
            run.accelerator.scaler.load_state_dict(run.state.scaler)
        run.accelerator.print(f"going on from {run.checkpoints.path(run.state.step)}")
    max_steps = steps_to_train(args, run.data, run.state.step)
    run.scheduler = get_scheduler(args.lr_scheduler_type, run.raw_optimizer, args.warmup_steps, max_steps)
    if stored is not None:
        go_to(stored.scheduler["last_epoch"], run.scheduler, run.raw_optimizer)
    if stored is not None and run.state.step >= max_steps:
        run.accelerator.print(f"nothing is left to train: {max_steps} steps were asked for")
    return max_steps


def arguments_before(run: Training, folder: OutputFolder) -> dict:
    """The arguments that the checkpoints in the folder were trained with, on every process."""
    kept = found_by_main_process(folder.arguments)
    return {**public_arguments(run.args), **(kept["arguments"] if kept else {})}


def note_arguments(run: Training, folder: OutputFolder, max_steps: int) -> None:
    """Keep the arguments that decide what is learnt. Where a run goes on with others, say so, now and in the card."""
    if not run.accelerator.is_main_process or run.state.step >= max_steps:
        return  # where nothing is left to train, those that it was trained with stay
    now = {name: value for name, value in public_arguments(run.args).items() if name not in MAY_CHANGE}
    kept = (run.state.step and folder.arguments()) or {"arguments": now, "changed": []}
    before = kept["arguments"]
    differing = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
    if differing:
        kept["changed"].append(f"from step {run.state.step} on, {', '.join(differing)}")
        say(run, f"going on with other arguments than before: {', '.join(differing)}")
    folder.keep_arguments({"arguments": now, "changed": kept["changed"]})


def steps_to_train(args: Arguments, data: Mixture, step: int) -> int:
    """Optimizer steps: --max_steps, else those that were done and what is left of --num_train_epochs."""
    if args.max_steps > 0:
        return args.max_steps
    return step + math.ceil(data.batches_until(args.num_train_epochs) / args.gradient_accumulation_steps)


def open_trackers(run: Training, folder: OutputFolder) -> Trackers:
    """The trackers of this run; after a resume they go on behind its step."""
    args, step = run.args, run.state.step
    going_on = step or (None if args.do_train else sys.maxsize)  # an evaluation alone leaves all lines of a training
    return Trackers(run.accelerator, folder, args.wandb_project, args.wandb_name, public_arguments(args), going_on)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    accelerator = training_accelerator(args)
    with OutputFolder(args.output_dir, STAGE, args.overwrite_output_dir, accelerator.is_main_process) as folder:
        if args.do_train:
            folder.claim(*MODEL_FILES)
        repo = publish_to(args, accelerator)
        run = begin(args, accelerator, folder)
        if args.do_train:
            train_and_save(run, folder, repo)
        else:
            run.trackers = open_trackers(run, folder)
            evaluate(run)
            check_evaluated(run)
        run.trackers.finish()


def train_and_save(run: Training, folder: OutputFolder, repo: str | None) -> None:
    """Train from where the last checkpoint stands to the end, and save the student."""
    args, student = run.args, run.student
    settings = LabelSettings(args.timestamp_probability, args.condition_on_prev_probability, args.seed)
    labeller = Labeller(student.grammar, settings)
    sets = open_training_sets(args, student, labeller, VerdictFiles(folder, run.accelerator), run.accelerator.print)
    augment = WaveformAugment(args.noise_probability, tuple(args.noise_snr_db), tuple(args.speed_perturbation))
    caching = args.cache_encoder_outputs or args.cache_teacher_states
    if caching:
        run.caches = make_caches(run, folder, augment)
    maker = ExampleMaker(labeller, student.window, args.audio_column_name, augment, audio_keys=caching)
    accelerator = run.accelerator
    share = Share(accelerator.process_index, accelerator.num_processes, args.per_device_train_batch_size)
    run.data = Mixture(args, sets, maker, run.collator, share)
    max_steps = go_on(run, folder)
    note_arguments(run, folder, max_steps)
    run.trackers = open_trackers(run, folder)
    try:
        train(run, max_steps)
    finally:
        run.checkpoints.finish()
    check_skipped(run, at_end=True)
    export(run, folder, repo)
    check_evaluated(run)


if __name__ == "__main__":
    exit_on_user_error(main)
