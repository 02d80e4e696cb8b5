"""Captions made readable: what captions from the web carry is removed, as for the published text models.

Knows strings; does not know encoders or features.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # and the path, but not the ?query
_DASHES = (  # and, last, the hyphen itself
    "\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d-"
)

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# The order matters: these are the steps of the DeepFloyd cleaner that the published text features were made with.
# Where a step looks wrong (a query that survives its address, CJK that disappears) it is kept: other words, other
# features, other pictures.
_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", ""),
)
_SYMBOLS = _rules(
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed and compatibility forms, hexagrams, ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # the end of an article's time stamp
    (r"\\n", " "),  # a newline that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_LEFTOVERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 10x20; the second sign is the Cyrillic letter
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_JOINTS = re.compile("[-_]")
_MAX_JOINTS = 3  # more hyphens and underscores than this, and they stand for spaces


def prepare_caption(caption: str) -> str:
    """Clean a caption for the text encoder: `clean_caption` twice, as the published features were made."""
    return clean_caption(clean_caption(caption))


def clean_caption(caption: str) -> str:
    """Lower-case a caption and remove what captions from the web carry: addresses, markup, file names, ids, adverts.

    Raises:
        ModuleNotFoundError: ftfy or beautifulsoup4 is not installed.
    """
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"cleaning captions needs {error.name}: pip install nar-gen[text]") from error
    text = _apply(_ADDRESSES, unquote_plus(caption).strip().lower())
    text = _apply(_SYMBOLS, BeautifulSoup(text, features="html.parser").text)
    if len(_JOINTS.findall(text)) > _MAX_JOINTS:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_LEFTOVERS, text.strip()).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
