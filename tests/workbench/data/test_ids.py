"""Questions chosen by a file of ids: those alone, in order, as a data set of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.students import noise_image
from workbench.analysis.execution import chosen_data
from workbench.data import load_data
from workbench.errors import DataError


def test_only_the_listed_questions_are_asked(tmp_path: Path) -> None:
    whole = load_data("shapes:val", limit=12)
    first, second = whole.scenes[0][:2]
    last = whole.scenes[3][0]
    wanted = [last.id, first.id, second.id]
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(wanted) + "\n\n")
    chosen = chosen_data("shapes:val", None, 0, file)
    assert [sample.id for sample in chosen] == [first.id, second.id, last.id]
    assert [[sample.id for sample in scene] for scene in chosen.scenes] == [wanted[1:], wanted[:1]]
    assert len(chosen_data("shapes:val", 1, 0, file)) == 2  # the limit counts images
    assert chosen.name == "shapes:val, 3 chosen questions"
    file.write_text("\n".join(wanted[:2]))
    other = chosen_data("shapes:val", None, 0, file)
    assert len({data.fingerprint for data in (whole, chosen, other)}) == 3
    assert len(whole) == len(load_data("shapes:val", limit=12))  # the data set itself stays as it is


@pytest.mark.parametrize("kind", ["hf", "llava_json"])
def test_conversations_are_those_of_the_listed_questions(kind: str, tmp_path: Path) -> None:
    """Or rows that were not chosen would be counted as rows that cannot be asked."""
    for number in range(3):
        noise_image(number).save(tmp_path / f"{number}.png")
    rows = [
        {"id": f"q{n}", "image": f"{n}.png", "question": "what ?", "answer": f"{n}"}
        | {"conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": f"{n}"}]}
        for n in range(3)
    ]
    unread = ("conversations",) if kind == "hf" else ("question", "answer")
    for row in rows:
        for name in unread:
            del row[name]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec, file = f"{kind}:{tmp_path / 'rows.jsonl'}", tmp_path / "ids.txt"
    file.write_text("\n".join(load_data(spec)[n].id for n in (2, 0)))
    chosen = chosen_data(spec, None, 0, file)
    assert [sample.answer for sample in chosen] == ["0", "2"]
    assert [conversation.turns[0][1] for conversation in chosen.conversations] == ["0", "2"]
    assert len(load_data(spec).conversations) == 3


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    wrong = ((None, "cannot be read"), ("\n", "has no ids"), ("nope\n", "1 of 1 ids are not in data set"))
    for content, sentence in wrong:
        if content is not None:
            file.write_text(content)
        with pytest.raises(DataError, match=sentence):
            chosen_data("shapes:val", 4, 0, file)
