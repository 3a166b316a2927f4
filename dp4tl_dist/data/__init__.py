"""Datasets: the beton file, its order, its loader and its sources."""
