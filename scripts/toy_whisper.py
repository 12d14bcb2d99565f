"""Make a small, untrained Whisper: its own tokenizer with all of Whisper's special tokens, random weights.

python scripts/toy_whisper.py --text_file words.txt --save_dir toy --window_length_s 6 --d_model 128
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

TIMESTAMPS = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
TASKS = ("translate", "transcribe")


def make_tokenizer(
    texts: list[str], vocab_size: int = 400, multilingual: bool = True, fillers: int = 0
) -> WhisperTokenizer:
    """A byte-level BPE tokenizer trained on the texts, with Whisper's special and timestamp tokens in their order.

    fillers: so many more tokens of text, which no text uses, for a vocabulary of a real size.
    """
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=1, show_progress=False)
    merges = [tuple(merge) for merge in _merges(trainer)]
    vocabulary = trainer.get_vocab()
    languages = list(LANGUAGES)[:99] if multilingual else ["en"]
    special = ["<|startoftranscript|>", *(f"<|{code}|>" for code in languages), *(f"<|{task}|>" for task in TASKS)]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    vocabulary |= {f"filler{number}": len(vocabulary) + number for number in range(fillers)}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.add_tokens(TIMESTAMPS)
    tokenizer.english_spelling_normalizer = {}
    return tokenizer


def make_model(
    tokenizer: WhisperTokenizer,
    window_length_s: float,
    d_model: int = 128,
    encoder_layers: int = 2,
    decoder_layers: int = 4,
    heads: int = 4,
    num_mel_bins: int = 80,
    max_target_positions: int = 128,
    multilingual: bool = True,
    max_initial_timestamp_index: int = 50,
) -> WhisperForConditionalGeneration:
    """A Whisper with random weights for a tokenizer and a window length, and the generation config that it needs."""
    id_of = tokenizer.convert_tokens_to_ids
    end = id_of("<|endoftext|>")
    shared_ids = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": id_of("<|startoftranscript|>"),
    }
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=num_mel_bins,
        d_model=d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_source_positions=int(window_length_s * 50),
        max_target_positions=max_target_positions,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **shared_ids,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **shared_ids,
        max_length=max_target_positions,
        is_multilingual=multilingual,
        no_timestamps_token_id=id_of("<|notimestamps|>"),
        prev_sot_token_id=id_of("<|startofprev|>"),
        max_initial_timestamp_index=max_initial_timestamp_index,
        return_timestamps=False,
        alignment_heads=[[layer, h] for layer in range(decoder_layers // 2, decoder_layers) for h in range(heads)],
        **(
            {
                "lang_to_id": {f"<|{code}|>": id_of(f"<|{code}|>") for code in list(LANGUAGES)[:99]},
                "task_to_id": {task: id_of(f"<|{task}|>") for task in TASKS},
            }
            if multilingual
            else {}
        ),
    )
    return model


def save(folder: str | Path, texts: list[str], window_length_s: float, seed: int = 0, **model_options) -> Path:
    """Write model, tokenizer and feature extractor of a toy Whisper into a folder."""
    torch.manual_seed(seed)
    multilingual = model_options.get("multilingual", True)
    tokenizer = make_tokenizer(texts, multilingual=multilingual)
    make_model(tokenizer, window_length_s, **model_options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mels = model_options.get("num_mel_bins", 80)
    WhisperFeatureExtractor(feature_size=mels, chunk_length=window_length_s).save_pretrained(folder)
    return Path(folder)


def _merges(trainer: ByteLevelBPETokenizer) -> list[list[str]]:
    return [m.split(" ") if isinstance(m, str) else m for m in json.loads(trainer.to_str())["model"]["merges"]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_file", required=True, help="Text that the tokenizer is trained on.")
    parser.add_argument("--save_dir", required=True)
    parser.add_argument("--window_length_s", type=int, default=6)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--encoder_layers", type=int, default=2)
    parser.add_argument("--decoder_layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    texts = Path(args.pop("text_file")).read_text(encoding="utf-8").splitlines()
    save(args.pop("save_dir"), texts, args.pop("window_length_s"), **args)


if __name__ == "__main__":
    main()
