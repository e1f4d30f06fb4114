"""Calibrations: thresholds for any agreement from one sample, and files that fit or are refused."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.bundle.manifest import FileEntry
from nearfar.errors import CalibrationError
from sdk.cascade import calibration as module
from sdk.cascade.bounds import allowed_disagreements
from sdk.cascade.calibration import Calibration, VariantKey, check_variant, digest_of, load, save
from tests.support.scripted_cloud import manifest

KEY = VariantKey(variant="int8", digest="a" * 64)
FAR = VariantKey(variant="fp32", digest="b" * 64)


def calibration(scores, agrees, *, names=("margin",), **fields) -> Calibration:
    return Calibration(
        model="digits",
        task="classification",
        edge=KEY,
        cloud=FAR,
        samples=len(agrees),
        scores=module.make({name: np.asarray(scores, float) for name in names}, np.asarray(agrees)),
        **fields,
    )


def traffic(rng, samples, wrong=0.2):
    """Scores 0..1; the surer the edge is, the likelier it is right."""
    scores = rng.random(samples)
    return scores, rng.random(samples) > wrong * 2 * (1 - scores)


@given(st.integers(0, 1000), st.sampled_from([0.9, 0.95, 0.98, 0.99]))
def test_a_threshold_keeps_no_more_disagreements_than_allowed(seed, target):
    scores, agrees = traffic(np.random.default_rng(seed), 600)
    found = calibration(scores, agrees, horizon_requests=None).threshold(target)
    kept = scores > found.bound
    allowed = allowed_disagreements(600, 1 - target, 0.05)
    assert (kept & ~agrees).sum() == found.kept_disagreements <= (allowed or 0)
    assert found.kept_share == pytest.approx(kept.mean(), abs=0.02)
    assert found.agreement_bound >= target or found.keeps_nothing
    # The next lower score would be one too many.
    if math.isfinite(found.bound):
        assert ((scores >= found.bound) & ~agrees).sum() == allowed + 1


def test_too_small_a_sample_keeps_nothing_and_says_how_many_it_takes():
    rng = np.random.default_rng(0)
    small = calibration(*traffic(rng, 100, wrong=0.0))
    found = small.threshold(0.98)
    assert found.keeps_nothing
    assert found.kept_share == 0.0
    enough = small.samples_needed(0.98)
    assert not calibration(*traffic(rng, enough, wrong=0.0)).threshold(0.98).keeps_nothing
    assert calibration(*traffic(rng, enough - 1, wrong=0.0)).threshold(0.98).keeps_nothing


def test_models_that_always_agree_keep_everything_that_has_a_score():
    scores = np.append(np.linspace(0, 1, 999), -np.inf)
    found = calibration(scores, np.ones(1000, bool)).threshold(0.98)
    assert found.bound == -math.inf
    assert not -math.inf > found.bound  # what has no score escalates all the same


def test_disagreements_without_a_score_are_never_kept_and_cost_nothing():
    scores = np.append(np.linspace(0, 1, 900), [-np.inf] * 100)
    agrees = np.append(np.ones(900, bool), np.zeros(100, bool))
    found = calibration(scores, agrees).threshold(0.98)
    assert found.bound == -math.inf
    assert found.kept_disagreements == 0


def test_ties_with_a_disagreement_are_not_kept():
    scores = np.ones(1000)
    agrees = np.arange(1000) >= 30
    found = calibration(scores, agrees).threshold(0.98)
    assert found.bound == 1.0
    assert found.kept_share == 0.0


def test_choosing_among_scores_is_paid_for_and_the_best_one_wins():
    rng = np.random.default_rng(5)
    scores, agrees = traffic(rng, 2000)
    noise = rng.random(2000)
    both = msgspec.structs.replace(
        calibration(scores, agrees),
        scores=module.make({"entropy": noise, "margin": scores}, agrees),
    )
    found = both.threshold(0.95)
    assert found.score == "margin"
    assert found.kept_share <= calibration(scores, agrees).threshold(0.95).kept_share
    assert both.samples_needed(0.98) > calibration(scores, agrees).samples_needed(0.98)


def test_the_stated_agreement_holds_for_new_traffic_in_at_least_95_of_100_calibrations():
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(300):
        scores, agrees = traffic(rng, 500)
        bound = calibration(scores, agrees).threshold(0.95).bound
        later, right = traffic(rng, 1000)
        held += ((later > bound) & ~right).mean() <= 0.05
    assert held / 300 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 300)


@given(st.integers(0, 100), st.floats(0.01, 0.99))
def test_shares_and_bounds_are_each_others_inverse(seed, share):
    scores, agrees = traffic(np.random.default_rng(seed), 2000)
    sample = calibration(scores, agrees).scores["margin"]
    assert sample.share_above(sample.bound_for_share(share)) == pytest.approx(share, abs=1e-6)


def test_the_ends_of_shares_keep_all_or_nothing():
    sample = calibration(*traffic(np.random.default_rng(1), 500)).scores["margin"]
    assert sample.bound_for_share(0.0) == math.inf
    assert sample.bound_for_share(1.0) == -math.inf
    assert sample.share_above(math.inf) == 0.0
    assert sample.share_above(-math.inf) == 1.0
    assert sample.share_above(sample.quantiles[0] - 1) == 1.0
    assert sample.share_above(sample.quantiles[-1]) == 0.0


def test_an_agreement_that_is_no_probability_cannot_be_aimed_at():
    with pytest.raises(ValueError, match=r"of 1\.0"):
        calibration(*traffic(np.random.default_rng(1), 500)).threshold(1.0)


def test_no_samples_are_no_calibration():
    with pytest.raises(CalibrationError, match="no sample"):
        module.make({"margin": np.empty(0)}, np.empty(0, bool))


# -- variants and files --------------------------------------------------------------------------


def with_files(*hashes: str, **fields):
    base = manifest("digits", "classification", label_output="y", **fields)
    files = tuple(FileEntry(path=f"f{i}", size_bytes=1, sha256=h) for i, h in enumerate(hashes))
    variant = msgspec.structs.replace(base.variants[0], files=files)
    return msgspec.structs.replace(base, variants=(variant,))


def test_a_digest_changes_with_content_and_not_with_names_and_figures():
    first = digest_of(with_files("a", "b"), "fp32")
    renamed = msgspec.structs.replace(with_files("a", "b"), name="other", version="9.9.9")
    assert digest_of(renamed, "fp32").digest == first.digest
    for other in (with_files("a", "c"), with_files("a"), with_files("a", "b", labels=("x",))):
        assert digest_of(other, "fp32").digest != first.digest
    with pytest.raises(CalibrationError, match="no variant 'int3'"):
        digest_of(with_files("a"), "int3")


def test_a_calibration_for_another_bundle_is_refused():
    mine = calibration(*traffic(np.random.default_rng(1), 500))
    check_variant(mine, "edge", VariantKey(variant="renamed", digest=KEY.digest))
    with pytest.raises(CalibrationError, match="another cloud model"):
        check_variant(mine, "cloud", VariantKey(variant="fp32", digest="c" * 64))


def test_a_file_comes_back_as_it_was_and_holds_nothing_else(tmp_path):
    mine = calibration(*traffic(np.random.default_rng(1), 500), created="2026-01-01T00:00:00")
    path = tmp_path / "new folder" / "digits.json"
    save(mine, path)
    assert load(path) == mine
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == ["digits.json"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda t: t.update(format_version=2), "format 2"),
        (lambda t: t.update(scores={}), "no scores"),
        (lambda t: t.update(samples=3), "more disagreements"),
        (lambda t: t.update(samples=0), "samples"),
        (lambda t: t.update(confidence=1.5), "confidence"),
        (lambda t: t.update(centre=[1.0]), "centre"),
        (lambda t: t["scores"].update(luck=t["scores"]["margin"]), "luck"),
        (lambda t: t["scores"]["margin"]["disagreements"].reverse(), "not in order"),
        (lambda t: t["scores"]["margin"]["quantiles"].reverse(), "not in order"),
        (lambda t: t["scores"]["margin"].update(quantiles=[1.0]), "quantiles"),
        (lambda t: t.pop("cloud"), "cloud"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, what):
    path = tmp_path / "digits.json"
    save(calibration(*traffic(np.random.default_rng(1), 500)), path)
    tree = msgspec.json.decode(path.read_bytes())
    damage(tree)
    path.write_bytes(msgspec.json.encode(tree))
    with pytest.raises(CalibrationError, match=what):
        load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{" * 10])
def test_what_is_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "digits.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is not a calibration"):
        load(path)


def test_missing_and_huge_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(tmp_path / "digits.json")
    (tmp_path / "digits.json").write_bytes(b" " * 100)
    monkeypatch.setattr(module, "MAX_BYTES", 99)
    with pytest.raises(CalibrationError, match="larger than"):
        load(tmp_path / "digits.json")
    mine = calibration(*traffic(np.random.default_rng(1), 500))
    with pytest.raises(CalibrationError, match="fewer inputs"):
        save(mine, tmp_path / "other.json")
    (tmp_path / "folder").write_text("")
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="cannot be written"):
        save(mine, tmp_path / "folder" / "other.json")
