"""Experiments that make README's tables; each runs as a script and as a slow test."""
