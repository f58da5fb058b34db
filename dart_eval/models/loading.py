"""Find, identify and load a model: the demo alias, a local folder, a GGUF file or a hub id."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import datasets
import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import extract_commit_hash

from dart_eval.layers import experts
from dart_eval.layers.quantised import method_of, quantisation_of
from dart_eval.models import adapters, demo_model
from dart_eval.models.spec import ModelSpec
from dart_eval.util.errors import UserError, nearest, out_of_memory
from dart_eval.util.files import check_name, feed, reason
from dart_eval.util.quiet import muted
from dart_eval.weights import checkpoint, gguf, stored
from dart_eval.weights.checkpoint import model_file

if TYPE_CHECKING:  # their modules take seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # files of a configuration and a tokenizer
WEIGHTS = (".safetensors", ".bin")
HUB_TIMEOUT = 5.0  # seconds
UNREACHABLE = re.compile(  # words of libraries' errors
    r"connect to |connection (error|reset|refused)|your (internet )?connection|offline mode|outgoing traffic",
    re.IGNORECASE,
)
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


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
        loaded: the model was passed in memory, and `weights` is a hash of its parameters.
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
            UserError: it cannot be loaded, or its weights or its tokenizer do not fit it, or the device cannot hold it.
        """
        spec, name = self.spec, self.identity.name
        attention = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
        tokenizer = self.load_tokenizer()
        with explaining(name), muted():
            model, notes = checkpoint.load_whole(
                _loader(self.config),
                name,
                self.source,
                dtype=getattr(torch, self.dtype),
                device_map=spec.device_map,
                revision=self.identity.revision or "main",
                trust_remote_code=spec.trust_remote_code,
                **attention,
                **stored.options(self.config, spec.load_in),
            )
            stored.expand(model)
            if self.adapter is not None:
                revision = self.identity.revision if self.adapter == self.source else None  # another's: the newest
                model = adapters.merge(model, self.adapter, revision)
                notes.append(f"model {name}: the adapter of {self.adapter} is merged into its weights")
            if not spec.device_map:
                model.to(choose_device(spec.device))  # type: ignore[arg-type]
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype != self.dtype:  # a quantised model may force another
            raise UserError(f"model {name} was loaded in {dtype}, not in {self.dtype}", f"give --dtype {dtype}")
        checkpoint.check_tokenizer(name, model, tokenizer)
        for text in [*notes, *self._record_bits(model)]:
            note(text)
        if any(p.is_meta for p in model.parameters()):  # pruning reads weights in place
            raise UserError(
                f"the model does not fit: --device-map {spec.device_map} leaves weights on the CPU or disk",
                "give more GPUs (--gpus-per-cell on Ray) or a smaller --dtype",
            )
        return model.eval(), tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer alone.

        Raises:
            UserError: it cannot be loaded.
        """
        other, trust = self.spec.tokenizer, self.spec.trust_remote_code
        revision = "main" if other else self.identity.revision or "main"
        with explaining(other or self.identity.name):
            return AutoTokenizer.from_pretrained(other or self.source, revision=revision, trust_remote_code=trust)

    def outline(self) -> PreTrainedModel:
        """Return the model without weights: its modules with their sizes, and their bits in the checkpoint.

        Raises:
            UserError: no model can be built from its configuration, or its files are damaged.
        """
        with explaining(self.identity.name):
            with torch.device("meta"):
                trust = self.spec.trust_remote_code
                model = _loader(self.config).from_config(self.config, trust_remote_code=trust)
            self._record_bits(model)
        return model

    def _record_bits(self, model: PreTrainedModel) -> list[str]:
        """Record the bits of the model's FFN weights. Return notes for the user."""
        return [*gguf.record_bits(self.source, model), *stored.record_bits(self.config, model)]


