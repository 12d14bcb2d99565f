"""Time the decoding of windows by the labelling engine against `generate`.

python benchmarks/labelling.py --json labelling.json

The reference is what a first script does: `WhisperFeatureExtractor`, then `generate(return_timestamps=True)`. The
teacher has random weights and a real size, Whisper tiny on a CPU and large-v3 on a GPU, but for its positions: those
make it write --label_tokens tokens between two timestamps, so that `generate` goes over each window once, as with a
real transcript. All rows end together, so what the engine gains from rows that end early does not show. With
--model_name_or_path and --dataset_name both run on a real model and real speech, with its WER.
Every variant runs in processes of its own, in turn; ratios are medians of pairs.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import jiwer
import numpy as np
import torch
from measuring import SIZES, Clock, in_turn, machine, make_parser, this_device, write_json

from distil_whisper.audio import decode, stack
from distil_whisper.ctranslate2_backend import CTranslate2Decoder
from distil_whisper.decoding import Decoder
from distil_whisper.meters import peak_memory
from distil_whisper.mixing import batched
from distil_whisper.models import LoadedWhisper, load_whisper
from distil_whisper.normalisation import normaliser
from distil_whisper.packing import Utterance, pack
from distil_whisper.reading import open_source

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import toy_whisper

GRAPHS = ("engine_graphs",) if torch.cuda.is_available() else ()  # the engine with --cuda_graphs
VARIANTS = ("reference", "engine", *GRAPHS, "engine_bfloat16", "ctranslate2")
CLIPS = ("reference_clips", "engine_packed")
TOLD = ("en", "transcribe")
PREFIX = 3  # <|startoftranscript|>, language, task


def save_teacher(folder: Path, size: str, label_tokens: int) -> None:
    """A Whisper of a real size that says the same thing of every window."""
    of = SIZES[size]
    torch.manual_seed(0)
    small = toy_whisper.make_tokenizer(["one two three"])
    tokenizer = toy_whisper.make_tokenizer(["one two three"], fillers=of["vocabulary"] - len(small))
    shape = (30, of["d_model"], of["layers"], of["layers"], of["heads"], of["mels"], 448)
    model = toy_whisper.make_model(tokenizer, *shape)
    words = tokenizer.convert_tokens_to_ids(["o", "n", "e"] * label_tokens)[: label_tokens - 3]
    ends = tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|29.98|>", "<|endoftext|>"])
    transcript = [ends[0], *words, *ends[1:]]
    with torch.no_grad():
        tokens, places = model.get_input_embeddings().weight, model.model.decoder.embed_positions.weight
        tokens[ends[-1]] = torch.randn(of["d_model"]) * 0.02  # as padding it would be 0
        tokens[sorted(set(transcript))] *= 4  # likelier than all timestamps together, which Whisper's rules compare
        places[PREFIX - 1 : PREFIX - 1 + len(transcript)] = 20 * tokens[transcript]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    toy_whisper.WhisperFeatureExtractor(feature_size=of["mels"]).save_pretrained(folder)


def windows(args, whisper: LoadedWhisper) -> tuple[list[np.ndarray], list[str | None]]:
    """Audio of the benchmark and its transcripts: that of a dataset, or noise as long as the window or as a clip."""
    count, draw = args.batches * args.batch_size, np.random.default_rng(1)
    if args.variant in CLIPS:
        noise = draw.standard_normal((args.batch_size * clips_in(args), int(args.clip_s * 16_000)), np.float32) * 0.1
        clips = [Utterance(f"{number}", "recording", {}, samples) for number, samples in enumerate(noise)]
        packed = [window.samples for window in pack(clips, whisper.window.samples)]
        samples = list(noise) if args.variant == "reference_clips" else packed
        return samples, [None] * len(samples)
    if not args.dataset_name:
        noise = draw.standard_normal((count, whisper.window.samples), np.float32) * 0.1
        return list(noise), [None] * count
    source = open_source(args.dataset_name, args.dataset_config_name, args.dataset_split_name)
    rows = list(islice(source.rows(0), count))
    return [decode(row["audio"], whisper.window.sampling_rate) for row in rows], [row.get("text") for row in rows]


def clips_in(args) -> int:
    """How many clips a window of 30 s holds."""
    return int(30 // args.clip_s)


class Reference:
    """`generate` as a first script calls it."""

    def __init__(self, whisper: LoadedWhisper, clock: Clock, max_label_length: int):
        self.whisper, self.clock, self.most = whisper, clock, max_label_length

    def __call__(self, batch: Iterable[np.ndarray]) -> list[list[int]]:
        """The tokens of each window."""
        model, grammar = self.whisper.model, self.whisper.grammar
        with self.clock.part("log-mel"):
            rate = self.whisper.window.sampling_rate
            features = self.whisper.feature_extractor(list(batch), sampling_rate=rate, return_tensors="pt")
            features = features.input_features.to(model.device, model.dtype)
        told = dict(zip(("language", "task"), TOLD, strict=True))
        found = model.generate(features, return_timestamps=True, max_new_tokens=self.most, num_beams=1, **told)
        return [grammar.spoken(row.tolist()) for row in found]


class Engine:
    """The labelling engine, with one of its decoders."""

    def __init__(self, whisper: LoadedWhisper, clock: Clock, max_label_length: int, make=Decoder):
        self.whisper = whisper
        self.decoder = make(whisper, max_label_length=max_label_length, return_timestamps=True)
        clock.around(self.decoder, "log_mel", "log-mel")

    def __call__(self, batch: Iterable[np.ndarray]) -> list[list[int]]:
        """The tokens of each window."""
        found = self.decoder(stack(list(batch), self.whisper.window), *TOLD)
        return [self.whisper.grammar.spoken(result.ids) for result in found]


def engine_of(variant: str):
    """What decodes in a variant."""
    if variant == "ctranslate2":
        return partial(Engine, make=partial(CTranslate2Decoder, device=this_device()))
    if variant in GRAPHS:
        return partial(Engine, make=partial(Decoder, cuda_graphs=True))
    return Reference if variant.startswith("reference") else Engine


def run_variant(args) -> dict:
    """One variant in this process: seconds, tokens by window, peak memory, parts, and texts where there is speech."""
    device = this_device()
    dtype = "bfloat16" if args.variant.endswith("bfloat16") else args.dtype
    with tempfile.TemporaryDirectory() as folder:
        name = None if args.variant in CLIPS else args.model_name_or_path
        if not name:
            tokens = args.label_tokens // clips_in(args) if args.variant == "reference_clips" else args.label_tokens
            save_teacher(Path(folder), args.size, tokens)
        whisper = load_whisper(name or folder, dtype=dtype, device=device)
    clock = Clock(device)
    clock.around(whisper.model.get_encoder(), "forward", "encoder")
    decode_batch = engine_of(args.variant)(whisper, clock, args.max_label_length)
    audio, texts = windows(args, whisper)
    audio, texts = zip(*sorted(zip(audio, texts, strict=True), key=lambda pair: len(pair[0])), strict=True)
    decode_batch(audio[: args.batch_size])  # warms the machine up
    clock.seconds.clear()
    began, tokens = clock.now(), []
    for batch in batched(iter(audio), args.batch_size):
        tokens += decode_batch(batch)
    seconds = clock.now() - began
    parts = {**clock.seconds, "decoder": seconds - sum(clock.seconds.values())}
    heard = sum(len(samples) for samples in audio) / whisper.window.sampling_rate
    wer = None if None in texts else error_rate(texts, tokens, whisper)
    return {"seconds": seconds, "audio": heard, "tokens": tokens, "peak": peak_memory(), "parts": parts, "wer": wer}


def error_rate(texts: list[str], tokens: list[list[int]], whisper: LoadedWhisper) -> float:
    """WER in percent."""
    rules, grammar = normaliser(None, TOLD[0], whisper.tokenizer), whisper.grammar
    said = [rules(whisper.tokenizer.decode([t for t in row if t < grammar.end])) for row in tokens]
    return 100 * jiwer.wer([rules(text) for text in texts], said)


def ending(variant: str) -> str:
    """What the names of a variant's figures end with."""
    return "" if variant == "engine" else f"_{variant.removeprefix('engine_')}"


