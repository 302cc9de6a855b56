"""Geometry, labels and intensities of files, before they are used."""
