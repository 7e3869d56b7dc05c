"""What RDT needs of a kind of device; one module each, found through ``registry``."""
