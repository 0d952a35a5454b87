"""The layouts of records: what each is read as, and the error of each broken record."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.pairs import prompt_end
from rlhf.records import DataError, read_comparisons, read_demonstrations, read_prompts

USER = {"role": "user", "content": "u"}
SYSTEM = {"role": "system", "content": "s"}


def calling(arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


CALL = calling({})
RESULT = {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def said(text):
    return {"role": "assistant", "content": text}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


# What is read ------------------------------------------------------------------------------------------------------

DEMONSTRATIONS = [
    ({"prompt": "p", "completion": "c"}, "p", "c"),
    ({"prompt": [USER], "completion": [said("c")]}, [USER], "c"),
    ({"prompt": [USER], "completion": said("c")}, [USER], "c"),
    ({"prompt": [USER], "completion": "c"}, [USER], "c"),
    ({"prompt": "u", "completion": [said("c")]}, [USER], "c"),
    ({"prompt": [USER, said("It is")], "completion": " c"}, [USER, said("It is")], " c"),
    ({"messages": [SYSTEM, USER, said("c")]}, [SYSTEM, USER], "c"),
    ({"messages": [SYSTEM, USER, said("c")], "prompt": "u"}, [SYSTEM, USER], "c"),
    ({"messages": [SYSTEM, USER, said("c")], "prompt": [SYSTEM]}, [SYSTEM, USER], "c"),
    ({"messages": [USER, said("c")], "label": "sports"}, [USER], "c"),
    (
        {"messages": [{"role": "developer", "content": text("a", "b")}, USER, said(text("c", "d"))]},
        [{"role": "developer", "content": "ab"}, USER],
        "cd",
    ),
    ({"messages": [USER, CALL | {"content": None}, RESULT | {"id": 7}, said("c")]}, [USER, CALL, RESULT], "c"),
    ({"messages": [USER, CALL]}, [USER], CALL),
    ({"messages": [USER, calling('{"a": [1]}')]}, [USER], calling({"a": [1]})),
    ({"messages": [USER, said("c") | {"reasoning_content": "t"}]}, [USER], said("c") | {"reasoning_content": "t"}),
]


@pytest.mark.parametrize(("record", "prompt", "completion"), DEMONSTRATIONS)
def test_demonstrations(record, prompt, completion):
    [found] = read_demonstrations([record])
    assert (found.prompt, found.completion, found.tools) == (prompt, completion, None)
    assert [r.prompt for r in read_prompts([record])] == [prompt]


HH = "\n\nHuman: hi\n\nAssistant: hey\n\nHuman: u\n\nAssistant:"
CHATML = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
NECTAR = [{"answer": "x", "model": "m", "rank": 2.0}, {"answer": "y", "model": "n", "rank": 1}]

COMPARISONS = [
    ({"prompt": "p", "chosen": "x", "rejected": "y"}, "p", ("x", "y"), (1, 2)),
    ({"prompt": [USER], "chosen": "x", "rejected": "y"}, [USER], ("x", "y"), (1, 2)),
    ({"prompt": [USER], "chosen": [said("x")], "rejected": [said("y")]}, [USER], ("x", "y"), (1, 2)),
    ({"prompt": "u", "chosen": said("x"), "rejected": said("y")}, [USER], ("x", "y"), (1, 2)),
    # whole conversations
    ({"chosen": [USER, said("x")], "rejected": [USER, said("y")]}, [USER], ("x", "y"), (1, 2)),
    (
        {"chosen": [SYSTEM, USER, said("x")], "rejected": [SYSTEM, USER, said("y")], "question": "q"},
        [SYSTEM, USER],
        ("x", "y"),
        (1, 2),
    ),
    (
        {"prompt": " u\n", "chosen": [USER, said("x")], "rejected": [USER, said("y")], "messages": [USER, said("x")]},
        [USER],
        ("x", "y"),
        (1, 2),
    ),
    (
        {"prompt": [SYSTEM], "chosen": [SYSTEM, USER, said("x")], "rejected": [SYSTEM, USER, said("y")]},
        [SYSTEM, USER],
        ("x", "y"),
        (1, 2),
    ),
    ({"chosen": [USER, said("x")], "rejected": [USER, CALL]}, [USER], ("x", CALL), (1, 2)),
    # transcripts
    ({"chosen": HH + " x", "rejected": HH + " y"}, HH, (" x", " y"), (1, 2)),
    ({"chosen": HH + " x x", "rejected": HH + " x y"}, HH, (" x x", " x y"), (1, 2)),
    ({"prompt": HH, "chosen": HH + " x", "rejected": HH + " y"}, HH, (" x", " y"), (1, 2)),
    ({"prompt": HH[:-12], "chosen": HH + " x", "rejected": HH + " y"}, HH, (" x", " y"), (1, 2)),
    (
        {"chosen": HH + " x\n\nHuman: h\n\nAssistant: z", "rejected": HH + " y"},
        HH,
        (" x\n\nHuman: h\n\nAssistant: z", " y"),
        (1, 2),
    ),
    ({"chosen": CHATML + "x", "rejected": CHATML + "y"}, CHATML, ("x", "y"), (1, 2)),
    (
        {"chosen": "USER: u ASSISTANT: x", "rejected": "USER: u ASSISTANT: y"},
        "USER: u ASSISTANT:",
        (" x", " y"),
        (1, 2),
    ),
    (
        {"chosen": "Do.\n\n### Response:\nDo x", "rejected": "Do.\n\n### Response:\nDo y"},
        "Do.\n\n### Response:\n",
        ("Do x", "Do y"),
        (1, 2),
    ),
    # other texts
    ({"chosen": "the sky is blue", "rejected": "the sky is black"}, "the sky is", (" blue", " black"), (1, 2)),
    ({"chosen": "Q yes", "rejected": "Q yes it is"}, "Q", (" yes", " yes it is"), (1, 2)),
    ({"chosen": "Q yes it is", "rejected": "Q yes \n"}, "Q", (" yes it is", " yes \n"), (1, 2)),
    ({"chosen": "Q\nI'll", "rejected": "Q\nI'm"}, "Q", ("\nI'll", "\nI'm"), (1, 2)),
    # answers that repeat a prompt, but are no transcripts
    ({"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello..."}, "Hello", ("Hello!", "Hello..."), (1, 2)),
    # more than two
    ({"prompt": "p", "completions": ["x", "y", "z"], "ranks": [2, 1, 2]}, "p", ("x", "y", "z"), (2, 1, 2)),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": [3.0, 1.0]}, "p", ("x", "y"), (3, 1)),
    ({"prompt": "p", "completions": ["x", "y", "z"], "scores": [0.5, 7, 0.5]}, "p", ("x", "y", "z"), (2, 1, 2)),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [-1e300, -2], "chosen": "x"}, "p", ("x", "y"), (2, 1)),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [10**400, 1.5]}, "p", ("x", "y"), (1, 2)),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2], "scores": [0, 1]}, "p", ("x", "y"), (1, 2)),
    ({"prompt": "u", "completions": [[said("x")], said("y")], "ranks": [1, 2]}, [USER], ("x", "y"), (1, 2)),
    ({"prompt": HH + " ", "answers": NECTAR}, HH + " ", ("x", "y"), (2, 1)),
]


@pytest.mark.parametrize(("record", "prompt", "completions", "ranks"), COMPARISONS)
def test_comparisons(record, prompt, completions, ranks):
    [found] = read_comparisons([record])
    assert (found.prompt, found.completions, found.ranks) == (prompt, completions, ranks)
    assert len(found.fields) == 1 + len(completions)
    assert [r.prompt for r in read_prompts([record])] == [prompt]


@pytest.mark.parametrize(
    ("record", "extra"),
    [
        ({"prompt": "p", "solution": 4, "tests": [1, None]}, {"solution": 4, "tests": [1, None]}),
        ({"prompt": "p", "completion": "c"}, {"completion": "c"}),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, {"chosen": "x", "rejected": "y"}),
        ({"messages": [USER, said("c")], "solution": 4, "prompt": "u"}, {"solution": 4}),
        ({"chosen": [USER, said("x")], "rejected": [USER, said("y")], "score": 4.5}, {"score": 4.5}),
        ({"messages": [USER], "answers": ["4"]}, {"answers": ["4"]}),
        ({"prompt": "p"}, {}),
    ],
)
def test_further_fields_of_a_prompt_are_kept(record, extra):
    [found] = read_prompts([record])
    assert found.extra == extra


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools(tools):
    turns = {"messages": [USER, said("c")], "tools": tools}
    [demonstration], [prompt] = read_demonstrations([turns]), read_prompts([turns])
    assert demonstration.tools == prompt.tools == TOOLS
    assert prompt.extra == {"tools": tools}
    [pair] = read_comparisons([{"prompt": [USER], "chosen": "x", "rejected": "y", "tools": tools}])
    assert pair.tools == TOOLS
    # A prompt that is a text has no place for tools.
    assert read_prompts([{"prompt": "p", "tools": "hammer"}])[0].tools is None
    assert [read_prompts([{"prompt": [USER], "tools": none}])[0].tools for none in (None, [], "[]")] == [None] * 3


def test_comparisons_without_a_preference_are_skipped_and_counted(caplog):
    pair, blank = {"chosen": HH + " x", "rejected": HH + " y"}, {"chosen": HH, "rejected": HH + " y"}
    same = {"chosen": HH + " x", "rejected": HH + " x"}
    turns = {"chosen": [USER, said("x")], "rejected": [USER, said(" ")]}
    with caplog.at_level(logging.WARNING):
        assert [record.where for record in read_comparisons([blank, pair, same, turns])] == ["records[1]"]
    assert caplog.messages == [
        "records: skipped 2 of 4 comparisons: an answer is blank",
        "records: skipped 1 of 4 comparisons: all tied",
    ]
    alike = {"chosen": turns["chosen"], "rejected": turns["chosen"]}
    for record in (same, alike, {"prompt": "p", "chosen": "x", "rejected": "x"}):
        with pytest.raises(DataError, match=r"^records: field 'ranks': every comparison is tied \(1 of 1\)$"):
            read_comparisons([record])
    with pytest.raises(DataError, match=r"^records: field 'ranks': every .* is tied or has a blank answer \(2 of 2\)$"):
        read_comparisons([same, blank])
    assert [record.prompt for record in read_prompts([blank, same, turns])] == [HH, HH, [USER]]


def test_blank_ones_of_several_completions_are_left_out(caplog):
    texts = {"prompt": "p", "completions": ["", "x", said(" \n"), "y"], "ranks": [4, 2, 3, 1]}
    listed = {"prompt": "p", "answers": [{"answer": text, "rank": i + 1} for i, text in enumerate(["x", "", "y"])]}
    few = {"prompt": "p", "completions": ["", "x"], "ranks": [2, 1]}
    with caplog.at_level(logging.WARNING):
        first, second = read_comparisons([texts, few, listed])
    assert (first.completions, first.ranks, first.fields) == (
        ("x", "y"), (2, 1), ("prompt", "completions[1]", "completions[3]")
    )  # fmt: skip
    assert (second.completions, second.ranks, second.fields[2]) == (("x", "y"), (1, 3), "answers[2].answer")
    assert caplog.messages == [
        "records: skipped 1 of 3 comparisons: an answer is blank",
        "records: left out 3 blank completions of comparisons",
    ]


# What is refused -----------------------------------------------------------------------------------------------------

ALONE = "expected the assistant's message alone"
PROMPT = "field 'prompt': is missing; the record has "


def whole(*own, name="chosen"):
    other = {"chosen": "rejected", "rejected": "chosen"}[name]
    return {name: [USER, *own], other: [USER, said("z")]}


BROKEN_DEMONSTRATIONS = [
    # prompt and completion, both messages
    ({"prompt": [USER], "completion": []}, "field 'completion': has no messages"),
    ({"prompt": [USER], "completion": [said("c"), USER]}, f"field 'completion': has 2 entries, {ALONE}"),
    ({"prompt": [USER], "completion": [USER]}, "field 'completion[0].role': is 'user', expected 'assistant'"),
    ({"prompt": [USER], "completion": [said("")]}, "field 'completion[0].content': is empty"),
    ({"prompt": [{"role": "user"}], "completion": "c"},
     "field 'prompt[0].content': is missing; the message has 'role'"),
    ({"prompt": [USER], "completion": said("c") | {"tool_calls": "f"}},
     "field 'completion.tool_calls': is a string, expected an array of objects"),
    ({"prompt": [USER], "completion": calling("a: 1")},
     "field 'completion.tool_calls[0].function.arguments': is a string that holds no JSON: Expecting value: line 1 "
     "column 1 (char 0)"),
    # messages
    ({"messages": [USER, said("a"), said("b")]},
     "field 'messages': ends with two turns of the assistant in a row, but one is an answer"),
    ({"messages": [USER, said("c")], "prompt": "q"}, "field 'prompt': is not what 'messages' begins with"),
    ({"messages": [USER, said("c")], "prompt": [SYSTEM]}, "field 'prompt': is not what 'messages' begins with"),
    ({"messages": [{"role": " ", "content": "u"}, said("c")]}, "field 'messages[0].role': is empty"),
    ({"messages": [{"role": 1, "content": "u"}, said("c")]},
     "field 'messages[0].role': is an integer, expected a string"),
    ({"messages": [{"role": "gpt", "content": "u"}, said("c")]},
     "field 'messages[0].role': is 'gpt', expected 'assistant' or another of a template's"),
    ({"messages": [{"role": "user", "content": None}, said("c")]},
     "field 'messages[0].content': is null, expected a string"),
    # parts
    ({"messages": [{"role": "user", "content": ["u"]}, said("c")]},
     "field 'messages[0].content[0]': is a string, expected an object with 'type' and 'text'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, said("c")]},
     "field 'messages[0].content[0].type': is 'image_url', but only 'text' is read"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "u"}]}, said("c")]},
     "field 'messages[0].content[0].text': is missing; the part has 'type', 'value'"),
    ({"messages": [USER, said(text("c", None))]}, "field 'messages[1].content[1].text': is null, expected a string"),
    # tools
    ({"messages": [USER, said("c")], "tools": 7}, "field 'tools': is an integer, expected an array of objects"),
    ({"messages": [USER, said("c")], "tools": ["f"]}, "field 'tools[0]': is a string, expected an object"),
    ({"messages": [USER, said("c")], "tools": "f"},
     "field 'tools': is a string that holds no JSON: Expecting value: line 1 column 1 (char 0)"),
    # what is known, and not read
    ({"instruction": "i", "input": "", "output": "o"},
     f"{PROMPT}'instruction', 'input', 'output'; this layout is Alpaca's, of which docs/data.md makes "
     "'prompt' and 'completion'"),
    ({"instruction": "i", "context": "", "response": "r", "category": "qa"},
     f"{PROMPT}'instruction', 'context', 'response', 'category'; this layout is Dolly's, of which docs/data.md makes "
     "'prompt' and 'completion'"),
    ({"conversations": [{"from": "human", "value": "v"}]},
     f"{PROMPT}'conversations'; this layout is ShareGPT's, of which docs/data.md makes 'messages'"),
    ({"messages": [{"from": "human", "value": "v"}, {"from": "gpt", "value": "v"}]},
     "field 'messages[0].role': is missing; the message has 'from', 'value'; this layout is ShareGPT's, of which "
     "docs/data.md makes 'messages'"),
    ({"prompt": "p", "completion": "c", "label": True},
     "field 'label': says whether the answer is good, and a demonstration is to be: docs/data.md keeps those that are"),
    ({"messages": [USER, said("c")], "label": False},
     "field 'label': says whether the answer is good, and a demonstration is to be: docs/data.md keeps those that are"),
]  # fmt: skip

BROKEN_COMPARISONS = [
    # texts
    ({"chosen": "x", "rejected": "y"},
     "field 'rejected': begins unlike 'chosen', so nothing is their prompt, and the record has no field 'prompt'"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
     "field 'rejected': begins unlike 'chosen', so nothing is their prompt, and the record has no field 'prompt'"),
    ({"chosen": "a x", "rejected": "a y", "question": "q"},
     "field 'question': looks like the prompt of 'chosen' and 'rejected', which is read from 'prompt': docs/data.md "
     "renames it"),
    ({"chosen": "a x", "rejected": None}, "field 'rejected': is null, expected a string"),
    ({"rejected": "y"}, "field 'chosen': is missing; the record has 'rejected'"),
    ({"chosen": "a x", "rejected": "a \ud83d"},
     "field 'rejected': holds half of a surrogate pair (\\ud83d), which is no character"),
    # conversations
    ({"chosen": [USER, said("x")], "rejected": "y"}, "field 'rejected': is a string, but 'chosen' is an array"),
    ({"chosen": "x", "rejected": [said("y")], "prompt": "p"},
     "field 'chosen': is a string, but 'rejected' is an array"),
    ({"chosen": [USER, said("x")], "rejected": [SYSTEM, said("y")]},
     "field 'rejected': begins with another turn than 'chosen', so nothing is their prompt"),
    ({"chosen": [said("x")], "rejected": [said("y")]}, "field 'chosen': has no turn before the assistant's"),
    (whole(said("x"), USER, said("x"), name="rejected"),
     "field 'rejected': has rejected[1] to [3] of its own, but only the last turn may differ"),
    (whole(USER), "field 'chosen[1].role': is 'user', expected 'assistant'"),
    ({"chosen": [USER, said("a"), said("x")], "rejected": [USER, said("a"), said("y")]},
     "field 'chosen': ends with two turns of the assistant in a row, but one is an answer"),
    # whole conversations beside a prompt
    ({"prompt": "q", "chosen": [USER, said("x")], "rejected": [USER, said("y")]},
     "field 'prompt': is not what 'chosen' begins with"),
    ({"prompt": [SYSTEM, USER], "chosen": [USER, said("x")], "rejected": [USER, said("y")]},
     "field 'prompt': is not what 'chosen' begins with"),
    ({"prompt": 7, "chosen": [USER, said("x")], "rejected": [USER, said("y")]},
     "field 'prompt': is an integer, expected a string or an array of messages"),
    # messages beside a prompt
    ({"prompt": [USER], "chosen": [said("x")], "rejected": [said(" ")]}, "field 'rejected[0].content': is empty"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [said("y")]},
     "field 'chosen[0].role': is 'user', expected 'assistant'"),
    ({"prompt": [USER], "chosen": [], "rejected": []}, "field 'chosen': has no messages"),
    # completions
    ({"prompt": [USER], "completions": [[said("x"), said("y")], "z"], "ranks": [1, 2]},
     f"field 'completions[0]': has 2 entries, {ALONE}"),
    ({"prompt": [USER], "completions": ["x", {"content": "y"}], "ranks": [1, 2]},
     "field 'completions[1].role': is missing; the message has 'content'"),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": [1, float("nan")]},
     "field 'ranks[1]': is nan, expected an integer of at least 1"),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": [float("inf"), 1]},
     "field 'ranks[0]': is inf, expected an integer of at least 1"),
    ({"prompt": "p", "completions": ["x", "y"], "ranks": [0.0, 1.0]},
     "field 'ranks[0]': is 0.0, expected an integer of at least 1"),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [1]}, "field 'scores': has 1 entry but 'completions' has 2"),
    ({"prompt": "p", "completions": ["x", "y"], "scores": "12"},
     "field 'scores': is a string, expected an array of numbers"),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [1, True]},
     "field 'scores[1]': is a boolean, expected a number"),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [1, float("nan")]},
     "field 'scores[1]': is nan, expected a finite number"),
    ({"prompt": "p", "completions": ["x", "y"], "scores": [float("-inf"), 1]},
     "field 'scores[0]': is -inf, expected a finite number"),
    # answers
    ({"prompt": "p", "answers": {"text": ["x"]}},
     "field 'answers': is an object, expected an array of objects with 'answer' and 'rank'"),
    ({"prompt": "p", "answers": ["x", "y"]},
     "field 'answers[0]': is a string, expected an object with 'answer' and 'rank'"),
    ({"prompt": "p", "answers": [{"answer": "x"}]}, "field 'answers[0].rank': is missing; the answer has 'answer'"),
    ({"prompt": "p", "answers": NECTAR[:1]}, "field 'answers': has 1 entry, but a comparison needs at least 2"),
    ({"prompt": "p", "answers": [NECTAR[0] | {"rank": "1"}]},
     "field 'answers[0].rank': is a string, expected an integer of at least 1"),
    ({"answers": NECTAR}, f"{PROMPT}'answers'"),
    # what is known, and not read
    ({"instruction": "i", "models": [], "completions": [{"response": "x"}]},
     f"{PROMPT}'instruction', 'models', 'completions'; this layout is UltraFeedback's, of which docs/data.md makes "
     "'prompt', 'completions' and 'scores'"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": []},
     f"{PROMPT}'input', 'preferred_output', 'non_preferred_output'; this layout is OpenAI's, of which "
     "docs/data.md makes 'prompt', 'chosen' and 'rejected'"),
    ({"prompt": "p", "completion": "c", "label": True},
     "field 'completions': is missing; the record has 'prompt', 'completion', 'label'; this layout is that of unpaired "
     "preferences, of which docs/data.md makes demonstrations"),
    ({"conversations": [], "chosen": {"from": "gpt", "value": "v"}, "rejected": {"from": "gpt", "value": "v"}},
     "field 'chosen.role': is missing; the message has 'from', 'value'; this layout is ShareGPT's, of which "
     "docs/data.md makes 'messages'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "record", "reason"),
    [
        *[(read_demonstrations, *case) for case in BROKEN_DEMONSTRATIONS],
        *[(read_comparisons, *case) for case in BROKEN_COMPARISONS],
        (
            read_prompts,
            {"messages": [USER, said("c")], "prompt": "q"},
            "field 'prompt': is not what 'messages' begins with",
        ),
        (read_prompts, {"prompt": []}, "field 'prompt': has no messages"),
        (read_prompts, {"chosen": "x", "rejected": "y"}, BROKEN_COMPARISONS[0][1]),
    ],
)
def test_broken(read, record, reason):
    with pytest.raises(DataError) as error:
        read([record])
    assert str(error.value) == f"records[0]: {reason}"


# Where texts are split ----------------------------------------------------------------------------------------------

# Words and the space between them, with characters that often cause mistakes: accents on their own, a letter outside of
# the basic plane, joined emoji, line ends of two characters.
letters = st.sampled_from(["a", "b", "é", "e\u0301", "\u0301", "𝒳", "👩\u200d👧", "'", "."])
words = st.lists(letters, min_size=1, max_size=4).map("".join)
spaces = st.sampled_from([" ", "\n", "\r\n", "  ", "\t", "\u3000"])


@st.composite
def pair_of_texts(draw):
    def running(least):
        parts = draw(st.lists(st.tuples(words, spaces), min_size=least, max_size=4))
        return "".join(word + space for word, space in parts)

    shared = running(0)
    return shared + draw(words) + running(0), shared + draw(words) + running(0)


@given(pair=pair_of_texts())
def test_texts_are_split_at_the_last_word_they_share(pair):
    end = prompt_end(*pair)
    shared = [a == b for a, b in zip(*pair, strict=False)]
    common = shared.index(False) if False in shared else len(shared)

    def fits(end):
        """It ends a word in both, and leaves something of both."""
        return (
            0 < end <= common
            and not pair[0][end - 1].isspace()
            and all(side[end:].strip() and side[end].isspace() for side in pair)
        )

    assert end == max(filter(fits, range(common + 1)), default=None)
    if end is not None:
        [record] = read_prompts([{"chosen": pair[0], "rejected": pair[1]}])
        assert [record.prompt + side[end:] for side in pair] == list(pair)


@given(turns=st.lists(st.tuples(words, words), max_size=3), asked=words, answers=st.tuples(words, words))
def test_transcripts_are_split_at_the_last_mark_they_share(turns, asked, answers):
    prompt = "".join(f"\n\nHuman: {human}\n\nAssistant: {answer}" for human, answer in turns)
    prompt += f"\n\nHuman: {asked}\n\nAssistant:"
    record = {"chosen": f"{prompt} {answers[0]}", "rejected": f"{prompt} {answers[1]}"}
    assert read_prompts([record])[0].prompt == prompt
    if answers[0] != answers[1]:
        [found] = read_comparisons([record])
        assert [found.prompt + completion for completion in found.completions] == [record["chosen"], record["rejected"]]
