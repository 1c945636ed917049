"""Checkpoints of SAN: the authors' files and our own, with the configuration read off the tensors.

A .safetensors file keeps the configuration as JSON in its metadata, a .pt or .pth file in the metadata that a state
dict carries into ``torch.save``. Either way the rest is the plain state dict that the authors' code reads.
"""

import inspect
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .model import RGB_MEAN, SAN

# Where training programs keep the weights, the preferred first.
_WRAPPERS = ("params_ema", "ema", "params", "state_dict", "model")
# Of DistributedDataParallel and AveragedModel, and of torch.compile.
_PREFIXES = re.compile(r"(module\.|_orig_mod\.)+")
# What the configuration is read from: names and numbers of dimensions.
_ANCHORS = {"head.0.weight": 4, "RG.0.conv_last.weight": 4, "tail.0.0.weight": 4, "add_mean.bias": 1}


def save(model: SAN, path: str | os.PathLike[str]) -> None:
    """See :meth:`SAN.save`."""
    path = _known(path)
    if path.suffix == ".safetensors":
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with replacing(path) as unfinished:  # safetensors' own file would be readable by its owner alone
            unfinished.write_bytes(serialize(state, {"format": "pt", "config": json.dumps(model.config)}))
    else:
        torch.save(model.state_dict(), path)


def load(path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> SAN:
    """See :meth:`SAN.from_checkpoint`."""
    state, stored = _read(_known(path))
    lacking = [name for name, rank in _ANCHORS.items() if name not in state or state[name].dim() != rank]
    if lacking:
        raise ValueError(f"{path}: no checkpoint of SAN, for it lacks {_listed(lacking)}")
    found = infer_config(state)
    for name, value in found.items():
        said = stored.get(name, value)
        # By repr, for neither True nor 1.0 is a 1. Of white the tensors tell only the nearest usual value.
        if repr(said) != repr(value) and name != "rgb_range":
            raise ValueError(f"{path}: {name}: {value!r} by the tensors, but {said!r} by the configuration")
    config = {**found, **stored, **overrides}
    try:
        model = SAN(**config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = model.state_dict()
    if overrides.get("scale", found["scale"]) != found["scale"]:
        warnings.warn(f"{path} is for scale {found['scale']}: the upsampler for {config['scale']} is new", stacklevel=3)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("tail.0.")}
        state |= {name: tensor for name, tensor in own.items() if name.startswith("tail.0.")}
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape},
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault} {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{path}: the keys do not fit SAN({config}): {listed}")
    model.load_state_dict(state)
    return model


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that show in the shapes of a state dict, and in its mean shift."""
    n_feats = state["head.0.weight"].shape[0]
    steps = _count(state, r"tail\.0\.(\d+)\.weight")
    config = {
        "scale": 3 if state["tail.0.0.weight"].shape[0] == 9 * n_feats else 2**steps,
        "n_resgroups": _count(state, r"RG\.(\d+)\."),
        "n_resblocks": _count(state, r"RG\.0\.rcab\.(\d+)\."),
        "n_feats": n_feats,
        "rgb_range": _rgb_range(state["add_mean.bias"]),
    }
    gate = state.get("RG.0.soca.conv_du.0.weight")
    if gate is None:
        return config | {"variant": "ssc" if "gamma" in state else "base"}
    return config | {"reduction": n_feats // max(gate.shape[:1].numel(), 1)}


def _rgb_range(bias: Tensor) -> float:
    """The value of white. Training with the authors' code moves the bias a little: so the nearest usual value."""
    value = bias.double().sum().item() / sum(RGB_MEAN)
    return next((usual for usual in (1, 255) if math.isclose(value, usual, rel_tol=0.1)), value)


def _count(state: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where a key matches."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _known(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"path: expected a .pt, .pth or .safetensors file, got {str(path)!r}")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a file under the authors' keys, and the configuration kept beside it, {} for none."""
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                configs = [json.loads((file.metadata() or {}).get("config", "{}"))]
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
            metadata = getattr(state, "_metadata", {}).values()
            configs = [entry["config"] for entry in metadata if "config" in entry] + [content.get("config")]
    except Exception as error:  # any of a dozen types, depending on what is wrong with the file
        raise ValueError(f"{path}: cannot be read as a checkpoint: {error}") from error
    # A program's own "config" is something else: ours has no other names than the constructor.
    known = inspect.signature(SAN).parameters.keys()
    stored = next((config for config in configs if isinstance(config, Mapping) and config.keys() <= known), {})
    tensors = {_PREFIXES.sub("", str(name), 1): tensor for name, tensor in state.items() if name != "n_averaged"}
    other = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if other:
        raise ValueError(f"{path}: expected a state dict, but these entries are no tensors: {_listed(other)}")
    return tensors, dict(stored)


def _listed(names: Iterable[str], most: int = 10) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``: it takes the name only once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each writer; of the path's only the suffix, by which writers choose the format.
    unfinished = path.with_name(f".unfinished-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # what an error has left
