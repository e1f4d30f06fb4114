from __future__ import annotations

import sys

import numpy as np
import pytest

from nearfar.errors import InvalidInput
from nearfar.tensors import (
    DATATYPES,
    EXTENDED,
    OF_ONNXRUNTIME,
    datatype_of,
    numpy_of,
    pack_4bit,
    spell,
    unpack_4bit,
)

ml_dtypes = pytest.importorskip("ml_dtypes")


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_every_datatype_has_a_dtype_whose_name_it_is(datatype):
    assert datatype_of(np.empty(0, numpy_of(datatype))) == datatype
    dtype = eval(spell(datatype), {"numpy": np, "ml_dtypes": ml_dtypes, "object": object})
    assert np.dtype(dtype) == numpy_of(datatype)
    assert datatype in OF_ONNXRUNTIME.values()


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "V3", ">f4"])
def test_other_dtypes_have_no_name_on_the_wire(dtype):
    with pytest.raises(InvalidInput, match="cannot be sent"):
        datatype_of(np.empty(2, dtype))


def test_other_types_of_ml_dtypes_have_no_name_either():
    with pytest.raises(InvalidInput, match="float8_e3m4 cannot be sent"):
        datatype_of(np.empty(2, ml_dtypes.float8_e3m4))


@pytest.mark.parametrize("datatype", sorted(EXTENDED))
def test_without_ml_dtypes_an_error_names_the_package(monkeypatch, datatype):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # an import of it fails
    with pytest.raises(InvalidInput, match=f"datatype {datatype} need.* ml_dtypes") as caught:
        numpy_of(datatype)
    assert caught.value.fix == "pip install ml_dtypes"


def test_4_bit_elements_are_packed_as_onnx_packs_them():
    array = np.array([1, 2, -8, 7, -1], ml_dtypes.int4)
    packed = pack_4bit(array)
    assert packed.tolist() == [0x21, 0x78, 0x0F]
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(array)
    assert packed.tobytes() == tensor.raw_data
    assert unpack_4bit(packed, 5).view(ml_dtypes.int4).tolist() == array.tolist()


@pytest.mark.parametrize("count", range(5))
def test_unpacking_undoes_packing(count):
    array = np.arange(15, 15 - count, -1).astype(ml_dtypes.uint4)
    packed = pack_4bit(array)
    assert packed.size == (count + 1) // 2
    assert unpack_4bit(packed, count).view(ml_dtypes.uint4).tolist() == array.tolist()
