"""What the parser reads, what it refuses and why, and that it never fails."""

import ast
import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.protocol import CLOSE, OPEN, Call, Invalid, Segment, Text, check_references, format_call, parse
from agent.spec import PUBLISHED, ToolSpec


def tag(body: str) -> str:
    return f"{OPEN}{body}{CLOSE}"


def only(body: str) -> Call | Invalid:
    """The one segment of a document that is one tag."""
    (segment,) = parse(tag(body))
    assert not isinstance(segment, Text)
    return segment


def call(body: str) -> Call:
    segment = only(body)
    assert isinstance(segment, Call), segment
    return segment


def invalid(body: str) -> Invalid:
    segment = only(body)
    assert isinstance(segment, Invalid), segment
    return segment


def code(raw: str, mark: str = "'") -> str:
    """The code that a tag with this raw, unescaped code value holds."""
    q = mark[0]
    params = call(
        f"{{{q}source{q}: {q}code{q}, {q}description{q}: {q}d{q}, {q}params{q}: {{{q}code{q}: {mark}{raw}{mark}}}}}"
    )
    return params.params["code"]


# The published form and strict JSON


def test_a_document_is_cut_into_text_and_calls_that_cover_it() -> None:
    first = tag("{'source': 'search', 'description': 'a cat', 'params': {'query': 'cat'}}")
    second = tag('{"source": "edit", "description": "a dog", "params": {"img_index": 0, "prompt": "as a dog"}}')
    text = f"Look. {first} Then {second}"
    start = text.index(second)
    assert parse(text) == [
        Text("Look. ", 0, 6),
        Call("search", "a cat", {"query": "cat"}, 6, 6 + len(first)),
        Text(" Then ", 6 + len(first), start),
        Call("edit", "a dog", {"img_index": 0, "prompt": "as a dog"}, start, len(text)),
    ]


def test_an_empty_document_has_no_segment() -> None:
    assert parse("") == []


def test_a_document_without_a_tag_is_one_text() -> None:
    assert parse("only text") == [Text("only text", 0, 9)]


@pytest.mark.parametrize(
    "body",
    [
        "{'params': {'query': 'cat'}, 'description': 'a', 'source': 'search'}",
        "{'source': 'search', 'description': 'a', 'params': {'query': 'cat',},}",
        "  \n{ 'source' :\n'search' , 'description':'a','params' : { 'query' : 'cat' , } , }\n ",
        """{"source": 'search', "description": 'a', 'params': {"query": 'cat'}}""",
        "{'source': 'search', 'description': 'a', 'params': {'query': '''cat'''}}",
        "{'source': 'search', 'description': 'a', 'params': {'query': r'cat'}}",
        "{'source': 'search', 'description': 'a', 'params': {'query': 'c'\n  'at'}}",
        '{"source": "search", "description": "\\u0061", "params": {"query": "c\\x61t"}}',
    ],
)
def test_order_spaces_trailing_commas_and_either_quote_do_not_matter(body: str) -> None:
    read = call(body)
    assert (read.source, read.description, read.params) == ("search", "a", {"query": "cat"})


# Each defect of the released parser


def test_an_apostrophe_in_a_single_quoted_value_survives() -> None:
    read = call("{'source': 'search', 'description': 'Apple's revenue', 'params': {'query': 'Apple's and 'Dell's'}}")
    assert read.description == "Apple's revenue"
    assert read.params == {"query": "Apple's and 'Dell's"}


def test_raw_newlines_in_a_value_survive() -> None:
    assert code("x = 1\nplt.plot(x)") == "x = 1\nplt.plot(x)"


@pytest.mark.parametrize("end", ["'}}", "' }}", "',}}", "' , } , }", "'\n}\n}"])
def test_extra_spaces_and_commas_after_code_with_inner_quotes_survive(end: str) -> None:
    body = "{'source': 'code', 'description': 'd', 'params': {'code': 'plt.title('Sales', loc=\"left\")" + end
    assert call(body).params["code"] == "plt.title('Sales', loc=\"left\")"


def test_json_words_are_read_and_judged_by_type() -> None:
    edit = '{"source": "edit", "description": %s, "params": {"img_index": %s, "prompt": "p"}}'
    assert invalid(edit % ('"d"', "true")).reason == "'img_index' must be an integer"
    assert invalid(edit % ("null", "0")).reason == "'description' must be text"
    assert invalid(edit % ("false", "0")).reason == "'description' must be text"


