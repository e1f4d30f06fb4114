from __future__ import annotations

from dataclasses import replace

import pytest

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure import kem
from nearfar.secure.identity import ServerIdentity
from nearfar.secure.keys import (
    CLOCK_TOLERANCE_S,
    MAX_LIFETIME_S,
    SUITE_XWING_AES256GCM,
    SUITE_XWING_CHACHA20POLY1305,
    SUPPORTED_SUITES,
    KeyConfiguration,
    KeyRing,
    preferred_suites,
    suites_for,
)
from tests.support.wire import IDENTITY, NOW_S

PIN = IDENTITY.pin
PUBLIC_KEY = kem.KemPrivateKey.generate().public_bytes
HOUR_S = 3600.0


def issue(lifetime_s: int = MAX_LIFETIME_S, not_before_s: int = int(NOW_S)) -> KeyConfiguration:
    return KeyConfiguration.issue(
        IDENTITY, PUBLIC_KEY, not_before_s=not_before_s, lifetime_s=lifetime_s
    )


def test_configuration_says_the_same_after_parsing_and_holds() -> None:
    issued = issue()
    parsed = KeyConfiguration.parse(issued.message)
    assert parsed == issued
    parsed.verify(PIN, now_s=NOW_S)
    assert len(issued.message) == 1 + 2 + 8 + 8 + 8 + 5 + 2 + 1216 + 32 + 32 + 64


@pytest.mark.parametrize(
    "region", ["type", "versions", "key id", "times", "suites", "key", "attestation", "end"]
)
def test_no_bit_can_be_changed(region: str) -> None:
    message = bytearray(issue().message)
    position = {
        "type": 0, "versions": 2, "key id": 5, "times": 20, "suites": 29, "key": 700,
        "attestation": -100, "end": -1,
    }[region]  # fmt: skip
    message[position] ^= 1
    with pytest.raises(SecurityError):
        KeyConfiguration.parse(bytes(message)).verify(PIN, now_s=NOW_S)


@pytest.mark.parametrize("cut", [0, 1, 2, 30, 1000, 1375])
def test_cut_configuration_is_not_one(cut: int) -> None:
    with pytest.raises(SecurityError, match="not a nearfar key configuration"):
        KeyConfiguration.parse(issue().message[:cut])


def test_longer_configuration_is_not_one() -> None:
    with pytest.raises(SecurityError, match="not a nearfar key configuration"):
        KeyConfiguration.parse(issue().message + b"\x00")


def test_wrong_pin_names_both_and_says_how_to_update_trust() -> None:
    other = ServerIdentity.generate().pin
    with pytest.raises(SecurityError) as caught:
        KeyConfiguration.parse(issue().message).verify(other, now_s=NOW_S)
    assert f"expected {other}" in caught.value.problem
    assert f"presented {PIN}" in caught.value.problem
    assert "put the new pin into `identity`" in caught.value.fix


def test_claiming_the_pinned_identity_without_its_key_is_noticed() -> None:
    impostor = ServerIdentity.generate()
    forged = bytearray(
        KeyConfiguration.issue(
            impostor, PUBLIC_KEY, not_before_s=int(NOW_S), lifetime_s=MAX_LIFETIME_S
        ).message
    )
    forged[-96:-64] = PIN.public_key
    with pytest.raises(SecurityError, match="not signed by the pinned identity"):
        KeyConfiguration.parse(bytes(forged)).verify(PIN, now_s=NOW_S)


def test_signature_over_other_data_of_the_identity_does_not_hold() -> None:
    message = issue().message
    body = message[:-64]
    relabelled = body + IDENTITY.sign(body)  # signed, but not for this purpose
    with pytest.raises(SecurityError, match="not signed"):
        KeyConfiguration.parse(relabelled).verify(PIN, now_s=NOW_S)


@pytest.mark.parametrize(
    ("now_s", "problem"),
    [
        (NOW_S - 1, "is not valid yet"),
        (NOW_S + MAX_LIFETIME_S, "has expired"),
        (0.0, "this machine's clock says 1970-01-01 00:00:00 UTC"),
        (1e18, "has expired"),
    ],
)
def test_configuration_outside_its_time_points_at_the_clocks(now_s: float, problem: str) -> None:
    with pytest.raises(SecurityError, match=problem) as caught:
        issue().verify(PIN, now_s=now_s)
    assert "clocks" in caught.value.fix


