"""Options that say which model is trained and how it is loaded and run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.errors import Problem
from library.option_groups import OptionGroup, opt
from library.option_values import BadValue

DYNAMO_BACKENDS = (
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensort",
    "ipex",
    "tvm",
)
_REMOVED_BACKENDS = {"aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt"}
_BACKEND_PACKAGES = {
    "onnxrt": "onnxruntime",
    "tensort": "torch_tensorrt",
    "ipex": "intel_extension_for_pytorch",
    "tvm": "tvm",
}


def token_length(value: Any) -> int | None:
    """Read `--max_token_length`: 75 is the ordinary length, written None.

    Raises:
        BadValue: If it is not 75, 150 or 225.
    """
    if str(value) == "75":
        return None
    if str(value) not in ("150", "225"):
        raise BadValue(f"{value!r} is not one of 150, 225 (75 without the option)")
    return int(value)


def dynamo_backend(value: Any) -> str | None:
    """Read `--dynamo_backend`: `no`, which accelerate and files of graphical front ends say, compiles nothing."""
    return None if str(value).lower() == "no" else str(value)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup, title="model"):
    """Which files the model is made of."""

    pretrained_model_name_or_path: str | None = opt(
        None,
        path=True,
        resume="free",
        help="Model to start from: a .safetensors or .ckpt file, a Diffusers folder, or a Hugging Face id.",
    )
    v2: bool = opt(False, metadata_key="ss_v2", help="The model is a Stable Diffusion 2.x model.")
    v_parameterization: bool = opt(
        False, help="Train on velocity (v-prediction), as models of 768 pixels of Stable Diffusion 2 expect."
    )
    vae: str | None = opt(
        None,
        path=True,
        resume="free",
        help="VAE to use in place of the model's own (file, Diffusers folder or id); it is also saved with the model.",
    )
    no_half_vae: bool = opt(False, help="Run the VAE in float32 whatever --mixed_precision says.")
    tokenizer_cache_dir: str | None = opt(
        None,
        path=True,
        resume="free",
        help="Folder for tokenizer files. The CLIP vocabulary is built in, so Stable Diffusion models need none.",
    )
    allow_nan_weights: bool = opt(
        False, resume="free", help="Load a model although some of its weights are not numbers (for research)."
    )

    @property
    def main_path(self) -> str | None:
        """File, folder or id of the model that is trained."""
        return self.pretrained_model_name_or_path

    def missing(self) -> Iterator[Problem]:
        """Yield which files a run cannot do without."""
        if not self.main_path:
            hint = "Give a .safetensors or .ckpt file, a Diffusers folder or a Hugging Face id."
            yield Problem("--pretrained_model_name_or_path", "is required", hint)

    def files(self) -> dict[str, str | None]:
        """Return files, folders and ids of Hugging Face by the option that names them."""
        return {"--pretrained_model_name_or_path": self.main_path, "--vae": self.vae}

    def base_files(self) -> dict[str, str]:
        """Return what frozen weights come from, by name; the model itself is called ""."""
        return {"": str(self.main_path)} | ({"vae": self.vae} if self.vae else {})


@dataclass(frozen=True, kw_only=True)
class TextOptions(OptionGroup, title="text"):
    """How captions become conditions."""

    max_token_length: int | None = opt(
        None,
        choices=(150, 225),
        convert=token_length,
        metadata_key="ss_max_token_length",
        help="Longest caption in tokens, in chunks of 75. Default: 75.",
    )
    clip_skip: int | None = opt(
        None,
        at_least=1,
        metadata_key="ss_clip_skip",
        help="Use the output of the n-th layer from the end of the text encoder.",
    )
    weighted_captions: bool = opt(False, help="Understand weights in captions: (word:1.3), [word], ((word)).")
    no_token_padding: bool = opt(
        False,
        help="Pad captions only to the longest one of their batch, not to 77 tokens.",
    )

    def cache_origin(self) -> dict[str, Any]:
        """Return what the outputs of text encoders depend on besides weights and captions."""
        return {
            "clip_skip": self.clip_skip,
            "max_token_length": self.max_token_length,
            "weighted": self.weighted_captions,
            "padded": not self.no_token_padding,
        }


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(OptionGroup, title="memory", resume="free"):
    """What trades memory against speed without changing the algorithm."""

    xformers: bool = opt(False, resume="exact", help="Attention by xformers, where it is installed.")
    sdpa: bool = opt(False, help="Attention by PyTorch's scaled_dot_product_attention (the default).")
    mem_eff_attn: bool = opt(False, resume="exact", help="Attention in slices that need less memory.")
    gradient_checkpointing: bool = opt(
        False,
        metadata_key="ss_gradient_checkpointing",
        help="Compute activations again in the backward pass: less memory, about a third slower.",
    )
    lowram: bool = opt(False, metadata_key="ss_lowram", help="Load models straight onto the GPU, sparing main memory.")
    highvram: bool = opt(False, help="Do not give cached GPU memory back between phases.")
    torch_compile: bool = opt(False, resume="exact", help="Compile the model with torch.compile.")
    dynamo_backend: str | None = opt(
        "inductor",
        resume="exact",
        choices=DYNAMO_BACKENDS,
        convert=dynamo_backend,
        matters_when={"torch_compile": ()},
        help="Backend of torch.compile.",
    )

    def warn(self) -> Iterator[Problem]:
        """Say which way of attention is taken when several are asked for."""
        asked = [name for name in ("mem_eff_attn", "xformers", "sdpa") if getattr(self, name)]
        for name in asked[1:]:
            yield Problem(f"--{name}", f"has no effect, since --{asked[0]} is given")
        if self.torch_compile and self.dynamo_backend is None:
            yield Problem("--torch_compile", "has no effect with --dynamo_backend no")

    def check(self) -> Iterator[Problem]:
        """Refuse compile backends that are gone or not installed."""
        if not self.torch_compile or self.dynamo_backend is None:
            return
        from importlib.util import find_spec

        where = f"--dynamo_backend {self.dynamo_backend}"
        if self.dynamo_backend in _REMOVED_BACKENDS:
            yield Problem(where, "PyTorch no longer has this backend", "Use inductor.")
        package = _BACKEND_PACKAGES.get(self.dynamo_backend)
        if package is not None and find_spec(package) is None:
            yield Problem(where, f"the package {package} is not installed", "Install it, or use inductor.")