def summarise(args, runs: dict[str, list[dict]]) -> dict:
    """Medians, ratios of pairs, and how many tokens are the reference's."""
    median = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    expected = runs["reference"][0]["tokens"]

    def speedup(variant: str, reference: str = "reference") -> float:
        """How many times as much audio a second."""
        pairs = zip(runs[reference], runs[variant], strict=True)
        return statistics.median(
            (other["audio"] / other["seconds"]) / (one["audio"] / one["seconds"]) for one, other in pairs
        )

    def agreement(variant: str) -> float:
        """Share of the reference's tokens that are at the same place."""
        pairs = list(zip(expected, runs[variant][0]["tokens"], strict=True))
        same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
        return same / max(sum(max(len(one), len(other)) for one, other in pairs), 1)

    def rate(of: dict, total) -> float:
        """The median of something a second."""
        return statistics.median(total(run) / run["seconds"] for run in of)

    return {
        "machine": machine(),
        "model": args.model_name_or_path or args.size,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "seconds": median,
        "audio_seconds_per_second": {name: rate(of, lambda run: run["audio"]) for name, of in runs.items()},
        "tokens_per_second": {name: rate(of, lambda run: sum(map(len, run["tokens"]))) for name, of in runs.items()},
        "peak_gb": {name: statistics.median(run["peak"] for run in of) / 1e9 for name, of in runs.items()},
        "speedup_packed": speedup("engine_packed", "reference_clips"),
        **{f"speedup{ending(name)}": speedup(name) for name in VARIANTS[1:]},
        **{f"token_agreement{ending(name)}": agreement(name) for name in VARIANTS[1:]},
        "wer": {name: of[0]["wer"] for name, of in runs.items()},
        "parts": {name: of[0]["parts"] for name, of in runs.items()},
    }


