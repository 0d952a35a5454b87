"""The miniature world: tricks do not score better than honest answers, and everything follows from the seed."""

from __future__ import annotations

import random

import pytest

from rlhf.demo.labellers import Labeller, agreement, gold_utility, hire
from rlhf.demo.world import RUDE, STOP_WORD, Instruction, World, answer_page

FOX_FOOD = Instruction("what does the fox eat ?", "question", ("fox",), (("fox", "food"),))
STORY = Instruction("write a story about the fox and the owl .", "story", ("fox", "owl"))


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def instructions(world):
    return world.instructions(12_000, random.Random(0))


def honest(world: World) -> str:
    return f"the fox eats {world.facts['fox', 'food']} ."


def test_everything_follows_from_the_seed(world):
    again = World(0)
    assert again.facts == world.facts
    assert again.documents(50, random.Random(1)) == world.documents(50, random.Random(1))
    assert again.instructions(50, random.Random(1)) == world.instructions(50, random.Random(1))
    assert World(1).facts != world.facts
    assert World(1).vocabulary == world.vocabulary


def test_vocabulary_covers_every_text(world, instructions):
    rng = random.Random(2)
    texts = world.documents(3_000, rng)
    texts += [text for i in instructions[:3_000] for text in (i.prompt, world.demonstration(i, rng))]
    texts.append(answer_page([("where does the fox live ?", "go away .")], FOX_FOOD.prompt))
    assert {word for text in texts for word in text.split()} <= set(world.vocabulary)
    assert 200 <= len(world.vocabulary) <= 400


def test_instructions_are_distinct_and_every_part_of_them_is_alike(instructions):
    assert len({i.prompt for i in instructions}) == 12_000
    assert max(len(i.prompt.split()) for i in instructions) <= 16
    for kind in ("question", "describe", "compare", "story"):
        first, last = (
            sum(i.kind == kind for i in part) / 3_000 for part in (instructions[:3_000], instructions[-3_000:])
        )
        assert 0.1 < first < 0.5
        assert abs(first - last) < 0.05


def test_documents_are_of_readable_length(world):
    lengths = [len(text.split()) for text in world.documents(2_000, random.Random(3))]
    assert 30 < sum(lengths) / len(lengths) < 70
    assert max(lengths) < 250


def test_the_few_shot_prompt_waits_for_an_answer():
    page = answer_page([("where does the fox live ?", "the fox lives in the cave .")], FOX_FOOD.prompt)
    assert page.endswith("what does the fox eat ? reply :")
    assert page.split().count(STOP_WORD) == 2


def test_demonstrations_are_good_but_not_perfect(world, instructions):
    rng = random.Random(4)
    best = gold_utility(world, FOX_FOOD, honest(world))
    utilities = [gold_utility(world, i, world.demonstration(i, rng)) for i in instructions[:2_000]]
    assert 0.6 * best < sum(utilities) / len(utilities) < best
    assert min(utilities) < 0.5 * best


def test_an_honest_answer_has_every_virtue(world):
    found = world.assess(FOX_FOOD, honest(world))
    assert (found.follows, found.truthful, found.fluent) == (1, 1, 1)
    assert (found.rude, found.off_topic, found.long_winded) == (0, 0, 0)


def test_it_refers_to_the_last_subject(world):
    food, home = world.facts["owl", "food"], world.facts["owl", "home"]
    about_owl = Instruction("", "describe", ("owl",), (("owl", "food"), ("owl", "home")))
    assert world.assess(about_owl, f"the owl eats {food} . it lives in the {home} .").truthful == 1
    assert world.assess(about_owl, f"the fox eats {food} . it lives in the {home} .").follows == 0


@pytest.mark.parametrize(
    "trick",
    [
        "",
        "{honest} {honest} {honest}",
        "{honest} shut up .",
        "{lie}",
        "{honest} {lie}",
        "the owl eats {food} .",
        "the fox sleeps in the {home} .",
        "{honest} the owl eats nuts . the bear eats nuts . the wolf eats nuts .",
        "{honest} the fox the fox the",
        "eats {food} fox the .",
        "i do not know .",
        "{honest} i do not know .",
        "have a nice day . thank you for asking . i hope this helps .",
        "what does the fox eat ? what does the owl eat ?",
        "one day the fox met the owl . they became good friends .",
    ],
)
def test_tricks_do_worse_than_an_honest_answer(world, trick):
    food = world.facts["fox", "food"]
    lie = f"the fox eats {'nuts' if food != 'nuts' else 'fish'} ."
    text = trick.format(honest=honest(world), lie=lie, food=food, home=world.facts["fox", "home"])
    assert gold_utility(world, FOX_FOOD, text) < gold_utility(world, FOX_FOOD, honest(world)) - 0.2


def test_listing_every_value_is_no_answer(world):
    text = " ".join(f"the fox eats {food} ." for food in ("nuts", "fish", "mice", world.facts["fox", "food"]))
    assert world.assess(FOX_FOOD, text).truthful == 0


def test_saying_more_helps_when_it_is_true(world):
    true = f"{honest(world)} the fox lives in the {world.facts['fox', 'home']} ."
    false = f"{honest(world)} the fox lives in the {'cave' if world.facts['fox', 'home'] != 'cave' else 'river'} ."
    plain = gold_utility(world, FOX_FOOD, honest(world))
    assert gold_utility(world, FOX_FOOD, true) > plain > gold_utility(world, FOX_FOOD, false)


def test_stories_keep_to_their_creatures(world):
    good = "one day the fox met the owl . the fox told the owl a secret . they were very happy ."
    for worse in (
        "one day the fox met the owl .",
        good.replace("owl", "bear"),
        good.replace("owl", "fox"),
        "they were very happy .",
    ):
        assert gold_utility(world, STORY, worse) < gold_utility(world, STORY, good)


def test_rude_words_are_known(world):
    assert all(world.assess(FOX_FOOD, text).rude == 1 for text in RUDE)


def samples(world: World, instruction: Instruction, rng: random.Random) -> list[str]:
    """Completions of varied quality, much as the SFT model writes them: some break off."""
    texts = [world.demonstration(instruction, rng) for _ in range(6)]
    return [" ".join(text.split()[: rng.randint(3, 12)]) if rng.random() < 0.1 else text for text in texts]


def test_labellers_agree_about_as_often_as_the_papers(world, instructions):
    rng = random.Random(5)
    comparisons = [(i, samples(world, i, rng)) for i in instructions[:600]]
    assert 0.70 < agreement(hire(world, 30, 0), comparisons) < 0.76


def test_a_labeller_repeats_a_judgement_and_ranks_as_he_prefers(world, instructions):
    rng = random.Random(6)
    for instruction in instructions[:50]:
        texts = samples(world, instruction, rng)
        texts.append(texts[0])
        ranks = Labeller(world, "somebody").rank(instruction, texts)
        assert ranks == Labeller(world, "somebody").rank(instruction, texts)
        assert ranks[0] == ranks[-1]
        assert min(ranks) == 1
        for a, rank_a in zip(texts, ranks, strict=True):
            for b, rank_b in zip(texts, ranks, strict=True):
                expected = 0.5 if rank_a == rank_b else float(rank_a < rank_b)
                assert Labeller(world, "somebody").prefers(instruction, a, b) == expected


def test_labellers_differ_in_taste(world):
    one, other = hire(world, 2, 0)
    assert one.weights != other.weights
    assert hire(world, 2, 0)[0].weights == one.weights
