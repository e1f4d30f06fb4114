"""ML-KEM-768 encapsulation with chosen randomness (FIPS 203, algorithms 14, 17 and 20).

Libraries choose the randomness themselves, so none of them can write a reproducible test vector.
This one is slow, not constant-time, and for vectors only; it is checked against the published
known answers in `published/mlkem768.json`.
"""

from __future__ import annotations

import hashlib

Q = 3329
K = 3
DU, DV = 10, 4

Polynomial = list[int]


def _reversed_bits(index: int) -> int:
    return int(f"{index:07b}"[::-1], 2)


_ZETAS = [pow(17, _reversed_bits(index), Q) for index in range(128)]
_GAMMAS = [pow(17, 2 * _reversed_bits(index) + 1, Q) for index in range(128)]


def _ntt(f: Polynomial) -> Polynomial:
    f, index, length = list(f), 1, 128
    while length >= 2:
        for start in range(0, 256, 2 * length):
            zeta = _ZETAS[index]
            index += 1
            for j in range(start, start + length):
                t = zeta * f[j + length] % Q
                f[j + length] = (f[j] - t) % Q
                f[j] = (f[j] + t) % Q
        length //= 2
    return f


def _inverse_ntt(f: Polynomial) -> Polynomial:
    f, index, length = list(f), 127, 2
    while length <= 128:
        for start in range(0, 256, 2 * length):
            zeta = _ZETAS[index]
            index -= 1
            for j in range(start, start + length):
                t = f[j]
                f[j] = (t + f[j + length]) % Q
                f[j + length] = zeta * (f[j + length] - t) % Q
        length *= 2
    return [value * 3303 % Q for value in f]


def _multiply(f: Polynomial, g: Polynomial) -> Polynomial:
    product: Polynomial = []
    for i in range(128):
        a0, a1, b0, b1 = f[2 * i], f[2 * i + 1], g[2 * i], g[2 * i + 1]
        product += [(a0 * b0 + a1 * b1 * _GAMMAS[i]) % Q, (a0 * b1 + a1 * b0) % Q]
    return product


def _add(*polynomials: Polynomial) -> Polynomial:
    return [sum(values) % Q for values in zip(*polynomials, strict=True)]


def _encode(f: Polynomial, bits: int) -> bytes:
    number = sum(value << bits * index for index, value in enumerate(f))
    return number.to_bytes(32 * bits, "little")


def _decode(data: bytes, bits: int) -> Polynomial:
    number = int.from_bytes(data, "little")
    return [number >> bits * index & ((1 << bits) - 1) for index in range(256)]


def _compress(f: Polynomial, bits: int) -> Polynomial:
    return [((value << bits) * 2 + Q) // (2 * Q) % (1 << bits) for value in f]


def _sample_ntt(seed: bytes) -> Polynomial:
    stream, sampled = hashlib.shake_128(seed).digest(3 * 1024), []
    for i in range(0, len(stream), 3):
        b0, b1, b2 = stream[i : i + 3]
        sampled += [d for d in (b0 + 256 * (b1 % 16), b1 // 16 + 16 * b2) if d < Q]
        if len(sampled) >= 256:
            return sampled[:256]
    raise AssertionError("1024 draws gave less than 256 coefficients")


def _sample_cbd(seed: bytes, number: int) -> Polynomial:
    bits = _decode(hashlib.shake_256(seed + bytes([number])).digest(128), 4)
    return [
        ((b & 1) + (b >> 1 & 1) - (b >> 2 & 1) - (b >> 3 & 1)) % Q  # eta = 2
        for b in bits
    ]


def encapsulate(public_key: bytes, message: bytes) -> tuple[bytes, bytes]:
    """Shared secret (32 bytes) and ciphertext (1088 bytes) for 32 bytes of chosen randomness."""
    digest = hashlib.sha3_512(message + hashlib.sha3_256(public_key).digest()).digest()
    shared_secret, r = digest[:32], digest[32:]
    t = [_decode(public_key[384 * i : 384 * (i + 1)], 12) for i in range(K)]
    rho = public_key[384 * K :]
    y = [_ntt(_sample_cbd(r, i)) for i in range(K)]
    e1 = [_sample_cbd(r, K + i) for i in range(K)]
    e2 = _sample_cbd(r, 2 * K)
    ciphertext = b""
    for i in range(K):
        # Row i of the transposed matrix.
        row = [_multiply(_sample_ntt(rho + bytes([i, j])), y[j]) for j in range(K)]
        ciphertext += _encode(_compress(_add(_inverse_ntt(_add(*row)), e1[i]), DU), DU)
    product = _add(*(_multiply(t[i], y[i]) for i in range(K)))
    mu = [(Q + 1) // 2 * bit for bit in _decode(message, 1)]
    ciphertext += _encode(_compress(_add(_inverse_ntt(product), e2, mu), DV), DV)
    return shared_secret, ciphertext
