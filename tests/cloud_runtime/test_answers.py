"""A real server on loopback: answers, and requests that cannot be answered."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud_runtime.models import ServedModels
from cloud_runtime.settings import ServerSettings
from nearfar.errors import EngineError, InvalidInput, ModelNotFound
from nearfar.session import Limits
from nearfar.wire.messages import Token
from tests.cloud_runtime.asking import X, chat
from tests.cloud_runtime.support import ScriptedModel, WireClient, run, running, served
from tests.support.tiny import TENSOR_WEIGHTS


def test_infer_on_a_real_bundle_equals_the_local_result(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            result, outputs = await client.infer("tiny", {"x": X})
        scores = X @ TENSOR_WEIGHTS
        expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(outputs["y"], expected, rtol=1e-5)
        assert result.variant == "fp32"
        assert result.execution_provider == "CPUExecutionProvider"
        assert result.compute_ms > 0
        assert result.queue_ms >= 0

    run(main())


def test_raw_bytes_are_preprocessed_by_the_server(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array([b"plain text " * 9, bytes([200, 201]) * 50], dtype=object)
            _, outputs = await client.infer("tiny-classifier", {"input": items}, form="bytes")
        assert outputs["scores"].argmax(axis=1).tolist() == [0, 1]

    run(main())


def test_models_are_offered_with_the_variant_that_runs_here(state, store):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            offers = {offer.manifest.name: offer for offer in (await client.models()).models}
        assert set(offers) == {"tiny", "tiny-classifier"}
        assert offers["tiny"].variant == "fp32"
        assert [variant.id for variant in offers["tiny"].manifest.variants] == ["fp32"]
        assert offers["tiny"].queue_ms == 0

    run(main())


def test_an_answer_is_streamed_token_by_token_with_its_account(state):
    async def main() -> None:
        async with (
            running(served(chat(token_s=0.002)), state) as server,
            WireClient.connect(server) as client,
        ):
            answer = await client.collect(await client.start_generate("chat", tokens=20))
        assert answer.text == "".join(f"t{index} " for index in range(20)) + "end"
        assert answer.fin.count == 21  # the last one is what the stop-string check held back
        assert answer.fin.finish_reason == "length"
        assert answer.fin.usage.completion_tokens == 20
        assert answer.fin.prefill_ms >= 2
        assert answer.fin.decode_ms >= 19 * 2

    run(main())


def test_many_streams_share_one_connection_and_never_mix(state):
    async def main() -> None:
        models = served(chat(token_s=0.001), ScriptedModel(), slots=8, max_waiting=64)
        async with running(models, state) as server, WireClient.connect(server) as client:
            lengths = range(1, 25)
            streams = [await client.start_generate("chat", tokens=count) for count in lengths]
            results = await asyncio.gather(
                *(
                    client.infer("scripted", {"x": np.full((1, 4), k, np.float32)})
                    for k in range(30)
                )
            )
            answers = await asyncio.gather(*(client.collect(stream) for stream in streams))
        assert [outputs["y"][0, 0] for _, outputs in results] == list(range(30))
        for count, answer in zip(lengths, answers, strict=True):
            assert answer.text == "".join(f"t{index} " for index in range(count)) + "end"

    run(main())


def test_tokens_wait_for_credit(state):
    async def main() -> None:
        async with running(served(chat()), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=6, credit=2)
            for expected in ("t0 ", "t1 "):
                message, _ = await client.next(stream)
                assert message.text == expected
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.next(stream), 0.1)
            await client.grant(stream, 100)
            rest = await client.collect(stream)
            assert rest.text == "t2 t3 t4 t5 end"

    run(main())


def test_an_answer_of_no_credit_at_all_starts_with_the_first_credit(state):
    async def main() -> None:
        async with running(served(chat()), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=2, credit=0)
            await asyncio.sleep(0.05)
            await client.grant(stream, 10)
            assert (await client.collect(stream)).text == "t0 t1 end"

    run(main())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "nobody"}, "nobody"),
        ({"model": "scripted", "version": "9.9.9"}, "9.9.9"),
        ({"model": "scripted", "variant": "int2"}, "int2"),
    ],
)
def test_an_unknown_model_version_or_variant_is_named(state, options, named):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(ModelNotFound, match=named):
                await client.infer(arrays={"x": X}, **options)
            await client.infer("scripted", {"x": X})

    run(main())


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"x": X.astype(np.float64)}, "x"),
        ({"x": X[:, :3]}, "x"),
        ({"z": X}, "z|x"),
        ({}, "x"),
    ],
)
def test_a_wrong_dtype_shape_or_name_is_invalid_input(state, store, arrays, named):
    async def main() -> None:
        async with (
            running(ServedModels.load(store), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match=named):
                await client.infer("tiny", arrays)
            await client.infer("tiny", {"x": X})

    run(main())


@pytest.mark.parametrize("form", ["text", "bytes"])
def test_raw_items_reach_the_model_as_what_they_are(state, form):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array(["né".encode(), b"", b"abc"], dtype=object)
            _, outputs = await client.infer("scripted", {"input": items}, form=form)
            assert outputs["y"].tolist() == [2 if form == "text" else 3, 0, 3]

    run(main())


def test_texts_must_be_utf8(state):
    async def main() -> None:
        async with (
            running(served(ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            items = np.array([b"\xff\xfe"], dtype=object)
            with pytest.raises(InvalidInput, match="UTF-8"):
                await client.infer("scripted", {"input": items}, form="text")

    run(main())


def test_generate_and_infer_each_need_a_model_of_their_kind(state):
    async def main() -> None:
        async with (
            running(served(chat(), ScriptedModel()), state) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match="generates text"):
                await client.infer("chat", {"x": X})
            with pytest.raises(InvalidInput, match="not for text"):
                await client.collect(await client.start_generate("scripted", tokens=1))

    run(main())


def test_a_result_too_large_to_send_is_an_error_and_not_a_cut(state):
    settings = ServerSettings(limits=Limits(max_message_bytes=100_000))

    class Growing(ScriptedModel):
        def infer(self, feeds):
            return {"y": np.zeros(1 << 20, np.uint8)}

    async def main() -> None:
        async with (
            running(served(Growing()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            with pytest.raises(InvalidInput, match="result cannot be sent"):
                await client.infer("scripted", {"x": X})

    run(main())


def test_an_engine_failure_mid_answer_ends_it_with_an_error(state):
    async def main() -> None:
        model = chat(error=EngineError("the engine broke", fix="Repair it"))
        async with running(served(model), state) as server, WireClient.connect(server) as client:
            stream = await client.start_generate("chat", tokens=10)
            for _ in range(3):
                message, _ = await client.next(stream)
                assert isinstance(message, Token)
            with pytest.raises(EngineError, match="the engine broke"):
                await client.next(stream)

    run(main())


@pytest.mark.parametrize("shaping", ["balanced", "strict"])
def test_shaped_answers_and_long_results_are_complete(state, shaping):
    settings = ServerSettings(min_shaping=shaping)

    class Long(ScriptedModel):
        def infer(self, feeds):
            return {"y": np.arange(100_000, dtype=np.uint8)}

    async def main() -> None:
        async with (
            running(served(chat(), Long()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            assert client.ready.shaping == shaping
            _, outputs = await client.infer("scripted", {"x": X})
            assert np.array_equal(outputs["y"], np.arange(100_000, dtype=np.uint8))
            answers = [
                client.collect(await client.start_generate("chat", tokens=count))
                for count in (1, 8, 30)
            ]
            for count, answer in zip((1, 8, 30), await asyncio.gather(*answers), strict=True):
                assert len(answer.texts) == count + 1

    run(main())


def test_shaped_answer_that_ends_while_the_server_drains_is_complete(state):
    settings = ServerSettings(min_shaping="balanced")

    async def main() -> None:
        async with (
            running(served(chat()), state, settings) as server,
            WireClient.connect(server) as client,
        ):
            stream = await client.start_generate("chat", tokens=5)
            await client.next(stream)
            draining = asyncio.create_task(server.server.drain())
            answer = await client.collect(stream)
            assert answer.fin.count == 6
            await draining

    run(main())
