"""Packaging. The entry scripts stay at the top level; `library`, `networks` and `finetune` are importable packages."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="sd-finetune-toolkit",
    version="0.1.0",
    description="Fine-tune Stable Diffusion: DreamBooth, LoRA, full fine-tuning, textual inversion",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["library*", "networks*", "finetune*", "tools*"]),
    package_data={"library": ["assets/*/*"]},
    py_modules=[
        "train_db",
        "fine_tune",
        "train_network",
        "train_textual_inversion",
        "train_textual_inversion_XTI",
        "gen_img",
        "sdxl_gen_img",
        "quickstart",
    ],
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.35",
        "transformers>=4.54",
        "accelerate>=1.6",
        "safetensors>=0.8",
        "tokenizers",
        "huggingface_hub",
        "ftfy>=6.1",
        "numpy",
        "opencv-python",
        "pillow>=11.3",
        "scipy",
        "tensorboard",
        "toml",
        "tqdm",
    ],
    extras_require={
        "bitsandbytes": ["bitsandbytes>=0.45"],
        "xformers": ["xformers"],
        "deepspeed": ["deepspeed"],
        "wandb": ["wandb"],
        "lycoris": ["lycoris_lora"],
        "peft": ["peft"],
        "tagger": ["onnxruntime"],
        "remote": ["fsspec", "s3fs", "aiohttp"],
        "optimizers": ["dadaptation", "lion-pytorch", "prodigyopt", "schedulefree"],
    },
)
