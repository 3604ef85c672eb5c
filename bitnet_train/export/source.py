"""What is exported: the tensors of a model folder, master or packed, checked against the model in its config.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bitnet_train.errors import UserError
from bitnet_train.formats.hf_folder import CONFIG, HFFolder, Kind, folder_kind
from bitnet_train.formats.packing import packed_shape, unpack_ternary
from bitnet_train.formats.tokenizer_files import TokenizerFiles
from bitnet_train.model.bitlinear import BitLinear
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.quant import TernaryWeight, quantize_weight


class Weights(Protocol):
    """The tensors of a model, by the names that transformers has for them."""

    def ternary(self, name: str) -> TernaryWeight:
        """Codes `(out, in)` of a matrix, and its scale in the dtype in which it is stored."""

    def dense(self, name: str) -> Tensor:
        """Any other tensor, in its stored dtype."""


@contextmanager
def located(path: Path, name: str) -> Iterator[None]:
    """Puts file and tensor in front of a ValueError of the formats, which know neither."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {name}: {error}") from None


@dataclass(frozen=True)
class ModelFolder:
    """The `Weights` of an HF folder of kind "master" or "packed"."""

    folder: HFFolder
    kind: Kind

    @classmethod
    def open(cls, source: Path) -> "ModelFolder":
        """Opens a run directory or an HF folder.

        Raises:
            UserError: it holds no BitNet model, or a tensor is missing, unknown or of the wrong shape.
        """
        path = source / "model" if (source / "model" / CONFIG).is_file() else source
        kind = folder_kind(path)
        if kind == "none":
            raise UserError(
                f"{source}: must be a finished run's directory or a model folder, has no {CONFIG} or model/{CONFIG}"
            )
        model = cls(HFFolder(path), kind)
        model._check()
        return model

    @property
    def path(self) -> Path:
        """The folder with config.json."""
        return self.folder.path

    @cached_property
    def config(self) -> BitNetConfig:
        """The model that config.json describes."""
        try:
            return BitNetConfig.from_json(self.folder.config)
        except TypeError as error:
            raise UserError(f"{self.path / CONFIG}: a field has the wrong type ({error}); write it again") from None

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer beside the weights."""
        return TokenizerFiles(self.path, {**asdict(self.config), **self.folder.config})

    @cached_property
    def _skeleton(self) -> BitNetForCausalLM:
        with torch.device("meta"):
            return BitNetForCausalLM(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model, codes unpacked."""
        return {name: tuple(tensor.shape) for name, tensor in self._skeleton.state_dict().items()}

    @cached_property
    def ternary_names(self) -> list[str]:
        """The weights that are ternary: one of each BitLinear."""
        modules = self._skeleton.named_modules()
        return [f"{name}.weight" for name, module in modules if isinstance(module, BitLinear)]

    def ternary(self, name: str) -> TernaryWeight:
        """Codes and scale: of a master quantised now, in float32; of a packed folder as stored."""
        if self.kind == "master":
            return quantize_weight(self.dense(name))
        with located(self.path, name):
            return TernaryWeight(unpack_ternary(self.folder.load(name)), self.dense(f"{name}_scale").reshape(()))

    def dense(self, name: str) -> Tensor:
        """A float tensor as stored.

        Raises:
            UserError: a value is NaN or infinite.
        """
        tensor = self.folder.load(name)
        if not torch.stack(tensor.aminmax()).isfinite().all():
            bad = int(tensor.isfinite().logical_not().sum())
            raise UserError(
                f"{self.path}: {name}: every value must be finite, got {bad} that are not; give an older model"
            )
        return tensor

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.kind == "master":
            return self.shapes
        stored = dict(self.shapes)
        for name in self.ternary_names:
            with located(self.path, name):
                stored |= {name: packed_shape(self.shapes[name]), f"{name}_scale": (1,)}
        return stored

    def _check(self) -> None:
        config = self.config  # first, so that another architecture is called by its name
        if self.kind == "dense":
            raise UserError(
                f"{self.path / CONFIG}: quantization_config must be there, got none: a dense model has no codes"
            )
        expected, found = self._stored_shapes(), set(self.folder.files)
        if config.tie_word_embeddings:
            found.discard("lm_head.weight")  # some writers store the shared matrix twice
        for problem, names in {"missing": expected.keys() - found, "unknown": found - expected.keys()}.items():
            if names:
                raise UserError(
                    f"{self.path}: the tensors must be those of the model in {CONFIG}, got {len(names)} {problem}, "
                    f"such as {min(names)}; copy the folder again"
                )
        for name, shape in expected.items():
            if self.folder.shape(name) != shape:
                found_shape = self.folder.shape(name)
                raise UserError(
                    f"{self.path}: {name}: shape must be {shape} by {CONFIG}, got {found_shape}; mend either"
                )
