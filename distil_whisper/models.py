"""Whisper checkpoints, loaded for inference with all that decoding needs."""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn import functional
from transformers import (
    AutoConfig,
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

from distil_whisper.arguments import attention
from distil_whisper.attention import BY_PRODUCTS
from distil_whisper.audio import Window
from distil_whisper.errors import UserError, refuse_missing_path
from distil_whisper.outputs import RECORDS, OutputFolder, remove, sync_one
from distil_whisper.tokens import Grammar

ENGLISH_ONLY_VOCABULARY = (
    51_864  # openai/whisper tells its English-only models by this size; multilingual ones have more
)
FRAMES_AT_ONCE = 3000  # log-mel frames that a CPU's encoder is given together

SIZES = (  # of a config, which are all 1 or more
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "vocab_size",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
)
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")

BESIDE = f"{RECORDS}/model"  # where a checkpoint is written before it is moved into an output folder
MODEL_FILES = (  # what a saved checkpoint is made of; config.json comes last, and makes it loadable
    "README.md",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "config.json",
)


@dataclass
class LoadedWhisper:
    """A model in evaluation mode with its tokenizer, feature extractor, token grammar and window."""

    model: WhisperForConditionalGeneration
    tokenizer: WhisperTokenizer
    feature_extractor: WhisperFeatureExtractor
    grammar: Grammar
    window: Window


def load_whisper(
    name: str,
    *,
    dtype: str = "float32",
    attn_type: str | None = None,
    cache_dir: str | None = None,
    device: torch.device | str | None = None,
    argument: str = "--model_name_or_path",
) -> LoadedWhisper:
    """Load a checkpoint (a folder or a Hub id) for inference; the device is a GPU where there is one.

    Weights are read from safetensors only. `argument` is named in messages. Raises UserError for a checkpoint that is
    missing, incomplete or not Whisper.
    """
    if Path(name).is_file():
        raise UserError(f"{argument} {name} is a file; give the folder of the checkpoint, {Path(name).parent}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fastest = BY_PRODUCTS if device.type == "cpu" and dtype == "bfloat16" else None
    refuse_missing_path(name, argument=argument)
    config = _load(AutoConfig, name, argument, cache_dir=cache_dir)
    if (Path(name) / "generation_config.json").is_file():  # loading the model passes over a damaged one
        _load(GenerationConfig, name, argument)
    if config.model_type != "whisper":
        raise UserError(f"{argument} {name} is a {config.model_type} model; give a Whisper checkpoint")
    if (problem := _config_problem(config)) is not None:
        raise UserError(f"{argument} {name} cannot be used: its config.json has {problem}")
    model, report = _load(
        WhisperForConditionalGeneration,
        name,
        argument,
        cache_dir=cache_dir,
        dtype=getattr(torch, dtype),
        attn_implementation=attention(attn_type) or fastest,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are in the report, without a traceback
        output_loading_info=True,
    )
    if (problem := _weights_problem(report)) is not None:
        raise UserError(f"{argument} {name} cannot be used: {problem}")
    tokenizer = _load(WhisperTokenizer, name, argument, cache_dir=cache_dir)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what is made where there are no files
        raise UserError(f"{argument} {name} has no tokenizer; put that of its teacher beside it (tokenizer.json)")
    feature_extractor = _load(WhisperFeatureExtractor, name, argument, cache_dir=cache_dir)
    grammar = Grammar(tokenizer, is_multilingual(model, tokenizer), config.max_target_positions)
    if (problem := _tokenizer_problem(grammar, model)) is not None:
        raise UserError(f"{argument} {name} cannot be used: {problem}; give model and tokenizer of one checkpoint")
    complete_generation_config(model, grammar)
    window = Window.from_models(feature_extractor, model.config)
    contiguous_states(model)
    reproducible_positions(model)
    model.to(device).eval()
    if broken := not_finite(model.state_dict()):
        raise UserError(f"{argument} {name} cannot be used: its weight {broken} is not finite in {dtype}")
    return LoadedWhisper(model, tokenizer, feature_extractor, grammar, window)


def _config_problem(config) -> str | None:
    """What no Whisper config can have, such as no layers; None if there is no such thing."""
    for name in SIZES:
        if getattr(config, name) < 1:
            return f"{name} {getattr(config, name)}; it must be 1 or more"
    for name in DROPOUTS:
        if not 0 <= getattr(config, name) < 1:
            return f"{name} {getattr(config, name)}; it must be at least 0 and below 1"
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if config.d_model % getattr(config, name):
            return f"{name} {getattr(config, name)}, which does not divide d_model {config.d_model}"
    return None


def _weights_problem(report: dict) -> str | None:
    """Where the weights of a checkpoint are not those that its config describes, by the report of their loading."""
    if report["mismatched_keys"]:
        weight, found, wanted = min(report["mismatched_keys"])
        return f"its weight {weight} is {list(found)}, and its config.json wants {list(wanted)}"
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        return f"it lacks {len(missing)} weights, such as {missing[0]}"
    if beyond := sorted(name for name in report["unexpected_keys"] if ".layers." in name):
        return f"it has {len(beyond)} weights of layers that its config.json does not name, such as {beyond[0]}"
    return None


def _tokenizer_problem(grammar: Grammar, model: WhisperForConditionalGeneration) -> str | None:
    """Where a model was trained with other token ids than its tokenizer has, as far as its configs tell."""
    if grammar.timestamp_end >= model.config.vocab_size:
        return f"its tokenizer has {grammar.timestamp_end + 1} tokens, and its vocab_size is {model.config.vocab_size}"
    without_times = getattr(model.generation_config, "no_timestamps_token_id", None)
    for name, of_model, of_tokenizer in (
        ("<|startoftranscript|>", model.config.decoder_start_token_id, grammar.start),
        ("<|notimestamps|>", without_times, grammar.no_timestamps),
    ):
        if of_model not in (None, of_tokenizer):
            return f"{name} is token {of_model} of its model, and token {of_tokenizer} of its tokenizer"
    return None


def contiguous_states(model: WhisperForConditionalGeneration) -> None:
    """Let a model's encoder layers hand on contiguous states.

    transformers transposes what comes from the convolutions, and every sum and every norm behind them goes through
    memory against its order: a quarter of the encoder's time on an H100.
    """
    model.get_encoder().layers[0].register_forward_pre_hook(_contiguous)


def _contiguous(_layer, given: tuple) -> tuple:
    return given[0].contiguous(), *given[1:]


class ReproduciblePositions(WhisperPositionalEmbedding):
    """The decoder's position table, whose gradient has the same bits each time.

    transformers indexes the table; the backward pass of that adds up with a CPU's threads racing.
    """

    def forward(self, input_ids, cache_length=0, position_ids=None):
        """The rows of the table for position_ids, else from cache_length on, as transformers has it."""
        if position_ids is None:
            return super().forward(input_ids, cache_length)
        return functional.embedding(position_ids, self.weight)


def reproducible_positions(model: WhisperForConditionalGeneration) -> None:
    """Let a model that is trained with the same command get the same weights, on any number of threads."""
    model.get_decoder().embed_positions.__class__ = ReproduciblePositions


def encoder_states(encoder: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The last hidden states [batch, positions, width] of log-mel windows [batch, mels, frames].

    On a CPU, without gradients, some 30 s at a time: what a layer hands to the next then stays in the cache.
    """
    in_parts = features.device.type == "cpu" and not torch.is_grad_enabled()
    parts = features.split(max(1, FRAMES_AT_ONCE // features.shape[-1])) if in_parts else [features]
    return torch.cat([encoder(part).last_hidden_state for part in parts])


def is_multilingual(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> bool:
    """Whether a model takes a language and a task token: by its generation config, else by its vocabulary."""
    generation_config = model.generation_config
    if getattr(generation_config, "is_multilingual", None) is not None:
        return generation_config.is_multilingual
    if getattr(generation_config, "lang_to_id", None):
        return True
    return "<|de|>" in tokenizer.get_vocab() and model.config.vocab_size != ENGLISH_ONLY_VOCABULARY


def complete_generation_config(model: WhisperForConditionalGeneration, grammar: Grammar) -> None:
    """Give the generation config what old or derived checkpoints lack, so that `generate` builds the grammar's prefix.

    A prefix that is forced by position is dropped: language and task name it.
    """
    generation_config = model.generation_config
    generation_config.forced_decoder_ids = None
    if hasattr(model.config, "forced_decoder_ids"):
        model.config.forced_decoder_ids = None
    found = {
        "is_multilingual": grammar.multilingual,
        "no_timestamps_token_id": grammar.no_timestamps,
        "prev_sot_token_id": grammar.previous,
    }
    if grammar.multilingual:
        vocabulary = grammar.tokenizer.get_vocab()
        names = [f"<|{code}|>" for code in LANGUAGES if f"<|{code}|>" in vocabulary]
        found["lang_to_id"] = {name: vocabulary[name] for name in names}
        found["task_to_id"] = {task: grammar.id_of(f"<|{task}|>") for task in TASK_IDS}
    for name, value in found.items():
        if getattr(generation_config, name, None) is None:
            setattr(generation_config, name, value)


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's weights in their type, the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        checksum = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum}".encode())
    return digest.hexdigest()


def not_finite(weights: dict[str, torch.Tensor]) -> str | None:
    """The first of the weights, by its name, that holds NaN or infinity; None if none does."""
    return next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)


def write_whisper(path: Path, whisper: LoadedWhisper, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a checkpoint into a folder, with the weights that are given, else those of the model."""
    if weights is not None and whisper.model.config.tie_word_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != "proj_out.weight"}
    whisper.model.save_pretrained(path, state_dict=weights, max_shard_size="1TB")
    whisper.tokenizer.save_pretrained(path)
    whisper.feature_extractor.save_pretrained(path)


def save_whisper(
    folder: OutputFolder,
    whisper: LoadedWhisper,
    weights: dict[str, torch.Tensor] | None = None,
    card: str | None = None,
) -> None:
    """Save a checkpoint among the other files of an output folder: written beside and synced, then moved, config.json
    last. What is left beside by a killed run is replaced by the next one, or removed as it opens the folder.

    Raises UserError for weights that are not finite.
    """
    if broken := not_finite(whisper.model.state_dict() if weights is None else weights):
        raise UserError(
            f"the student's weights are not finite (such as {broken}), so they are not saved in {folder.path}"
        )
    with folder.new_folder(BESIDE) as beside:
        write_whisper(beside, whisper, weights)
        if card is not None:
            (beside / "README.md").write_text(card, encoding="utf-8")
    names = sorted(os.listdir(folder / BESIDE), key=lambda name: name == "config.json")
    folder.claim(*names)
    remove(folder / "config.json")  # a mixture of old and new files must not load
    for name in names:
        os.replace(folder / BESIDE / name, folder / name)
    sync_one(folder.path)
    folder.remove(BESIDE)


def _load(kind: type, name: str, argument: str, **options):
    """`kind.from_pretrained(name)`, with a sentence for what cannot be loaded."""
    try:
        return kind.from_pretrained(name, **options)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split()).split(". ", 1)[0]
        raise UserError(f"{argument} {name} cannot be loaded as a Whisper checkpoint: {reason}") from error
