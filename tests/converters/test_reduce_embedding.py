"""Shorter vectors: of the same space in all variants, judged against the whole ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from converters.commands import convert
from converters.settings import EmbeddingSettings
from converters.steps.export_encoder import Pooling
from converters.steps.reduce_embedding import Projection, fit, reduced_encoder, space_of
from converters.steps.verify_embedding import check_short
from nearfar.bundle import open_bundle
from nearfar.bundle.manifest import QualityFigure
from nearfar.cli import run
from nearfar.errors import ConversionError
from nearfar.wire.messages import ModelOffer
from sdk import Client, parse_policy
from tests.support.scripted_cloud import EMBEDDING, ScriptedCloud
from tests.support.scripted_edge import ScriptedEdge, put_into

POOLING = Pooling(mode="mean", normalise=True, max_length_tokens=64)


def nearfar_convert(*arguments: object) -> int:
    texts = [str(argument) for argument in arguments]
    return run(convert, texts, program="nearfar convert")


def in_few_directions(texts: int, width: int, rank: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    made = generator.standard_normal((texts, rank)) @ generator.standard_normal((rank, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def test_the_main_directions_keep_all_there_is_and_the_first_numbers_do_not():
    vectors = in_few_directions(200, 32, 6)
    turned = fit(EmbeddingSettings(dimensions=6), vectors)
    cut = fit(EmbeddingSettings(dimensions=6, method="truncate"), vectors)
    assert turned.matrix.shape == cut.matrix.shape == (32, 6)
    assert turned.kept == pytest.approx(1.0, abs=1e-5)
    assert cut.kept < 0.9
    products = (vectors @ turned.matrix) @ (vectors @ turned.matrix).T
    np.testing.assert_allclose(products, vectors @ vectors.T, atol=1e-5)
    np.testing.assert_array_equal(vectors @ cut.matrix, vectors[:, :6])
    again = fit(EmbeddingSettings(dimensions=6), vectors)
    assert again.matrix.tobytes() == turned.matrix.tobytes()


@pytest.mark.parametrize(
    ("settings", "texts", "says"),
    [
        ({"dimensions": 32}, 200, "32 are no fewer"),
        ({"dimensions": 16}, 31, "too few to find 16 directions"),
    ],
)
def test_what_cannot_be_shortened_is_said(settings, texts, says):
    with pytest.raises(ConversionError, match=says):
        fit(EmbeddingSettings(**settings), in_few_directions(texts, 32, 6))


def test_a_shortened_encoder_gives_unit_vectors_of_the_projection():
    torch = pytest.importorskip("torch")

    class Encoder(torch.nn.Module):
        input_names = ("x",)

        def forward(self, x):
            return x

    vectors = in_few_directions(40, 32, 6)
    projection = fit(EmbeddingSettings(dimensions=4), vectors)
    with torch.no_grad():
        short = reduced_encoder(Encoder(), projection, POOLING)(torch.from_numpy(vectors)).numpy()
    expected = vectors @ projection.matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)


def test_a_space_has_a_name_of_its_own():
    one = Projection(np.eye(4, 2, dtype=np.float32), 1.0)
    other = Projection(np.eye(4, 3, dtype=np.float32), 1.0)
    cls = Pooling(mode="cls", normalise=True, max_length_tokens=64)
    names = [
        space_of("source", POOLING, None),
        space_of("source", POOLING, one),
        space_of("source", POOLING, other),
        space_of("source", cls, one),
        space_of("other", POOLING, one),
    ]
    assert len(set(names)) == 5
    assert names[1].startswith("2:")
    assert space_of("source", POOLING, Projection(one.matrix, 0.5)) == names[1]


def test_a_limit_that_shortening_alone_breaks_is_refused():
    def figures(value: float) -> list[QualityFigure]:
        return [
            QualityFigure(
                metric="recall_at_10_whole", value=value, higher_is_better=True, samples=64,
                reference="source",
            )
        ]  # fmt: skip

    check_short(figures(0.5), None)
    check_short(figures(0.96), 0.05)
    with pytest.raises(ConversionError, match=r"keep 94\.0% of each text's neighbours"):
        check_short(figures(0.94), 0.05)


def test_one_command_shortens_the_vectors_of_all_variants(tiny_bert: Path, tmp_path: Path):
    # Fewer texts than by default: a test has no time for a thousand.
    recipe = tmp_path / "short.toml"
    recipe.write_text(
        'format = 1\n[source]\nkind = "huggingface"\n[bundle]\nname = "short"\n'
        "[settings]\npassages = 48\n[settings.embedding]\npassages = 48\n"
    )
    status = nearfar_convert(
        tiny_bert, "-o", tmp_path / "a", "--dimensions", 16, "--no-measure", "--recipe", recipe
    )
    assert status == 0
    manifest = open_bundle(tmp_path / "a").manifest
    (output,) = manifest.outputs
    assert output.shape == (-1, 16)
    assert manifest.space.startswith("16:")
    for variant in manifest.variants:
        metrics = {figure.metric: figure.value for figure in variant.quality}
        assert 0.2 < metrics["recall_at_10_whole"] <= 1
    assert {variant.id for variant in manifest.variants} == {"fp32", "int8"}


def test_vectors_of_another_space_are_never_asked_of_the_cloud(tmp_path: Path):
    policy = parse_policy(
        'version = 1\nclasses = ["public"]\n[[rule]]\nid = "open"\n'
        'when = { sensitivity = "public" }\neffect = "cloud_ok"\n'
    )
    here = msgspec.structs.replace(EMBEDDING, space="16:aa")
    with ScriptedCloud(tmp_path / "state") as cloud:
        (tmp_path / "store").mkdir()
        with Client(
            cloud=cloud.config(), models=tmp_path / "store", policy=policy, sensitivity="public"
        ) as client:
            put_into(client, ScriptedEdge((here,)))
            client.warm_up(EMBEDDING.name)
            offers = client._link.state.offers
            before = client.explain(EMBEDDING.name, texts=["near"], mode="cloud_only")
            assert before.route == "cloud"  # the cloud does not say what its space is
            there = msgspec.structs.replace(offers[EMBEDDING.name].manifest, space="32:bb")
            offers[EMBEDDING.name] = ModelOffer(
                manifest=there, variant=offers[EMBEDDING.name].variant
            )
            refused = client.explain(EMBEDDING.name, texts=["near"], mode="cloud_only")
            assert refused.route is None
            assert "another space" in str(refused.error())
            assert client.explain(EMBEDDING.name, texts=["near"]).route == "edge"
