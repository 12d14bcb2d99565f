"""The token grammar on tables of cases, for a toy vocabulary and for Whisper's own where it is at hand.

What is expected is written as text: the tokenizer itself turns names such as <|hi|> in it into their tokens.
"""

import re
import zlib

import pytest
import toy_whisper
from conftest import WORDS
from transformers import WhisperTokenizer

from distil_whisper.errors import UserError
from distil_whisper.tokens import IGNORED, Grammar, Target, compression_ratio, language_and_task, plain_text

POSITIONS = 128
SOT, END, PREV = "<|startoftranscript|>", "<|endoftext|>", "<|startofprev|>"
HINDI = f"{SOT}<|hi|><|transcribe|>"
PLAIN, TIMED = "<|notimestamps|>", "<|0.00|> one two<|1.20|><|1.20|> three<|2.06|>"
LOOKS_SPECIAL = "say <|endoftext|> or <|1.20|>, <|hi|> <|startofprev|><|startoftranscript|> <|x|> <| |> <||> a<b|c"


@pytest.fixture(scope="module")
def multilingual(toy_teacher):
    return Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, POSITIONS)


@pytest.fixture(scope="module")
def english_only(toy_english_only):
    return Grammar(WhisperTokenizer.from_pretrained(toy_english_only), False, POSITIONS)


@pytest.fixture(scope="module")
def real(real_tokenizer):
    return Grammar(real_tokenizer, True, 448)


@pytest.fixture(params=["multilingual", "real"])
def grammar(request):
    """A multilingual grammar: the toy's, and that of Whisper's own vocabulary."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def fewer_languages():
    """The toy's vocabulary without its last language: its later ids are one lower, as large-v2's are to large-v3's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_whisper, "LANGUAGES", dict(list(toy_whisper.LANGUAGES.items())[:98]))
        tokenizer = toy_whisper.make_tokenizer([" " + " ".join(WORDS)] * 3)
    return Grammar(tokenizer, True, POSITIONS)


def ids(grammar, text):
    return grammar.tokenizer.encode(text, add_special_tokens=False)


def whole(sequence):
    """The tokens that a sequence was made of."""
    return [*sequence.decoder_input_ids, sequence.labels[-1]]


def check_shape(grammar, sequence):
    """Inputs and labels are one sequence shifted by one, and nothing up to <|startoftranscript|> is a target."""
    inputs, labels = sequence.decoder_input_ids, sequence.labels
    assert len(inputs) == len(labels) <= grammar.max_positions
    start = inputs.index(grammar.start)
    assert labels[:start] == [IGNORED] * start
    assert labels[start:-1] == inputs[start + 1 :]
    assert IGNORED not in labels[start:]


BEFORE = "<|0.00|> four<|0.50|>"
ONE, THREE = f"{PLAIN} one{END}", f"{PLAIN} one two three{END}"
CASES = {  # label, prompt, keeps timestamps, truncated -> the sequence before and behind the prefix of the model
    "text alone": (" one", None, True, False, ("", ONE)),
    "nothing": ("", None, True, False, ("", PLAIN + END)),
    "timestamps kept": (TIMED, None, True, False, ("", TIMED + END)),
    "timestamps dropped": (TIMED, None, False, False, ("", THREE)),
    "prompt": (" one", " four five", True, False, (PREV + " four five", ONE)),
    "prompt of another pipeline": (" one", PREV + " four", True, False, (PREV + " four", ONE)),
    "prompt with its frame": (" one", f"{PREV}{HINDI}{PLAIN} four{END}", True, False, (PREV + " four", ONE)),
    "timestamps in label and prompt": (TIMED, BEFORE, True, False, (PREV + BEFORE, TIMED + END)),
    "timestamps dropped in both": (TIMED, BEFORE, False, False, (PREV + " four", THREE)),
    "none in the label, so none in the prompt": (" one", BEFORE, True, False, (PREV + " four", ONE)),
    "prompt of the original scripts": (" one", f"{PREV}{PLAIN} four", True, False, (PREV + " four", ONE)),
    "prompt that begins twice": (" one", f"{PREV}{PREV} four", True, False, (PREV + " four", ONE)),
    "prompt with a prompt": (" one", f"{PREV} three{HINDI}{PLAIN} four{END}{END}", True, False, (PREV + " four", ONE)),
    "empty prompt": (" one", "", True, False, ("", ONE)),
    "prompt of a timestamp alone, dropped": (" one", "<|0.00|>", True, False, ("", ONE)),
    "truncated": (" one two", None, True, True, ("", PLAIN + " one two")),
    "truncated with timestamps and prompt": (TIMED, " four", True, True, (PREV + " four", TIMED)),
}


