"""The 32 bits of a watermark as 108 coded bits, and back from what was measured.

A CRC of 16 bits says whether what was read is what was written. The code is the convolutional code
of rate 1/2 and constraint length 7 with the generators 171 and 133 (octal), as in IEEE 802.11; it
is decoded by the Viterbi algorithm from soft values, so a bit that was measured badly counts less.
"""

from __future__ import annotations

import binascii

import numpy as np

PAYLOAD_BITS = 32
_CRC_BITS = 16
_MEMORY = 6  # bits of state; as many zeros end the message
_GENERATORS = (0o171, 0o133)
_STATES = 1 << _MEMORY
MESSAGE_BITS = PAYLOAD_BITS + _CRC_BITS
CODED_BITS = 2 * (MESSAGE_BITS + _MEMORY)


def encode_payload(payload: int) -> np.ndarray:
    """The coded bits of a payload, as signs.

    Args:
        payload: in [0, 2**32).

    Returns:
        float64 [CODED_BITS], each -1 or 1.

    Example:
        >>> encode_payload(0xC0FFEE).shape
        (108,)

    """
    message = (payload << _CRC_BITS) | _crc(payload)
    state = 0
    signs = []
    for position in range(MESSAGE_BITS - 1, -_MEMORY - 1, -1):
        bit = (message >> position) & 1 if position >= 0 else 0
        register = (bit << _MEMORY) | state
        for generator in _GENERATORS:
            parity = (register & generator).bit_count() & 1
            signs.append(1.0 if parity else -1.0)
        state = register >> 1
    return np.asarray(signs)


def decode_payload(soft: np.ndarray) -> int | None:
    """The most likely payload; None where its CRC does not fit.

    Noise passes the CRC once in 2**16 times.

    Args:
        soft: [CODED_BITS], positive for 1; the larger a value, the surer it is.

    """
    message = _viterbi(soft.reshape(-1, 2))
    payload = message >> _CRC_BITS
    fits = _crc(payload) == message & ((1 << _CRC_BITS) - 1)
    return payload if fits else None


def _crc(payload: int) -> int:
    """CRC-16 of CCITT, from a start that makes the payload 0 no codeword of zeros."""
    return binascii.crc_hqx(payload.to_bytes(4, "big"), 0xFFFF)


def _outputs() -> np.ndarray:
    """The signs that leave a register, float64 [2 * _STATES, 2]."""
    table = np.empty((2 * _STATES, 2))
    for register in range(2 * _STATES):
        for i, generator in enumerate(_GENERATORS):
            table[register, i] = 1.0 if (register & generator).bit_count() & 1 else -1.0
    return table


_OUTPUTS = _outputs()
_REGISTERS = np.arange(2 * _STATES).reshape(2, _STATES)  # [bit, state before]


def _viterbi(soft_N2: np.ndarray) -> int:
    """The message whose code correlates best with what was measured, without its last zeros."""
    scores = np.full(_STATES, -np.inf)
    scores[0] = 0.0
    chosen = []
    for pair in soft_N2:
        # A register's upper six bits are the next state. So registers 2 s and 2 s + 1 both lead to
        # the state s, and the better one stays.
        gained = scores[_REGISTERS % _STATES] + (_OUTPUTS @ pair)[_REGISTERS]
        arriving = gained.reshape(_STATES, 2)
        best = arriving.argmax(axis=1)
        chosen.append(best)
        scores = arriving[np.arange(_STATES), best]

    # The last zeros have led to the state 0.
    state = 0
    message = 0
    for position, best in enumerate(reversed(chosen)):
        register = 2 * state + int(best[state])
        bit = register >> _MEMORY
        message |= bit << position
        state = register % _STATES
    return message >> _MEMORY
