"""What Ray's alpha RDT has under this name and others import; Ray's own tests do."""

from __future__ import annotations

from ray.experimental.rdt.tensor_transport_manager import TensorTransportMetadata

#: Transports with groups tell no more of an object than any other.
CollectiveTransportMetadata = TensorTransportMetadata
