"""`nearfar bench link` on a tiny model: real processes, a short run."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from benchmarks import link
from nearfar.engines.base import CancelToken
from nearfar.errors import Cancelled
from tests.support import tiny


def test_there_are_three_links_without_recordings_too():
    chosen = link.links_of(None)
    assert [scenario.name for scenario in chosen] == list(link.GENERATED)


def test_each_policy_keeps_to_its_route_over_a_real_link(tmp_path: Path, monkeypatch):
    pytest.importorskip("onnxruntime")
    tiny.write_tiny_classifier_bundle(tmp_path / "models" / "tiny", "tiny")
    monkeypatch.setattr(link, "SETTLE_S", 0.0)
    settings = link.Settings(models=tmp_path / "models", model="tiny", duration_s=1.0)
    scenario = dataclasses.replace(link.links_of(None)[0], rate_s=12.0)
    with link.RealCloud(tmp_path, settings.models, names=["tiny"], threads=1) as cloud:
        outcome = link.run_link(cloud, scenario, settings, tmp_path, lambda: None)
    assert set(outcome.results) == set(link.POLICIES)
    counts = {len(results) for results in outcome.results.values()}
    assert len(counts) == 1  # the same requests
    assert counts.pop() > 3
    assert {one.route for one in outcome.results[link.EDGE] if one.is_in_time} <= {"edge"}
    assert {one.route for one in outcome.results[link.CLOUD] if one.is_in_time} <= {"cloud"}
    assert any(one.is_in_time for one in outcome.results[link.OURS])
    names = [figure.name for figure in link._figures(outcome)]
    assert f"{scenario.name}: nearfar: SLO attainment" in names


def test_a_slow_device_takes_its_time_and_can_be_cancelled(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    from nearfar.bundle import BundleStore

    tiny.write_tiny_classifier_bundle(tmp_path / "models" / "tiny", "tiny")
    bundle = BundleStore(tmp_path / "models").open("tiny")
    model = link.SlowModel(bundle, bundle.manifest.variants[0].id)
    model.takes_s = lambda size_bytes: size_bytes / 1000.0
    feeds = model.preprocess("bytes", [b"abc"])
    size = next(iter(feeds.values())).nbytes
    began_s = time.monotonic()
    assert model.infer(feeds)
    assert time.monotonic() - began_s >= size / 1000.0
    model.takes_s = lambda size_bytes: 30.0
    cancel = CancelToken()
    threading.Timer(0.05, cancel.cancel).start()
    began_s = time.monotonic()
    with pytest.raises(Cancelled):
        model.infer(feeds, cancel)
    assert time.monotonic() - began_s < 10.0
