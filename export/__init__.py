"""Artifacts: exporters, listed in table.py, and the runtime that loads them without the rest of the package."""
