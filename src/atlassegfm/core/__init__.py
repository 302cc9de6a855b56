"""What everything stands on: errors, geometry, images, masks, labels, files."""
