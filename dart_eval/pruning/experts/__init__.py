"""Routed experts under a method."""