def build(grammar, label, prompt, timestamps, truncated, language, task):
    target = grammar.encode_pseudo_label(label)
    target = target if timestamps else grammar.without_timestamps(target)
    previous = grammar.prompt_of_ids(None if prompt is None else ids(grammar, prompt), target.has_timestamps)
    return grammar.sequence(target, language, task, previous, truncated)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "kind, language, task, prefix",
    [
        ("multilingual", "hi", "transcribe", HINDI),
        ("real", "hi", "transcribe", HINDI),
        ("multilingual", "Hindi", "translate", f"{SOT}<|hi|><|translate|>"),
        ("english_only", None, None, SOT),
    ],
)
def test_sequences(request, kind, language, task, prefix, case):
    grammar = request.getfixturevalue(kind)
    *given, (before, after) = CASES[case]
    if kind == "english_only":
        given[1] = given[1] and given[1].replace("<|hi|><|transcribe|>", "")
    sequence = build(grammar, *given, language, task)
    assert whole(sequence) == ids(grammar, before + prefix + after)
    check_shape(grammar, sequence)


@pytest.mark.parametrize("text_tokens, kept", [(1, 63), (60, 63), (61, 62), (100, 23), (122, 1), (123, 0), (124, 0)])
def test_a_long_prompt_loses_its_beginning_and_the_label_nothing(multilingual, text_tokens, kept):
    prompt = [index % 200 for index in range(300)]
    label = Target([7] * text_tokens, False)  # 4 tokens before it, 1 behind it, of which the decoder sees all but one
    sequence = multilingual.sequence(label, "hi", "transcribe", prompt)
    before = [multilingual.previous, *prompt[-kept:]] if kept else []
    assert whole(sequence) == [*before, *ids(multilingual, HINDI + PLAIN), *label.ids, multilingual.end]
    check_shape(multilingual, sequence)


def test_half_of_whispers_positions_less_one_is_left_to_the_prompt(real):
    sequence = real.sequence(Target([7], False), "hi", "transcribe", list(range(1000)))
    assert sequence.decoder_input_ids.index(real.start) == 1 + 223


@pytest.mark.parametrize("text_tokens, truncated, fits", [(124, False, True), (125, False, False), (125, True, True)])
@pytest.mark.parametrize("prompt", [[], [1, 2, 3]])
def test_a_label_that_does_not_fit_is_refused_and_never_cut(multilingual, text_tokens, truncated, fits, prompt):
    sequence = multilingual.sequence(Target([7] * text_tokens, False), "hi", "transcribe", prompt, truncated)
    if fits:
        assert whole(sequence).count(7) == text_tokens
        assert len(sequence.labels) == POSITIONS
    else:
        assert sequence is None


def test_a_label_with_timestamps_needs_no_room_for_their_absence(multilingual):
    label = Target([multilingual.timestamp_begin] + [7] * 124, True)
    assert len(multilingual.sequence(label, "hi", "transcribe").labels) == POSITIONS


def test_token_ids_are_kept_and_text_is_encoded_again(grammar):
    generated = [*ids(grammar, "<|0.00|>"), *(ids(grammar, letter)[0] for letter in " one"), *ids(grammar, "<|1.20|>")]
    by_ids = grammar.target_of_ids(generated)
    by_text = grammar.encode_pseudo_label(grammar.decode(generated))
    assert by_ids == Target(generated, True)
    assert by_text == Target(ids(grammar, "<|0.00|> one<|1.20|>"), True)
    assert by_text.ids != generated


FRAMES = [
    (f"{HINDI}{PLAIN} one two{END}", " one two"),
    (f"{HINDI}{TIMED}{END}", TIMED),
    (f"{SOT}{PLAIN} one{END}", " one"),
    (f"{SOT} one{END}{END}{END}", " one"),
    (f"{PREV} four{HINDI}{PLAIN} one{END}", " one"),
    (f" one{END}", " one"),
    (TIMED, TIMED),
    (f"{HINDI}{PLAIN}{END}", ""),
]


@pytest.mark.parametrize("foreign, label", FRAMES)
def test_labels_of_other_pipelines_lose_their_frame(grammar, foreign, label):
    expected = Target(ids(grammar, label), "<|0.00|>" in label)
    assert grammar.encode_pseudo_label(foreign) == expected
    assert grammar.target_of_ids(ids(grammar, foreign)) == expected


@pytest.mark.parametrize("special", ["<|hi|>", "<|nospeech|>", PREV, "<|notimestamps|>"])
def test_special_tokens_inside_of_ids_are_refused_by_name(grammar, special):
    check_refused(grammar, ids(grammar, f" one{special} two"), special)


def test_ids_beyond_the_vocabulary_are_refused(grammar):
    beyond = len(grammar.tokenizer)
    check_refused(grammar, [*ids(grammar, " one"), beyond], f"the id {beyond}, which is not in the vocabulary")


@pytest.mark.parametrize(
    "prompt", [f" one{END} two", f" one{SOT} two{SOT} three", "<|notimestamps|> one<|1.00|>", "<|nospeech|> one"]
)
def test_a_prompt_of_uncertain_meaning_is_refused(grammar, prompt):
    with pytest.raises(UserError, match="condition_on_prev holds"):
        grammar.prompt_of_ids(ids(grammar, prompt), True)


def check_refused(grammar, tokens, words):
    with pytest.raises(UserError, match=f"whisper_token_ids hold .*{re.escape(words)}"):
        grammar.target_of_ids(tokens)
    with pytest.raises(UserError, match=f"condition_on_prev holds .*{re.escape(words)}"):
        grammar.prompt_of_ids(tokens, True)


def test_two_tokenizers_whose_timestamps_differ_by_one(multilingual, fewer_languages):
    assert multilingual.end == fewer_languages.end
    assert multilingual.timestamp_begin == fewer_languages.timestamp_begin + 1
    assert multilingual.fingerprint != fewer_languages.fingerprint
    for grammar in (multilingual, fewer_languages):
        assert grammar.encode_pseudo_label(TIMED).ids == ids(grammar, TIMED)
        assert grammar.decode(ids(grammar, TIMED)) == TIMED
    with pytest.raises(UserError, match=r"condition_on_prev holds <\|notimestamps\|> and timestamps"):
        multilingual.prompt_of_ids(ids(fewer_languages, TIMED), True)
    with pytest.raises(UserError, match=r"notimestamps"):
        multilingual.target_of_ids(ids(fewer_languages, TIMED))


def test_the_fingerprint_is_that_of_the_vocabulary(multilingual, toy_teacher, english_only):
    again = Grammar(WhisperTokenizer.from_pretrained(toy_teacher), True, 64)
    assert again.fingerprint == multilingual.fingerprint != english_only.fingerprint


@pytest.mark.parametrize("encode", ["encode_text", "encode_transcript"])
def test_text_that_looks_like_special_tokens_is_text(grammar, encode):
    tokens = (
        grammar.encode_text(LOOKS_SPECIAL)
        if encode == "encode_text"
        else grammar.encode_transcript(LOOKS_SPECIAL, "hi")
    )
    assert max(tokens) < grammar.end
    # decode of WhisperTokenizer would take the mark out, even where it is text
    assert grammar.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False).strip() == LOOKS_SPECIAL


def test_a_pseudo_label_has_no_special_token_but_timestamps(grammar):
    target = grammar.encode_pseudo_label("<|0.00|> say <|hi|> <|nospeech|><|1.20|>")
    assert [token for token in target.ids if token >= grammar.end] == ids(grammar, "<|0.00|><|1.20|>")


def test_every_timestamp_survives_text(grammar):
    tokens = [grammar.timestamp_begin + index for index in range(1501)]
    assert grammar.encode_pseudo_label(grammar.decode(tokens)).ids == tokens
    assert grammar.tokenizer.convert_ids_to_tokens(tokens[-1]) == "<|30.00|>"


@pytest.mark.parametrize("seconds", ["30.02", "45.00"])
def test_a_timestamp_beyond_the_vocabulary_is_refused(grammar, seconds):
    with pytest.raises(UserError, match=rf"<\|{seconds}\|>.*30\.00"):
        grammar.encode_pseudo_label(f"<|0.00|> one<|{seconds}|>")


def test_decoding_keeps_text_and_marks_alone(grammar):
    assert grammar.decode(ids(grammar, f"{HINDI}<|0.00|> one<|0.02|>{PREV}<|12.34|> two{END}")) == (
        "<|0.00|> one<|0.02|><|12.34|> two"
    )