def _loader(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Return the class that loads a language model, or one for images and text if there is no other."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM  # also for a model that brings its own code
    return AutoModelForImageTextToText


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is cuda, else mps, else cpu.

    Raises:
        UserError: no such device.
    """
    apple = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if apple else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "auto, cpu, cuda, cuda:1, mps") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count or (device.type == "mps" and not apple):
        raise UserError(f"device {name} is not there", "choose another --device")
    return device


def resolve(spec: ModelSpec) -> Resolved:
    """Find a model and its identity, without loading it.

    Raises:
        UserError: no model, a folder without weights, a hub that is unreachable or lacks the model, an unknown dtype,
            or a model with code of its own.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"unknown dtype {spec.dtype!r}", nearest(spec.dtype, DTYPES))
    if spec.load_in not in (None, "4bit", "8bit"):
        raise UserError(f"unknown load_in {spec.load_in!r}", "4bit or 8bit")
    choose_device(spec.device)
    name = demo_model.ALIAS if spec.model is None else spec.model
    check_name(name, "--model")
    path = Path(os.path.expanduser(name))
    try:
        for option in ("tokenizer", "peft"):
            value = os.path.expanduser(getattr(spec, option) or "")
            if Path(value).is_file() or (value.startswith((".", "/")) and not Path(value).exists()):
                raise UserError(f"--{option} {value} is not a folder", "give a folder, or a name on the hub")
            if value and not Path(value).exists():
                work_offline_if_unreachable()
            spec = dataclasses.replace(spec, **{option: value or None})  # type: ignore[arg-type]
        local = name == demo_model.ALIAS or path.exists()
        if local and spec.revision not in (None, "main"):  # main is lm-eval's default
            raise UserError(
                f"--revision {spec.revision} is of a model on the hub, and {name} is on this machine",
                "leave it out, or give the model's name on the hub",
            )
        if name == demo_model.ALIAS:
            folder, title = demo_model.folder(), name
        elif path.suffix.lower() == gguf.SUFFIX and path.is_file():
            folder, title = gguf.folder(path), path.stem
        elif path.is_dir():
            folder, title = path, path.resolve().name
            weights = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
            if all(file.name in adapters.WEIGHTS for file in weights):
                adapters.refuse_alone(str(path))  # some trainers leave the base model's config.json beside it
                raise UserError(f"model folder {path} has no weights (*.safetensors)", "save it with save_pretrained")
        elif local or name.startswith((".", "/", "~")):
            raise UserError(
                f"model {name} is neither a folder nor a GGUF file", "give a folder with config.json, or a file.gguf"
            )
        else:
            work_offline_if_unreachable()
            return _identify(spec, name, name, None)
        return _identify(spec, str(folder), title, hash_folder(folder))
    except PermissionError as error:
        problem = f"model {name} cannot be read ({reason(error)})"
        raise UserError(problem, "check the permissions of its files") from None