@pytest.mark.parametrize("lifetime_s", [0, MAX_LIFETIME_S + 1, 2**40])
def test_lifetimes_out_of_range_are_refused_even_when_signed(lifetime_s: int) -> None:
    with pytest.raises(SecurityError, match="not within 86400 s"):
        issue(lifetime_s).verify(PIN, now_s=NOW_S)


def test_clocks_may_be_five_minutes_late() -> None:
    current = KeyRing(IDENTITY, now_s=NOW_S).current(NOW_S)
    current.verify(PIN, now_s=NOW_S - CLOCK_TOLERANCE_S)
    with pytest.raises(SecurityError):
        current.verify(PIN, now_s=NOW_S - CLOCK_TOLERANCE_S - 1)


# Key ring


def test_ring_rotates_at_half_life_and_the_older_key_overlaps() -> None:
    ring = KeyRing(IDENTITY, lifetime_s=24 * 3600, now_s=NOW_S)
    first = ring.current(NOW_S)
    assert ring.current(NOW_S + 11 * HOUR_S) is first
    second = ring.current(NOW_S + 12 * HOUR_S)
    assert second.key_id != first.key_id
    assert ring.private_key(first.key_id, NOW_S + 12 * HOUR_S) is not None
    second.verify(PIN, now_s=NOW_S + 12 * HOUR_S)


def test_expired_private_keys_are_dropped() -> None:
    ring = KeyRing(IDENTITY, lifetime_s=24 * 3600, now_s=NOW_S)
    first = ring.current(NOW_S)
    assert ring.private_key(first.key_id, first.expires_s - 1) is not None
    assert ring.private_key(first.key_id, first.expires_s) is None
    assert len(ring) == 0
    # The clock cannot bring it back.
    assert ring.private_key(first.key_id, NOW_S) is None


def test_ring_never_holds_more_than_three_keys_over_a_week() -> None:
    ring = KeyRing(IDENTITY, lifetime_s=3600, now_s=NOW_S)
    for minutes in range(0, 7 * 24 * 60, 20):
        now_s = NOW_S + minutes * 60
        ring.current(now_s).verify(PIN, now_s=now_s)
        assert len(ring) <= 3


def test_ring_recovers_when_the_clock_was_set_back() -> None:
    ring = KeyRing(IDENTITY, now_s=NOW_S)
    earlier_s = NOW_S - 7 * 24 * HOUR_S
    ring.current(earlier_s).verify(PIN, now_s=earlier_s)


def test_ring_recovers_when_the_clock_jumped_ahead_and_came_back() -> None:
    ring = KeyRing(IDENTITY, now_s=NOW_S)
    first = ring.current(NOW_S)
    assert ring.private_key(first.key_id, NOW_S + 7 * 24 * HOUR_S) is None
    assert ring.private_key(ring.current(NOW_S).key_id, NOW_S) is not None


def test_unknown_key_ids_have_no_key() -> None:
    assert KeyRing(IDENTITY, now_s=NOW_S).private_key(bytes(8), NOW_S) is None


@pytest.mark.parametrize("lifetime_s", [0, 899, MAX_LIFETIME_S + 1])
def test_ring_lifetime_is_bounded(lifetime_s: int) -> None:
    with pytest.raises(ConfigError, match="Choose between 900 s and 86400 s"):
        KeyRing(IDENTITY, lifetime_s=lifetime_s, now_s=NOW_S)


def test_configurations_compare_by_what_they_say() -> None:
    issued = issue()
    assert replace(issued, expires_s=issued.expires_s + 1) != issued


@pytest.mark.parametrize(
    ("cpuinfo", "first"),
    [
        ("processor : 0\nflags\t\t: fpu aes avx\n", SUITE_XWING_AES256GCM),
        ("processor : 0\nflags\t\t: fpu avx\n", SUITE_XWING_CHACHA20POLY1305),
        ("Features\t: fp asimd aes pmull\n", SUITE_XWING_AES256GCM),
        ("Features\t: fp asimd crc32 aesthetic\n", SUITE_XWING_CHACHA20POLY1305),
        ("model name : something else\n", SUITE_XWING_AES256GCM),
        ("", SUITE_XWING_AES256GCM),
    ],
)
def test_machine_without_aes_instructions_prefers_chacha20(cpuinfo: str, first: int) -> None:
    suites = suites_for(cpuinfo)
    assert suites[0] == first
    assert sorted(suites) == sorted(SUPPORTED_SUITES)


def test_this_machine_prefers_one_of_the_supported_suites() -> None:
    assert sorted(preferred_suites()) == sorted(SUPPORTED_SUITES)
