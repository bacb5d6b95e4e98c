"""Options of several tokens: every log-probability is compared with one plain pass for each option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor

from tests.tiny import BUILDERS, WORDS, build
from workbench.capture.edit import edit
from workbench.data import Sample
from workbench.errors import DataError, ModelError
from workbench.mllm import MLLM
from workbench.mllm.conversation import end_tokens
from workbench.scoring.options import END, Options
from workbench.scoring.quiz import Quiz

QUESTION = "what color is this ?"
OPTIONS = [("red cat", "red dog", "blue"), ("yes", "no"), ("one", "one two", "one two one"), ("left", "the left cat")]


def picture(seed: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def triple(values: torch.Tensor, _: int) -> torch.Tensor:
    return 3 * values.flip(0)


def asked(number: int, options: tuple[str, ...], image: int, question: str = QUESTION) -> Sample:
    return Sample(str(number), str(image), lambda: picture(image), question, options[0], options)


SCENES = [
    [asked(0, OPTIONS[0], 0), asked(1, OPTIONS[1], 0, "a dog ?")],
    [asked(2, OPTIONS[2], 1), asked(3, OPTIONS[3], 1, "is the red cat left ?"), asked(4, OPTIONS[1], 1)],
]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], MLLM]:
    folder = tmp_path_factory.mktemp("models")
    models: dict[str, MLLM] = {}

    def loaded(name: str) -> MLLM:
        if name not in models:
            models[name] = MLLM.load(str(build(name, folder / name)))
        return models[name]

    return loaded


def oracle(mllm: MLLM, sample: Sample, *, end: bool) -> torch.Tensor:
    """The log-probability of each option, from one pass over prompt and option without padding."""
    prompt = mllm.encode([sample.image], [sample.question])
    scores = []
    for option in sample.options:
        ids = mllm.answer_ids(option)
        batch = mllm.continued(prompt, [ids])
        assert batch.inputs["input_ids"][0, -len(ids) :].tolist() == ids
        with torch.inference_mode():
            logprobs = mllm.model(**batch.inputs).logits[0].float().log_softmax(-1)
        score = sum(float(logprobs[-1 - len(ids) + place, token]) for place, token in enumerate(ids))
        if end:
            stops = mllm.processor.tokenizer.convert_tokens_to_ids(end_tokens(mllm))
            score += float(logprobs[-1, stops].logsumexp(-1))
        scores.append(score)
    return torch.tensor(scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_options_equal_one_pass_for_each(name: str, load: Callable[[str], MLLM]) -> None:
    mllm = load(name)
    for size in (2, 5):
        quiz = Quiz(mllm, SCENES, size)
        found = quiz.likelihoods()
        for row, sample in enumerate(quiz.samples):
            expected = oracle(mllm, sample, end=sample.options == OPTIONS[2])
            assert torch.allclose(found[row, : len(expected)], expected, atol=2e-4), sample
            assert (found[row, len(expected) :] == -torch.inf).all()
        assert torch.allclose(quiz.logprobs(), found.log_softmax(-1))


def test_questions_need_no_places_of_the_visual_tokens(tmp_path: Path) -> None:
    """The class token, which a LLaVA with the features `full` has among its visual tokens, is nowhere in the image."""
    folder = build("llava", tmp_path / "llava")
    for file in (folder / "config.json", folder / "processor_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": "full"}))
    mllm = MLLM.load(str(folder))
    quiz = Quiz(mllm, SCENES, 2)
    assert quiz._prefixes is not None
    found = quiz.likelihoods()
    for row, sample in enumerate(quiz.samples):
        expected = oracle(mllm, sample, end=sample.options == OPTIONS[2])
        assert torch.allclose(found[row, : len(expected)], expected, atol=2e-4), sample


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_every_way_through_the_model_scores_the_same(name: str, load: Callable[[str], MLLM]) -> None:
    """Continued from the prefix of an image or run as a whole, changed, knocked out, padded on either side."""
    mllm = load(name)
    for side in ("left", "right"):
        mllm.processor.tokenizer.padding_side = side
        quiz = Quiz(mllm, SCENES, 3, first=7)
        assert (quiz._prefixes is not None) == (name == "llava")
        seen = set()

        def roll(values: torch.Tensor, image: int, seen: set[int] = seen) -> torch.Tensor:
            seen.add(image)
            return values.roll(image, 0)

        def whole(*arguments: object, quiz: Quiz = quiz) -> torch.Tensor:
            return quiz._summed(quiz._from_whole_prompts(*arguments))  # type: ignore[arg-type]

        assert torch.allclose(quiz.likelihoods(), whole(None, None), atol=2e-4)
        for site in ("encoder", "projector", 0, 1, 2, mllm.n_layers):
            changed = quiz.likelihoods(site, roll)  # type: ignore[arg-type]
            assert torch.allclose(changed, whole(site, roll), atol=2e-4), site
            moved = (changed - quiz.likelihoods()).nan_to_num().abs().max()
            assert (moved > 1e-3) == (site != mllm.n_layers), site  # nothing reads visual tokens after the last block
        assert seen == {7, 8}
        for blocks in ([1], [2, 3]):
            assert torch.allclose(quiz.knocked_out(blocks), whole(None, None, blocks).log_softmax(-1), atol=2e-4)
    mllm.processor.tokenizer.padding_side = "left"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_answers_equal_transformers_own(name: str, load: Callable[[str], MLLM]) -> None:
    """Generated from the prefix of an image, greedy answers are those of `model.generate` on each prompt alone."""
    mllm = load(name)
    quiz = Quiz(mllm, SCENES, 3)
    plain = []
    for sample in quiz.samples:
        inputs = mllm.encode([sample.image], [sample.question]).inputs
        with torch.inference_mode():
            ids = mllm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        (text,) = mllm.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        plain.append(text.strip())
    assert quiz.answers(max_new_tokens=6) == plain
    assert quiz.answers("encoder", lambda values, _: values, max_new_tokens=6) == plain
    assert len(set(plain)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_answers_under_a_change_are_those_of_the_changed_prompt(name: str, load: Callable[[str], MLLM]) -> None:
    """Each generated word is the likeliest one after the changed prompt and the words before it."""
    mllm = load(name)
    quiz = Quiz(mllm, SCENES[:1], 3)
    known = mllm.processor.tokenizer.get_vocab()
    special = torch.tensor([number for word, number in known.items() if word not in WORDS])

    class OnlyWords(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, special, -torch.inf)

    for site in ("encoder", 0, 2):
        answers = quiz.answers(site, triple, max_new_tokens=3, sampler=lambda _: OnlyWords())  # type: ignore[arg-type]
        for sample, answer in zip(quiz.samples, answers, strict=True):
            words = answer.split()
            assert len(words) == 3
            for count, word in enumerate(words):
                prompt = mllm.encode([sample.image], [sample.question])
                beginning = mllm.continued(prompt, [[known[before] for before in words[:count]]])
                logits = edit(mllm, beginning, at=site, fn=triple)[0]  # type: ignore[arg-type]
                assert int(OnlyWords()(logits, logits).argmax()) == known[word]


def test_what_must_be_read_is_read_once(load: Callable[[str], MLLM]) -> None:
    """Options that begin alike share a pass; where one option begins another, its end is scored."""
    mllm = load("llava")
    options = Options(mllm, [sample for scene in SCENES for sample in scene])
    known = mllm.processor.tokenizer.get_vocab()
    ids = [[tuple(known[word] for word in option.split()) for option in sample] for sample in OPTIONS]
    assert options.tokens[0] == ids[0]
    assert options.tokens[2] == [(*option, END) for option in ids[2]]
    assert [(c.question, c.tokens) for c in options.continuations] == [
        (0, (known["red"],)),
        (1, ()),
        (2, ids[2][2]),
        (3, (known["the"], known["left"])),
        (4, ()),
    ]
    assert options.lengths.tolist() == [[2, 2, 1], [1, 1, 0], [2, 3, 4], [1, 3, 0], [1, 1, 0]]


def test_options_that_the_model_cannot_tell_apart_are_refused(load: Callable[[str], MLLM]) -> None:
    mllm = load("llava")
    with pytest.raises(DataError, match="the options horse and zebra of a question have the same tokens in"):
        Quiz(mllm, [[asked(0, ("red", "horse", "zebra"), 0)]], 4).likelihoods()
    mllm.processor.tokenizer.eos_token = None
    try:
        with pytest.raises(ModelError, match="its tokenizer has no end token"):
            Quiz(mllm, [[asked(0, ("one", "one two"), 0)]], 4).likelihoods()
    finally:
        mllm.processor.tokenizer.eos_token = "<eos>"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_answer(load: Callable[[str], MLLM], wrong: float) -> None:
    """The largest of values that are not numbers is the first one: the first option would be the answer to all."""
    mllm = load("llava")
    bias = torch.nn.Parameter(torch.zeros(mllm.config.get_text_config().vocab_size))
    mllm.model.lm_head.bias = bias
    try:
        quiz = Quiz(mllm, SCENES, 3)
        assert quiz.likelihoods().isfinite().any(1).all()
        assert len(quiz.answers(max_new_tokens=2)) == 5
        bias.data[mllm.processor.tokenizer.get_vocab()["cat"]] = wrong  # as an overflow of float16 does
        for ask in (quiz.likelihoods, quiz.answers, lambda: quiz.knocked_out([1]), lambda: quiz.answers(1, triple)):
            with pytest.raises(ModelError, match=r"computes values that are not finite in torch.float32: load it in"):
                ask()
    finally:
        mllm.model.lm_head.bias = None
