"""Several ways to say what a picture shows, so that a model does not learn one form of caption only.

Knows words; does not know pictures, encoders or training.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

WORDINGS = ("plain", "varied")
_PLURALS = ("s", "men", "people", "feet", "teeth")
_DETERMINED = ("a ", "an ", "the ", "no ", "two ", "three ", "four ")
_SPOKEN_CONSONANT = ("uni", "use", "usa", "uk ", "eu", "one", "uto")  # a unicorn
_SPOKEN_VOWEL = ("hour", "heir", "honest")


def wordings(caption: str, tags: Sequence[str] = (), style: str = "") -> tuple[str, ...]:
    """At most six captions for one picture, always the same ones, the fullest first.

    Of "red apple", tagged "fruit", in the style "flat": "red apple, flat"; "red apple"; "a red apple"; one of "a red
    apple, flat", "a red apple in flat style" and "flat red apple"; "apple fruit, flat"; and "fruit red apple". Which
    of the alternatives and of the tags is decided by a hash of caption and style, so that other pictures of the same
    thing get others.
    """
    caption = " ".join(caption.split())
    if not caption:
        return ("",)
    draw = zlib.crc32(f"{caption}|{style}".encode())
    spoken = with_article(caption)
    said = set(caption.lower().split())
    further = [tag.lower() for tag in tags if not said & set(tag.lower().split())]
    tag = further[draw // 7 % len(further)] if further else ""
    last = caption.split()[-1]
    made = [
        f"{caption}, {style}" if style else caption,
        caption,
        spoken,
        (f"{spoken}, {style}", f"{spoken} in {style} style", f"{style} {caption}")[draw % 3] if style else "",
        (f"{last} {tag}, {style}" if style else f"{last} {tag}") if tag else "",
        f"{tag} {caption}" if tag else "",
    ]
    return tuple(dict.fromkeys(text for text in made if text))


def with_article(caption: str) -> str:
    """The caption with "a", "an" or "the" before it, where that can be said."""
    text = caption.lower()
    if text.startswith("flag of "):
        return f"the {caption}"
    head = text.split(" with ")[0].split(" of ")[0].split(" in ")[0]
    plural = head.endswith(_PLURALS) and not head.endswith(("ss", "us", "is"))
    if plural or not text[0].isalpha() or text.startswith(_DETERMINED):
        return caption
    vowel = text[0] in "aeiou" and not text.startswith(_SPOKEN_CONSONANT)
    return f"{'an' if vowel or text.startswith(_SPOKEN_VOWEL) else 'a'} {caption}"
