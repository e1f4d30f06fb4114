"""What must work with the base dependencies alone, and how light `import sdk` is."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Third-party packages of the extras; blocking their import is as good as not having them.
EXTRAS = (
    "onnxruntime", "onnxruntime_genai", "onnx", "torch", "transformers", "tokenizers", "jinja2",
    "tensorrt", "safetensors", "gguf", "onnxslim", "onnxscript", "sklearn", "accelerate",
    "jwt",
)  # fmt: skip

_BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sdk_and_all_its_public_names_import_with_base_dependencies_only():
    python("import sdk\nfor name in sdk.__all__: getattr(sdk, name)")


def test_help_works_with_base_dependencies_only():
    assert "quickstart" in python("from nearfar.cli import main; main(['--help'])")


@pytest.mark.parametrize(
    "package", ["nearfar", "edge_runtime", "cloud_runtime", "converters", "benchmarks"]
)
def test_every_package_imports_with_base_dependencies_only(package):
    python(f"import {package}")


def test_importing_sdk_loads_no_engine_and_no_transport():
    heavy = {"onnxruntime", "torch", "websockets", "cryptography", "typer", "rich", "asyncio"}
    code = f"import sys, sdk; sdk.Client; print(sorted({heavy!r} & set(sys.modules)))"
    loaded = python(code).strip()
    assert "onnxruntime" not in loaded
    assert "torch" not in loaded
    assert "typer" not in loaded
