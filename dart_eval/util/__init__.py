"""Utilities of all other folders: errors, files, texts."""