def _identify(spec: ModelSpec, source: str, name: str, weights: str | None) -> Resolved:
    """Return a model by its configuration. weights: hash of a folder; None: a model on the hub."""
    revision = spec.revision or "main"
    if model_file(source, "config.json", revision) is None:
        adapters.refuse_alone(source, spec.revision)
    with explaining(name):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=spec.trust_remote_code)
        commit = None if weights else commit_of(source, "config.json", revision)
        code = checkpoint.own_code(source, config, commit)
        if quantisation := quantisation_of(config):
            from transformers.quantizers import AutoHfQuantizer  # with torchao it takes seconds

            if not AutoHfQuantizer.supports_quant_method(quantisation):  # the weights would be taken for plain ones
                raise UserError(
                    f"config.json of model {name} says quant_method {method_of(config)!r}, which transformers "
                    "does not know", "correct quantization_config, or remove it if the weights are not quantised",
                )  # fmt: skip
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and longest < 1:
        raise UserError(f"model {name} says that it takes {longest} tokens", "correct its context length")
    if code is not None and "/" in code and not spec.trust_remote_code:
        raise refusal_of_code(name, code)
    adapter = spec.peft or (source if model_file(source, adapters.CONFIG, commit) else None)
    quantised = method_of(config) is not None or (Path(source) / gguf.FACTS).is_file()
    forms = {"an adapter": adapter, "quantised weights": quantised, f"--load-in {spec.load_in}": spec.load_in}
    if len(several := [form for form, given in forms.items() if given]) > 1:
        raise UserError(f"model {name} has {' and '.join(several)}", "leave one of them out: they do not go together")
    parts = []  # what decides the answers beside the model's own files
    if spec.load_in is not None:
        stored.quantise_while_loading(config, spec.load_in)
        name = f"{name}+{spec.load_in}"
        parts.append(spec.load_in)
    if adapter is not None:
        parts.append(adapters.hash_files(adapter, commit if adapter == source else None))
        name = name if adapter == source else f"{name}+{Path(os.path.abspath(adapter)).name}"
    if (other := spec.tokenizer) is not None:
        folder = Path(other)
        parts.append(
            hash_folder(folder, SETTINGS) if folder.is_dir() else commit_of(other, "tokenizer_config.json", "main")
        )
    for part in parts:
        weights = hashlib.sha256(f"{weights or commit} {part}".encode()).hexdigest()
    dtype = spec.dtype
    if dtype == "auto":
        named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        dtype = str(named).removeprefix("torch.") if named else checkpoint.weights_dtype(source, commit)
    identity = Identity(name, commit, weights, spec.trust_remote_code and code is not None)
    return Resolved(spec, source, identity, dtype, config=config, adapter=adapter)


def hash_folder(path: Path, endings: Sequence[str] = (*SETTINGS, *WEIGHTS)) -> str:
    """Return the sha256 of a folder's weights, configuration, tokenizer and code, or of its files of these endings."""
    digest = hashlib.sha256()
    files = {f for f in path.iterdir() if f.suffix in endings} | set(path.rglob("*.py"))
    for file in sorted(f for f in files if f.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        feed(digest, file)
    return digest.hexdigest()


@cache
def work_offline_if_unreachable() -> None:
    """Switch the libraries to offline mode if the hub does not answer; cached files still load.

    Without this, each request is retried for most of a minute. Behind a proxy the hub is not tried.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in PROXIES):
        return
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=HUB_TIMEOUT).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def commit_of(source: str, name: str, revision: str) -> str:
    """Return the commit that a branch or tag of a hub's repository names now, else `revision`.

    In the hub's cache a file lies in a folder of its commit. name: of a file that the repository has.
    """
    file = model_file(source, name, revision)
    return extract_commit_hash(None if file is None else str(file), None) or revision


def refusal_of_code(name: str, code: str) -> UserError:
    """Return the refusal of a model's own code."""
    return UserError(
        f"model {name!r} has its own code ({code}), which runs only with your consent",
        "read the code; if you trust it, add --trust-remote-code",
    )


@contextlib.contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turn any error of a library in the block into one line about the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _explain(name, error) from error


def _explain(name: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        return checkpoint.no_tensors(name, error)
    if out_of_memory(error):
        return UserError(f"memory ran out while model {name!r} was loaded", "free memory, or use a smaller model")
    if "trust_remote_code" in text:
        return refusal_of_code(name, "auto_map or custom_generate")
    if UNREACHABLE.search(text):
        return UserError(
            f"model {name!r} is not a local folder, and the hub cannot be reached",
            f"give a local folder, or the demo alias {demo_model.ALIAS}, or check the network (HF_ENDPOINT)",
        )
    if "not a valid model identifier" in text or "Repository Not Found" in text:
        return UserError(
            f"model {name!r} was found neither as a folder nor on the hub", "check the name and your access"
        )
    remedy = "it must be a complete causal language model with its tokenizer"
    if isinstance(error, ImportError):  # a library for quantised weights is missing
        remedy = "install the packages that it needs"
    return UserError(f"model {name!r} cannot be loaded ({text[:300]})", remedy)
