"""A Whisper of a real size with made-up weights that says more, the longer the sound of a window is."""

from pathlib import Path

import numpy as np
import torch
from measuring import SIZES, this_device
from toy_whisper import WhisperFeatureExtractor, make_model, make_tokenizer

from distil_whisper.audio import LogMel
from distil_whisper.models import encoder_states

LEVELS = 5  # lengths of sound that the model tells apart: fifths of its window
PREFIX = 3  # <|startoftranscript|>, language, task
WORDS = [one + two for one in ("ba", "de", "ki", "lo", "mu", "na", "po") for two in ("fa", "gi", "hu", "je", "to")]
SAYS, APART = 20, 12  # how loud positions name a token, and how far apart the levels of sound are


def noise(parts: int, samples: int, draw: np.random.Generator) -> np.ndarray:
    """Sound as long as some of the LEVELS parts of a window."""
    return draw.standard_normal(samples * parts // LEVELS, np.float32) * 0.1


def words_of(parts: int, label_tokens: int) -> list[str]:
    """What is said of such a sound, a token each; two timestamps and the end token come to them."""
    return [WORDS[place % len(WORDS)] for place in range(label_tokens * parts // LEVELS - 3)]


def transcript(parts: int, label_tokens: int, draw: np.random.Generator) -> str:
    """A transcript of it in which a tenth of the words are wrong."""
    return " ".join(draw.choice(WORDS) if draw.random() < 0.1 else word for word in words_of(parts, label_tokens))


def save_talker(folder: Path, size: str, label_tokens: int, dtype: str) -> None:
    """Write the checkpoint in a type. Positions name what is said, label_tokens of it in a full window, as many fewer
    as the window's sound is shorter: the last layer hears by uniform attention whether that is over."""
    of = SIZES[size]
    torch.manual_seed(0)
    text = " " + " ".join(WORDS)
    small = make_tokenizer([text], vocab_size=1000)
    tokenizer = make_tokenizer([text], vocab_size=1000, fillers=of["vocabulary"] - len(small))
    with this_device():  # on a CPU the random numbers of large-v3 take longer than all else
        model = make_model(tokenizer, 30, of["d_model"], of["layers"], of["layers"], of["heads"], of["mels"], 448)
    model.to(getattr(torch, dtype))
    extractor = WhisperFeatureExtractor(feature_size=of["mels"])
    words = tokenizer.encode(" " + " ".join(words_of(LEVELS, label_tokens)), add_special_tokens=False)
    begin, closing, end = tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|29.98|>", "<|endoftext|>"])
    with torch.no_grad():
        tokens, places = model.get_input_embeddings().weight, model.model.decoder.embed_positions.weight
        tokens[end] = torch.randn_like(tokens[end]) * 0.02  # as padding it would be 0
        tokens[list({*words, begin, closing, end})] *= 4  # likelier than all timestamps together
        listen(model, extractor, tokens[closing])
        said = places[PREFIX - 1 :]
        said[0] = SAYS * tokens[begin]
        for place, word in enumerate(words, 1):
            said[place] = SAYS * tokens[word]
        for level in range(1, LEVELS + 1):
            last = label_tokens * level // LEVELS
            # louder than the word there, and where there is more sound than that not as loud
            said[last - 2] += (SAYS + APART * (level - 0.4)) * tokens[closing]
            said[last - 1] += SAYS / 2 * tokens[end]  # chosen where no word may follow
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)


def listen(model, extractor: WhisperFeatureExtractor, away_from: torch.Tensor) -> None:
    """Let the decoder's last layer turn away from a token, by APART for each level of sound beyond the first."""
    draw, samples = np.random.default_rng(0), 30 * extractor.sampling_rate
    windows = np.zeros((LEVELS, samples), np.float32)
    for parts, window in enumerate(windows, 1):
        sound = noise(parts, samples, draw)
        window[: len(sound)] = sound
    log_mel, encoder = LogMel(extractor).to(model.device), model.get_encoder().eval()
    features = log_mel(torch.from_numpy(windows).to(model.device)).to(model.dtype)
    heard = encoder_states(encoder, features).double().mean(1)
    levels = torch.arange(LEVELS, dtype=torch.double, device=heard.device)
    tells = torch.linalg.pinv(heard) @ levels  # along it, the mean states of all levels go by equal steps
    attention = model.model.decoder.layers[-1].encoder_attn
    for layer in (attention.q_proj, attention.v_proj, attention.out_proj):
        layer.weight.zero_()
        layer.bias.zero_()
    for place in range(2):  # what rounding leaves of it, too
        attention.v_proj.weight[place] = tells
        tells = tells - attention.v_proj.weight[place].double()
        attention.out_proj.weight[:, place] = -APART * away_from
