"""Understands an instruction of the edit tool: plain English in, operations of tools/edit_ops.py in order out.

Every operation has a pattern that finds it in the text and a reader (tools/edit_words.py) that takes its arguments
from the *clause* around it, which ends at the next comma, full stop, "and", "then", ... Where two patterns overlap, the
one that starts first and is longer wins; within a clause each operation counts once. Quoted text is only ever the text
of a caption. A picture is edited as a whole, not the things in it: what no pattern finds is passed over.
"""

from __future__ import annotations

import re

from tools import edit_words as words
from tools.base import CallFailed

CAN_DO = (
    "black and white, sepia, invert, brighter or darker, more or less contrast, more or less saturated, tint with a "
    "colour, blur, sharpen, posterize, pixelate, edges, sketch, rotate, flip, crop, resize, thumbnail, border, round "
    "corners, caption 'text'"
)
MAX_INSTRUCTION = 2000  # characters
MAX_OPERATIONS = 16

_FIRST = 0xE000
_MARK = "\ue000-\uf8ff"
_QUOTES = re.compile(r"(?<!\w)(?:'(.+?)'|\"(.+?)\"|“(.+?)”|‘(.+?)’|«(.+?)»|`(.+?)`)(?!\w)", re.S)
_BREAK = re.compile(r"[,;.!?](?=\s|$)|\b(?:and|then|but|plus|also|after(?:wards)?|finally)\b|\n", re.I)
_NO = re.compile(r"(?:\bno|\bnot|n['’]t|\bwithout|\bnever|\binstead\s+of)\s+(?:\w+\s+){0,2}$", re.I)
_LISTED = re.compile(  # one clause: "increase brightness, contrast and sharpness by 20%"
    r"(brightness|contrast|saturation|sharpness)(?:,|,?\s+and)\s+(?:the\s+)?(?=brightness|contrast|saturation|sharpness)",
    re.I,
)
_END = r"(?=\s*(?:$|[,;.!?]|\b(?:and|then|but|with|plus|instead|version|image|picture|photo)\b))"
_TINT = r"(?:tint|tone|hue|filter|overlay|wash|cast|shade)"
_WRITE = (
    r"\b(?:add|put|write|insert|place|overlay|print|draw|give|include|stamp|with|caption\w*|label\w*|title\w*|text|words?|"
    r"saying|says|reads?|reading)\b"
)
_TURN = (
    r"(?:by\s+|about\s+)?(?:-?\d|a\s+(?:quarter|half)|(?:to\s+the\s+)?(?:left|right)\b|(?:counter|anti)?[\s-]?clockwise|"
    r"upside|around|on\s+its|sideways)"
)
_HV = r"(?:horizontal\w*|vertical\w*)"
_HERE = r"(?:the\s+|its\s+|all\s+|of\s+)*"

