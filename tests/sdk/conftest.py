"""A client with a scripted device and a scripted cloud, both of which may take a request."""

from __future__ import annotations

import pytest

from sdk import Client
from tests.support.scripted_cloud import STORY, TENSOR, ScriptedCloud
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.two_routes import POLICY


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


@pytest.fixture
def both(cloud, tmp_path):
    (tmp_path / "store").mkdir()
    with Client(
        cloud=cloud.config(), models=tmp_path / "store", policy=POLICY, sensitivity="public"
    ) as client:
        client.device = put_into(client, ScriptedEdge((TENSOR, STORY)))
        yield client
