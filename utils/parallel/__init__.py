"""Several processes for one run: who does what, and how they keep together."""
