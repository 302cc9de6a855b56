"""One annotated scan customizes a frozen segmentation foundation model to every other scan of its kind."""
