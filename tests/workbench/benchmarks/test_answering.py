"""Questions in the words of a prompt, and the answers that a model gives to them."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from analyses.benchmark import Config, check_scorer
from tests.tiny import build
from workbench.analysis.chunks import Chunk
from workbench.benchmarks.answering import Decoding, answer_chunk
from workbench.benchmarks.asking import Asking, PromptOptions, ask
from workbench.benchmarks.prompts import ONE_WORD
from workbench.benchmarks.tables import judged
from workbench.data import Dataset, Sample
from workbench.data.base import Conversation
from workbench.data.benchmark_rows import BenchmarkDataset
from workbench.data.conversations import ConversationDataset
from workbench.errors import ConfigError, DataError, UnknownNameError
from workbench.mllm import MLLM
from workbench.scoring.quiz import Quiz
from workbench.scoring.sampling import Sampler


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3), dtype=np.uint8))


def questions(options: tuple[str, ...] = ("red cat", "blue dog", "one")) -> list[Sample]:
    words = ("what color is this ?", "is this red ?", "what is the color of the cat ?")
    return [
        Sample(str(n), str(n // 2), lambda n=n: picture(n // 2), words[n % 3], options[n % 2], options, f"type {n % 2}")
        for n in range(6)
    ]


def benchmark(name: str, samples: list[Sample]) -> BenchmarkDataset:
    return BenchmarkDataset(f"{name}:x", samples, lambda: "x", benchmark=name, version="twin", prompts={})


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> MLLM:
    return MLLM.load(str(build("llava", tmp_path_factory.mktemp("models") / "llava")))


def answers(mllm: MLLM, asking: Asking, decoding: Decoding, size: int = 4, **more: Any) -> pd.DataFrame:
    return answer_chunk(mllm, asking, Chunk(asking.worded, 0, size), decoding, **more).tables["answers"]


# --- asking ---------------------------------------------------------------------------------------


def test_options_are_what_the_prompt_asks_for(mllm: MLLM) -> None:
    def options(name: str, style: Any, samples: list[Sample]) -> tuple[Any, ...]:
        asking = ask(PromptOptions(prompt=style), mllm, benchmark(name, samples), generated=True)
        worded = asking.worded[0][1]
        return worded.options, worded.answer

    yes_no = questions(("yes", "no"))
    assert options("cv_bench", "llava", questions()) == (("A", "B", "C"), "B")
    assert options("cv_bench", "plain", questions()) == (("red cat", "blue dog", "one"), "blue dog")
    assert options("pope", "llava", yes_no) == (("Yes", "No"), "No")
    assert options("pope", "paper", yes_no) == (("yes", "no"), "no")


def test_a_model_is_asked_in_words_that_it_knows(mllm: MLLM) -> None:
    plain = ask(PromptOptions(), mllm, benchmark("pope", questions(("yes", "no"))))
    assert plain.style == "plain"  # it knows no word of LLaVA's prompt
    (sentence,) = plain.left_out
    assert sentence.startswith("prompt llava has words that ") and "does not know, such as Answer" in sentence
    forced = ask(PromptOptions(prompt="llava"), mllm, benchmark("pope", questions(("yes", "no"))), generated=True)
    assert forced.style == "llava"
    (sentence,) = forced.left_out
    assert sentence.startswith("6 of 6 questions have words that") and "Answer" in sentence
    odd = [*questions(), Sample("6", "3", lambda: picture(3), "a zebra ?", "yes", ("yes", "no"))]
    assert "1 of 7 questions" in ask(PromptOptions(), mllm, Dataset("odd", odd, "odd")).left_out[0]
    no_answer = [*questions(), Sample("6", "3", lambda: picture(3), "a cat ?", "two", ("yes", "no"))]
    (left_out,) = ask(PromptOptions(), mllm, Dataset("odd", no_answer, "odd")).left_out
    assert left_out.startswith("1 of 7 questions have no options with the answer among them")
    with pytest.raises(ConfigError, match="prompt is lmms, which a data set that is no benchmark does not have"):
        ask(PromptOptions(prompt="lmms"), mllm, Dataset("plain", questions(), "x"))


def test_questions_whose_options_the_model_cannot_tell_apart_are_counted_and_not_asked(mllm: MLLM) -> None:
    twice = Sample("6", "3", lambda: picture(3), "is this red ?", "yes", ("yes", "no", "yes"))
    unknown = Sample("7", "3", lambda: picture(3), "is this red ?", "yes", ("yes", "zebra", "lion"))
    data = Dataset("odd", [*questions(), twice, unknown], "odd")
    asking = ask(PromptOptions(), mllm, data)
    assert list(asking.originals) == [str(n) for n in range(6)]
    (first,) = asking.left_out
    assert first.startswith("2 of 8 questions have two options with the same tokens in")
    assert first.endswith("such as 'yes' and 'yes': not asked")
    assert len(answers(mllm, asking, Decoding("likelihood"))) == 6
    assert len(ask(PromptOptions(), mllm, data, generated=True).originals) == 8
    with pytest.raises(DataError, match=r"6 of 6 questions have two options with the same tokens in .*'Yes' and 'No'"):
        ask(PromptOptions(prompt="llava"), mllm, benchmark("pope", questions(("yes", "no"))))


def test_first_questions_that_all_have_one_answer_are_told_of(mllm: MLLM) -> None:
    """As POPE asks: about each image, first of an object that is there and then of one that is not."""
    options = ("yes", "no")
    samples = [
        Sample(f"{kind}{n}", str(n // 2), lambda n=n: picture(n // 2), "is this red ?", options[n % 2], options, kind)
        for kind in ("random", "popular")
        for n in range(24)
    ]
    data = benchmark("pope", samples)
    assert ask(PromptOptions(prompt="plain"), mllm, data, each=1).left_out == [
        f"all 12 questions of type {kind} that are asked have the answer yes, others have not: --questions 0 asks all"
        for kind in ("random", "popular")
    ]
    assert not ask(PromptOptions(prompt="plain"), mllm, data).left_out
    assert not ask(PromptOptions(prompt="plain"), mllm, benchmark("pope", samples[:6]), each=1).left_out


def test_rows_without_one_image_are_counted(mllm: MLLM) -> None:
    samples = questions()
    conversations = [Conversation(s.id, ((s.question, s.answer),), (s.load,), (s.image_id,)) for s in samples]
    text = Conversation("text", (("what color ?", "red"),))
    data = ConversationDataset("hf:x", [*conversations, text], "x", samples)
    assert ask(PromptOptions(), mllm, data).left_out == ["1 of 7 rows are not about one image: not asked"]


def test_a_typo_in_a_scorer_names_all_that_can_be_chosen(mllm: MLLM) -> None:
    asking = ask(PromptOptions(), mllm, benchmark("pope", questions(("yes", "no"))), generated=True)
    with pytest.raises(UnknownNameError, match=r"'al'.*official.*did you mean 'all'"):
        check_scorer(Config(data="pope:x", scorer="al"), asking)


def test_unknown_words_of_the_data_alone_do_not_change_the_prompt(mllm: MLLM) -> None:
    """A model that knows every word that LLaVA's prompt adds, and not those of some questions."""
    knows = copy.copy(mllm)
    knows.processor = copy.copy(mllm.processor)
    knows.processor.tokenizer = copy.deepcopy(mllm.processor.tokenizer)
    knows.processor.tokenizer.add_tokens(
        [AddedToken(word, single_word=True) for word in [*ONE_WORD.split(), "Yes", "No"]]
    )
    odd = [*questions(("yes", "no")), Sample("6", "3", lambda: picture(3), "a zebra ?", "yes", ("yes", "no"))]
    asking = ask(PromptOptions(), knows, benchmark("pope", odd))
    assert asking.style == "llava"
    (sentence,) = asking.left_out
    assert sentence.startswith("1 of 7 questions have words that") and sentence.endswith("such as zebra")
    asking = ask(PromptOptions(), mllm, benchmark("pope", odd))
    assert asking.style == "plain"
    assert [sentence.split()[0] for sentence in asking.left_out] == ["prompt", "1"]


