"""Replies of judges: read whatever their dress, refused where they are not one answer."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.evaluate.parsing import Answer, Number, ParseError, Text

SCORE = Answer((Number("score", 0, 10), Text("reasoning", ("reason",))), bare=True)
VERDICT = Answer((Number("correct", 0, 1, integer=True), Text("reason")))
THREE = Answer(
    (
        Number("fantasy_fulfillment", 0, 10, aliases=("fantasy",)),
        Number("identity_preservation", 0, 10),
        Number("aesthetic_quality", 0, 10),
    )
)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 8, "reasoning": "x"}', 8),
        ('{"score": 7.5}', 7.5),
        ('{"score": 7.0}', 7),
        ('```json\n{"score": "8/10"}\n```', 8),
        ('Sure, here it is:\n{"score": [6], "reasoning": "two\nlines"}\nAnything else?', 6),
        ('{"Score": " 9 "}', 9),
        ('{"score": {"score": 3, "reason": "y"}}', 3),
        ('{"result": {"score": 5}}', 5),
        ('[{"score": 4}]', 4),
        ('{"score": 8, "reasoning": "cut off in the', 8),
        ("{'score': 8, 'reasoning': 'single quotes'}", 8),
        ("**Score:** 9", 9),
        ("**Score**: 9/10", 9),
        ("score (0-10): 8", 8),
        ("Score = <8>", 8),
        ("Score：8", 8),
        ("- Score: 8 out of 10.", 8),
        ("1. **Score** - ignored\n2. Score: 8", 8),
        ("| Score | 9 |", 9),
        ("## Score\n8", 8),
        ("Score: 8. Because 3 details are wrong.", 8),
        ("Score 8", 8),
        ("<think>Score: 3? or Score: 4?</think>\nScore: 5", 5),
        ("7", 7),
        (" **7/10** ", 7),
        ('{"score": 6} {"score": 6}', 6),
        ("{" * 3000 + '{"score": 6}', 6),
    ],
)
def test_one_number_is_read(reply, score):
    value = SCORE.parse(reply)["score"]
    assert value == score and type(value) is type(score)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("", "no score"),
        ("I cannot judge this.", "no score"),
        ("I think it is 7", "no score"),
        ("score 3 points lower", "no score"),
        ("no score: 3", "no score"),
        ("underscore: 3", "no score"),
        ("Score: high", "no score"),
        ("<think>Score: 3", "no score"),
        ("Score: 7-8", "'7-8'"),
        ("Score: 7 or 8", "'7 or 8'"),
        ("Score: 7,5", "'7,5'"),
        ("Score: 7.5.1", "'7.5.1'"),
        ("Score: 80%", "'80%'"),
        ("Score: 4/5", "4/5"),
        ("Score: -1", "'-1'"),
        ("Score: 11", "'11'"),
        ('{"score": 11}', "'11'"),
        ('{"score": 1e999}', "'inf'"),
        ('{"score": ' + "9" * 5000 + "}", "outside"),
        ('{"score": NaN}', "no score"),
        ('{"score": null}', "'None'"),
        ('{"score": true}', "'True'"),
        ('{"score": "high"}', "'high'"),
        ('{"score": [7, 8]}', "'[7, 8]'"),
        ('{"score": 7, "score": 8}', "7, 8"),
        ('{"score": 7} or {"score": 8}', "7, 8"),
        ('Score: 7\n{"score": 8}', "8, 7"),
        ('{"score": {"a": 7}}', "not a number"),
    ],
)
def test_no_number_is_guessed(reply, found):
    with pytest.raises(ParseError, match=re.escape(found)):
        SCORE.parse(reply)


@pytest.mark.parametrize("reply", ['{"score": 1', "Score: 1", "1", "**Score:** 1 "])
def test_a_number_where_the_reply_was_cut_may_lack_digits(reply):
    assert SCORE.parse(reply)["score"] == 1
    with pytest.raises(ParseError, match="cut off"):
        SCORE.parse(reply, truncated=True)
    if "core" in reply:
        assert SCORE.parse(f"{reply.strip()}, because", truncated=True)["score"] == 1


def test_a_verdict_is_0_or_1():
    for reply, correct in (
        ('{"correct": true}', 1),
        ('{"correct": "0"}', 0),
        ('{"correct": 1.0}', 1),
        ("correct: 0", 0),
    ):
        assert VERDICT.parse(reply)["correct"] == correct
    for reply in ('{"correct": 0.5}', '{"correct": 2}', '{"correct": -1}', "incorrect: 0", "Not correct: 1"):
        with pytest.raises(ParseError):
            VERDICT.parse(reply)


def test_labels_with_markdown_decimals_and_scales():
    reply = """**Fantasy Fulfillment:** 9
    Reason: all there, 3 details perfect.
    2. **Identity Preservation** (0-10): 8/10
    - Aesthetic_Quality = **7.5**"""
    expected = {"fantasy_fulfillment": 9, "identity_preservation": 8, "aesthetic_quality": 7.5}
    assert THREE.parse(reply) == expected
    with pytest.raises(ParseError, match="no aesthetic_quality"):
        THREE.parse(reply.replace("Aesthetic", "Artistic"))


def test_texts_are_for_the_reader_and_may_lack():
    assert SCORE.parse('{"score": 1, "reason": "r"}')["reasoning"] == "r"
    assert SCORE.parse("Score: 1\nReason: dull colours")["reasoning"] == "dull colours"
    assert SCORE.parse('{"score": 1}')["reasoning"] == ""


def test_the_schema_has_bounds_and_the_verdict_first():
    assert VERDICT.schema["properties"]["correct"] == {"type": "integer", "enum": [0, 1]}
    assert list(VERDICT.schema["properties"]) == VERDICT.schema["required"] == ["correct", "reason"]
    assert SCORE.schema["properties"]["score"] == {"type": "number", "minimum": 0, "maximum": 10}
    assert SCORE.schema["additionalProperties"] is False


def test_long_replies_take_no_time():
    for piece in ("{", "[", "**", "score ", "| ", "`", "score: ", '{"score": {', "<think>", "- "):
        with pytest.raises(ParseError):
            SCORE.parse(piece * (20000 // len(piece)))


PIECES = st.one_of(
    st.sampled_from(
        ["score", "Score:", "**score**", '"score":', "correct", '"correct": ', "fantasy fulfillment: ", "true", "false"]
        + ["{", "}", "[", "]", "```json\n", "```", "\n", " ", ",", "/10", " out of 5", "<think>", "</think>", "- ", "|"]
        + ["NaN", "Infinity", "null", "\\", '"', "'", "1e400", "-", "%", "：", "½", "٣", "8", "10", "7.5", "-1"]
    ),
    st.integers(-20, 20).map(str),
    st.floats(0, 12, allow_nan=False).map(str),
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-1, 11) | st.floats(0, 11) | st.sampled_from(["8", "8/10", "good", ""]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["score", "correct", "Score", "identity_preservation", "x"]), inner)
        ),
        max_leaves=6,
    ).map(json.dumps),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.booleans())
def test_any_text_is_an_answer_out_of_it_or_a_parse_error(reply, truncated):
    for answer in (SCORE, VERDICT, THREE):
        try:
            found = answer.parse(reply, truncated)
        except ParseError as error:
            assert str(error)
            continue
        there = {float(digits) for digits in re.findall(r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", reply)}
        there |= {float(digits) for digits in re.findall(r"[0-9]+(?:\.[0-9]+)?", reply)}
        if answer is VERDICT:
            there |= {1.0} if "true" in reply else set()
            there |= {0.0} if "false" in reply else set()
        for part in answer.fields:
            if isinstance(part, Number):
                assert found[part.name] in there
                assert part.low <= found[part.name] <= part.high
