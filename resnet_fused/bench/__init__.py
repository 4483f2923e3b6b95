"""Timing that can be trusted: interleaved variants, ratios with intervals, the machine's load."""
