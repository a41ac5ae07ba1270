"""Backends execute quantisers and GEMMs. The choice is made here, once; nothing else asks for the device."""

from fp8train.backends.selection import BACKENDS, get_backend, select_backend

__all__ = ["BACKENDS", "get_backend", "select_backend"]
