"""Time the labelling engine against `generate` as a first script calls it.

python benchmarks/labelling.py --json labelling.json

The reference takes windows as they come: `WhisperFeatureExtractor`, then `generate(return_timestamps=True)`. The
engine decodes windows of like length together, and with "drafts" reads transcripts in which a tenth of the words are
wrong. Sound is 6 to 30 s long, as that of utterances; the teacher is a Whisper of a real size, tiny on a CPU and
large-v3 on a GPU, whose weights are made up: it writes --label_tokens tokens for a full window, and fewer for shorter
sound. Its words hang on their places alone, so equal tokens prove little there: with --model_name_or_path and
--dataset_name the comparison is of a real model on real speech. A second comparison is of clips of 6 s, which the
engine packs. Every variant runs in processes of its own, in turn; ratios are medians of pairs, each to the reference
in the same type. The figure called `speedup` is that of the engine's fastest variant with a WER not above its
reference's, which `speedup_is_of` names.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import jiwer
import numpy as np
import torch
from measuring import Clock, in_turn, machine, make_parser, this_device, write_json
from transformers import WhisperForConditionalGeneration

from distil_whisper.audio import decode
from distil_whisper.decoding import Decoder
from distil_whisper.labelling import decode_windows, expected_lengths
from distil_whisper.meters import peak_memory
from distil_whisper.mixing import batched
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.normalisation import normaliser
from distil_whisper.packing import Utterance, WindowAudio, pack, single
from distil_whisper.reading import open_source

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from talker import LEVELS, noise, save_talker, transcript

BFLOAT16 = ("reference_bfloat16", "engine_bfloat16", "engine_bfloat16_drafts")
OTHERS = ("engine_no_graphs",) if torch.cuda.is_available() else BFLOAT16
VARIANTS = ("reference", "engine", "engine_drafts", *OTHERS, "ctranslate2")
PACKED = ("engine_packed",) if torch.cuda.is_available() else ("engine_packed", "engine_bfloat16_packed")
CLIPS = ("reference_clips", *(() if torch.cuda.is_available() else ("reference_bfloat16_clips",)), *PACKED)
TOLD = ("en", "transcribe")


def windows(args, whisper: LoadedWhisper) -> tuple[list[WindowAudio], list[str | None]]:
    """What is decoded and its transcripts: of a dataset, or sound as long as utterances or as clips."""
    count, draw = args.batches * args.batch_size, np.random.default_rng(1)
    size, rate = whisper.window.samples, whisper.window.sampling_rate
    if args.dataset_name and args.variant not in CLIPS:
        source = open_source(args.dataset_name, args.dataset_config_name, args.dataset_split_name)
        rows = list(islice(source.rows(0), count))
        audio, texts = [decode(row["audio"], rate) for row in rows], [row.get("text") for row in rows]
    else:
        clips = args.variant in CLIPS
        parts = [1] * (args.batch_size * LEVELS) if clips else draw.permutation(count) % LEVELS + 1
        audio = [noise(number, size, draw) for number in parts]
        texts = [transcript(number, args.label_tokens, draw) for number in parts]
    utterances = [Utterance(str(n), "recording", {}, samples, TOLD) for n, samples in enumerate(audio)]
    if args.variant in PACKED:
        packed = list(pack(utterances, size))
        return packed, [None] * len(packed)
    return [single(utterance) for utterance in utterances], texts


class Reference:
    """`generate` as a first script calls it: a batch at a time, as the windows come."""

    def __init__(self, whisper: LoadedWhisper, clock: Clock, args):
        self.whisper, self.clock = whisper, clock
        self.batch_size, self.most = args.batch_size, args.max_label_length

    def __call__(self, windows: Sequence[WindowAudio], _texts: Sequence[str | None]) -> list[list[int]]:
        """The tokens of each window."""
        batches = batched(iter(windows), self.batch_size)
        return [tokens for batch in batches for tokens in self.of_batch([window.samples for window in batch])]

    def of_batch(self, batch: list[np.ndarray]) -> list[list[int]]:
        """The tokens of each window of a batch."""
        model, grammar = self.whisper.model, self.whisper.grammar
        with self.clock.part("log-mel"):
            rate = self.whisper.window.sampling_rate
            features = self.whisper.feature_extractor(batch, sampling_rate=rate, return_tensors="pt")
            features = features.input_features.to(model.device, model.dtype)
        told = dict(zip(("language", "task"), TOLD, strict=True))
        found = model.generate(features, return_timestamps=True, max_new_tokens=self.most, num_beams=1, **told)
        return [grammar.spoken(row.tolist()) for row in found]


class Engine:
    """The labelling engine, with one of its decoders."""

    def __init__(self, whisper: LoadedWhisper, clock: Clock, args, make):
        self.whisper, self.batch_size, self.drafts = whisper, args.batch_size, args.variant.endswith("drafts")
        self.decoder = make(whisper, max_label_length=args.max_label_length, return_timestamps=True)
        clock.around(self.decoder, "log_mel", "log-mel")

    def __call__(self, windows: Sequence[WindowAudio], texts: Sequence[str | None]) -> list[list[int]]:
        """The tokens of each window."""
        drafts, lengths = texts if self.drafts else None, expected_lengths(windows, texts)
        found = decode_windows(self.decoder, windows, lengths, self.whisper.window, self.batch_size, drafts)
        return [self.whisper.grammar.spoken(result.ids) for result in found]


def engine_of(variant: str):
    """What decodes in a variant."""
    if variant.startswith("reference"):
        return Reference
    if variant != "ctranslate2":
        return partial(Engine, make=partial(Decoder, cuda_graphs=not variant.endswith("no_graphs")))
    from distil_whisper.ctranslate2_backend import CTranslate2Decoder  # which may be missing

    return partial(Engine, make=partial(CTranslate2Decoder, device=this_device()))


def run_variant(args) -> dict:
    """One variant in this process: seconds, tokens by window, peak memory, parts, and texts where there is speech."""
    device = this_device()
    dtype = "bfloat16" if "bfloat16" in args.variant else args.dtype
    name = args.talker if args.variant in CLIPS else args.model_name_or_path or args.talker
    whisper = load_whisper(name, dtype=dtype, device=device)
    if args.variant.startswith("reference"):  # as a first script loads it
        model = WhisperForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, dtype))
        whisper = replace(whisper, model=model.to(device).eval())
    clock = Clock(device)
    clock.around(whisper.model.get_encoder(), "forward", "encoder")
    decode_all = engine_of(args.variant)(whisper, clock, args)
    heard, texts = windows(args, whisper)
    first = args.batch_size * (2 if device.type == "cuda" else 1)
    decode_all(heard[:first], texts[:first])  # warms the machine up, and makes graphs
    clock.seconds.clear()
    began = clock.now()
    tokens = decode_all(heard, texts)
    seconds = clock.now() - began
    parts = {**clock.seconds, "decoder": seconds - sum(clock.seconds.values())}
    audio = sum(len(window.samples) for window in heard) / whisper.window.sampling_rate
    wer = None if None in texts else error_rate(texts, tokens, whisper)
    return {"seconds": seconds, "audio": audio, "tokens": tokens, "peak": peak_memory(), "parts": parts, "wer": wer}


def error_rate(texts: list[str], tokens: list[list[int]], whisper: LoadedWhisper) -> float:
    """WER in percent."""
    rules, grammar = normaliser(None, TOLD[0], whisper.tokenizer), whisper.grammar
    said = [rules(whisper.tokenizer.decode([t for t in row if t < grammar.end])) for row in tokens]
    return 100 * jiwer.wer([rules(text) for text in texts], said)


def reference_of(variant: str) -> str:
    """The reference that a variant is compared with: of the same windows, in the same type."""
    dtype, clips = ("_bfloat16" if "bfloat16" in variant else ""), ("_clips" if variant in PACKED else "")
    return f"reference{dtype}{clips}"


def summarise(args, runs: dict[str, list[dict]]) -> dict:
    """Medians, ratios of pairs, and how many tokens are the reference's."""
    median = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}

    def speedup(variant: str) -> float:
        """How many times as much audio a second as the reference in the same type."""
        pairs = zip(runs[reference_of(variant)], runs[variant], strict=True)
        return statistics.median(
            (other["audio"] / other["seconds"]) / (one["audio"] / one["seconds"]) for one, other in pairs
        )

    def agreement(variant: str) -> float:
        """Share of the reference's tokens that are at the same place."""
        pairs = list(zip(runs[reference_of(variant)][0]["tokens"], runs[variant][0]["tokens"], strict=True))
        same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
        return same / max(sum(max(len(one), len(other)) for one, other in pairs), 1)

    def rate(of: dict, total) -> float:
        """The median of something a second."""
        return statistics.median(total(run) / run["seconds"] for run in of)

    def wer(variant: str) -> float | None:
        """Its WER, where there are transcripts."""
        return runs[variant][0]["wer"]

    ours = [name for name in runs if name.startswith("engine") and name not in PACKED]
    right = [
        name for name in ours if None not in (pair := (wer(name), wer(reference_of(name)))) and pair[0] <= pair[1]
    ]
    best = min(right or ["engine"], key=median.get)
    compared = [name for name in VARIANTS if name in runs and not name.startswith("reference")]
    return {
        "machine": machine(),
        "model": args.model_name_or_path or args.size,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "seconds": median,
        "audio_seconds_per_second": {name: rate(of, lambda run: run["audio"]) for name, of in runs.items()},
        "tokens_per_second": {name: rate(of, lambda run: sum(map(len, run["tokens"]))) for name, of in runs.items()},
        "peak_gb": {name: statistics.median(run["peak"] for run in of) / 1e9 for name, of in runs.items()},
        "speedup": speedup(best),
        "token_agreement": agreement(best),
        "speedup_is_of": best,
        "speedups": {name: speedup(name) for name in compared},
        "token_agreements": {name: agreement(name) for name in compared},
        "speedups_packed": {name: speedup(name) for name in PACKED if name in runs},
        "wer": {name: wer(name) for name in runs},
        "parts": {name: of[0]["parts"] for name, of in runs.items()},
    }


