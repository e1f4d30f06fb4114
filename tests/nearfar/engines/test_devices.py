"""Looking at the machine: this one, and packages that crash or fail when their libraries load."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nearfar.engines import devices


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in `onnxruntime` package with GPU provider libraries that are no libraries."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    for name in (*devices._PROVIDER_LIBRARIES, "libonnxruntime_providers_shared.so"):
        (capi / name).write_bytes(b"not a library")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source):
        (capi.parent / "__init__.py").write_text(source)

    write("")
    return write


def find_spec_afresh(monkeypatch):
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)


def test_this_machine_is_described():
    device = devices.probe()
    assert device.physical_cores >= 1
    assert device.physical_cores <= (os.cpu_count() or 1)
    assert device.memory_bytes > 100 << 20
    assert device.machine


def test_the_cpu_runs_models_wherever_onnxruntime_is_installed():
    pytest.importorskip("onnxruntime")
    assert devices.probe().execution_providers[-1] == "CPUExecutionProvider"


def test_probing_does_not_import_the_inference_library():
    import subprocess

    statement = (
        "import sys; from nearfar.engines.devices import probe; probe(); "
        "print('onnxruntime' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_provider_libraries_that_do_not_load_are_reported_with_the_reason(installed, monkeypatch):
    find_spec_afresh(monkeypatch)
    providers, missing, sm_arch, _ = devices._providers()
    assert providers == ("CPUExecutionProvider",)
    assert set(missing) == {"TensorrtExecutionProvider", "CUDAExecutionProvider"}
    assert all(missing.values())
    assert sm_arch is None or not Path("/dev/nvidia0").exists() or sm_arch.isdigit()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended the probe with status -11"),
        ("import os; os._exit(3)", "ended the probe with status 3"),
    ],
)
def test_a_library_that_crashes_takes_only_the_probe_with_it(installed, monkeypatch, source, why):
    find_spec_afresh(monkeypatch)
    installed(source)
    providers, missing, _, _ = devices._providers()
    assert providers == ("CPUExecutionProvider",)
    assert all(why in text for text in missing.values())


def test_a_library_that_hangs_does_not_hang_us(installed, monkeypatch):
    find_spec_afresh(monkeypatch)
    installed("import time; time.sleep(60)")
    monkeypatch.setattr(devices, "_PROBE_TIMEOUT_S", 0.5)
    _, missing, _, _ = devices._providers()
    assert all("did not finish" in text for text in missing.values())


@pytest.mark.parametrize(
    ("content", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("nonsense", None)]
)
def test_the_quota_of_a_container_limits_the_threads(monkeypatch, content, cpus):
    monkeypatch.setattr(Path, "read_text", lambda self: content)
    assert devices._cpu_quota() == cpus
