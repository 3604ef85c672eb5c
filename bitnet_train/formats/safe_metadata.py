"""The `.metadata` of a sharded checkpoint (torch.distributed.checkpoint), read without running what is in it.

The file is a pickle, and torch 2.13 reads it with a bare pickle.load, also where weights_only is forced. Here a name in
the pickle is looked up only if it is one of the few that the format needs: its own dataclasses, torch.Size, dtypes,
layouts and paths. None of them does more than hold its arguments.

What is no tensor is stored as a pickle of its own, which the planner loads with weights_only=False. There is no need
for any: a checkpoint that holds one is refused, and so is a file name that leads out of the folder.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from bitnet_train.errors import UserError

METADATA = ".metadata"
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The few classes of the format, and the dtypes."""
        if name in _NAMES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def load_metadata(path: Path) -> Metadata:
    """The metadata of a sharded checkpoint.

    Args:
        path: the checkpoint's folder.

    Raises:
        UserError: the file is missing or damaged, asks for anything that could run code, or names files elsewhere.
    """
    file = Path(path) / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; give a sharded checkpoint") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file}: is not read: {error}; take a checkpoint that you trust") from None
    return _checked(file, metadata)


def _checked(file: Path, metadata: object) -> Metadata:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{file}: must hold the metadata of a checkpoint, got {type(metadata).__name__}; take another")
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            raise UserError(f"{file}: {name} is a pickle, only tensors are read; take a checkpoint that you trust")
    for info in metadata.storage_data.values():
        path = str(getattr(info, "relative_path", ""))
        if not path or Path(path).name != path:
            raise UserError(f"{file}: names {path!r}, which is not in the folder; take a checkpoint that you trust")
    return metadata


class SafeReader(FileSystemReader):
    """torch's reader of sharded checkpoints in a folder, with `load_metadata` in place of its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `load_metadata` returns, marked with the id of this load as torch does."""
        metadata = load_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
