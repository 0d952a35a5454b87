"""Conversations as token ids: what the chat template writes, no more and no less."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf.data import (
    Comparison,
    DataError,
    Demonstration,
    Limits,
    PromptRecord,
    tokenize_comparisons,
    tokenize_demonstrations,
    tokenize_prompts,
    turn_end,
)

LIMITS = Limits(max_prompt_tokens=1000, max_response_tokens=1000, context_length=3000)
SPECIAL = [
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<call>",
]


def template(turn, prompt="", *, before="", after=""):
    """A chat template: what it writes for each turn and where the assistant begins to answer."""
    asked = "{% if add_generation_prompt %}" + prompt + "{% else %}" + after + "{% endif %}"
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + asked


CHATML = template("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
GEMMA = template(
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ 'model' if m.role == 'assistant' else m.role }}]\n{{ m.content | trim }}<end_of_turn>\n",
    "[model]\n",
    before="{{ bos_token }}",
)
LLAMA = template("[{{ m.role }}]\n\n{{ m.content | trim }}<|eot_id|>", "[assistant]\n\n", before="{{ bos_token }}")
PHI = template("[{{ m.role }}]\n{{ m.content }}<|end|>\n", "[assistant]\n", after="{{ eos_token }}")
OSS = template(
    "[{{ m.role }}{{ ':final' if m.role == 'assistant' }}]{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}",
    "[assistant",
)
TWO = template("[{{ m.role }}]{{ m.content }}<|end|><|im_end|>", "[assistant]")
PLAIN = template("{{ m.role }}: {{ m.content }}\n", "assistant:")
# Qwen 3 writes an empty thought before an answer without one. Other templates begin a thought in the prompt only.
THOUGHT = template(
    "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n",
    "<|im_start|>assistant\n",
)
OPENED = template("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n<think>\n")
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer(chat_template, *, merges=(), bos=False):
    """A token per byte, and the special tokens. With ``bos`` it begins every text with BOS by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        number = tokenizer.token_to_id("<bos>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def user(content="u"):
    return {"role": "user", "content": content}


def demonstrate(tokenizer, prompt, completion, **more):
    [example] = tokenize_demonstrations([Demonstration(prompt, completion, "d:1", **more)], tokenizer, LIMITS)
    return example


def decoded(tokenizer, example):
    return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.completion_ids)


CASES = [
    (CHATML, "<|im_end|>", "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", "c<|im_end|>"),
    (GEMMA, "<end_of_turn>", "<bos>[user]\nu<end_of_turn>\n[model]\n", "c<end_of_turn>"),
    (LLAMA, "<|eot_id|>", "<bos>[user]\n\nu<|eot_id|>[assistant]\n\n", "c<|eot_id|>"),
    (PHI, "<|end|>", "[user]\nu<|end|>\n[assistant]\n", "c<|end|>"),
    (OSS, "<|return|>", "[user]u<|end|>[assistant", ":final]c<|return|>"),
    (TWO, "<|end|><|im_end|>", "[user]u<|end|><|im_end|>[assistant]", "c<|end|><|im_end|>"),
    (PLAIN, "<eos>", "user: u\nassistant:", " c<eos>"),
    (THOUGHT, "<|im_end|>", "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", "<think></think>c<|im_end|>"),
    (OPENED, "<|im_end|>", "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n<think>\n", "c<|im_end|>"),
]


@pytest.mark.parametrize(("chat_template", "end", "prompt", "completion"), CASES)
def test_a_turn_ends_as_the_template_ends_it(chat_template, end, prompt, completion):
    tokenizer = bytes_tokenizer(chat_template)
    assert tokenizer.decode(turn_end(tokenizer)) == end
    for content in ("c", f"c{end}"):  # a content that has the end as text does not end twice
        example = demonstrate(tokenizer, [user()], content)
        assert decoded(tokenizer, example) == (prompt, completion)
    [example] = tokenize_prompts([PromptRecord([user()], "p:1")], tokenizer, LIMITS)
    assert tokenizer.decode(example.prompt_ids) == prompt


def test_without_a_template_or_one_that_takes_conversations_a_turn_ends_with_eos():
    refusing = "{{ raise_exception('no') }}"
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    only_questions = template("{{ raise_exception('one turn') if loop.index > 1 }}{{ m.content }}<|end|>")
    for chat_template in (None, refusing, silent, only_questions):
        tokenizer = bytes_tokenizer(chat_template)
        assert turn_end(tokenizer) == [tokenizer.eos_token_id]


