"""The command: its output, its exit codes, and what it never overwrites."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.cli import run
from tests.folders import CODES, LINEARS, edit_config, edit_tensor, write_master

ROOT = Path(__file__).parents[3]


def test_the_command_prints_what_it_wrote(master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(master), str(tmp_path / "packed"), "--format", "safetensors"]) == 0
    wrote, verified = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'packed'} (")
    assert verified == f"verified: {LINEARS} matrices, {CODES} codes, 0 differ"


def test_the_script_ends_with_2_and_one_line_for_wrong_input(tmp_path: Path) -> None:
    command = [sys.executable, "tools/export.py", str(tmp_path / "none"), str(tmp_path / "out"), "--format", "gguf"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'none'}: must be a finished run's directory, a model folder")
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--format"),
        (["--format", "gguf", "--linear-class", "bitlinear"], "--linear-class belongs to --format safetensors"),
        (
            ["--format", "gguf", "--max-shard-size", "1GB"],
            "--max-shard-size belongs to --format safetensors and master",
        ),
        (["--format", "master", "--max-shard-size", "big"], "must be a size such as 500MB or 5GB, got 'big'"),
        (["--format", "master", "--max-shard-size", "0"], "must be a size such as 500MB or 5GB, got '0'"),
        (["--format", "master", "--no-dry-run"], "--no-dry-run belongs to --push-to-hub"),
        (["--format", "master", "--text", "file"], "--text belongs to --verify"),
        (["--format", "safetensors", "--push-to-hub", "name"], "--push-to-hub must be user/name, got 'name'"),
        (["--format", "onnx"], "invalid choice: 'onnx'"),
        (["--format", "gguf", "--type", "q4_0"], "invalid choice: 'q4_0'"),
        (["--format", "gguf", "--dtype", "float32"], "--dtype belongs to --format safetensors and master"),
        (["--format", "master", "--type", "f16"], "--type belongs to --format gguf"),
    ],
)
def test_wrong_options_are_refused(master: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run([str(master), str(tmp_path / "out"), *options])


def test_without_verification_nothing_is_read_back(
    master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet_train.export.readback.Readback.written", lambda *_: pytest.fail("was read back"))
    assert run([str(master), str(tmp_path / "model.gguf"), "--format", "gguf", "--no-verify"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_sizes_of_shards_have_units(master: Path, tmp_path: Path) -> None:
    counts = {}
    for size in ("20KB", "20000", "1GiB"):
        assert run([str(master), str(tmp_path / size), "--format", "safetensors", "--max-shard-size", size]) == 0
        counts[size] = len(list((tmp_path / size).glob("*.safetensors")))
    assert counts["20KB"] == counts["20000"] > counts["1GiB"] == 1


def test_list_says_where_a_model_can_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_master(tmp_path / "master", {"hidden_size": 512, "intermediate_size": 512})
    assert run([str(tmp_path / "master"), "--list"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: text.strip() for name, text in lines.items()}
    assert told["safetensors autobitlinear"].split() == ["yes", "transformers"]
    assert told["gguf i2_s"] == "yes   bitnet.cpp, ik_llama.cpp (by its own llama-quantize to IQ2_BN)"
    assert told["gguf f16"] == "yes   ik_llama.cpp"
    assert told["gguf tq2_0"].startswith("no ")
    assert "computes SiLU without a word" in told["gguf tq2_0"]
    assert len(told) == 9
    assert os.listdir(tmp_path) == ["master"]


@pytest.mark.parametrize(("format", "option"), [("gguf", "--type=f32"), ("safetensors", "--dtype=float32")])
def test_a_full_disk_ends_with_one_line_and_nothing_half_written(
    master: Path, tmp_path: Path, format: str, option: str
) -> None:
    assert run([str(master), str(tmp_path / "out"), "--format", format, "--force"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code = limit + "from bitnet_train.export import main; main()"
    arguments = [str(master), str(tmp_path / "out"), "--format", format, option, "--force"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path / 'out'}: cannot be written: File too large; nothing was changed\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_upload_is_dry_by_default(
    master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Path, str]] = []

    def send(path: Path, card: str, repository: str) -> str:
        sent.append((path, repository))
        return "url"

    monkeypatch.setattr("bitnet_train.export.hub._send", send)
    arguments = [str(master), str(tmp_path / "out"), "--format", "safetensors", "--push-to-hub", "me/model", "--force"]
    assert run(arguments) == 0
    output = capsys.readouterr().out
    assert "would send model.safetensors (0.2 MB)" in output
    assert "nothing was sent to me/model" in output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "README.md:\n" + "".join(f"    {line}\n" for line in card.splitlines()) in output
    assert sent == []
    assert run([*arguments, "--no-dry-run"]) == 0
    assert sent == [(tmp_path / "out", "me/model")]


class Hub:
    """Stands for huggingface_hub.HfApi: `files` are the repository's."""

    files: ClassVar[dict[str, bytes]] = {}

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> str:
        assert private
        return f"https://hub/{repository}"

    def upload_file(self, *, path_or_fileobj: Path | bytes, path_in_repo: str, repo_id: str) -> None:
        content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else path_or_fileobj.read_bytes()
        self.files[path_in_repo] = content


def test_a_gguf_file_is_uploaded_with_its_card(
    master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", Hub)
    arguments = [str(master), str(tmp_path / "model.gguf"), "--format", "gguf", "--push-to-hub", "me/model"]
    assert run([*arguments, "--no-dry-run", "--license", "mit"]) == 0
    assert Hub.files.keys() == {"README.md", "model.gguf"}
    assert Hub.files["model.gguf"] == (tmp_path / "model.gguf").read_bytes()
    assert b"license: mit" in Hub.files["README.md"]
    assert b"-m model.gguf" in Hub.files["README.md"]
    output = capsys.readouterr().out
    assert "sending README.md (0.0 MB)" in output
    assert "sent: https://hub/me/model" in output


def test_verify_accounts_for_everything(
    master: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet_train.export.llama_process.installed", lambda _: False)
    embedding = load_file(master / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(master, "lm_head.weight", embedding.clone())
    edit_config(master, use_cache=True, auto_map={"AutoConfig": "evil.C"}, _name_or_path="/home/alice/base")
    (master / "generation_config.json").write_text('{"temperature": 0.6}')
    (master / "LICENSE").write_text("mit")
    assert run([str(master), str(tmp_path / "m.gguf"), "--format", "gguf", "--verify"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[1:] == [
        f"verified: {LINEARS} matrices, {CODES} codes, 0 differ",
        "tensors: 24 of 25 used; left out: lm_head.weight (the embedding, stored twice)",
        "config.json: 14 of 17 fields used; left out: _name_or_path, auto_map, use_cache",
        "generation_config.json: 2 of 3 fields used; left out: temperature",
        "ik_llama.cpp (IQ2_BN) not run: ik_llama_cpp is not installed",
    ]
    assert told.err == "note: left out: LICENSE\n"
    assert run([str(master), str(tmp_path / "packed"), "--format", "safetensors", "--verify"]) == 0
    told = capsys.readouterr()
    assert "config.json: 16 of 17 fields used; left out: auto_map" in told.out
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["_name_or_path"] == "base"
    assert "auto_map" not in config


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_force_replaces_a_link_and_leaves_what_it_points_at(master: Path, tmp_path: Path, format: str) -> None:
    export(master, tmp_path / "real", format=format)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("none")
    for name in ("link", "nowhere"):
        with pytest.raises(UserError, match="must not exist yet"):
            export(master, tmp_path / name, format=format)
    with pytest.raises(UserError, match="--force replaces only"):
        export(master, tmp_path / "nowhere", format=format, force=True)
    export(master, tmp_path / "link", format=format, force=True)
    assert not (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "master", "nowhere", "real"]


def test_a_licence_is_an_identifier(master: Path, tmp_path: Path) -> None:
    (master / "README.md").write_text('---\nlicense: "mit\\ntags: [evil]"\n---\n')
    with pytest.raises(
        UserError, match=r"the licence must be an identifier .* got 'mit\\ntags: \[evil\]'; give --license"
    ):
        export(master, tmp_path / "out")
    export(master, tmp_path / "out", licence="llama3.1")
    assert "\nlicense: llama3.1\n---\n" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_is_replaced_only_by_force(master: Path, tmp_path: Path) -> None:
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        export(master, tmp_path / target, format=format)
        with pytest.raises(UserError, match="must not exist yet"):
            export(master, tmp_path / target, format=format)
        export(master, tmp_path / target, format=format, force=True)
    assert sorted(os.listdir(tmp_path)) == ["master", "model.gguf", "packed"]


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_force_replaces_nothing_but_an_export(master: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / "letter").write_text("dear")
    for name in ("thesis", "letter"):
        with pytest.raises(UserError, match="--force replaces only"):
            export(master, tmp_path / name, format=format, force=True)
    assert (tmp_path / "thesis" / "chapter").is_file()


def test_force_does_not_replace_the_source_or_what_holds_it(tmp_path: Path) -> None:
    write_master(tmp_path / "run" / "model")
    for target in (tmp_path / "run" / "model", tmp_path / "run", tmp_path):
        with pytest.raises(UserError, match="must not be the model that is exported, or contain it"):
            export(tmp_path / "run", target, force=True)


def test_a_failed_export_leaves_the_earlier_one(master: Path, tmp_path: Path) -> None:
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        export(master, tmp_path / target, format=format)
    written = (tmp_path / "model.gguf").read_bytes(), (tmp_path / "packed" / "model.safetensors").read_bytes()
    edit_tensor(master, "model.layers.1.mlp.up_proj.weight", torch.full((256, 128), torch.nan))
    for target, format in (("packed", "safetensors"), ("model.gguf", "gguf")):
        with pytest.raises(UserError, match=r"up_proj\.weight: every value must be finite, got 32768 that are not"):
            export(master, tmp_path / target, format=format, force=True)
    assert written == ((tmp_path / "model.gguf").read_bytes(), (tmp_path / "packed" / "model.safetensors").read_bytes())
    assert sorted(os.listdir(tmp_path)) == ["master", "model.gguf", "packed"]