_WORDS: list[tuple[str, words.Reader]] = [
    (
        r"black[\s-]*(?:and|&|n)[\s-]*white|\bb\s?[&/]\s?w\b|\bgr[ae]y[\s-]?(?:scal|ton)\w*|monochrom\w*",
        words.greyscale,
    ),
    (
        rf"\bgr[ae]y\b{_END}|(?:remove\s+{_HERE}|without\s+(?:any\s+)?)colou?rs?\b|colou?rless|\bdesaturat\w*",
        words.greyscale,
    ),
    (r"\bsepia\b|\bvintage\b|\bantique\b|\bold[\s-](?:fashioned|time)\w*", words.simple("sepia")),
    (rf"\binvert\w*|\bnegative\b|\b(?:revers\w*|opposite)\s+{_HERE}colou?rs?", words.simple("invert")),
    (r"\bbright(?:er|en\w*)\b|\blight(?:er|en\w*)\b", words.plain_level("brightness", 1)),
    (r"\bdark(?:er|en\w*)\b|\bdim(?:mer|med)?\b", words.plain_level("brightness", -1)),
    (r"\bbright(?:ness)?\b", words.level("brightness", 1)),
    (r"\bdark\b", words.level("brightness", -1)),
    (r"\bcontrast\w*", words.level("contrast", 1)),
    (r"\bsaturat\w*|\bcolou?rful\w*|\bvivid\w*|\bvibran\w*", words.level("saturation", 1)),
    (rf"\b(?:{words.MORE}|{words.LESS})\s+{_HERE}colou?rs?\b", words.level("saturation", 1)),
    (r"\bmuted?\b|\bpaler?\b|\bfade[ds]?\b|\bwashed[\s-]out\b", words.plain_level("saturation", -1)),
    (r"\bblur\w*|\bout\s+of\s+focus\b|\bsmooth\w*|\bsoften\w*|\bfuzz\w*", words.blur),
    (r"\bsharp(?:en\w*|er|ness)?\b|\bcrisp(?:er)?\b", words.sharpen),
    (rf"\b(?:rotat\w*|(?:turn|tilt|spin){words.IT}?\s+(?={_TURN}))(?:{words.IT}?\s+upside[\s-]down)?", words.rotate),
    (r"\bupside[\s-]down\b|\b(?:quarter|half)[\s-]turn\b|\bon\s+its\s+(?:side|head)\b", words.rotate),
    (rf"\b(?:flip|mirror|reflect)\w*(?:{words.IT}?\s+(?:{_HV}\s+and\s+{_HV}|upside[\s-]down))?", words.flip),
    (rf"\bcrop\w*|\btrim\w*|\bkeep\s+(?:only|just)\b|\bonly\s+keep\b|\bzoom\w*{words.IT}?\s+in", words.crop),
    (rf"\b(?:cut|remov\w*)(?:\s+(?:off|away))?\s+(?=(?:the\s+)?{words.PART.pattern})", words.crop),
    (
        r"\bre-?(?:siz|scal)\w*|\bscal(?:e|ed|ing)\b|\b(?:up|down)scal\w*|\bthumbnail\w*|\bshr[iu]nk\w*|\benlarg\w*",
        words.resize,
    ),
    (r"\b(?:small|larg|bigg)er\b(?!\s+(?:border|frame|contrast|text|caption|letters))", words.resize),
    (
        rf"\b(?:half|halve|double|twice|triple|reduc\w*|increas\w*)\s+{_HERE}(?:size|(?:as\s+)?(?:large|big))\b",
        words.resize,
    ),
    (r"\d+\s*(?:px|pixels?)\s+(?:wide|high|tall)\b", words.resize),
    (
        rf"(?:{words.COLOUR}[\s-]+(?:\w+[\s-]+)?)?\b(?:border\w*|fram(?:e|ed)\b)"
        rf"(?:{words.IT}?(?:\s+(?!and\b)\w+)?\s+(?:in|of|with)\s+(?:a\s+)?{words.COLOUR})?",
        words.border,
    ),
    (rf"\bround\w*\s+(?:off\s+)?{_HERE}(?:corners?|edges?)\b|\b(?:corners?|edges?)\s+rounded\b", words.round_corners),
    (
        rf"\b(?:tint|colou?ri[sz]e|tone|dye|wash|paint)\w*{words.IT}?(?:\s+(?:in|with|to|a|an|all))*\s+({words.COLOUR})",
        words.tint,
    ),
    (
        rf"\b(?:make|turn|colou?r|paint|render){words.IT}(?:\s+(?:more|all|a\s+bit|slightly|completely|look|into|to|in))*"
        rf"\s+({words.COLOUR}){_END}",
        words.tint,
    ),
    (rf"\b(?:chang|set|turn)\w*\s+{_HERE}(?:hue|tint|tone|colou?rs?)\s+(?:in)?to\s+({words.COLOUR})", words.tint),
    (rf"\b({words.COLOUR})[\s-]+{_TINT}(?:ed|s)?\b|\b{_TINT}s?\s+(?:of|in)\s+({words.COLOUR})", words.tint),
    (r"\bposteri[sz]\w*|\bposter\b|\bpop[\s-]?art\b", words.posterize),
    (rf"\b(?:fewer|reduc\w*\s+{_HERE}number\s+of|limit\w*)\s+{_HERE}colou?rs\b", words.posterize),
    (r"\bpixel(?:l?at|i[sz])\w*|\bpixel[\s-]art\b|\bmosaic\b|\b8[\s-]?bit\b|\bblocky\b", words.pixelate),
    (
        rf"\b(?:find|detect|show|trac|extract|highlight|only|just)\w*\s+{_HERE}(?:edges?|outlines?)\b",
        words.simple("edges"),
    ),
    (
        r"\bedge[\s-](?:detect\w*|map|filter)\b|\boutlin\w*|\bcontours?\b|\b(?:to|into|as)\s+edges\b",
        words.simple("edges"),
    ),
    (r"\bsketch\w*|\b(?:pencil|line|charcoal|ink)[\s-](?:drawing|art|sketch)\w*|\bpencil\b", words.simple("sketch")),
    (rf"{_WRITE}(?:(?!{_WRITE}|\band\b|\bthen\b)[^,;.\n{_MARK}])*[{_MARK}]", words.caption),
    (
        r"\b(?:(?:caption|text|title|label|words?)\s*(?::|\bsaying\b|\breading\b|\bthat\s+(?:says|reads)\b)|write)\s+"
        rf"(?!(?:an?|the|some|something|it|in|on)\b)(?P<plain>[^,;.\n{_MARK}]+?)"
        rf"(?=\s*(?:$|[,;.\n]|\b(?:at|on)\s+(?:the|it)\b|\bin\s+{words.COLOUR}\s*$))",
        words.caption,
    ),
]
_PATTERNS = [(re.compile(pattern, re.I), read) for pattern, read in _WORDS]


