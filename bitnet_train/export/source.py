"""What is exported: a stored model of any kind, checked against its configuration before anything is written.

a run directory                        its result, model/
a checkpoint of a run (step-000100)    the masters of that step
an HF folder                           masters, or packed codes of either class; --quantize takes a dense one
a GGUF file                            codes and scales, and the tokenizer
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from bitnet_train.data.template import renewed
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.export.checkpoint import CheckpointWeights
from bitnet_train.export.tokenization import prove_keys
from bitnet_train.formats.gguf_file import GGUFFile, is_gguf
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.hf_folder import CONFIG, GENERATION_CONFIG, HFFolder, folder_kind, quantization_config
from bitnet_train.formats.json_file import read_json, write_json
from bitnet_train.formats.link import followed
from bitnet_train.formats.model_card import licence_of
from bitnet_train.formats.packing import packed_shape
from bitnet_train.formats.private_paths import without_paths
from bitnet_train.formats.recognise import what_it_is
from bitnet_train.formats.schemas import GenerationConfig
from bitnet_train.formats.state_file import STATE
from bitnet_train.formats.tokenizer_files import Roles, TokenizerFiles
from bitnet_train.model.accounting import check_modules, check_sizes, expendable, left_out
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.skeleton import skeleton, tensor_shapes, ternary_names
from bitnet_train.model.weights import FolderWeights, GGUFWeights, Weights, gguf_config, gguf_shapes, located


class SourceTokenizer(Protocol):
    """What an export takes from a tokenizer, whether files or the keys of a GGUF file hold it."""

    @property
    def bos_id(self) -> int | None:
        """The id in front of every text, if there is one."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    @property
    def begins_with_bos(self) -> bool:
        """Whether runtimes put BOS in front of a text."""

    def files(self) -> dict[str, str]:
        """The files of the source that `write` takes, and the state in which they go."""

    def check(self) -> None:
        """Raises UserError where the formats cannot hold this tokenizer."""

    def generation_ids(self) -> dict[str, int | list[int]]:
        """The special ids of generation_config.json."""

    def gguf_metadata(self, roles: Roles | None = None) -> dict[str, object]:
        """The tokenizer as keys of a GGUF file."""

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's files into an HF folder."""


