"""Rows that TRL's own utilities make, and rows of LLaMA-Factory's data folder."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from trl import data_utils

from bitnet_train.data.chat import encode_chat
from bitnet_train.data.conversation import messages_of, unread_of_conversation
from bitnet_train.data.preference import pair_of
from bitnet_train.data.sources import Row, read_rows
from bitnet_train.errors import UserError
from tests.packages import member
from tests.support import tiny_tokenizer

ASKED = [{"role": "user", "content": "What colour is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": text}] for text in ("It is blue.", "It is green."))
PAIRS = [{"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN], "score": 0.9}] * 2


def saved(rows: Any, folder: Path) -> list[Row]:
    rows.to_parquet(folder / "rows.parquet")
    return list(read_rows(str(folder / "rows.parquet")))


def test_a_prompt_that_trl_extracts_is_the_one_that_is_read(tmp_path: Path) -> None:
    implicit = datasets.Dataset.from_list(PAIRS)
    explicit = implicit.map(data_utils.extract_prompt)
    assert "prompt" in explicit.column_names
    pairs = [pair_of(row) for row in (*saved(implicit, tmp_path), *saved(explicit, tmp_path))]
    assert pairs == [pairs[0]] * 4
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == (ASKED, BLUE, GREEN)


def test_pairs_that_trl_takes_apart_have_a_label(tmp_path: Path) -> None:
    """KTO's rows: {prompt, completion, label}."""
    explicit = datasets.Dataset.from_list(PAIRS).map(data_utils.extract_prompt).remove_columns("score")
    good: list[Row] = []
    bad: list[Row] = []
    for row in saved(data_utils.unpair_preference_dataset(explicit), tmp_path):
        (good if row.fields["label"] else bad).append(row)
    assert (len(good), len(bad)) == (2, 2)
    for row in good:
        assert messages_of(row) == [*ASKED, *BLUE]
        assert list(unread_of_conversation(row.fields)) == []
    for row in bad:
        with pytest.raises(UserError, match="label is false"):
            messages_of(row)


def test_sharegpt_is_what_trl_makes_of_it(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
    ]
    rows = datasets.Dataset.from_list([{"conversations": turns}])
    converted = rows.map(data_utils.maybe_convert_to_chatml, remove_columns="conversations")
    assert "messages" in converted.column_names
    (ours,), (theirs,) = saved(rows, tmp_path), saved(converted, tmp_path)
    assert messages_of(ours) == messages_of(theirs)


def test_answers_as_trl_masks_them(tmp_path: Path) -> None:
    """apply_chat_template of a prompt-completion row: what TRL trains is what carries loss here."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path)
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    row = data_utils.apply_chat_template({"prompt": ASKED, "completion": BLUE}, theirs)
    ids, trained = encode_chat(messages_of(Row("rows", 1, {"prompt": ASKED, "completion": BLUE})), tokenizer)
    assert tokenizer.decode([id for id, flag in zip(ids, trained, strict=True) if not flag]) == row["prompt"]
    assert tokenizer.decode([id for id, flag in zip(ids, trained, strict=True) if flag]) == row["completion"]


@pytest.mark.slow
def test_llama_factorys_kto_rows() -> None:
    rows = json.loads(member("llamafactory==0.9.5", "data/kto_en_demo.json"))
    read = [Row("kto", number, row) for number, row in enumerate(rows)]
    labels = [row.fields["label"] for row in read]
    assert {True, False} == {*labels}
    for row in read:
        if row.fields["label"]:
            assert messages_of(row)[-1]["content"] == row.fields["messages"][-1]["content"]  # type: ignore[index]
        else:
            with pytest.raises(UserError, match="label is false"):
                messages_of(row)
