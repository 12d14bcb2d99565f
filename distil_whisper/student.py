"""A smaller student made of a teacher's layers."""

import copy
import re
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration

from distil_whisper.errors import UserError

DECODER_LAYERS = 2  # of the student, unless asked otherwise
_LAYER = re.compile(r"(?P<stack>encoder|decoder)\.layers\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class LayerMap:
    """Which teacher layer each student layer is a copy of: teacher layers (from 0) in the student's order."""

    encoder: list[int]
    decoder: list[int]


def spaced_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layers (from 0) that a student of so many layers copies: first, last, and evenly spaced between.

    Places between two layers are rounded down: 2 of 32 are [0, 31], 3 of 32 are [0, 15, 31]. A single layer is the
    last one, [31], as in Distil-Whisper (Gandhi et al., 2023, arXiv:2311.00430), where DistilBART (Shleifer and Rush,
    2020, arXiv:2010.13002), whose recommendation maximal spacing is, takes the first.
    """
    if student_layers == 1:
        return [teacher_layers - 1]
    return [index * (teacher_layers - 1) // (student_layers - 1) for index in range(student_layers)]


def make_student(
    teacher: WhisperForConditionalGeneration,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    encoder_layers_numbers: list[int] | None = None,
    decoder_layers_numbers: list[int] | None = None,
) -> tuple[WhisperForConditionalGeneration, LayerMap]:
    """Make a student of some of a teacher's layers and all its other weights, in float32.

    Without numbers the layers are maximally spaced: all of the encoder and two of the decoder unless a count says
    otherwise. Numbers count from 0, negative ones from the end. The student's config counts its layers, and its
    generation config is the teacher's with alignment heads that the student has. Raises UserError for numbers that
    the teacher lacks or that are given twice, and for a count that the teacher or the numbers contradict.
    """
    config = copy.deepcopy(teacher.config)
    layers = LayerMap(
        encoder=_choose(
            "encoder", config.encoder_layers, encoder_layers, encoder_layers_numbers, config.encoder_layers
        ),
        decoder=_choose("decoder", config.decoder_layers, decoder_layers, decoder_layers_numbers, DECODER_LAYERS),
    )
    config.encoder_layers, config.decoder_layers = len(layers.encoder), len(layers.decoder)
    config.dtype = torch.float32
    student = WhisperForConditionalGeneration(config)
    student.load_state_dict(_student_state(teacher.state_dict(), layers))
    student.generation_config = _generation_config(teacher.generation_config, layers.decoder, config)
    return student.eval(), layers


def alignment_heads(teacher_heads: list[list[int]] | None, decoder_layers: list[int], heads: int) -> list[list[int]]:
    """The [layer, head] pairs whose attention gives a student its word timestamps.

    The teacher's own where their layer was copied (decoder_layers are the teacher layers in the student's order), else
    all `heads` heads of the upper half of the student's decoder, the fallback of openai/whisper.
    """
    surviving = [[decoder_layers.index(layer), head] for layer, head in teacher_heads or [] if layer in decoder_layers]
    upper_half = range(len(decoder_layers) // 2, len(decoder_layers))
    return sorted(surviving) or [[layer, head] for layer in upper_half for head in range(heads)]


def _choose(stack: str, available: int, count: int | None, numbers: list[int] | None, default: int) -> list[int]:
    """The teacher layers that one stack of the student copies."""
    if numbers:
        return _numbered(stack, available, count, numbers)
    wanted = default if count is None else count
    if not 1 <= wanted <= available:
        nearest = min(max(wanted, 1), available)
        raise UserError(
            f"--{stack}_layers is {wanted}, but the teacher has {available} {stack} layers "
            f"(allowed: 1 to {available}; nearest: {nearest})"
        )
    return spaced_layers(available, wanted)


def _numbered(stack: str, available: int, count: int | None, numbers: list[int]) -> list[int]:
    argument = f"--{stack}_layers_numbers"
    for number in numbers:
        if not -available <= number < available:
            nearest = available - 1 if number > 0 else -available
            raise UserError(
                f"{argument} names layer {number}, but the teacher has {available} {stack} layers "
                f"(allowed: 0 to {available - 1}, or -{available} to -1 from the end; nearest: {nearest})"
            )
    layers = [number % available for number in numbers]
    repeated = [number for number, layer in zip(numbers, layers, strict=True) if layers.count(layer) > 1]
    if repeated:
        raise UserError(
            f"{argument} names one layer more than once ({', '.join(map(str, repeated))} of {available} layers); "
            "name each teacher layer at most once"
        )
    if count is not None and count != len(layers):
        raise UserError(
            f"--{stack}_layers is {count}, but {argument} names {len(layers)} layers ({' '.join(map(str, numbers))}); "
            f"give one of the two, or --{stack}_layers {len(layers)}"
        )
    return layers


def _student_state(teacher_state: dict[str, torch.Tensor], layers: LayerMap) -> dict[str, torch.Tensor]:
    """The teacher's weights under the student's names."""
    state = {}
    for name, weight in teacher_state.items():
        match = _LAYER.search(name)
        if match is None:
            state[name] = weight
            continue
        copied = getattr(layers, match["stack"])
        if int(match["index"]) in copied:
            place = f"{match['stack']}.layers.{copied.index(int(match['index']))}."
            state[name[: match.start()] + place + name[match.end() :]] = weight
    return state


def _generation_config(teacher_config: GenerationConfig, decoder_layers: list[int], config) -> GenerationConfig:
    generation_config = copy.deepcopy(teacher_config)
    # One that is marked as made from a model config is made anew when it is loaded, without what is set here.
    generation_config._from_model_config = None
    generation_config.alignment_heads = alignment_heads(
        getattr(teacher_config, "alignment_heads", None), decoder_layers, config.decoder_attention_heads
    )
    return generation_config
