"""Bounds of the histograms that the API and the workers share."""

FIRST_OUTPUT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60)