@pytest.mark.parametrize(
    "text, language, expected",
    [(" one ", "hi", " one"), ("one", None, " one"), ("one", "ja", "one"), ("one", "Thai", "one"), (" ", "hi", "")],
)
def test_a_transcript_begins_as_whisper_begins(multilingual, text, language, expected):
    assert multilingual.encode_transcript(text, language) == ids(multilingual, expected)


@pytest.mark.parametrize("given", ["hi", "Hindi", " HI ", "<|hi|>", "hindi"])
def test_a_language_is_known_by_code_name_or_token(grammar, given):
    assert grammar.language_code(given) == "hi"


@pytest.mark.parametrize("given, meant", [("hindy", "hindi"), ("transcribe", None), ("germann", "german")])
def test_an_unknown_language_is_refused_with_the_nearest(grammar, given, meant):
    with pytest.raises(UserError, match=f"no language '{given}'.*{f'did you mean {meant}' if meant else ''}"):
        grammar.language_code(given)


@pytest.mark.parametrize("language, task", [(None, "transcribe"), ("hi", None), (None, None)])
def test_a_multilingual_model_is_always_told_language_and_task(grammar, language, task):
    with pytest.raises(UserError, match="needs a language and a task"):
        grammar.prefix(language, task, False)


class Vocabulary:
    """A tokenizer that has these special tokens and nothing else; the unknown token is <|endoftext|>."""

    def __init__(self, *names):
        self.names = dict(zip(names, range(100, 200), strict=False))

    def get_vocab(self):
        return self.names

    def convert_tokens_to_ids(self, name):
        return self.names.get(name, self.names[END])


@pytest.mark.parametrize("name", ["<|nospeech|>", "<|nocaptions|>"])
def test_no_speech_has_two_names(name):
    assert Grammar(Vocabulary(END, SOT, PREV, name, PLAIN, "<|0.00|>"), True, 8).no_speech == 103


@pytest.mark.parametrize("lacking", [SOT, PREV, "<|nospeech|>", PLAIN, "<|0.00|>"])
def test_a_tokenizer_without_a_token_of_the_grammar_is_refused(lacking):
    names = [name for name in (END, SOT, PREV, "<|nospeech|>", PLAIN, "<|0.00|>") if name != lacking]
    with pytest.raises(UserError, match=re.escape(lacking)):
        Grammar(Vocabulary(*names), True, 8)


@pytest.mark.parametrize(
    "transcript, text",
    [
        (TIMED, "one two three"),
        (" one  two ", "one  two"),
        (f"{HINDI}{PLAIN} one{END}", "one"),
        ("<|0.00|>日本<|0.50|><|0.50|>語<|0.90|>", "日本語"),
        ("a < b | c > d", "a < b | c > d"),
        ("", ""),
    ],
)
def test_plain_text(transcript, text):
    assert plain_text(transcript) == text


class GenerationConfig:
    """What a generation config says, if it does."""

    def __init__(self, **values):
        vars(self).update(values)


@pytest.mark.parametrize(
    "language, task, config, expected",
    [
        ("Hindi", None, GenerationConfig(), ("hi", "transcribe")),
        (None, "translate", GenerationConfig(language="<|de|>"), ("de", "translate")),
        ("hi", None, GenerationConfig(language="de", task="translate"), ("hi", "translate")),
        (None, None, None, (None, "transcribe")),
    ],
)
def test_the_flag_comes_before_the_generation_config(multilingual, language, task, config, expected):
    assert language_and_task(language, task, multilingual, config) == expected


@pytest.mark.parametrize("language, task, words", [("en", None, "--language en"), (None, "translate", "--task")])
def test_an_english_only_model_is_told_nothing(english_only, language, task, words):
    with pytest.raises(UserError, match=f"{words}.*English-only"):
        language_and_task(language, task, english_only, GenerationConfig())
    assert language_and_task(None, "transcribe", english_only, GenerationConfig(language="en")) == (None, None)


def test_special_tokens_that_a_model_made_up_are_not_spoken(grammar):
    words = grammar.encode_text(" one two")
    made_up = [grammar.timestamp(0.0), words[0], grammar.start, grammar.no_timestamps, *words[1:]]
    assert grammar.spoken(made_up) == [grammar.timestamp(0.0), *words]
    assert grammar.target_of_ids(grammar.spoken(made_up)).has_timestamps


def test_compression_ratio_of_loops_and_of_nothing():
    loop = "again and again " * 20
    assert compression_ratio(loop) == len(loop) / len(zlib.compress(loop.encode()))
    assert compression_ratio(loop) > 5
    assert compression_ratio("") == 0.0
