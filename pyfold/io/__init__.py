"""Files: safetensors by position (``safetensors``), a whole checkpoint as a source (``checkpoint``), a destination that appears
only when it is complete (``destination``)."""
