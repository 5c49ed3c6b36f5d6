"""Names of the samplers of Stable Cascade. Light."""

from __future__ import annotations

SAMPLERS = ("ddpm", "ddim", "lcm")
"""The first is what the models were made to be drawn with."""
