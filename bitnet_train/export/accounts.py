"""The fate of all that a source holds: used or left out, line by line, and notes for the user."""

from collections.abc import Sequence
from dataclasses import asdict

from bitnet_train.errors import UserError
from bitnet_train.export.source import Source
from bitnet_train.export.targets import Target
from bitnet_train.formats.gguf_tokenizer import GGUFTokenizer
from bitnet_train.formats.hf_folder import CONFIG, GENERATION_CONFIG
from bitnet_train.formats.tokenizer_files import CHAT_TEMPLATE, MORE_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG

_DESCRIBING = ("architectures", "model_type", "quantization_config", "torch_dtype", "dtype", "transformers_version")
_HOW = ("quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm")
_GENERAL = ("architecture", "name", "license", "file_type", "quantization_version", "alignment")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_TRAINING = ("initializer_range", "attention_dropout")  # of the configuration, and nothing that a runtime computes
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def notes(model: Source, target: Target, rounds: bool, zeros: Sequence[str]) -> tuple[str, ...]:
    """Notes for the user although nothing is wrong.

    Args:
        model: the source.
        target: what it was exported to.
        rounds: masters were rounded to a narrower type.
        zeros: the matrices that are all zero.
    """
    told = []
    if target.format == "gguf" and not model.tokenizer.begins_with_bos and model.tokenizer.bos_id is not None:
        told.append("runtimes put no BOS in front of a text, as the chat template writes none (add_bos_token is false)")
    if rounds:
        told.append(
            "masters rounded to bfloat16 quantise to other codes here and there; --dtype float32 keeps every code"
        )
    if zeros:
        told.append(f"{len(zeros)} matrices are all zero: {', '.join(sorted(zeros))}")
    files = model.tokenizer.files()
    unread = [name for name, state in files.items() if state == "copied unread"]
    if unread and target.format != "gguf":
        told.append(f"there is no tokenizer.json; {', '.join(unread)} was copied unread")
    if not files and not model.tokenizer.generation_ids() and target.format != "gguf":
        told.append("the model has no tokenizer; --tokenizer DIR adds one")
    if files and not unread and target.format != "gguf":
        try:
            _ = model.trained_tokenizer
        except UserError as error:
            told.append(f"the tokenizer was copied as it is: {error}")
    if left := [*_files_left_out(model, target), *_templates_left_out(model, target)]:
        told.append(f"left out: {', '.join(left)}")
    return tuple(told)


def _templates_left_out(model: Source, target: Target) -> list[str]:
    """GGUF has one chat template."""
    if target.format != "gguf" or isinstance(model.tokenizer, GGUFTokenizer):
        return []
    return [f"chat template {name}" for name in model.trained_tokenizer.chat_templates if name != "default"]


def _files_left_out(model: Source, target: Target) -> list[str]:
    """Files of the source's folder that are in no part of the export."""
    if not model.path.is_dir() or not (model.path / CONFIG).is_file():
        return []
    used = {CONFIG, GENERATION_CONFIG, "README.md"}
    if target.format != "gguf":
        used |= {name.split("/")[0] for name in model.tokenizer.files()}
    else:
        used |= {TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, MORE_TEMPLATES, "special_tokens_map.json"}
    weights = (".safetensors", ".safetensors.index.json")
    names = sorted(entry.name for entry in model.path.iterdir() if not entry.name.startswith("."))
    return [name for name in names if name not in used and not name.endswith(weights)]


def accounts(model: Source, target: Target) -> tuple[str, ...]:
    """The fate of every tensor, field and key of the source, a line for each file."""
    count = len(model.shapes_found) - len(model.tensors_left_out)
    left = [f"{name} ({reason})" for name, reason in model.tensors_left_out.items()]
    tensors = f"tensors: {count} of {len(model.shapes_found)} used" + (f"; left out: {', '.join(left)}" if left else "")
    return tensors, *_fields(model, target), *_keys(model, target)


def _keys(model: Source, target: Target) -> list[str]:
    """Those of a GGUF file beside the ones that config.json came of."""
    if not isinstance(model.tokenizer, GGUFTokenizer):
        return []
    metadata = model.tokenizer.metadata
    known = {f"general.{key}" for key in _GENERAL}
    unused = [key for key in metadata if key.startswith("general.") and key not in known]
    unused += model.tokenizer.unread_keys() if target.format != "gguf" else []
    told = f"; left out: {', '.join(unused)}" if unused else ""
    return [f"keys: {len(metadata) - len(unused)} of {len(metadata)} used{told}"]


def _fields(model: Source, target: Target) -> list[str]:
    """GGUF has keys for what decides about the function; a folder has every field, but what names code to run."""
    lines = []
    files = {CONFIG: model.config_json, GENERATION_CONFIG: model.generation_config}
    for name, content in files.items():
        unused = sorted(key for key in content if not _is_used(key, name, model, target))
        unused += [f"quantization_config.{key}" for key in content.get("quantization_config", {}) if key not in _HOW]
        told = f"; left out: {', '.join(unused)}" if unused else ""
        used = sum(_is_used(key, name, model, target) for key in content)
        lines.append(f"{name}: {used} of {len(content)} fields used{told}")
    return lines


def _is_used(key: str, file: str, model: Source, target: Target) -> bool:
    if target.format != "gguf":
        return key != "auto_map"
    if file == GENERATION_CONFIG:
        return key in _IDS
    computed = {*asdict(model.config)} - {*_TRAINING}
    return key in computed or key in (*_DESCRIBING, *_ROPE, *_IDS)
