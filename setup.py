"""Installs `cobra` and `vision_scan`; everything else is in pyproject.toml."""

from setuptools import setup

setup()
