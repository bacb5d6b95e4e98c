"""Our own parsers read answers as a person would, and say nothing where a person could not."""

from __future__ import annotations

import pytest

from workbench.benchmarks.parsers import parse_letter, parse_option, parse_relation, parse_word

COLORS = ("red", "dark red", "blue", "none of these")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        (" (c) ", "C"),
        ("D.", "D"),
        ("**B.** blue", "B"),
        ("B: blue", "B"),
        ("a) red", "A"),
        ("The correct answer is C.", "C"),
        ("Option D", "D"),
        ("choice is (B)", "B"),
        ("I would say (A), since it is bright", "A"),
        ("Dark red.", "B"),
        ("It is red", "A"),
        ("NONE OF THESE", "D"),
        ("it is  dark   red", "B"),
        ("a) or a thing", "A"),
        ("B) I looked for a or the like", "B"),
        ("The answer is A and it is red", "A"),
        ("B. Both A and C", "B"),
        ("[C]", "C"),
        ("answer is: (b)", "B"),
    ],
)
def test_a_letter_or_the_text_of_an_option(answer: str, letter: str) -> None:
    assert parse_letter(answer, COLORS) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "a star",
        "A or B",
        "(A) or (B)",
        "The answer is A. No, the answer is B.",
        "E",
        "F. green",
        "red or blue",
        "Bluetooth",
        "reddish",
        "I. think",
        "answer: a tree",
        "42",
        "Option A or B",
        "The answer is A and C.",
        "A) or B)",
        "a) or b)",
        "A. or (B)",
        "Answer: A/B",
        "A, B",
        "A, B and C",
    ],
)
def test_no_single_option(answer: str) -> None:
    assert parse_letter(answer, COLORS) is None


@pytest.mark.parametrize(
    "answer",
    [
        "The answer is not (A)",
        "It isn't option B.",
        "The answer is not A",
        "Answer: A dog",
        "Neither (A) nor (B)",
        "The answer is not (A) a cat",
        "Option A is not correct.",
        "(b) isn't right",
        "The answer A is wrong",
        "A or (b)",
        "(a) and B",
        "The answer is A or maybe B",
    ],
)
def test_what_is_ruled_out_or_may_be_an_article_is_no_letter(answer: str) -> None:
    assert parse_letter(answer, ("a cat", "a dog", "a cow")) is None


def test_a_letter_beside_one_that_is_ruled_out_is_read() -> None:
    animals = ("a cat", "a dog", "a cow")
    assert parse_letter("The answer is not (A) but (B)", animals) == "B"
    assert parse_letter("The answer is A cat", animals) == "A"
    assert parse_letter("The answer is A because a dog has no whiskers", animals) == "A"


@pytest.mark.parametrize(
    "answer",
    [
        "Considering options A and B, the correct answer is B.",
        "Of points A and B, B is closer. The answer is (B).",
        "The answer is B. A and B are both on the left.",
        "The answer is B.It is a dog",
        "Answer: B-",
        "Answer: B- the dog",
    ],
)
def test_other_letters_elsewhere_in_the_answer_do_not_count(answer: str) -> None:
    assert parse_letter(answer, ("the cat", "the dog", "the cow")) == "B"


def test_an_option_may_begin_like_a_denial() -> None:
    for answer in ("(B) is not visible", "B is not visible.", "The answer is (B) is not visible"):
        assert parse_letter(answer, ("is visible", "is not visible")) == "B"
    assert parse_letter("Option A isn\u2019t correct", ("a cat", "a dog")) is None
    assert parse_letter("A is not correct", ("is no", "is yes")) is None


def test_a_letter_within_an_option_is_none() -> None:
    assert parse_letter("The answer is A.M.", ("P.M.", "A.M.")) == "B"
    assert parse_letter("The answer is A-frame", ("ranch", "A-frame")) == "B"
    assert parse_letter("The answer is B. A.M. is too early", ("A.M.", "P.M.")) == "B"
    assert parse_letter("It is not (A). It is a dog.", ("a cat", "a dog")) == "B"
    assert parse_letter("Option A is not correct, option B is", ("a cat", "a dog")) == "B"


def test_on_the_top_is_on_where_top_is_no_option() -> None:
    below = ("on", "under", "left", "right")
    assert parse_relation("The mug is on the top of the table", below) == "on"
    assert parse_relation("on the top", ("left", "right", "top", "bottom")) == "top"


