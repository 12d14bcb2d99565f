import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from distil_whisper.errors import UserError
from distil_whisper.normalisation import is_spaceless, normaliser


class Tokenizer:
    """All that normalisation asks of a tokenizer."""

    def __init__(self, spellings):
        self.english_spelling_normalizer = spellings


PLAIN = Tokenizer(None)
HINDI = "मैं हिन्दी बोलता हूँ।"


@pytest.mark.parametrize(
    "name, language, expected",
    [
        (None, None, "english"),  # an English-only model
        (None, "en", "english"),
        (None, "hi", "multilingual"),
        ("basic_keep_marks", "hi", "basic_keep_marks"),
        ("basic", "hi", "basic"),
        ("basic", "en", "basic"),
        ("english", "de", "english"),
    ],
)
def test_the_name_of_the_normaliser_that_is_used(name, language, expected):
    assert normaliser(name, language, PLAIN).name == expected


@pytest.mark.parametrize(
    "language, text, words",
    [
        ("hi", HINDI, "मैं हिन्दी बोलता हूँ"),
        ("ta", "தமிழ், மொழி!", "தமிழ் மொழி"),
        ("bn", "বাংলা ভাষা।", "বাংলা ভাষা"),
        ("fr", "L’été, déjà !", "l été déjà"),
        ("fr", "L'e\u0301te\u0301", "l été"),  # decomposed letters are composed
        ("de", "Straße (lacht) [Musik] 5 €", "straße 5"),
    ],
)
@pytest.mark.parametrize("name", [None, "basic_keep_marks"])
def test_our_defaults_keep_combining_marks(name, language, text, words):
    assert normaliser(name, language, PLAIN)(text) == words


def test_the_default_of_before_is_as_it_was():
    """Its name stands beside stored error rates, so what it does may not change."""
    before = normaliser("basic_keep_marks", "tr", PLAIN)
    assert before("IŞIK \u200cel\u00adma, שָׁלוֹם") == "işik \u200cel\u00adma שָׁלוֹם"


def test_the_basic_normaliser_destroys_hindi_and_is_whispers():
    basic = normaliser("basic", "hi", PLAIN)
    assert basic(HINDI) == "म ह न द ब लत ह"
    assert basic(HINDI) == " ".join(BasicTextNormalizer()(HINDI).split())


def test_a_mark_without_a_letter_is_dropped():
    assert normaliser(None, "de", PLAIN)("gut ❤\ufe0f so") == "gut so"


def test_hindi_vowel_signs_count_as_errors():
    ours, basic = normaliser(None, "hi", PLAIN), normaliser("basic", "hi", PLAIN)
    assert ours("कि") != ours("की")
    assert basic("कि") == basic("की")


def test_english_spellings_come_from_the_tokenizer():
    spelled = normaliser(None, "en", Tokenizer({"colour": "color"}))
    assert spelled("The Colour, it's twenty-one!") == "the color it is 21"
    assert normaliser(None, "en", PLAIN)("The Colour") == "the colour"


@pytest.mark.parametrize(
    "language, text, expected",
    [("zh", "你好,世界", "你 好 世 界"), ("ja", "がぎ", "が ぎ"), ("th", "ดีครับ", "ดี ค รั บ")],
)
def test_languages_without_spaces_are_split_into_characters(language, text, expected):
    found = normaliser(None, language, PLAIN)
    assert found.spaceless
    assert is_spaceless(language)
    assert found(text) == expected


def test_languages_with_spaces_are_not_split():
    assert not is_spaceless("hi")
    assert not is_spaceless(None)
    assert not normaliser(None, "hi", PLAIN).spaceless


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'englsh'.*did you mean english\?"):
        normaliser("englsh", "en", PLAIN)


def test_the_real_tokenizer_has_spellings(real_tokenizer):
    assert normaliser(None, "en", real_tokenizer)("Mr. Colour's theatre") == "mister color is theater"
