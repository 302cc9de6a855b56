"""Embedded pair of synthetic abdominal scans (two patients, MR contrast), and the whole job done on it.

The atlas has axes LAS and voxels of 1.8 x 1.8 x 4 mm; the query has axes LPS, tilted by 8 degrees, and voxels of
1.6 x 1.6 x 5 mm. The patients differ in size, pose, shape of each organ and contrast. Intensities are int16.
"""

from pathlib import Path

#: Folder of the embedded files.
PAIR = Path(__file__).parent / "data"
#: Their names: annotated scan with its labels, scan to segment with its true labels (for scoring only).
ATLAS, LABELS, QUERY, REFERENCE = "atlas.nii.gz", "atlas_labels.nii.gz", "query.nii.gz", "query_reference.nii.gz"