@pytest.mark.parametrize("mark", ["'", '"', "'''", '"""'])
def test_non_ascii_text_is_never_mojibake_and_backslash_alpha_never_a_bell(mark: str) -> None:
    raw = r"plt.xlabel(`$\alpha$ Größe 日本 🙂`)\nplt.ylabel(`$\beta \frac \vec \theta \nabla \rho \text{x} \times`)"
    value = raw.replace("`", '"' if mark[0] == "'" else "'")
    assert code(value, mark) == value.replace(r"\n" + "plt", "\nplt")


# Quotes, brackets and backslashes within code


@pytest.mark.parametrize(
    "raw",
    [
        """d = {'a': {'b': 'c'}}""",
        """d = {'a': {'b': 'c'}}\nprint(d, "]}}", [1, {2: ')'}])""",
        """plt.title('It is "so"'); s = ''""",
        """print('')""",
        """words = text.split(' ')""",
        """print(', '.join(["a", 'b']), "'}}")""",
        """df = pd.DataFrame({'x': ['a', 'b'], "y": [1, 2]})\nplt.bar(df['x'], df["y"])""",
        r"""re.findall(r'\b\w+\d', "a b")""",
    ],
)
@pytest.mark.parametrize("mark", ["'", '"'])
def test_code_with_quotes_of_both_kinds_and_brackets_needs_no_escape(raw: str, mark: str) -> None:
    assert code(raw, mark) == raw


def test_quoted_parameters_in_any_order_keep_their_inner_quotes() -> None:
    body = "{'description': 'it's', 'params': {'prompt': 'it's', 'img_index': 2 }, 'source': 'edit'}"
    assert call(body).params == {"img_index": 2, "prompt": "it's"}
    assert call(body).description == "it's"


def test_escapes_mean_what_python_and_json_say() -> None:
    assert code(r"a\nb\tc\\d\'e\"f\/g\u00e9\x41\U0001F642\ud83d\ude42") == "a\nb\tc\\d'e\"f/géA🙂🙂"


def test_an_escaped_backslash_keeps_what_follows_as_it_is() -> None:
    assert code(r"print(\"a\\nb\", r\"\\alpha\")", '"') == r'print("a\nb", r"\alpha")'


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_encoded() -> None:
    assert code(r"a\ud83db").encode() == "a\ufffdb".encode()


# Refused tags: one reason and one position each


@pytest.mark.parametrize(
    ("body", "reason", "at"),
    [
        ("", "the tag is empty", ""),
        ("a cat", "a '{' is missing here", "a cat"),
        ("['a']", "a '{' is missing here", "["),
        ("{}", "the tag lacks 'source'", "{"),
        ("{'source': 'search', 'description': 'a'}", "the tag lacks 'params'", "{"),
        (
            "{'source': 'search', 'description': 'a', 'params': {'query': 'x'}, 'n': 1}",
            "the tag must not have 'n': its keys are source, description, params",
            "'n'",
        ),
        (
            "{'source': 'serch', 'description': 'a', 'params': {'query': 'x'}}",
            "unknown source 'serch': known are search, diffusion, code, edit",
            "'serch'",
        ),
        ("{'source': 1, 'description': 'a', 'params': {'query': 'x'}}", "'source' must be text", "1"),
        ("{'source': 'search', 'description': ' ', 'params': {'query': 'x'}}", "'description' is empty", "' '"),
        (
            "{'source': 'search', 'description': {'a': 1}, 'params': {'query': 'x'}}",
            "'description' must be text",
            "{'a'",
        ),
        ("{'source': 'search', 'description': 'a', 'params': 'x'}", "'params' must be a dict", "'x'"),
        ("{'source': 'search', 'description': 'a', 'params': {}}", "'params' of search lacks 'query'", "{}"),
        (
            "{'source': 'search', 'description': 'a', 'params': {'prompt': 'x'}}",
            "'params' of search must not have 'prompt': its keys are query",
            "'prompt'",
        ),
        ("{'source': 'search', 'description': 'a', 'params': {'query': '\\n'}}", "'query' is empty", "'\\n'"),
        ("{'source': 'code', 'description': 'a', 'params': {'code': ''}}", "'code' is empty", "''"),
        ("{'source': 'diffusion', 'description': 'a', 'params': {'prompt': 7}}", "'prompt' must be text", "7"),
        (
            "{'source': 'search', 'description': 'a', 'params': {'query': ['x']}}",
            "'query' has no value that can be read: it must be quoted text or a number",
            "['x']",
        ),
        ("{'source': 'search', 'source': 'code'}", "the key 'source' is given twice", "'source': 'code'"),
        (
            "{'source': 'search', 'description': 'a', 'params': {'query': 'x'}",
            "a ',' or a '}' is missing after the value of 'params'",
            CLOSE,
        ),
        (
            "{'source': 'search', 'description': 'a', 'params': {'query': 'x'}}}",
            "there is text after the closing brace",
            "}" + CLOSE,
        ),
        (
            "{'source': 'search', 'description': 'a', 'params': {'query': 'it's}}",
            "a ',' or a '}' is missing after the value of 'query'",
            "s}}",
        ),
        ("{'source' 'search'}", "a ':' is missing after the key 'source'", "'search'"),
    ],
)
def test_a_malformed_tag_is_one_invalid_call_with_a_reason_and_a_position(body: str, reason: str, at: str) -> None:
    text = f"before {tag(body)} after"
    before, broken, after = parse(text)
    assert before == Text("before ", 0, 7)
    assert isinstance(broken, Invalid)
    assert (broken.reason, broken.start, broken.end) == (reason, 7, len(text) - 6)
    assert text.startswith(at, broken.position)
    assert broken.start <= broken.position <= broken.end
    assert after == Text(" after", len(text) - 6, len(text))


