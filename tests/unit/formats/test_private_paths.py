"""Public texts and files name no folder of a machine."""

import pytest

from bitnet_train.formats.private_paths import text_without_paths, without_path, without_paths


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/home/alice/client/rows.jsonl", "rows.jsonl"),
        ("/data", "data"),
        ("~/models/base/", "base"),
        (r"C:\Users\alice\rows.jsonl", "rows.jsonl"),
        (r"\\server\share\rows.jsonl", "rows.jsonl"),
        ("file:///srv/rows.jsonl", "rows.jsonl"),
        ("rows.jsonl", "rows.jsonl"),
        ("org/model", "org/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("hf://datasets/org/rows", "hf://datasets/org/rows"),
        ("", ""),
    ],
)
def test_of_a_path_the_last_part_stays(path: str, public: str) -> None:
    assert without_path(path) == public


def test_templates_and_tokens_of_a_tokenizer_stay() -> None:
    config = {
        "name_or_path": "/home/alice/tok",
        "tokenizer_file": "/root/cache/tokenizer.json",
        "eos_token": "/s",
        "pad_token": {"content": "/pad/x", "special": True},
        "chat_template": "/{{ messages }}/x",
        "extra": [{"path": "/srv/a/b"}, 3, None],
        "told": "made of /srv/a/b",
        "/srv/a/key": 1,
    }
    public = without_paths(config)
    del config["/srv/a/key"]
    assert public == config | {
        "name_or_path": "tok",
        "tokenizer_file": "tokenizer.json",
        "extra": [{"path": "b"}, 3, None],
        "told": "made of b",
        "key": 1,
    }


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see `/home/alice/x.md` and /srv/a/b/.", "see `x.md` and b."),
        ("NAME=/data/set/y.jsonl, weight 2", "NAME=y.jsonl, weight 2"),
        ("https://example.org/a/b/c <p>x</p> and/or 1/2 ../a/b ./a/b", None),
        (r"at C:\Users\alice\rows.jsonl now", "at rows.jsonl now"),
        ("| data | /srv/w/x.jsonl |", "| data | x.jsonl |"),
        ("[INST] a [/INST] </s>", None),
        ("path:/home/me/x, -v /h/a/b:/h/c/d", "path:x, -v b:d"),
        ("**/home/me/bold** at //srv/share/x", "**bold** at x"),
        ("http://a.org//b/c s3://bucket/key/x file:///srv/a/b", "http://a.org//b/c s3://bucket/key/x b"),
    ],
)
def test_a_text_for_people(text: str, public: str | None) -> None:
    assert text_without_paths(text) == (text if public is None else public)