def understand(instruction: str) -> list[words.Operation]:
    """The operations that an instruction asks for, in order.

    Raises:
        CallFailed: there is none, there are too many, the instruction is too long, or one lacks what it needs.
    """
    if len(instruction) > MAX_INSTRUCTION:
        raise CallFailed(f"the instruction is {len(instruction)} characters long: at most {MAX_INSTRUCTION} are read")
    text, quoted = _take_quoted(instruction)
    text = _LISTED.sub(r"\1 & ", text)
    breaks = [m.span() for m in _BREAK.finditer(text)]
    operations: list[words.Operation] = []
    read: set[tuple[words.Reader | str, int]] = set()  # by reader or operation, and clause
    end = 0
    for match, reader in _matches(text):
        start = max((b for _, b in breaks if b <= match.start()), default=0)
        if match.start() < end or (reader, start) in read or _NO.search(text[start : match.start()]):
            continue
        stop = min((a for a, _ in breaks if a >= match.end()), default=len(text))
        marks = re.findall(f"[{_MARK}]", match[0])
        said = quoted[ord(marks[-1]) - _FIRST] if marks else ""
        before, after = text[start : match.start()], text[match.end() : stop]
        operation = reader(words.Found(match, text[start:stop], before, after, said))
        if operation and (operation.name, start) not in read:
            read |= {(operation.name, start), (reader, start)}
            operations.append(operation)
            end = match.end()
    if not operations:
        raise CallFailed(f"no edit that this tool can do is in {instruction[:120]!r}: it can do {CAN_DO}")
    if len(operations) > MAX_OPERATIONS:
        raise CallFailed(f"the instruction asks for {len(operations)} edits: at most {MAX_OPERATIONS} are done")
    return operations


def _matches(text: str) -> list[tuple[re.Match[str], words.Reader]]:
    """All matches, the earliest and then the longest first."""
    found = [(match, reader) for pattern, reader in _PATTERNS for match in pattern.finditer(text)]
    return sorted(found, key=lambda pair: (pair[0].start(), -pair[0].end()))


def _take_quoted(instruction: str) -> tuple[str, list[str]]:
    """Replace each quoted text by one private-use character, so that nothing in it is read as an operation."""
    quoted: list[str] = []

    def replace(match: re.Match[str]) -> str:
        quoted.append(next(g for g in match.groups() if g))
        return chr(_FIRST + len(quoted) - 1)

    return _QUOTES.sub(replace, re.sub(f"[{_MARK}]", "", instruction)), quoted