def test_numbers_are_whole_words() -> None:
    assert parse_letter("12", ("1", "12", "2")) == "B"
    assert parse_letter("There are 2 cups.", ("1", "12", "2")) == "C"
    assert parse_letter("1.50", ("1", "1.50")) == "B"
    assert parse_letter("007", ("7", "007")) == "B"
    assert parse_letter("3", ("1", "12", "2")) is None
    assert parse_letter("2.", ("1", "12", "2")) == "C"
    assert parse_letter("2, I think", ("1", "12", "2")) == "C"
    assert parse_letter("2.5", ("1", "12", "2")) is None
    assert parse_letter("1,200 people", ("1", "12", "200")) is None
    assert parse_letter("about 3.2", ("2", "3.2")) == "B"


def test_options_with_the_same_text_name_none() -> None:
    assert parse_option("red", ("red", "Red", "blue")) is None
    assert parse_option("blue", ("red", "Red", "blue")) == "blue"
    assert parse_option("c++ is", ("c++", "c")) == "c++"


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("The answer is D, which is a consumer.", "D"),
        ("This diagram shows a food web.", None),
        ("A food web with four animals is shown.", None),
        ("I think it's a fox, so it's E", "E"),
        ("I'm sure that it is E", "E"),
        ("The answer is I.", "I"),
        ("The answer is A", "A"),
        ("It is A, because it is eaten.", "A"),
        ("It is A because it is eaten.", "A"),
        ("A is the consumer", "A"),
        ("A or D", None),
        ("A and D", None),
        ("a", "A"),
        ("**a**", "A"),
        ("e.", "E"),
        ("e. It eats plants", "E"),
        ("It is (a)", "A"),
        ("e.g. a fox", None),
        ("E.g. a fox", None),
        ("The answer is d", "D"),
        ("The answer is a", "A"),
        ("the answer is a.", "A"),
        ("This is a Venus flytrap.", None),
        ("(a) It is eaten", "A"),
        ("Vitamin E) or B", "E"),
        ("This is an A-frame house.", None),
        ("It has a double-D shape", None),
    ],
)
def test_an_option_of_one_letter_is_no_word_of_the_sentence(answer: str, option: str | None) -> None:
    assert parse_option(answer, ("D", "A", "E", "I")) == option


def test_the_article_is_no_option_of_a_lettered_question() -> None:
    """MMStar has diagrams whose parts are called A to F, in another order than the options' own letters."""
    assert parse_letter("This diagram shows a food web.", ("D", "A", "E", "F")) is None
    assert parse_letter("It must be E", ("D", "A", "E", "F")) == "C"


def test_an_option_of_one_small_letter_is_read_as_it_is_written() -> None:
    assert parse_option("The variable is y", ("x", "y")) == "y"
    assert parse_option("It is the longest side, a.", ("a", "b")) == "a"
    assert parse_option("It is a line", ("a", "b")) is None
    assert parse_option("NO", ("no", "ab")) == "no"  # these are letters that follow one another


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes.", "yes"), ("**No**", "no"), ("no, there is not", "no"), ("\nYES\n", "yes"), ("'Yes'", "yes")],
)
def test_the_first_word_is_yes_or_no(answer: str, word: str) -> None:
    assert parse_word(answer) == word


@pytest.mark.parametrize("answer", ["", "...", "nope", "not at all", "y", "It is yes", "Yesterday", "None", "no-one's"])
def test_another_first_word(answer: str) -> None:
    assert parse_word(answer) == ("no" if answer == "no-one's" else None)


@pytest.mark.parametrize(
    ("answer", "relation"),
    [
        ("The cup is on the table", "on"),
        ("on the left", "left"),
        ("It is on its right side", "right"),
        ("on left of the table", "left"),
        ("on top", "on"),
        ("on top of the box", "on"),
        ("in front of the box", "front"),
        ("In-Front", "front"),
        ("on", "on"),
        ("left and right", None),
        ("upon", None),
        ("the front, on the left", None),
    ],
)
def test_one_spatial_relation(answer: str, relation: str | None) -> None:
    assert parse_relation(answer, ("on", "under", "left", "right", "front", "behind")) == relation
