"""The options by topic, as mix-ins: what several scripts share is declared once."""