def test_rotated_questions_have_each_option_at_each_place(mllm: MLLM) -> None:
    two = Sample("6", "3", lambda: picture(3), "is this red ?", "yes", ("yes", "no"))
    asking = ask(PromptOptions(prompt="llava"), mllm, benchmark("mmstar", [*questions(), two]), generated=True)
    versions = asking.rotated()
    assert [len(version.originals) for version in versions] == [7, 7, 6]  # the last question has two options
    assert [version.originals["0"].options[0] for version in versions] == ["red cat", "blue dog", "one"]
    assert [version.worded[0][0].answer for version in versions] == ["A", "C", "B"]
    assert "A. blue dog" in versions[1].worded[0][0].question


# --- answering ------------------------------------------------------------------------------------


def test_likelihood_stores_the_score_of_every_option(mllm: MLLM) -> None:
    asking = ask(PromptOptions(), mllm, Dataset("plain", questions(), "x"))
    table = answers(mllm, asking, Decoding("likelihood"))
    expected = Quiz(mllm, asking.worded, 6).likelihoods()
    assert np.allclose([json.loads(row) for row in table["logprobs"]], expected.numpy(), atol=1e-4)
    assert [json.loads(row) for row in table["tokens"]] == [[2, 2, 1]] * 6
    rows = judged(table)
    for name, values in (("sum", expected), ("mean", expected / torch.tensor([2, 2, 1]))):
        right = [s.options[int(v.argmax())] == s.answer for s, v in zip(questions(), values, strict=True)]
        assert rows[rows["scorer"] == name]["correct"].tolist() == right


