"""Comparing LoRAs: figures, verdict, report, picture."""
