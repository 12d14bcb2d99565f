"""What writers spell in several ways is one text, and what readers tell apart is two: by language and script."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distil_whisper.multilingual import characters
from distil_whisper.normalisation import normaliser
from distil_whisper.tokens import SPACELESS_LANGUAGES

NON_JOINER, JOINER, SOFT_HYPHEN, NARROW, MARK = "\u200c", "\u200d", "\u00ad", "\u202f", "\ufeff"


@pytest.mark.parametrize(
    "language, spellings, expected",
    [
        # Turkish and Azeri: two letters i
        ("tr", ["IŞIK", "ışık", "Işık"], "ışık"),
        ("tr", ["İstanbul", "I\u0307stanbul", "istanbul", "İSTANBUL", "i\u0307stanbul"], "istanbul"),
        ("tr", ["DİYARBAKIR'DA", "Diyarbakır’da"], "diyarbakır da"),
        ("az", ["QIZIL İT", "Qızıl it"], "qızıl it"),
        ("de", ["INSEL", "Insel"], "insel"),
        # Arabic: vowels, doubling, the stroke that widens words; hamza and madda stay
        ("ar", ["اَلسَّلَامُ عَلَيْكُمْ", "السلام عليكم", "الســلام عليكم"], "السلام عليكم"),
        ("ar", ["هٰذَا كِتَابٌ", "هذا كتاب"], "هذا كتاب"),
        ("ar", ["ٱلْقُرْآن", "القرآن", "القرا\u0653ن"], "القرآن"),
        ("ar", ["أَسْئِلَةٌ؟", "أسئلة", "ا\u0654سي\u0654لة"], "أسئلة"),
        ("ar", ["\u200fمرحبا\u200e، \u202bعالم\u202c", "مرحبا عالم"], "مرحبا عالم"),
        ("ar", ["ﻣﺮﺣﺒﺎ", "مرحبا"], "مرحبا"),
        # Persian: the non-joiner; Arabic keyboards; the small hamza
        ("fa", [f"می{NON_JOINER}خواهم", "میخواهم", f"مي{NON_JOINER}خواهم"], "میخواهم"),
        ("fa", [f"کتاب{NON_JOINER}های", "كتابهاي"], "کتابهای"),
        ("fa", ["خانهٔ ما", "خانۀ ما", "خانه ما"], "خانه ما"),
        # Urdu
        ("ur", ["اُردُو زبان", "اردو زبان"], "اردو زبان"),
        ("ur", ["اعلیٰ", "اعلی", "اعلى"], "اعلی"),
        ("ur", ["جذبۂ دل", "جذبہ\u0654 دل"], "جذبۂ دل"),
        ("ur", ["کہا۔", "كها"], "کہا"),
        # Hebrew: vowel points; geresh and gershayim; the hyphen
        ("he", ["שָׁלוֹם עוֹלָם", "שלום עולם", "\ufb2aלום עולם"], "שלום עולם"),
        ("he", ['צה"ל', "צה״ל", "צה”ל"], "צהל"),
        ("he", ["צ'יפס", "צ׳יפס", "צ’יפס"], "ציפס"),
        ("he", ["בית־ספר", "בית-ספר", "בית ספר"], "בית ספר"),
        ("yi", ["\ufb2eלט", "א\u05b7לט"], "א\u05b7לט"),
        ("yi", ["װאָס", "וואָס"], "וואָס"),
        # Scripts of India and Sri Lanka: composed letters, joiners
        ("hi", ["क़लम", "क\u093cलम"], "क\u093cलम"),
        ("hi", [f"क्{JOINER}या", "क्या", f"क्{NON_JOINER}या"], "क्या"),
        ("hi", ["मैं हिन्दी बोलता हूँ।", "मैं हिन्दी बोलता हूँ"], "मैं हिन्दी बोलता हूँ"),
        ("ta", ["கொடு", "க\u0bc6\u0bbeடு"], "கொடு"),
        ("bn", ["বাংলা ভাষা।", "বাংলা ভাষা"], "বাংলা ভাষা"),
        ("bn", [f"হঠাত্{JOINER}", "হঠাৎ"], "হঠাৎ"),
        ("ml", [f"അവന്{JOINER}", "അവൻ"], "അവൻ"),
        ("mr", [f"दर्{JOINER}या", "दऱ्या"], "दऱ्या"),
        ("ml", [f"എന്{JOINER}റെ", "എൻ്റെ", "എന്റെ", "എൻറെ"], "എന്റെ"),
        ("si", [f"ශ්{JOINER}රී ලංකා", "ශ්රී ලංකා"], "ශ්රී ලංකා"),
        # Languages without spaces: characters are letters with their marks
        ("th", ["น้ำ", "น\u0e4d\u0e49า", "น\u0e49\u0e4dา"], "น้ำ"),
        ("th", ["แม่ครับ", "เเม่ครับ", "แม่ ครับ", "แม่\u200bครับ"], "แ ม่ ค รั บ"),
        ("lo", ["ນ້ຳ", "ນ\u0ecd\u0ec9າ"], "ນ້ຳ"),
        ("lo", ["ແມ່", "ເເມ່"], "ແ ມ່"),
        ("km", ["ខ្មែរ", "ខ្មែរ។", "\u200bខ្មែរ"], "ខ្មែ រ"),
        ("my", ["မြန်မာ", "မြန်မာ။", "မြန်\u200bမာ"], "မြ န် မာ"),
        ("bo", ["བོད་ཡིག", "བོད་ཡིག།"], "བོ ད ཡི ག"),
        ("zh", ["你好,世界", "你好 世界。", "你好\u3000世界"], "你 好 世 界"),
        ("ja", ["ガギ", "カ\u3099キ\u3099", "ｶﾞｷﾞ"], "ガ ギ"),
        # Latin, Greek, Cyrillic, Armenian, Korean
        ("vi", ["Tiếng Việt", "Tie\u0302\u0301ng Vie\u0323\u0302t", "TIẾNG VIỆT"], "tiếng việt"),
        ("vi", ["Đà Nẵng", "đà nẵng"], "đà nẵng"),
        ("de", ["Straße", "straße", "STRAẞE", f"Stra{SOFT_HYPHEN}ße"], "straße"),
        ("el", ["ΟΔΟΣ", "οδος", "Οδοσ"], "οδοσ"),
        ("el", ["ΠΩΣ'ΝΑΙ", "πως’ναι"], "πωσ ναι"),
        ("uk", ["п'ять", "п’ять", "пʼять", "П'ЯТЬ", "п`ять", "п´ять", "п＇ять"], "пʼять"),
        ("uk", ["'так'", "«так»", "так"], "так"),
        ("be", ["сям’я", "сям'я"], "сямʼя"),
        ("uz", ["Oʻzbek", "O'zbek", "O‘zbek", "o’zbek"], "oʼzbek"),
        ("fr", ["L’été, déjà !", "l'e\u0301te\u0301 déjà", f"L‘été, déjà{NARROW}!", "lʼété déjà"], "l été déjà"),
        ("ro", ["şi ţară", "și țară", "ȘI ȚARĂ"], "și țară"),
        ("hy", ["ի՞նչ", "ինչ"], "ինչ"),
        ("nl", ["ĳs", "ijs"], "ijs"),
        ("ko", ["한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"], "한국어"),
        # Emoji and what nobody sees, in any language
        ("de", ["Hallo 👋🏽 Welt", "Hallo👋Welt", "Hallo Welt", f"{MARK}Hallo Welt"], "hallo welt"),
        ("es", [f"hola 👩{JOINER}🚀", "hola ❤\ufe0f", "hola 🇪🇸", "hola 🏴\U000e0067\U000e007f", "hola"], "hola"),
        ("pl", ["Lego™ ℹ\ufe0f 1\ufe0f\u20e3", "lego 1"], "lego 1"),
        ("it", [f"co{SOFT_HYPHEN}sì", "co\u2060sì", "così"], "così"),
    ],
)
def test_spellings_of_one_text(language, spellings, expected):
    rules = normaliser(None, language, None)
    assert rules.name == "multilingual"
    assert {rules(spelling) for spelling in spellings} == {expected}


@pytest.mark.parametrize(
    "language, one, other",
    [
        ("tr", "açı", "açi"),
        ("ar", "سأل", "سال"),  # asked, flowed
        ("ar", "قرآن", "قران"),
        ("fa", "می خواهم", "میخواهم"),  # with a space it is two words
        ("yi", "אַלט", "אָלט"),
        ("hi", "कि", "की"),
        ("hi", "क़लम", "कलम"),
        ("ta", "கல்", "கால்"),
        ("bn", "দিন", "দীন"),
        ("ml", "അവൻ", "അവന്"),  # he, to him
        ("mr", f"दर्{JOINER}या", "दर्या"),  # valleys, sea
        ("th", "มา", "ม้า"),  # come, horse
        ("lo", "ມາ", "ໝາ"),
        ("km", "កា", "កី"),
        ("my", "ငါ", "ငါး"),
        ("vi", "ma", "má"),
        ("de", "Maße", "Masse"),
        ("uz", "oʻn", "on"),
        ("uk", "п'ять", "пять"),
    ],
)
def test_texts_that_are_read_otherwise_differ(language, one, other):
    rules = normaliser(None, language, None)
    assert rules(one) != rules(other)


@pytest.mark.parametrize("text", ["मैं हूँ", "มา ม้า", "အမေ", "ខ្មែរ", "བོད", "がぎ", "e\u0301te"])
def test_no_character_begins_with_a_mark(text):
    found = characters(text)
    assert "".join(found) == text.replace(" ", "")
    assert not any(unicodedata.category(character[0]).startswith("M") for character in found)


UNSEEN = "\u00ad\u034f\u061c\u200b\u200c\u200d\u200e\u2060\u2067\ufe0f\ufeff\U000e0101"


@given(language=st.sampled_from(["fa", "hi", "de", "ar", "th", "uk"]), data=st.data())
def test_what_nobody_sees_changes_nothing(language, data):
    """However many of such characters stand wherever in a text."""
    letters = st.text("می خواهمकि हिन्Straße ,'عَ ดีครับп ять👋🏽", max_size=20)
    text = data.draw(letters)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    strewn = text
    for place in sorted(places, reverse=True):
        strewn = strewn[:place] + data.draw(st.sampled_from(UNSEEN)) + strewn[place:]
    rules = normaliser(None, language, None)
    assert rules(strewn) == rules(text)


@given(text=st.text(max_size=30), language=st.sampled_from([None, "tr", "ar", "he", "uk", "fa", *SPACELESS_LANGUAGES]))
def test_words_are_parted_by_single_spaces(text, language):
    found = normaliser("multilingual", language, None)(text)
    assert found == " ".join(found.split())


@given(text=st.text(max_size=30), language=st.sampled_from([None, "tr", "ar", "he", "uk", "fa", "yi", "ml"]))
def test_a_normalised_text_is_normal(text, language):
    rules = normaliser("multilingual", language, None)
    assert rules(rules(text)) == rules(text)
