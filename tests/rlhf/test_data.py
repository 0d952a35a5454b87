"""Records: every way they can be wrong, and the token ids of good ones."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.data import (
    Comparison,
    DataError,
    Demonstration,
    Example,
    Limits,
    PromptRecord,
    RankedExample,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
    tokenize_comparisons,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_texts,
)

LIMITS = Limits(max_prompt_tokens=8, max_response_tokens=4, context_length=12)
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ["<eos>", "<bos>", "<unk>", *"abcdefgh", "user", "system", "assistant"]
EOS, BOS, UNK, A, B, C, D = range(7)


def words(*, bos=False, closing=False, chat_template=None, **special):
    """A tokenizer with a token per word. With ``bos`` and ``closing`` it puts BOS and EOS around a text by itself."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or closing:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*["<bos>"] * bos, "$A", *["<eos>"] * closing], special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def letters():
    """A byte-level tokenizer: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def deaf():
    """A tokenizer that drops what it does not know, as some byte-less BPE ones do."""
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def demo(prompt="a b", completion="c", where="d.jsonl:1"):
    return Demonstration(prompt, completion, where)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# Bad input: what is wrong, and all of the line that says so ---------------------------------------------------------

GOOD_DEMONSTRATION = b'{"prompt": "p", "completion": "c"}\n'
GOOD_COMPARISON = b'{"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2]}\n'

BAD_LINES = [
    (b'{"prompt": "\xe9"}', "invalid UTF-8 at byte 13 of the line (0xe9)"),
    (b'{"prompt": "p" "completion": "c"}', "invalid JSON at column 16: Expecting ',' delimiter"),
    (b'{"prompt": "p"', "invalid JSON at column 15: Expecting ',' delimiter"),
    (b"[" * 100_000, "invalid JSON: maximum recursion depth exceeded"),
    (b'["p", "c"]', "is an array, expected an object with named fields"),
    (b"null", "is null, expected an object with named fields"),
]

BAD_PROMPTS = [
    ({}, "field 'prompt': is missing; the record has no fields"),
    ({"text": "t", "id": 1}, "field 'prompt': is missing; the record has 'text', 'id'"),
    ({"prompt": 7}, "field 'prompt': is an integer, expected a string or an array of messages"),
    ({"prompt": None}, "field 'prompt': is null, expected a string or an array of messages"),
    ({"prompt": "\ud83d"}, "field 'prompt': holds half of a surrogate pair (\\ud83d), which is no character"),
    ({"prompt": ["p"]}, "field 'prompt[0]': is a string, expected an object with 'role' and 'content'"),
    ({"messages": []}, "field 'messages': has no messages"),
    ({"messages": "p"}, "field 'messages': is a string, expected an array of messages"),
    ({"messages": [{"role": "user"}]}, "field 'messages[0].content': is missing; the message has 'role'"),
    ({"messages": [{"role": "user", "content": 1}]}, "field 'messages[0].content': is an integer, expected a string"),
    (
        {"messages": [{"role": "human", "content": "p"}]},
        "field 'messages[0].role': is 'human', expected 'user' or another of a template's",
    ),
    (
        {"messages": [{"role": "assistant", "content": "c"}]},
        "field 'messages': has no turn before the assistant's",
    ),
]

BAD_DEMONSTRATIONS = [
    ({"prompt": "p"}, "field 'completion': is missing; the record has 'prompt'"),
    (
        {"prompt": "p", "completion": ["c"]},
        "field 'completion[0]': is a string, expected an object with 'role' and 'content'",
    ),
    ({"prompt": "p", "completion": True}, "field 'completion': is a boolean, expected a string"),
    ({"prompt": "p", "completion": " \n"}, "field 'completion': is empty"),
    (
        {"messages": [{"role": "user", "content": "p"}]},
        "field 'messages': ends with the turn of the user, not the assistant's",
    ),
    (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}]},
        "field 'messages[1].content': is empty",
    ),
]


def ranked(completions=("x", "y"), ranks=(1, 2)):
    return {"prompt": "p", "completions": completions, "ranks": ranks}


BAD_COMPARISONS = [
    ({"prompt": "p"}, "field 'completions': is missing; the record has 'prompt'"),
    ({"prompt": "p", "completions": ["x", "y"]}, "field 'ranks': is missing; the record has 'prompt', 'completions'"),
    ({"prompt": "p", "chosen": "x"}, "field 'rejected': is missing; the record has 'prompt', 'chosen'"),
    ({"prompt": "p", "chosen": "x", "rejected": 2.5}, "field 'rejected': is a number, expected a string"),
    ({"prompt": "p", "chosen": "", "rejected": "y"}, "field 'chosen': is empty"),
    (ranked(completions="xy"), "field 'completions': is a string, expected an array of strings or messages"),
    (ranked(completions=["x", None]), "field 'completions[1]': is null, expected a string"),
    (ranked(["x"], [1]), "field 'completions': has 1 entry, but a comparison needs at least 2"),
    (ranked([], []), "field 'completions': has 0 entries, but a comparison needs at least 2"),
    (ranked(["x"] * 4, [1, 2, 3]), "field 'ranks': has 3 entries but 'completions' has 4"),
    (ranked(ranks={"x": 1}), "field 'ranks': is an object, expected an array of integers"),
    (ranked(ranks=[1, 2.5]), "field 'ranks[1]': is 2.5, expected an integer of at least 1"),
    (ranked(ranks=[True, 2]), "field 'ranks[0]': is a boolean, expected an integer of at least 1"),
    (ranked(ranks=["1", 2]), "field 'ranks[0]': is a string, expected an integer of at least 1"),
    (ranked(ranks=[0, 1]), "field 'ranks[0]': is 0, expected an integer of at least 1"),
]


def as_lines(cases):
    return [(json.dumps(record).encode(), reason) for record, reason in cases]


@pytest.mark.parametrize(
    ("read", "good", "line", "reason"),
    [
        *[(read_demonstrations, GOOD_DEMONSTRATION, *case) for case in BAD_LINES + as_lines(BAD_DEMONSTRATIONS)],
        *[(read_comparisons, GOOD_COMPARISON, *case) for case in BAD_LINES + as_lines(BAD_COMPARISONS)],
        *[(read_prompts, GOOD_DEMONSTRATION, *case) for case in as_lines(BAD_PROMPTS)],
        (read_texts, b'{"text": "t"}\n', b'{"prompt": "p"}', "field 'text': is missing; the record has 'prompt'"),
        (read_texts, b'{"text": "t"}\n', b'{"text": ["t"]}', "field 'text': is an array, expected a string"),
    ],
)
def test_bad_record(tmp_path, read, good, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + b"a second problem\n")
    with pytest.raises(DataError) as error:
        read([str(path)])
    # Some versions of Python also say where the recursion happened.
    message = str(error.value).removesuffix(" while decoding a JSON array from a unicode string")
    assert message == f"{path}:3: {reason}"


@pytest.mark.parametrize("read", [read_demonstrations, read_comparisons, read_prompts, read_texts])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "no such file"),
        ("missing.parquet", None, "no such file"),
        ("directory", "directory", "is a directory, expected a file"),
        ("directory.jsonl", "directory", "is a directory, expected a file"),
        ("x" * 300 + ".jsonl", None, "could not be read: File name too long"),
        ("empty.jsonl", b"", "is empty; it holds no records"),
        ("blank.jsonl", b"\n \r\n\n", "is empty; it holds no records"),
        ("mark.jsonl", b"\xef\xbb\xbf", "is empty; it holds no records"),
    ],
)
def test_bad_file(tmp_path, read, name, content, reason):
    path = tmp_path / name
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read([str(path)])
    assert str(error.value) == f"{path}: {reason}"


@pytest.mark.parametrize("read", [read_demonstrations, read_comparisons, read_prompts])
def test_plain_text_is_no_record(read):
    with pytest.raises(
        DataError, match=r"^notes\.txt: is plain text, which has no fields; expected JSON lines or Parquet$"
    ):
        read(["notes.txt"])


def test_bad_plain_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Größe\n".encode() + "Grüße\n".encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_texts([str(path)])
    assert str(error.value) == f"{path}:2: invalid UTF-8 at byte 3 of the line (0xfc)"
    path.write_text(" \n")
    with pytest.raises(DataError) as error:
        read_texts([str(path)])
    assert str(error.value) == f"{path}: holds no text"


def test_byte_of_invalid_utf8_counts_the_mark(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xff"}')
    with pytest.raises(DataError) as error:
        read_prompts([str(path)])
    assert str(error.value) == f"{path}:1: invalid UTF-8 at byte 16 of the line (0xff)"


def test_unknown_data_set_is_one_line(monkeypatch):
    import datasets

    def offline(name, split):
        raise ConnectionError(f"cannot reach {name}, {split}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as error:
        read_prompts(["someone/prompts:test"])
    reason = "no such file, and no data set of that name: cannot reach someone/prompts, test"
    assert str(error.value) == f"someone/prompts:test: {reason}"


def test_tied_comparisons_are_skipped_and_counted(tmp_path, caplog):
    tied, untied = ranked(ranks=[2, 2]), ranked(ranks=[2, 1])
    path = write(tmp_path / "data.jsonl", tied, untied, tied)
    with caplog.at_level(logging.WARNING):
        assert [record.where for record in read_comparisons([path])] == [f"{path}:2"]
    assert caplog.messages == [f"{path}: skipped 2 of 3 comparisons: all tied"]
    path = write(tmp_path / "tied.jsonl", tied, tied)
    with pytest.raises(DataError) as error:
        read_comparisons([path])
    assert str(error.value) == f"{path}: field 'ranks': every comparison is tied (2 of 2)"


# Good input ----------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]))
answer = text.filter(str.strip)
endings = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"])


def lines(draw, records):
    """JSON lines in any of the forms that are accepted."""
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    ascii_only = draw(st.booleans())
    encoded = [json.dumps({"id": 1} | record, ensure_ascii=ascii_only).encode() for record in records]
    return mark + b"".join(line + draw(endings) for line in encoded)


@st.composite
def demonstration_file(draw):
    pairs = draw(st.lists(st.tuples(text, answer), min_size=1, max_size=5))
    return pairs, lines(draw, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


@given(case=demonstration_file())
def test_demonstrations_round_trip(tmp_path_factory, case):
    pairs, content = case
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_bytes(content)
    assert [(r.prompt, r.completion) for r in read_demonstrations([str(path)])] == pairs
    assert [r.prompt for r in read_prompts([str(path)])] == [prompt for prompt, _ in pairs]
    numbers = [i for i, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    assert [r.where for r in read_demonstrations([str(path)])] == [f"{path}:{i}" for i in numbers]


@st.composite
def comparison_file(draw):
    ranked_answers = st.lists(st.tuples(answer, st.integers(1, 9)), min_size=2, max_size=12)
    untied = ranked_answers.filter(lambda pairs: len({rank for _, rank in pairs}) > 1)
    records = draw(st.lists(st.tuples(text, untied), min_size=1, max_size=4))
    rows = [(prompt, *map(tuple, zip(*pairs, strict=True))) for prompt, pairs in records]
    return rows, lines(draw, [dict(zip(("prompt", "completions", "ranks"), row, strict=True)) for row in rows])


@given(case=comparison_file())
def test_comparisons_round_trip(tmp_path_factory, case):
    rows, content = case
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_bytes(content)
    assert [(r.prompt, r.completions, r.ranks) for r in read_comparisons([str(path)])] == rows


def test_a_pair_is_a_ranking(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"})
    [record] = read_comparisons([path])
    assert (record.completions, record.ranks) == (("good", "bad"), (1, 2))


def test_last_turn_is_the_completion(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "c"},
    ]
    path = write(tmp_path / "data.jsonl", {"messages": [turn | {"id": 1} for turn in turns]})
    [record] = read_demonstrations([path])
    assert (record.prompt, record.completion) == (turns[:2], "c")
    assert [record.prompt for record in read_prompts([path])] == [turns[:2]]
    path = write(tmp_path / "prompt.jsonl", {"messages": turns[:2]}, {"prompt": turns[:2]})
    assert [record.prompt for record in read_prompts([path])] == [turns[:2]] * 2


def test_texts(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\n\nthird")
    path = write(tmp_path / "data.jsonl", {"text": "one"}, {"text": " "}, {"text": "two\n"})
    assert read_texts([str(plain), path]) == ["first\nsecond\n\nthird", "one", "two\n"]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data [1].parquet"
    records = [ranked(), {"prompt": "q", "chosen": "x", "rejected": "y"}, {"prompt": "r"}]
    names = ("prompt", "completions", "ranks", "chosen", "rejected")
    columns = [[record.get(name) for record in records] for name in names]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), path)
    assert [record.where for record in read_prompts([str(path)])] == [f"{path}:row {i}" for i in (1, 2, 3)]
    with pytest.raises(DataError) as error:
        read_comparisons([str(path)])
    assert str(error.value) == f"{path}:row 3: field 'completions': is missing; the record has 'prompt'"
    path.write_bytes(b"no such format")
    with pytest.raises(DataError, match=r"^[^\n]+ \[1\]\.parquet: is no readable Parquet file: [^\n]+$"):
        read_prompts([str(path)])


def test_data_set_by_name(monkeypatch):
    import datasets

    loaded = {"train": [{"prompt": "p"}], "test": [{"prompt": "q"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(loaded[split]))
    assert read_prompts(["some/set", "some/set:test"]) == [
        PromptRecord("p", "some/set:row 1"),
        PromptRecord("q", "some/set:test:row 1"),
    ]


# Token ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "expected"),
    [
        (words(), "a b", [A, B]),
        (words(), "", [EOS]),
        (words(bos_token="<bos>"), "", [BOS]),
        (words(bos=True, bos_token="<bos>"), "a b", [BOS, A, B]),
        (words(bos=True, bos_token="<bos>"), "", [BOS]),
        (words(closing=True), "a b", [A, B]),
        (words(closing=True), "", [EOS]),
        (words(bos=True, closing=True, bos_token="<bos>"), "a b", [BOS, A, B]),
        (words(bos=True, bos_token="<bos>"), "a <eos>", [BOS, A, EOS]),  # this EOS is in the text, not added to it
        (
            words(chat_template=CHAT),
            [{"role": "user", "content": "a"}],
            [WORDS.index("user"), A, WORDS.index("assistant")],
        ),
        (
            # A template writes its own special tokens.
            words(
                bos=True, bos_token="<bos>", chat_template="<bos>{% for m in messages %} {{ m.content }}{% endfor %}"
            ),
            [{"role": "user", "content": "a"}],
            [BOS, A],
        ),
    ],
)
def test_prompt_ids(tokenizer, prompt, expected):
    [example] = tokenize_demonstrations([demo(prompt)], tokenizer, LIMITS)
    assert example == Example(expected, [C, EOS])
    [example] = tokenize_prompts([PromptRecord(prompt, "p.jsonl:1")], tokenizer, LIMITS)
    assert (example.prompt_ids, example.text) == (expected, prompt)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("a", "b", [B, EOS]),
        ("a", "b c d", [B, C, D, EOS]),
        ("a", "a b c d", [A, B, C, D]),  # full: no room for the EOS
        ("a", "a b c d d", [A, B, C, D]),
        ("a", "b <eos>", [B, EOS]),
        ("a a a a a a a a", "b", [B, EOS]),
        ("a a a a a a a a", "b c", [B, C]),  # the context ends
    ],
)
def test_completion_ids(prompt, completion, expected):
    [example] = tokenize_demonstrations(
        [demo(prompt, completion)], words(closing=True), replace(LIMITS, context_length=10)
    )
    assert example.completion_ids == expected


def test_comparison_ids():
    record = Comparison("a", ("b", "c d", "a b c d"), (2, 1, 2), "c.jsonl:1", ("prompt", "0", "1", "2"))
    expected = RankedExample([A], [[B, EOS], [C, D, EOS], [A, B, C, D]], [2, 1, 2])
    assert tokenize_comparisons([record, record], words(), LIMITS) == [expected, expected]


@given(prompt=text, completion=answer)
def test_byte_level_ids_decode_to_the_text(prompt, completion):
    tokenizer = letters()
    limits = Limits(max_prompt_tokens=1000, max_response_tokens=1000, context_length=2000)
    [example] = tokenize_demonstrations([demo(prompt, completion)], tokenizer, limits)
    prompt_ids, completion_ids = example.prompt_ids, example.completion_ids
    assert prompt_ids == (tokenizer(prompt).input_ids or [tokenizer.eos_token_id])
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion_ids[:-1]) == completion


def test_long_prompts_are_dropped_and_counted(caplog):
    records = [demo("a"), demo(" ".join("a" * 9)), demo(" ".join("a" * 500)), demo("b")]
    with caplog.at_level(logging.WARNING):
        kept = tokenize_demonstrations(records, words(), LIMITS)
    assert [example.prompt_ids for example in kept] == [[A], [B]]
    assert caplog.messages == ["dropped 2 of 4 prompts: over 8 tokens"]


def test_what_is_cut_is_counted(caplog):
    records = [
        Comparison("a", ("b", "a b c a b", "c"), (1, 2, 3), "c.jsonl:1", ("prompt", "0", "1", "2")),
        Comparison("a", ("a b c a b", "a b c a c"), (1, 2), "c.jsonl:2", ("prompt", "0", "1")),
    ]
    with caplog.at_level(logging.WARNING):
        [kept] = tokenize_comparisons(records, words(), LIMITS)
    assert [len(ids) for ids in kept.completion_ids] == [2, 4, 2]
    assert caplog.messages == [
        "cut 3 of 5 completions: over 4 tokens, or over the model's context of 12 with their prompt",
        "dropped 1 of 2 comparisons: within the limits, their completions are the same tokens",
    ]
    with pytest.raises(DataError, match="no data is left to use: within the limits, the completions"):
        tokenize_comparisons(records[1:], words(), LIMITS)


def test_nothing_dropped_is_not_spoken_of(caplog):
    with caplog.at_level(logging.WARNING):
        tokenize_demonstrations([demo("a"), demo("b")], words(), LIMITS)
    assert caplog.messages == []


def test_room_for_one_token_is_room():
    [example] = tokenize_demonstrations([demo("a " * 11, "b c")], words(), replace(LIMITS, max_prompt_tokens=11))
    assert (len(example.prompt_ids), example.completion_ids) == (11, [B])
    [example] = tokenize_demonstrations([demo("a", "b c")], words(), replace(LIMITS, max_response_tokens=1))
    assert example.completion_ids == [B]


NO_ROOM = "tokens, which leaves no room for a completion in the model's context of 12; a lower max_prompt_tokens drops"


@pytest.mark.parametrize(
    ("records", "tokenizer", "limits", "message"),
    [
        ([], words(), {}, "there are no records to use"),
        ([demo("a " * 9)], words(), {}, "no data is left to use: dropped 1 of 1 prompts: over 8 tokens"),
        (
            [demo(), demo("a " * 12, where="d.jsonl:2")],
            words(),
            {"max_prompt_tokens": 20},
            f"d.jsonl:2: field 'prompt': has 12 {NO_ROOM} such prompts",
        ),
        (
            [demo("a " * 13)],
            words(),
            {"max_prompt_tokens": 12},  # as large as the context, so it drops no prompt
            f"d.jsonl:1: field 'prompt': has 13 {NO_ROOM} such prompts",
        ),
        (
            [demo("a " * 5000)],
            words(),
            {"max_prompt_tokens": 1024},
            f"d.jsonl:1: field 'prompt': has 5000 {NO_ROOM} such prompts",
        ),
        (
            [demo(completion="\x00")],
            deaf(),
            {},
            "d.jsonl:1: field 'completion': the tokenizer makes no token of it",
        ),
        (
            [demo()],
            words(eos_token=None),
            {},
            "tokenizer '': has no EOS token, so no completion could end; set its eos_token and save it again",
        ),
        (
            [Demonstration([{"role": "user", "content": "a"}], "b", "d.jsonl:1", ("messages", "messages"))],
            words(),
            {},
            "d.jsonl:1: field 'messages': has messages, but the tokenizer has no chat template",
        ),
        (
            [demo([{"role": "user", "content": "a"}, {"role": "system", "content": "a"}])],
            words(chat_template=CHAT),
            {},
            "d.jsonl:1: field 'prompt': the chat template refuses it: system comes first",
        ),
    ],
)
def test_bad_ids(records, tokenizer, limits, message):
    with pytest.raises(DataError) as error:
        tokenize_demonstrations(records, tokenizer, replace(LIMITS, **limits))
    assert str(error.value) == message


def test_text_chunks():
    chunks = tokenize_texts(["a b", "c", "d a b"], words(bos=True, closing=True, bos_token="<bos>"), length=4)
    assert chunks.dtype == torch.int64
    assert chunks.tolist() == [[A, B, EOS, C], [EOS, D, A, B]]
    with pytest.raises(DataError, match=r"^pretraining text: has 9 tokens, too few for one chunk of 10$"):
        tokenize_texts(["a b", "c", "d a b"], words(), length=10)


def test_more_texts_than_one_call_takes():
    assert tokenize_texts(["a b"] * 2500, words(), length=3).tolist() == [[A, B, EOS]] * 2500


def test_prompts_leave_room_for_a_whole_answer():
    records = [PromptRecord("a", "p.jsonl:1"), PromptRecord("a b", "p.jsonl:2")]
    with pytest.raises(DataError) as error:
        tokenize_prompts(records, words(), replace(LIMITS, max_prompt_tokens=4, context_length=5))
    reason = "has 2 tokens, which with max_response_tokens = 4 exceed the model's context of 5"
    advice = "lower it, or max_prompt_tokens to drop such prompts"
    assert str(error.value) == f"p.jsonl:2: field 'prompt': {reason}; {advice}"


def test_invalid_records_are_reported_in_order(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD_DEMONSTRATION + b'{"prompt": ""}\n\xff')
    with pytest.raises(DataError, match=r":2: field 'completion': is missing"):
        read_demonstrations([str(path)])