def show(result: dict) -> None:
    """The result as a table."""
    print(f"{result['machine']}; {result['model']}, {result['dtype']}, batch {result['batch_size']}")
    print(f"{'':18}{'audio s/s':>10}{'tokens/s':>10}{'peak GB':>9}{'WER %':>8}   time by part")
    for name in (*VARIANTS, *CLIPS):
        row = [result[key][name] for key in ("audio_seconds_per_second", "tokens_per_second", "peak_gb")]
        wer = "" if result["wer"][name] is None else f"{result['wer'][name]:.2f}"
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in result["parts"][name].items())
        print(f"{name:18}{row[0]:>10.1f}{row[1]:>10.1f}{row[2]:>9.2f}{wer:>8}   {parts}")
    for name in VARIANTS[1:]:
        speedup, agreement = result[f"speedup{ending(name)}"], result[f"token_agreement{ending(name)}"]
        print(f"{name}: {speedup:.2f} times as fast, {agreement:.4f} of the tokens equal")
    print(f"engine, clips packed: {result['speedup_packed']:.2f} times as fast as a window for each clip")


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = make_parser(__doc__, (*VARIANTS, *CLIPS))
    parser.add_argument("--batch_size", type=int, default=128 if cuda else 16)
    parser.add_argument("--batches", type=int, default=4 if cuda else 2)
    parser.add_argument("--label_tokens", type=int, default=128 if cuda else 64)
    parser.add_argument("--max_label_length", type=int, default=225 if cuda else 128)
    parser.add_argument("--clip_s", type=float, default=6.0, help="Length of the clips of the second comparison.")
    parser.add_argument("--model_name_or_path", help="A model to use in place of the one that is made.")
    parser.add_argument("--dataset_name", help="A dataset with a column text, for that model.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split_name", default="test")
    args = parser.parse_args(argv)
    if args.variant:
        print(json.dumps(run_variant(args)))
        return
    runs = in_turn(__file__, (*VARIANTS, *CLIPS), args)
    result = summarise(args, runs)
    show(result)
    write_json(args, result)


if __name__ == "__main__":
    main()
