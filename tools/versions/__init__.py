"""The parts of tools/compare_versions.py."""
