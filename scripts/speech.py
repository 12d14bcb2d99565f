"""Speech from eSpeak NG, through the library that the PyPI package espeakng-loader carries (no system package)."""

import ctypes
import functools

import espeakng_loader
import numpy as np

SAMPLING_RATE = 22_050  # what every eSpeak NG voice of this build speaks at, in hertz
_SYNCHRONOUS_RETRIEVAL = 2
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_chunks: list[np.ndarray] = []


@_CALLBACK
def _collect(samples, count, _events):
    if samples and count > 0:
        _chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
    return 0


@functools.cache
def _library():
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate != SAMPLING_RATE:
        raise RuntimeError(f"eSpeak NG did not start (it answered {rate})")
    library.espeak_SetSynthCallback(_collect)
    return library


def speak(text: str, voice: str = "en-us", rate: int = 175, pitch: int = 50) -> np.ndarray:
    """Speak a text: float32 samples in [-1, 1] at SAMPLING_RATE, its silence at both ends removed.

    rate is in words per minute, pitch from 0 to 100. Raises ValueError for a voice that eSpeak NG does not have.
    """
    library = _library()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice!r}")
    library.espeak_SetParameter(_RATE, rate, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    _chunks.clear()
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(_chunks).astype(np.float32) / 32_768 if _chunks else np.zeros(0, np.float32)
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples
