"""Colour profiles (ICC.1:2010), made by hand, and what their colours are in sRGB by the definitions alone."""

import struct

import numpy as np

# Columns of the matrices to XYZ under D50 (Bradford), from the primaries of IEC 61966-2-1 and of SMPTE EG 432-1.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = np.array([0.9642, 1.0, 0.8249])


def from_curve(value: np.ndarray) -> np.ndarray:
    """sRGB's values in [0, 1] as light."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_8_bits(xyz: np.ndarray) -> np.ndarray:
    """Light in XYZ under D50 as sRGB of 0 to 255, what lies outside clipped."""
    light = np.clip(np.linalg.inv(SRGB) @ xyz, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def lab_to_xyz(lab: tuple[float, float, float]) -> np.ndarray:
    """CIE 1976, under D50."""
    middle = (lab[0] + 16) / 116
    f = np.array([middle + lab[1] / 500, middle, middle - lab[2] / 200])
    return D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def matrix_profile(primaries: np.ndarray) -> bytes:
    """RGB with sRGB's curve."""
    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    red, green, blue = (_xyz(column) for column in primaries.T)
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    return _profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """Greys whose light is their value to the power of gamma."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256))})


def ink_profile(cyan: tuple[int, int, int], black: int = 0) -> bytes:
    """Four inks: cyan alone has these values of CIELAB, paper is white, every other mixture has the lightness black."""
    mixtures = [(black, 0, 0)] * 16
    mixtures[0b0000], mixtures[0b1000] = (100, 0, 0), cyan
    grid = bytes(value for L, a, b in mixtures for value in (round(L * 2.55), a + 128, b + 128))
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    as_is = bytes(range(256))
    table = head + as_is * 4 + grid + as_is * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table})


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _profile(space: bytes, between: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50)} | tags
    at = 128 + 4 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", at + len(content), len(tag))
        content += tag.ljust(-(-len(tag) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", at + len(content), b"none", 0x02400000, b"mntr", space, between)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp")
    return head.ljust(68, b"\0") + _fixed(*D50).ljust(60, b"\0") + table + content
