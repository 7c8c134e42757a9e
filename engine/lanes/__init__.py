"""Lanes: images on their way through a table, and the runner that moves them all one row on."""
