"""`import sdk` stays small; the time it takes is measured by `nearfar bench`, not here."""

from __future__ import annotations

import subprocess
import sys

_MEASURE = """
def rss_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
before = rss_bytes()
import sdk
sdk.Client
print(rss_bytes() - before)
"""


def test_importing_the_client_takes_less_than_40_mb():
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 40e6


def test_a_client_without_a_cloud_needs_neither_transport_nor_cryptography(tmp_path):
    code = (
        "import sys, sdk; sdk.Client(models=sys.argv[1]);"
        "print([m for m in ('websockets', 'cryptography', 'asyncio', 'onnxruntime')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_call_without_a_stated_agreement_imports_nothing_of_the_cascade(tmp_path):
    code = (
        "import sys, sdk; client = sdk.Client(models=sys.argv[1])\n"
        "try: client.infer('none', {})\n"
        "except sdk.ModelNotFound: pass\n"
        "print([m for m in sys.modules if m.startswith('sdk.cascade')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_an_unknown_one_is_not():
    import sdk

    assert all(getattr(sdk, name) is not None for name in sdk.__all__)
    assert set(sdk.__all__) <= set(dir(sdk))
    assert not hasattr(sdk, "Clinet")