def show(result: dict) -> None:
    """The result as a table."""
    print(f"{result['machine']}; {result['model']}, {result['dtype']}, batch {result['batch_size']}")
    print(f"{'':24}{'audio s/s':>10}{'tokens/s':>10}{'peak GB':>9}{'WER %':>8}   time by part")
    for name in result["peak_gb"]:
        row = [result[key][name] for key in ("audio_seconds_per_second", "tokens_per_second", "peak_gb")]
        wer = "" if result["wer"][name] is None else f"{result['wer'][name]:.2f}"
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in result["parts"][name].items())
        print(f"{name:24}{row[0]:>10.1f}{row[1]:>10.1f}{row[2]:>9.2f}{wer:>8}   {parts}")
    for name, speedup in result["speedups"].items():
        equal = f"{result['token_agreements'][name]:.4f} of the tokens equal"
        print(f"{name}: {speedup:.2f} times as fast as {reference_of(name)}, {equal}")
    for name, speedup in result["speedups_packed"].items():
        print(f"{name}: {speedup:.2f} times as fast as a window for each clip ({reference_of(name)})")
    print(f"speedup {result['speedup']:.2f}, of {result['speedup_is_of']}")


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__, (*VARIANTS, *CLIPS))
    parser.add_argument("--batch_size", type=int, default=128 if cuda else 16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--label_tokens", type=int, default=100, help="Of a full window.")
    parser.add_argument("--max_label_length", type=int, default=225 if cuda else 128)
    parser.add_argument("--model_name_or_path", help="A model to use in place of the one that is made.")
    parser.add_argument("--dataset_name", help="A dataset with a column text, for that model.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split_name", default="test")
    parser.add_argument("--without_clips", action="store_true", help="Leave out the second comparison.")
    parser.add_argument("--talker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(run_variant(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_talker(Path(folder), args.size, args.label_tokens, args.dtype)
        args.talker = folder
        variants = VARIANTS if args.without_clips else (*VARIANTS, *CLIPS)
        runs = in_turn(__file__, variants, args, optional={"ctranslate2"})
    result = summarise(args, runs)
    show(result)
    write_json(args, result)


if __name__ == "__main__":
    main()