@pytest.mark.parametrize("index", ["1", "1.0", "'1'", '" 1 "', "+1", "1e0"])
def test_an_integer_may_be_written_as_a_whole_number_or_as_text(index: str) -> None:
    read = call(f"{{'source': 'edit', 'description': 'd', 'params': {{'img_index': {index}, 'prompt': 'p'}}}}")
    assert read.params["img_index"] == 1
    assert type(read.params["img_index"]) is int


@pytest.mark.parametrize("index", ["true", "False", "None", "1.5", "1e999", "'one'", "''", "1" * 30, "9" * 5000])
def test_nothing_else_is_an_integer(index: str) -> None:
    refused = invalid(f"{{'source': 'edit', 'description': 'd', 'params': {{'img_index': {index}, 'prompt': 'p'}}}}")
    assert "'img_index'" in refused.reason
    assert refused.source == "edit"


def test_reasons_stay_short_whatever_the_tag_holds() -> None:
    assert len(invalid("{'" + "k" * 10_000 + "': 1}").reason) < 200


# Broken tags among others


GOOD = tag("{'source': 'search', 'description': 'a', 'params': {'query': 'x'}}")


def kinds(segments: list[Segment]) -> str:
    return "".join(type(s).__name__[0] for s in segments)


@pytest.mark.parametrize("kept", range(len(OPEN), len(GOOD)))
def test_a_document_cut_off_inside_a_tag_ends_in_one_invalid_call(kept: int) -> None:
    text = f"{GOOD} text {GOOD[:kept]}"
    first, between, last = parse(text)
    assert isinstance(first, Call) and isinstance(between, Text) and isinstance(last, Invalid)
    assert "cut off" in last.reason
    assert (last.end, last.position) == (len(text), len(text))


def test_a_tag_in_an_unclosed_one_is_still_read() -> None:
    text = f"a {OPEN}{{'source': 'code', 'descr {GOOD} b"
    segments = parse(text)
    assert kinds(segments) == "TICT"
    assert segments[1] == Invalid("the tag is not closed before the next one", 2, 35, 35, "code")


def test_text_after_a_whole_but_unclosed_tag_is_kept() -> None:
    text = f"{GOOD.removesuffix(CLOSE)}\n\nMore text. {GOOD}"
    broken, kept, good = parse(text)
    assert isinstance(broken, Invalid) and "</imgen> is missing" in broken.reason
    assert isinstance(kept, Text) and kept.text == "\n\nMore text. "
    assert isinstance(good, Call)


def test_a_stray_closing_mark_is_text() -> None:
    assert kinds(parse(f"a {CLOSE} b {GOOD}{CLOSE}")) == "TCT"


def test_the_rest_of_the_document_goes_on_after_a_broken_tag() -> None:
    assert kinds(parse(f"{GOOD}{tag('{')} text {GOOD}")) == "CITC"


# Any text at all

fragments = st.sampled_from(
    [
        OPEN,
        CLOSE,
        GOOD,
        "{",
        "}",
        "'",
        '"',
        "'''",
        ":",
        ",",
        "\\",
        "\n",
        " ",
        "'source': ",
        "'code'",
        "'params': {",
        "}}",
    ]
    + ["'description': ", "'code': ", "\\u", "\\ud83d", "true", "1", "1e9", "é", "\ud800", "r'", "'search'", "'edit'"]
)


@settings(deadline=None)
@given(st.lists(fragments | st.text(max_size=5)).map("".join) | st.text(st.characters(), max_size=30).map(tag))
@example(tag("{" * 100_000))
@example(tag("[" * 100_000))
def test_any_text_parses_into_segments_that_cover_it(text: str) -> None:
    segments = parse(text)
    assert "".join(text[s.start : s.end] for s in segments) == text
    assert all(s.start < s.end for s in segments)
    assert [s.start for s in segments[1:]] == [s.end for s in segments[:-1]]
    assert all(a.text == text[a.start : a.end] for a in segments if isinstance(a, Text))
    assert all(i.reason and i.start <= i.position <= i.end for i in segments if isinstance(i, Invalid))
    for c in segments:
        if isinstance(c, Call):
            kinds = {name: type(value) for name, value in c.params.items()}
            assert kinds == PUBLISHED[c.source].params and c.description.strip()
    check_references(segments, 1)


# Not what this parser reads in its own way: marks of tags, backspaces, form feeds, and what may spell a TeX command.
words = st.text(st.characters(exclude_characters="\x08\x0c", exclude_categories=["Cs"])).filter(
    lambda s: s.strip() and not re.search(r"imgen>|[\n\r\t][a-z]", s)
)


@settings(deadline=None)
@given(words, words, st.sampled_from([repr, json.dumps, lambda d: json.dumps(d, ensure_ascii=False, indent=1)]))
@example("tab\there", "a\nb", json.dumps)
def test_what_python_and_json_write_is_read_as_they_read_it(description: str, query: str, write) -> None:
    read = call(write({"source": "search", "description": description, "params": {"query": query}}))
    assert (read.description, read.params["query"]) == (description, query)


@pytest.mark.parametrize(
    "body",
    [
        "{'source': 'search', 'des ",
        "{'source': 'code', 'description': 'a', 'params': {'code': 'x'y'z",
        "'source': 'a' ' '",
        "{" * 20,
    ],
)
def test_a_long_document_of_broken_tags_parses_in_two_seconds(body: str) -> None:
    broken = tag(body)
    filler = "text " * ((200_000 // 5_000 - len(broken)) // 5)
    text = (broken + filler) * 5_000
    started = time.process_time()
    segments = parse(text)
    assert time.process_time() - started < 2
    assert sum(isinstance(s, Invalid) for s in segments) == 5_000


@pytest.mark.parametrize(
    "inside", ["'", '"', "' ", "'}} ", "',", "' , ", " ", "\\", "\\'", "a''", "''' ", "\\text", "'a'\n", "{'a': ", "1"]
)
@pytest.mark.parametrize("start", ["{'source': 'code', 'description': 'd', 'params': {'code': '", "", "{'source': "])
def test_one_long_broken_tag_takes_no_quadratic_time(start: str, inside: str) -> None:
    text = tag(start + inside * (200_000 // len(inside)))
    started = time.process_time()
    parse(text)
    assert time.process_time() - started < 2


# References


def edit(index: int) -> str:
    return format_call("edit", "d", {"img_index": index, "prompt": "p"})


@pytest.mark.parametrize(
    ("text", "given_images", "expected"),
    [
        (edit(0), 0, "I"),
        (edit(0), 1, "C"),
        (edit(1), 1, "I"),
        (edit(-1), 5, "I"),
        (GOOD + edit(0), 0, "CC"),
        (GOOD + edit(1), 0, "CI"),
        (GOOD + edit(2), 2, "CC"),
        (GOOD + edit(0) + edit(1), 0, "CCC"),
        (GOOD + edit(9) + edit(1), 0, "CII"),  # a refused edit takes no slot
        (GOOD + tag("{") + edit(1), 0, "CII"),  # nor does a malformed tag
        (edit(0) + GOOD, 0, "IC"),
    ],
)
def test_an_edit_may_only_point_backwards(text: str, given_images: int, expected: str) -> None:
    assert kinds(check_references(parse(text), given_images)) == expected


def test_a_forward_reference_says_what_stands_before_it() -> None:
    _, refused = check_references(parse(GOOD + edit(1)), 0)
    start = len(GOOD)
    reason = "img_index is 1, but 1 pictures stand before this tag (they are counted from 0)"
    assert refused == Invalid(reason, start, start + len(edit(1)), start, "edit")


def test_tools_of_one_s_own_are_read_and_checked_by_their_specs() -> None:
    specs = {"blend": ToolSpec("blend", {"first": int, "second": int}, "mix", image_params=("first", "second"))}
    text = format_call("blend", "d", {"first": 0, "second": 2})
    assert kinds(check_references(parse(text, specs), 3, specs)) == "C"
    assert kinds(check_references(parse(text, specs), 2, specs)) == "I"
    assert kinds(parse(GOOD, specs)) == "I"


# Writing

values = st.text(st.characters(), max_size=50).filter(lambda s: s.strip()) | st.sampled_from(
    [
        "</imgen>",
        "a <imgen> b",
        "\\",
        "'",
        "\"'",
        "\\n",
        "\n",
        "\\\n",
        "\\\\alpha",
        "tab\theta",
        "\nabla",
        "\rho",
        "'}}",
    ]
).map(lambda s: f"x{s}y{s}")


@settings(deadline=None)
@given(values, values, st.sampled_from(["python", "json"]))
@example("x", 'it\'s "so"', "python")
def test_a_formatted_call_reads_back_identically(description: str, text: str, style) -> None:
    written = format_call("code", description, {"code": text}, style)
    assert parse(written) == [Call("code", description, {"code": text}, 0, len(written))]
    standard = json.loads if style == "json" else ast.literal_eval
    if not any("\ud800" <= c <= "\udfff" for c in written):  # which Python source cannot hold
        body = standard(written.removeprefix(OPEN).removesuffix(CLOSE))
        assert body == {"source": "code", "description": description, "params": {"code": text}}


def test_a_formatted_call_is_the_published_form() -> None:
    written = format_call("edit", "it's", {"img_index": 1, "prompt": "so"})
    assert written == tag("""{'source': 'edit', 'description': "it's", 'params': {'img_index': 1, 'prompt': 'so'}}""")
    written = format_call("edit", "it's", {"img_index": 1, "prompt": "so"}, style="json")
    assert written == tag('{"source": "edit", "description": "it\'s", "params": {"img_index": 1, "prompt": "so"}}')


@pytest.mark.parametrize("value", [True, None, 1.5, ["x"], 10**18])
def test_a_parameter_that_would_not_read_back_is_not_written(value) -> None:
    with pytest.raises(ValueError, match="'img_index' must be text or an integer"):
        format_call("edit", "d", {"img_index": value, "prompt": "p"})


# Lists of pictures

MANY = {"blend": ToolSpec("blend", {"img_index": list[int], "prompt": str}, "mix", image_params=("img_index",))}


@pytest.mark.parametrize(
    ("written", "read"),
    [("[0, 2]", [0, 2]), ("[ 1 ,\n+2, ]", [1, 2]), ("[0]", [0]), ("1", [1]), ("'1'", [1]), ("[1,1]", [1, 1])],
)
@pytest.mark.parametrize("prompt", ["'p'", "'it's'"])
def test_a_list_parameter_takes_one_index_or_several(written: str, read: list[int], prompt: str) -> None:
    body = f"{{'source': 'blend', 'description': 'd', 'params': {{'img_index': {written}, 'prompt': {prompt}}}}}"
    (segment,) = parse(tag(body), MANY)
    assert isinstance(segment, Call) and segment.params["img_index"] == read
    assert MANY["blend"].pictures(segment.params) == read


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("[]", "'img_index' is empty"),
        ("[,]", "has no value that can be read"),
        ("[0, 'a']", "has no value that can be read"),
        ("[0 1]", "has no value that can be read"),
        ("[[0]]", "has no value that can be read"),
        ("[0, 1", "has no value that can be read"),
        ("'a'", "must be an integer"),
    ],
)
def test_what_is_no_list_of_integers_is_refused(written: str, reason: str) -> None:
    body = f"{{'source': 'blend', 'description': 'd', 'params': {{'img_index': {written}, 'prompt': 'p'}}}}"
    (segment,) = parse(tag(body), MANY)
    assert isinstance(segment, Invalid) and reason in segment.reason


def test_a_list_is_no_text_and_no_single_index() -> None:
    refused = invalid("{'source': 'edit', 'description': 'd', 'params': {'img_index': [0], 'prompt': 'p'}}")
    assert refused.reason == "'img_index' must be an integer"
    assert (
        invalid("{'source': 'search', 'description': 'd', 'params': {'query': [0]}}").reason == "'query' must be text"
    )


@pytest.mark.parametrize(("indices", "expected"), [([0, 1], "C"), ([0, 2], "I"), ([-1], "I"), ([1, 0, 1], "C")])
def test_every_index_of_a_list_must_point_backwards(indices: list[int], expected: str) -> None:
    written = format_call("blend", "d", {"img_index": indices, "prompt": "p"})
    assert kinds(check_references(parse(written, MANY), 2, MANY)) == expected


def test_a_long_list_takes_no_quadratic_time() -> None:
    started = time.process_time()
    for end in ("]", "x", ""):
        parse(tag(f"{{'source': 'blend', 'params': {{'img_index': [{'1, ' * 60_000}{end}"), MANY)
    assert time.process_time() - started < 2
