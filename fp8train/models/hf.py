"""Weights of a Hugging Face Llama, Qwen2 or Qwen3 folder, in and out, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp8train.errors import CheckpointError, ConfigError
from fp8train.models.config import ModelConfig
from fp8train.models.decoder import Decoder, build_model
from fp8train.models.hf_config import check_same_architecture, config_from_hf, config_to_hf, read_config_json
from fp8train.models.initialization import fill

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
READABLE = ("BF16", "F16", "F32")  # names in a safetensors header; each is exact in FP32
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # parameters with a row per token id
MAX_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION_CONFIG,
)


class Packing(Protocol):
    """How a folder stores some of its matrices in fewer bytes: codes under the name of each, and scales beside them."""

    @property
    def document(self) -> dict[str, Any]:
        """quantization_config of config.json."""

    @property
    def dtype(self) -> str:
        """Of the codes, as a safetensors header has it."""

    @property
    def suffix(self) -> str:
        """What the name of the scales adds to that of the codes."""

    def packed_bytes(self, name: str, shape: Sequence[int]) -> int | None:
        """Size of a parameter in the files; None where it is written as it is."""

    def pack(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What is written of a parameter, by what is added to its name."""

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the scales of a matrix."""

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The matrix."""


def hf_name(name: str) -> str:
    """Name in a Hugging Face folder of our parameter `name`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_hf(model: Decoder, directory: str | Path, packing: Packing | None = None) -> None:
    """Copy hf_values into the model's FP32 parameters; exact where they are not packed.

    A converted model needs fp8train.weights_changed(model) afterwards.
    """
    fill(model, hf_values(model, directory, packing))


def hf_values(model: Decoder, directory: str | Path, packing: Packing | None = None) -> Iterator[tuple[str, Tensor]]:
    """(path, values on the CPU) of each parameter, from a Hugging Face folder; all is checked before the first.

    Args:
        model: on any device; only shapes are read. Rows that pad its vocabulary come as 0.
        directory: config.json with model.safetensors, or its shards and their index.
        packing: how weights are stored that have scales beside them; None: there are none.

    Raises:
        ConfigError: the folder is of another architecture than model.config, or quantised and packing is None.
        CheckpointError: a file or tensor is missing, unexpected, damaged, quantised or of another shape; the message
            names it.
    """
    directory = Path(directory)
    check_same_architecture(model.config, directory)
    stored = read_config_json(directory).get("quantization_config")
    if stored and packing is None:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
        raise ConfigError(
            f"{directory}: the weights are quantised (quant_method {method!r}); needs BF16, FP16 or FP32 here. Take "
            "the unquantised model, or say how they are packed."
        )
    parameters = {hf_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        files = _open_tensors(directory, stack)
        wanted = {theirs: parameter for theirs, (_, parameter) in parameters.items()}
        scales = _scales(wanted, files, packing)
        _check_tensors(model.config, wanted, files, directory, scales, packing)
        for theirs, (name, parameter) in parameters.items():
            tensor = files[theirs].get_tensor(theirs)
            if packing is not None and theirs in scales:
                tensor = packing.unpack(tensor, files[scales[theirs]].get_tensor(scales[theirs]))
            if name in VOCABULARY and len(tensor) < len(parameter):
                tensor = F.pad(tensor, (0, 0, 0, len(parameter) - len(tensor)))
            yield name, tensor


def save_hf(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    directory: str | Path,
    dtype: str = "bfloat16",
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    eos_token_id: int | None = None,
    packing: Packing | None = None,
    origin: str | Path | None = None,
) -> None:
    """Write a folder that transformers loads: config.json, safetensors (shards if large), tokenizer files.

    The folder appears whole or not at all.

    Args:
        state: as Decoder.state_dict(); a tied lm_head.weight may be left out.
        config: shape of the model.
        directory: must not exist, or be empty.
        dtype: "bfloat16" (rounded to nearest) or "float32", of what is not packed.
        tokenizer_dir: folder whose tokenizer files are copied, or a tokenizer.json; None copies none.
        max_shard_bytes: a file ends before the tensor that would exceed this.
        eos_token_id: of config.json, where the config.json in tokenizer_dir states none.
        packing: of the parameters that it names; None: none.
        origin: folder that the model began as, whose token ids, generation_config.json and initializer_range are taken
            where tokenizer_dir has none.

    Raises:
        ConfigError: another dtype; qkv_bias together with qk_norm, which no family has.
        CheckpointError: the folder is in use, the disk full or read-only; a tensor is missing, unexpected or of another
            shape.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; needs one of {', '.join(DTYPES)}.")
    directory = Path(directory).absolute()
    _check_state(state, config)
    document = _document(config, dtype, _token_ids(tokenizer_dir) or _token_ids(origin), eos_token_id, origin, packing)
    tokenizer_files = _tokenizer_files(tokenizer_dir, origin)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(
            f"{directory}: exists and is not empty; needs a new or empty folder. Choose another, or delete it."
        )
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")  # two processes may be at it
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", document)
        _write_tensors(partial, state, config, DTYPES[dtype], max_shard_bytes, packing)
        for name, source in tokenizer_files.items():
            shutil.copyfile(source, partial / name)
        _sync(partial)
        os.replace(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({error}). Free space or choose another folder; nothing was left there."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Open safetensors file of every tensor in the folder, by tensor name."""
    index = directory / INDEX
    if index.is_file():
        try:
            shards = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: no weight_map can be read ({error!r}); needs the index of a sharded model. Fetch the folder "
                "again."
            ) from error
    else:
        shards = ["model.safetensors"]
    files: dict[str, Any] = {}
    for shard in shards:
        path = directory / shard
        outside = ".." in Path(shard).parts or os.path.isabs(shard)  # the file itself may be a link out of the folder
        if outside or not path.is_file():
            raise CheckpointError(
                f"{path}: is no file of this folder; needs the weights as safetensors. Fetch the folder again, or "
                "convert pytorch_model.bin to safetensors."
            )
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged, cut off or unreadable ({error}). Fetch the file again.") from error
        if twice := files.keys() & file.keys():
            raise CheckpointError(
                f"{path}: has {min(twice)}, as another file has; needs it once. Fetch the folder again."
            )
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _scales(parameters: Mapping[str, Tensor], files: Mapping[str, Any], packing: Packing | None) -> dict[str, str]:
    """Names of the scales, by those of the packed parameters."""
    if packing is None:
        return {}
    return {name: name + packing.suffix for name in parameters if name + packing.suffix in files}


