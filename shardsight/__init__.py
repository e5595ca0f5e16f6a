"""Distributed batch vision on Ray."""