def test_a_template_that_takes_one_answer_only_still_ends_it():
    single = template("{{ raise_exception('too long') if loop.index > 2 }}{{ m.content }}<|end|>")
    tokenizer = bytes_tokenizer(single)
    assert tokenizer.decode(turn_end(tokenizer)) == "<|end|>"


def test_added_tokens_that_are_not_special_end_turns_too():
    tokenizer = bytes_tokenizer(template("{{ m.role }} {{ m.content }}[END]\n", "assistant "))
    assert turn_end(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.add_tokens(["[END]"])
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids(["[END]"])


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
turns = st.lists(st.tuples(contents, contents), max_size=2)


@given(
    history=turns, asked=contents, answer=contents, chat_template=st.sampled_from([CHATML, LLAMA, PHI, OSS, THOUGHT])
)
def test_ids_are_those_of_the_whole_conversation(history, asked, answer, chat_template):
    tokenizer = bytes_tokenizer(chat_template, bos=True)
    prompt = [turn for human, reply in history for turn in (user(human), said(reply))] + [user(asked)]
    example = demonstrate(tokenizer, prompt, answer)
    whole = tokenizer.apply_chat_template([*prompt, said(answer)], return_dict=False)
    ids = example.prompt_ids + example.completion_ids
    assert ids == whole[: len(ids)]
    end = turn_end(tokenizer)
    assert ids[-len(end) :] == end
    assert whole.count(tokenizer.bos_token_id) == ids.count(tokenizer.bos_token_id) <= 1
    assert answer.strip() in tokenizer.decode(example.completion_ids)


def test_what_a_tokenizer_would_join_stays_apart():
    tokenizer = bytes_tokenizer(CHATML, merges=[("Ċ", "Ċ")])
    whole = tokenizer.apply_chat_template([user(), said("\n\nc")], return_dict=False)
    example = demonstrate(tokenizer, [user()], "\n\nc")
    # In the whole text the prompt's line end and the answer's first line end are one token.
    assert whole[: len(example.prompt_ids)] != example.prompt_ids
    assert example.completion_ids == tokenizer("\n\nc<|im_end|>").input_ids
    assert decoded(tokenizer, example) == ("<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", "\n\nc<|im_end|>")


def test_a_tokenizer_that_begins_a_text_with_a_space_does_not_begin_an_answer_so():
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<eos>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template("{{ m.content }}<|end|>")
    )
    example = demonstrate(tokenizer, [user("a b")], "cd")
    assert tokenizer.convert_ids_to_tokens(tokenizer("cd").input_ids) == ["▁", "c", "d"]
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["▁", "a", "▁", "b", "<|end|>"]
    assert tokenizer.convert_ids_to_tokens(example.completion_ids) == ["c", "d", "<|end|>"]
    with pytest.raises(DataError, match=r"^d:1: field 'completion': the tokenizer makes no token of it$"):
        demonstrate(tokenizer, [user("a b")], "1")


def test_texts_end_with_eos_whatever_the_template_says():
    tokenizer = bytes_tokenizer(CHATML, bos=True)
    records = [Demonstration("p", " c", "d:1"), Demonstration([user()], "c", "d:2"), Demonstration("q", "d", "d:3")]
    found = [decoded(tokenizer, example) for example in tokenize_demonstrations(records, tokenizer, LIMITS)]
    chat = ("<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n", "c<|im_end|>")
    assert found == [("<bos>p", " c<eos>"), chat, ("<bos>q", "d<eos>")]


def test_a_prompt_that_the_assistant_has_begun_is_continued():
    tokenizer = bytes_tokenizer(CHATML)
    prompt = [user(), said("It is")]
    example = demonstrate(tokenizer, prompt, " c")
    begun = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nIt is"
    assert decoded(tokenizer, example) == (begun, " c<|im_end|>")
    assert example == demonstrate(tokenizer, prompt, said(" c"))
    [found] = tokenize_prompts([PromptRecord(prompt, "p:1", extra={"a": 1})], tokenizer, LIMITS)
    assert (tokenizer.decode(found.prompt_ids), found.text, found.extra) == (begun, prompt, {"a": 1})


def test_one_that_is_cut_off_has_no_end():
    tokenizer = bytes_tokenizer(TWO)
    record = Comparison([user()], ("cc", "cccccc"), (1, 2), "c:1", ("prompt", "a", "b"))
    [example] = tokenize_comparisons([record], tokenizer, replace(LIMITS, max_response_tokens=4))
    assert [tokenizer.decode(ids) for ids in example.completion_ids] == ["cc<|end|><|im_end|>", "cccc"]


CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
DECLARED = [{"type": "function", "function": {"name": "f"}}]
CONVERSATION = [user(), said("", tool_calls=CALL), {"role": "tool", "content": "r"}]


def test_tools_and_calls_are_written():
    tokenizer = bytes_tokenizer(TOOLS)
    example = demonstrate(tokenizer, CONVERSATION, "c", tools=DECLARED)
    turns = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    called = '<call>f{"a": 1}<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n'
    declared = '[{"type": "function", "function": {"name": "f"}}]'
    assert decoded(tokenizer, example) == (declared + turns + called, "c<|im_end|>")
    [found] = tokenize_prompts([PromptRecord(CONVERSATION, "p:1", tools=DECLARED)], tokenizer, LIMITS)
    assert found.prompt_ids == example.prompt_ids
    # An answer may be a call as well, after some thought.
    example = demonstrate(tokenizer, [user()], said("c", tool_calls=CALL, reasoning_content="t"))
    assert decoded(tokenizer, example) == (turns, '<think>t</think>c<call>f{"a": 1}<|im_end|>')


def test_a_call_ends_as_the_template_ends_it():
    calling = template(
        "[{{ m.role }}]{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<call>"
        "{% else %}{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endif %}",
        "[assistant]",
    )
    tokenizer = bytes_tokenizer(calling)
    prompt = "[user]u<|end|>[assistant]"
    assert decoded(tokenizer, demonstrate(tokenizer, [user()], "c")) == (prompt, "c<|return|>")
    assert decoded(tokenizer, demonstrate(tokenizer, [user()], said("", tool_calls=CALL))) == (prompt, "f<call>")


DEAF = template(
    "{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}<|end|>{% endif %}", "[assistant]"
)


@pytest.mark.parametrize(
    ("chat_template", "prompt", "completion", "more", "reason"),
    [
        (DEAF, [{"role": "developer", "content": "d"}, user()], "c", {},
         "field 'prompt': the chat template leaves out the content of a turn of the developer"),
        (DEAF, [user(), said(""), {"role": "tool", "content": "r"}], "c", {},
         "field 'prompt': the chat template leaves out the content of a turn of the tool"),
        (CHATML, CONVERSATION, "c", {},
         "field 'prompt': the chat template leaves out the tool_calls of a turn of the assistant"),
        (CHATML, [user()], "c", {"tools": DECLARED}, "field 'tools': the chat template leaves them out"),
        (CHATML, [user()], said("", tool_calls=CALL), {},
         "field 'completion': the chat template leaves out its tool_calls"),
        (CHATML, [user()], said("c", thinking="t"), {},
         "field 'completion': the chat template leaves out its thinking"),
        (GEMMA, [{"role": "system", "content": "s"}, user()], "c", {},
         "field 'prompt': the chat template refuses it: System role not supported"),
        (template("{{ m.content + m.name }}"), [user()], "c", {},
         "field 'prompt': the chat template refuses it: 'dict object' has no attribute 'name'"),
        (template("{{ m.content + 1 }}"), [user()], "c", {},
         "field 'prompt': the chat template refuses it: can only concatenate str (not \"int\") to str"),
        (None, [user()], "c", {}, "field 'prompt': has messages, but the tokenizer has no chat template"),
        (TOOLS.replace("assistant\n{% endif", "assistant\n<think>{% endif"), [user()], said("", tool_calls=CALL), {},
         "field 'completion': the chat template writes the prompt in another way before such an answer"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_say_is_an_error(chat_template, prompt, completion, more, reason):
    with pytest.raises(DataError) as error:
        demonstrate(bytes_tokenizer(chat_template), prompt, completion, **more)
    assert str(error.value) == f"d:1: {reason}"


def test_a_role_is_tried_where_it_first_stands_and_further_on():
    """A template may take a system's turn at the beginning and leave out a later one."""
    first_only = template("{% if m.role != 'system' or loop.first %}[{{ m.role }}]{{ m.content }}<|end|>{% endif %}")
    system = {"role": "system", "content": "s"}
    records = [PromptRecord([system, user()], "p:1"), PromptRecord([system, user(), system], "p:2")]
    tokenizer = bytes_tokenizer(first_only)
    assert len(tokenize_prompts(records[:1], tokenizer, LIMITS)) == 1
    with pytest.raises(DataError, match=r"^p:2: field 'prompt': the chat template leaves out .* turn of the system$"):
        tokenize_prompts(records, tokenizer, LIMITS)
