"""Exporting networks, and loading what was exported."""
