"""Look at results in a browser, correct them, and let what was accepted improve the rest.

- :mod:`.cases`: the table of cases; what a request names is looked up there, and never a path;
- :mod:`.session`: one opened case, its draft, history and log;
- :mod:`.edits`, :mod:`.clicks`: what can be done to a structure, as functions on masks;
- :mod:`.cohort`: the run in the background;
- :mod:`.protocols`: the same cases for 3D Slicer, OHIF and napari;
- :mod:`.app`, :mod:`.guard`, :mod:`.start`: requests, who may send them, and the server.
"""