def test_drawn_answers_do_not_depend_on_the_batch(mllm: MLLM) -> None:
    asking = ask(PromptOptions(), mllm, Dataset("plain", questions(), "x"))
    drawn = Decoding("sample", max_new_tokens=4, temperature=1.0, draws=3)
    tables = [answers(mllm, asking, drawn, size).set_index(["id", "draw"])["answer"] for size in (1, 6)]
    assert tables[0].sort_index().equals(tables[1].sort_index())
    assert len(tables[0]) == 18
    assert tables[0].groupby("id").nunique().max() > 1
    greedy = answers(mllm, asking, Decoding(max_new_tokens=4)).set_index("id")["answer"]
    cold = answers(mllm, asking, Decoding("sample", max_new_tokens=4, temperature=1e-4, draws=2))
    assert (cold["answer"] == cold["id"].map(greedy)).all()


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    nothing: Any = None
    count = torch.zeros(4)
    for draw in range(4000):
        sampler = Sampler(0.7, [Sample("q", "i", nothing)], seed=1, draw=draw)
        count[sampler(torch.zeros(1, 1, dtype=torch.long), logits).argmax()] += 1
    expected = (logits[0] / 0.7).softmax(0)
    assert ((count / 4000 - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()
    with pytest.raises(ConfigError, match="temperature is 0: expected a number above 0"):
        Sampler(0, [], seed=0, draw=0)


def test_blind_answers_are_those_to_a_text_and_to_one_image(mllm: MLLM) -> None:
    asking = ask(PromptOptions(), mllm, Dataset("plain", questions(), "x"))
    blind = answers(mllm, asking, Decoding(max_new_tokens=5), shown="no image")
    texts = [
        mllm.generate(mllm.encode([[]], [sample.question]), max_new_tokens=5)[0]
        for scene in asking.worded
        for sample in scene
    ]
    assert blind["answer"].tolist() == texts
    assert set(blind["shown"]) == {"no image"}
    grey = answers(mllm, asking, Decoding(max_new_tokens=5), shown="mean image", blank=picture(9))
    same = [[mllm.generate(mllm.encode([picture(9)], [s.question]), max_new_tokens=5)[0] for s in asking.scenes[0]]]
    assert grey["answer"].tolist()[:2] == same[0]
    assert grey["image_id"].tolist() == blind["image_id"].tolist()