def _check_tensors(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    files: Mapping[str, Any],
    directory: Path,
    scales: Mapping[str, str],
    packing: Packing | None,
) -> None:
    """Raise unless the files hold exactly the parameters, in their shapes and in a readable dtype."""
    missing = [name for name in parameters if name not in files]
    expected = {*parameters, *scales.values()}
    # old folders carry the rotary frequencies, which follow from the config
    unexpected = [name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and "lm_head.weight" in unexpected and not missing:
        unexpected.remove("lm_head.weight")
        if not torch.equal(
            files["lm_head.weight"].get_tensor("lm_head.weight"),
            files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight"),
        ):
            raise CheckpointError(
                f"{directory}: lm_head.weight differs from the embedding although tie_word_embeddings is true. Set "
                "it to false in config.json."
            )
    for what, names in (("lacks", missing), ("has, besides those expected,", unexpected)):
        if names:
            raise CheckpointError(
                f"{directory}: {what} {len(names)} tensors, such as {', '.join(names[:3])}; needs exactly the "
                "weights of its config.json. Fetch the folder again."
            )
    for name, parameter in parameters.items():
        shape = _unpadded_shape(name, parameter, config)
        readable: Sequence[str] = READABLE
        if packing is not None and name in scales:
            readable = (packing.dtype,)
            _check_header(files[scales[name]], scales[name], READABLE, packing.scales_shape(shape), directory)
        _check_header(files[name], name, readable, shape, directory)


def _check_header(file: Any, name: str, readable: Sequence[str], shape: tuple[int, ...], directory: Path) -> None:
    """Raise unless a tensor has one of these dtypes, and this shape."""
    header = file.get_slice(name)
    if header.get_dtype() not in readable:
        raise CheckpointError(
            f"{directory}: {name} is {header.get_dtype()}; needs {' or '.join(readable)}. Take the unquantised model."
        )
    if tuple(header.get_shape()) != shape:
        raise CheckpointError(
            f"{directory}: {name} has shape {list(header.get_shape())}; its config.json needs {list(shape)}. "
            "Fetch the folder again."
        )


def _unpadded_shape(name: str, parameter: Tensor, config: ModelConfig) -> tuple[int, ...]:
    if name.removeprefix("model.") in VOCABULARY:
        return (config.vocab_size, *parameter.shape[1:])
    return tuple(parameter.shape)


def _check_state(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise unless the state holds exactly the parameters of a model of this config."""
    wanted = build_model(config, "meta").state_dict()
    optional = {"lm_head.weight"} if config.tie_embeddings else set()
    missing = [name for name in wanted if name not in state and name not in optional]
    unexpected = [name for name in state if name not in wanted]
    for what, names in (("lacks", missing), ("has, besides those expected,", unexpected)):
        if names:
            raise CheckpointError(
                f"weights of model {config.name}: the state {what} {len(names)} tensors, such as "
                f"{', '.join(names[:3])}; needs Decoder.state_dict()."
            )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"weights of model {config.name}: {name} has shape {list(tensor.shape)}; the config needs "
                f"{list(wanted[name].shape)}."
            )


def _write_tensors(
    directory: Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    max_shard_bytes: int,
    packing: Packing | None,
) -> None:
    names = [name for name in state if not (config.tie_embeddings and name == "lm_head.weight")]
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name in names:
        packed = None if packing is None else packing.packed_bytes(name, state[name].shape)
        size = dtype.itemsize * state[name].numel() if packed is None else packed
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in shard:
            rows = config.vocab_size if name in VOCABULARY else state[name].shape[0]
            weight = state[name].detach()[:rows].cpu()
            if packing is not None and packing.packed_bytes(name, weight.shape) is not None:
                tensors |= {hf_name(name) + added: part for added, part in packing.pack(name, weight).items()}
            else:
                tensors[hf_name(name)] = weight.to(dtype).contiguous()
        (directory / file).touch()
        permissions = (directory / file).stat().st_mode  # those of any new file; safetensors makes it its owner's alone
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(permissions)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        _write_json(
            directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        )


def _document(
    config: ModelConfig,
    dtype: str,
    token_ids: Mapping[str, Any],
    eos_token_id: int | None,
    origin: str | Path | None,
    packing: Packing | None,
) -> dict[str, Any]:
    """config.json of what save_hf writes."""
    ids = dict(token_ids)
    if ids.get("eos_token_id") is None:
        ids["eos_token_id"] = eos_token_id
    document = config_to_hf(config, dtype, ids)
    if origin is not None:
        document["initializer_range"] = config_from_hf(origin).init_std
    return document if packing is None else document | {"quantization_config": packing.document}


def _token_ids(tokenizer_dir: str | Path | None) -> dict[str, Any]:
    """Special token ids that the tokenizer's own model folder states."""
    if tokenizer_dir is None or not (Path(tokenizer_dir) / "config.json").is_file():
        return {}
    document = read_config_json(tokenizer_dir)
    return {name: document.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _tokenizer_files(source: str | Path | None, origin: str | Path | None) -> dict[str, Path]:
    """Files to copy, by the name they get."""
    generation = {} if origin is None else {GENERATION_CONFIG: Path(origin) / GENERATION_CONFIG}
    found = {name: path for name, path in generation.items() if path.is_file()}
    if source is None:
        return found
    source = Path(source)
    if source.is_file():
        return found | {"tokenizer.json": source}
    own = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    if not own:
        raise CheckpointError(
            f"{source}: holds no tokenizer; needs tokenizer.json or the files of a Hugging Face tokenizer. Correct "
            "the path."
        )
    return found | own


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Make the files of a folder, and the folder itself, durable before it is renamed into place."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
