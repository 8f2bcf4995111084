"""Files: safetensors by position (``safetensors``), files of torch.save by position (``pytorch``), JSON of strangers
(``strict_json``), a whole checkpoint as a source (``checkpoint``), a destination that appears only when it is complete
(``destination``)."""
