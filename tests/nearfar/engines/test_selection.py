"""Which variant runs where: a table of machines and variants."""

from __future__ import annotations

import sys

import msgspec
import pytest

from nearfar.bundle.manifest import FileEntry, Manifest, Requirements, Variant
from nearfar.engines import selection
from nearfar.engines.devices import Device
from nearfar.engines.selection import candidates, runnable_variants

DEVICE = Device(
    machine="test",
    execution_providers=("CPUExecutionProvider",),
    physical_cores=4,
    memory_bytes=8 << 30,
    has_genai=True,
)


def variant(name, *, rank, size=100, placement=("edge", "cloud"), engine="onnxruntime", **needs):
    return Variant(
        id=name, engine=engine, precision=name, entry="f", placement=placement, quality_rank=rank,
        files=(FileEntry(path="f", size_bytes=size, sha256="0" * 64),),
        requirements=Requirements(**needs),
    )  # fmt: skip


def ids(*variants, placement, device=DEVICE):
    manifest = Manifest(name="m", version="1.0.0", task="tensor", variants=variants)
    return [item.id for item in runnable_variants(manifest, device, placement)]


FP32 = variant("fp32", rank=0, size=400, placement=("cloud", "edge"))
FP16 = variant("fp16", rank=1, size=200)
INT8 = variant("int8", rank=2, size=100)


def test_the_device_takes_the_smallest_of_those_meant_for_it():
    assert ids(FP32, FP16, INT8, placement="edge") == ["int8", "fp16", "fp32"]


def test_the_device_prefers_a_larger_one_meant_for_it_to_a_smaller_one_that_is_not():
    assert ids(
        variant("a", rank=1, size=50, placement=("cloud", "edge")),
        variant("b", rank=0, size=400),
        placement="edge",
    ) == ["b", "a"]


def test_the_cloud_takes_the_best():
    assert ids(INT8, FP16, FP32, placement="cloud") == ["fp32", "fp16", "int8"]


GENAI = variant("fp32", rank=0, size=400, engine="onnxruntime-genai")
GENAI_INT4 = variant("int4", rank=2, size=120, engine="onnxruntime-genai")
PLAIN = variant("onnx-fp32", rank=1, size=401)
PLAIN_INT4 = variant("onnx-int4", rank=3, size=100)


def text_ids(placement, **changes):
    manifest = Manifest(
        name="m", version="1.0.0", task="text-generation",
        variants=(PLAIN_INT4, PLAIN, GENAI, GENAI_INT4),
    )  # fmt: skip
    device = msgspec.structs.replace(DEVICE, **changes)
    return [item.id for item in runnable_variants(manifest, device, placement)]


@pytest.fixture
def genai_works(monkeypatch):
    monkeypatch.setattr(selection, "_import_problem", lambda: None)


@pytest.mark.usefixtures("genai_works")
def test_text_runs_on_plain_onnx_runtime_only_where_there_is_no_onnxruntime_genai():
    assert text_ids("edge") == ["int4", "fp32", "onnx-int4", "onnx-fp32"]
    assert text_ids("edge", has_genai=False) == ["onnx-int4", "onnx-fp32"]
    assert text_ids("cloud") == ["fp32", "onnx-fp32", "int4", "onnx-int4"]
    assert text_ids("cloud", has_genai=False) == ["onnx-fp32", "onnx-int4"]


def test_a_library_that_is_installed_but_cannot_be_imported_is_as_good_as_none(monkeypatch):
    selection._import_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "nearfar.engines.genai_native", None)
    try:
        assert text_ids("edge") == ["onnx-int4", "onnx-fp32"]
    finally:
        selection._import_problem.cache_clear()


def test_the_order_in_the_manifest_makes_no_difference():
    assert ids(FP32, INT8, FP16, placement="edge") == ids(INT8, FP16, FP32, placement="edge")


@pytest.mark.parametrize(
    ("wanted", "device", "reason"),
    [
        (variant("v", rank=0, placement=("cloud",)), {}, "meant for cloud only"),
        (variant("v", rank=0, engine="torch"), {}, "does not run the engine torch"),
        (
            variant("v", rank=0, engine="onnxruntime-genai"),
            {"has_genai": False},
            "onnxruntime-genai is not installed",
        ),
        (variant("v", rank=0), {"execution_providers": ()}, "onnxruntime is not installed"),
        (
            variant("v", rank=0, execution_provider="CUDAExecutionProvider"),
            {},
            "needs CUDAExecutionProvider, which does not work here: not installed",
        ),
        (
            variant("v", rank=0, execution_provider="CUDAExecutionProvider"),
            {"missing_providers": {"CUDAExecutionProvider": "libcudnn.so.9 is missing"}},
            "libcudnn.so.9 is missing",
        ),
        (variant("v", rank=0, sm_arch="87"), {}, "sm_87, this is a machine without GPU"),
        (variant("v", rank=0, sm_arch="87"), {"sm_arch": "90"}, "sm_87, this is sm_90"),
        (
            variant("v", rank=0, memory_bytes=16 << 30),
            {},
            "needs 16.0 GiB of memory, here are 8.0 GiB",
        ),
    ],
)
def test_what_cannot_run_says_why(wanted, device, reason):
    manifest = Manifest(name="m", version="1.0.0", task="tensor", variants=(wanted,))
    machine = msgspec.structs.replace(DEVICE, **device)
    assert runnable_variants(manifest, machine, "edge") == ()
    (candidate,) = candidates(manifest, machine, "edge")
    assert reason in candidate.excluded


def test_those_that_cannot_run_come_last():
    manifest = Manifest(
        name="m",
        version="1.0.0",
        task="tensor",
        variants=(variant("best", rank=0, size=1, engine="torch"), INT8),
    )
    for placement in ("edge", "cloud"):
        found = candidates(manifest, DEVICE, placement)
        assert [item.variant.id for item in found] == ["int8", "best"]


VNNI, AVX2, ARM = ("avx2", "avx512_vnni"), ("avx2",), ("asimddp",)


@pytest.mark.parametrize(
    ("saturation", "flags", "runs"),
    [
        ({}, AVX2, True),
        ({"x86-vnni": False}, VNNI, True),
        ({"x86-vnni": False}, AVX2, False),  # never tried on such a CPU
        ({"x86": False}, AVX2, True),
        ({"x86": True}, AVX2, False),
        ({"x86": True}, VNNI, True),
        ({"x86": True}, ARM, True),
        ({"other": True}, ARM, False),
    ],
)
def test_a_variant_that_may_saturate_on_this_cpu_is_not_chosen(saturation, flags, runs):
    device = msgspec.structs.replace(DEVICE, cpu_flags=flags)
    int8 = msgspec.structs.replace(INT8, saturation=saturation)
    expected = ["int8", "fp32"] if runs else ["fp32"]
    assert ids(FP32, int8, placement="edge", device=device) == expected
    if not runs:
        manifest = Manifest(name="m", version="1.0.0", task="tensor", variants=(int8,))
        (only,) = candidates(manifest, device, "edge")
        assert "saturate" in only.excluded
