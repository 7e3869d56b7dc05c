"""Keywords that RDT adds to calls."""

#: The keyword under which a call of a generator carries its ``StreamSpec`` or ``DynamicSpec``.
STREAM_KEYWORD = "_ray_rdt_stream"
