"""The report of a run: one HTML file, made from metrics and artefacts alone. Nothing here needs torch."""
