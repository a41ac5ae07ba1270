"""Run configuration: dataclasses hold types and defaults, configs/*.yaml what differs, the command line has the last word."""

from __future__ import annotations

from fp8train.arguments import parse_arguments

__all__ = ["parse_arguments"]
