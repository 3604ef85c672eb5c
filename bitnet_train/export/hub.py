"""Upload to the Hugging Face hub, dry by default: what is public by mistake cannot be taken back."""

import re
from pathlib import Path

from bitnet_train.errors import UserError, printable


def check_repository(repository: str) -> None:
    """Refuses a name that is not user/name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise UserError(f"--push-to-hub must be user/name, got {repository!r}")


def push(path: Path, card: str, repository: str, *, dry_run: bool) -> None:
    """Prints what an upload of a folder or GGUF file would send, the card in full, or sends it.

    Args:
        path: the export.
        card: its model card, README.md, which goes with a file; a folder holds it.
        repository: user/name; made, private, if it does not exist.
        dry_run: sends nothing.

    Raises:
        UserError: no huggingface-hub, or the hub refused (not logged in, no network).
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    sizes = {"README.md": len(card.encode())} | {str(file.relative_to(root)): file.stat().st_size for file in files}
    for name, size in sizes.items():
        print(printable(f"{'would send' if dry_run else 'sending'} {name} ({size / 1e6:.1f} MB)"))
    if dry_run:
        print("README.md:", *map(printable, card.splitlines()), sep="\n    ")
        print(f"nothing was sent to {repository}: this was a dry run, --no-dry-run sends it")
    else:
        print(f"sent: {_send(path, card, repository)}")


def _send(path: Path, card: str, repository: str) -> str:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push-to-hub needs huggingface-hub: pip install 'bitnet-train[hf]'") from None
    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=True, exist_ok=True))
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=path)
        else:
            contents: dict[str, bytes | Path] = {"README.md": card.encode(), path.name: path}
            for name, content in contents.items():
                api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repository)
    except Exception as error:  # of several libraries below the hub's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--push-to-hub {repository}: the hub did not take it: {reason}; is `hf auth login` done?"
        ) from error
    return url
