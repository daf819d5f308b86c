"""Packaging of mindspeed-mm: `pip install .` gives the library and the console script `mindspeed-mm`."""

from setuptools import find_namespace_packages, setup

# `megatron` is a PEP 420 namespace shared with the megatron-core wheel, so no megatron/__init__.py may exist and
# only our own part of it, megatron.driver, is listed.
PACKAGES = find_namespace_packages(
    include=[
        "mindspeed_mm",
        "mindspeed_mm.*",
        "checkpoint_converters",
        "checkpoint_converters.*",
        "evaluation",
        "evaluation.*",
        "megatron.driver",
        "megatron.driver.*",
    ],
    exclude=["*.__pycache__", "*.__pycache__.*"],
)

REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.12.1,!=0.13.*,!=0.14.*,!=0.15.*,<0.17",  # see docs/ascend.md, Versions
    "transformers>=5,<6",
    "tokenizers",
    "sentencepiece>=0.2",
    "safetensors>=0.4",
    "pillow>=10.1",
    "numpy>=1.26",
    "pydantic>=2.5",
    "pyyaml>=6",
    "rich>=13",
    "psutil>=5.9",
    "tensorboard>=2.14",
    "jinja2>=3.1",
    "matplotlib>=3.8",
]

EVALUATE = ["openpyxl>=3.1"]
QUICKSTART = [*EVALUATE, "scikit-learn>=1.4"]
SERVE = ["fastapi>=0.115", "starlette>=0.41", "uvicorn>=0.34", "prometheus_client>=0.20", "httpx>=0.27"]
STORAGE = ["fsspec>=2024.6", "s3fs>=2024.6", "botocore>=1.35"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]

EXTRAS = {
    "evaluate": EVALUATE,
    "parquet": ["pyarrow>=14"],
    "quantize": ["bitsandbytes>=0.45"],
    "quickstart": QUICKSTART,
    "docs": DOCS,  # builds the site; see mkdocs.yml
    "serve": SERVE,
    "storage": STORAGE,  # with constraints-storage.txt, see docs/storage.md
    "storage-test": [*STORAGE, "moto[server]>=5", "boto3>=1.35", "requests>=2.31"],
    "wandb": ["wandb>=0.17"],
    "swanlab": ["swanlab>=0.10"],
    "npu": ["torch_npu"],  # its version must be the one made for the installed torch and CANN
    "dev": [
        *QUICKSTART,
        *SERVE,
        "bitsandbytes>=0.45",
        "openai>=1.50",  # the client that the servers are tested with
        "playwright>=1.45",  # drives the web page in tests, with a chromium that is on the PATH
        "peft>=0.15",  # tests compare with it
        "pyarrow>=14",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "trl>=1.16; python_version >= '3.11'",  # tests of preference training compare with it
        "hypothesis>=6.100",
        "ruff>=0.6",
    ],
}

setup(
    name="mindspeed-mm",
    version="0.1.0",
    description="Training, inference and evaluation of LLaVA-family models on megatron-core: NPU, GPU and CPU",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=PACKAGES,
    package_data={"": ["*.json", "*.jinja", "*.html", "*.css", "*.js"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["mindspeed-mm = mindspeed_mm.cli.main:entry"],
        # `torchrun --logs-specs mindspeed_mm`: torchrun's own report goes to a file.
        "torchrun.logs_specs": ["mindspeed_mm = mindspeed_mm.platform.torchrun:ReportToFile"],
    },
)