@dataclass(frozen=True)
class Source:
    """A stored model, open for export.

    Attributes:
        path: the folder, checkpoint or file that holds it.
        kind: "master": float weights; "ternary": codes and scales.
        config: the model that config.json describes.
        config_json: config.json, as it is or as it would be.
        shapes_found: the shapes of the stored tensors, by the names that transformers has for them.
        name: what to call the model.
        run_dir: the directory of the run that made it, where that is known.
        licence: its SPDX identifier, where that is known.
        tensors_left_out: stored tensors that are not needed, and why.
        own_tokenizer: the tokenizer is the one that was stored with it.
    """

    path: Path
    kind: Literal["master", "ternary"]
    config: BitNetConfig
    config_json: Mapping[str, Any]
    weights: Weights
    tokenizer: SourceTokenizer
    shapes_found: Mapping[str, tuple[int, ...]]
    name: str
    run_dir: Path | None = None
    licence: str | None = None
    tensors_left_out: Mapping[str, str] = field(default_factory=dict)
    own_tokenizer: bool = True

    @cached_property
    def _skeleton(self) -> BitNetForCausalLM:
        return skeleton(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model, codes unpacked."""
        return tensor_shapes(self._skeleton)

    @cached_property
    def ternary_names(self) -> dict[str, None]:
        """The weights that are ternary, one of each BitLinear, as an ordered set."""
        return ternary_names(self._skeleton)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, with every id at which our generation ends."""
        config = self._generation_config
        if self.tokenizer.eos_id is None:
            return config
        try:
            more = self.trained_tokenizer.stop_token_ids
        except UserError:  # there is none, or a note tells why it cannot be read
            return config
        given = config.get("eos_token_id")
        stops = given if isinstance(given, list) else [given]
        return config | {"eos_token_id": list(dict.fromkeys(id_ for id_ in (*stops, *more) if id_ is not None))}

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        """As it is stored, with the ids of the tokenizer."""
        path = self.path / GENERATION_CONFIG
        stored = without_paths(read_json(path, GenerationConfig) if path.is_file() else {})
        if not self.own_tokenizer:
            stored = {key: value for key, value in stored.items() if not key.endswith("_token_id")}
        return stored | self.tokenizer.generation_ids()

    @cached_property
    def trained_tokenizer(self) -> Tokenizer:
        """The tokenizer as training has it.

        Raises:
            UserError: the model has none.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.write(Path(folder))
            write_json(Path(folder) / GENERATION_CONFIG, self._generation_config)
            try:
                return Tokenizer.from_folder(folder)
            except UserError as error:
                message = str(error).replace(f"{folder}", str(self.path))
                raise UserError(message) from None

    @cached_property
    def gguf_tokenizer(self) -> dict[str, object]:
        """The `tokenizer.*` keys of a GGUF file, which say the same tokenizer: `prove_keys`.

        Raises:
            UserError: GGUF cannot say it.
        """
        if not isinstance(self.tokenizer, TokenizerFiles):
            return self.tokenizer.gguf_metadata()
        _ = self.tokenizer.gguf_metadata()  # first, for what it refuses
        trained = self.trained_tokenizer
        keys = self.tokenizer.gguf_metadata(Roles(trained.bos_token_id, trained.stop_token_ids))
        prove_keys(trained, GGUFTokenizer(self.path, keys), self.tokenizer.path)
        return keys

    def check(self) -> None:
        """Refuses tensors that are missing, unknown or of another shape, and a tokenizer that does not fit."""
        expected = self._expected_shapes()
        found = {name: shape for name, shape in self.shapes_found.items() if name not in self.tensors_left_out}
        for problem, names in {"missing": expected.keys() - found, "unknown": found.keys() - expected}.items():
            if names:
                raise UserError(
                    f"{self.path}: the tensors must be those of the model in {CONFIG}, got {len(names)} {problem}, "
                    f"such as {min(names)}; copy the folder again"
                )
        for name, shape in expected.items():
            if found[name] != shape:
                raise UserError(
                    f"{self.path}: {name}: shape must be {shape} by {CONFIG}, got {found[name]}; mend either"
                )
        self.tokenizer.check()

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.kind == "master" or not isinstance(self.weights, FolderWeights):
            return self.shapes
        stored = dict(self.shapes)
        for name in self.ternary_names:
            with located(self.path, name):
                stored |= {name: packed_shape(self.shapes[name]), f"{name}_scale": (1,)}
        return stored


def open_source(path: Path, *, quantize: bool = False, tokenizer: Path | None = None) -> Source:
    """Opens a stored model; see the module's text.

    Args:
        path: where it is.
        quantize: takes a dense folder's weights for masters.
        tokenizer: a folder with tokenizer.json, in place of the model's own.

    Raises:
        UserError: there is no BitNet model, or its parts do not fit together.
    """
    checkpoint = followed(path)  # of checkpoints/last
    if checkpoint.is_file():
        if not is_gguf(path):
            raise UserError(
                f"{path}: must be a finished run's directory, a model folder, a checkpoint or a GGUF file: "
                f"{what_it_is(path)}"
            )
        source = _gguf(path)
    elif (checkpoint / STATE).is_file():
        source = _checkpoint(checkpoint)
    else:
        source = _folder(path, quantize)
    if tokenizer is not None:
        source = _with_tokenizer(source, tokenizer)
    source.check()
    return source


def _folder(source: Path, quantize: bool) -> Source:
    path = source / "model" if (source / "model" / CONFIG).is_file() else source
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{source}: must be a finished run's directory, a model folder, a checkpoint or a GGUF file, has no "
            f"{CONFIG} or model/{CONFIG}: {what_it_is(source)}"
        )
    folder = HFFolder(path)
    online = {"quantization_config": quantization_config("autobitlinear", "online")}
    # first, so that another architecture is called by its name
    config = BitNetConfig.from_json({**folder.config, **online}, path / CONFIG)
    kind = folder_kind(path)
    if kind == "dense" and not quantize:
        raise UserError(
            f"{path / CONFIG}: quantization_config must be there, got none: a dense model has no codes; --quantize "
            "takes its weights for masters"
        )
    config_json = folder.config | (online if kind == "dense" else {})
    check_sizes(path, config, folder.shapes)
    check_modules(path / CONFIG, folder.config.get("quantization_config"), config)
    tokenizer = TokenizerFiles(path, {**config_json, **asdict(config)}, renewed)
    weights = FolderWeights(folder, kind)
    run_dir = path.resolve().parent if path.name == "model" else None
    return Source(
        path,
        "ternary" if kind == "packed" else "master",
        config,
        config_json,
        weights,
        tokenizer,
        folder.shapes,
        name=(run_dir or path.resolve()).name,
        run_dir=run_dir,
        licence=licence_of(path),
        tensors_left_out=_left_out(folder, config),
    )


def _left_out(folder: HFFolder, config: BitNetConfig) -> dict[str, str]:
    """Stored tensors that are not needed. One that has no place at all is told by `Source.check`."""
    outline = tensor_shapes(skeleton(config))
    needed = [name for name in folder.tensors if name in outline or not expendable(name, config)]
    return left_out(folder, needed, config)


def _gguf(path: Path) -> Source:
    file = GGUFFile(path)
    config_json, shapes = gguf_config(file), gguf_shapes(file)
    config = BitNetConfig.from_json(config_json, path)
    check_sizes(path, config, shapes)
    tokenizer = GGUFTokenizer(path, file.metadata, renewed)
    name = str(file.metadata.get("general.name", path.stem))
    found = file.metadata.get("general.license")
    licence = found if isinstance(found, str) else None
    weights = GGUFWeights(file)
    return Source(path, "ternary", config, config_json, weights, tokenizer, shapes, name, licence=licence)


def _checkpoint(path: Path) -> Source:
    weights = CheckpointWeights(path)
    config_json = weights.config
    config = BitNetConfig.from_json(config_json, path / STATE)
    check_sizes(path, config, weights.shapes)
    run_dir = path.parent.parent
    tokenizer = TokenizerFiles(run_dir / "model", {"vocab_size": config.vocab_size}, renewed)
    return Source(path, "master", config, config_json, weights, tokenizer, weights.shapes, run_dir.name, run_dir)


def _with_tokenizer(source: Source, folder: Path) -> Source:
    """The same model with another tokenizer, whose ids replace those of config.json."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {folder}: must be a folder with tokenizer.json, has none")
    config_json = {key: value for key, value in source.config_json.items() if not key.endswith("_token_id")}
    files = TokenizerFiles(folder, asdict(source.config), renewed)
    return replace(source, config_json=config_json, tokenizer=files, own_tokenizer=False)
